"""Stop strings: where a text is cut doesn't depend on how it came."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama.engine.stopping import StopStrings


def cut(text: str, stops) -> str:
    """The text up to the stop that ends first; of those that end together, the longest."""
    ends = [(text.find(s) + len(s), -len(s)) for s in stops if s in text]
    if not ends:
        return text
    end, length = min(ends)
    return text[: end + length]


def stream(pieces, stops):
    stopper = StopStrings(stops)
    shown = [stopper.feed(piece) for piece in pieces]
    return [*shown, stopper.finish()], stopper.stopped


def test_a_thousand_texts_and_stop_sets():
    """The stream adds up to the cut text, and none of it is ever a part of the stop."""
    rng = random.Random(0)
    stopped = 0
    for _ in range(1000):
        letters = "ab\né"[: rng.randint(2, 4)]
        text = "".join(rng.choices(letters, k=rng.randint(0, 40)))
        stops = [
            "".join(rng.choices(letters, k=rng.randint(1, 5))) for _ in range(rng.randint(0, 4))
        ]
        pieces, at = [], 0
        while at < len(text):
            size = rng.randint(0, 4)
            pieces.append(text[at : at + size])
            at += size
        shown, found = stream(pieces, stops)
        expected = cut(text, stops)
        assert "".join(shown) == expected
        assert found == (expected != text or any(text.endswith(s) for s in stops))
        for i in range(len(shown)):  # what was shown so far is never more than what stays
            assert expected.startswith("".join(shown[: i + 1]))
        stopped += found
    assert 300 < stopped < 950


@settings(max_examples=300)
@given(
    pieces=st.lists(st.text(alphabet="ab<|>", max_size=4), max_size=12),
    stops=st.lists(st.text(alphabet="ab<|>", min_size=1, max_size=4), max_size=3),
)
def test_any_pieces(pieces, stops):
    assert "".join(stream(pieces, stops)[0]) == cut("".join(pieces), stops)


def test_what_cannot_become_a_stop_is_shown_at_once():
    stopper = StopStrings(["\nUser:"])
    assert stopper.feed("Hello") == "Hello"
    assert stopper.feed(" you\nUs") == " you"
    assert stopper.feed("ual") == "\nUsual"
    assert stopper.feed("\nUser: hi") == "" and stopper.stopped
    assert stopper.feed("more") == "" and stopper.finish() == ""


@pytest.mark.parametrize("wrong", ["text", [""], [1], ["a", ""]], ids=repr)
def test_stops_are_a_list_of_texts(wrong):
    with pytest.raises(ValueError, match="stop="):
        StopStrings(wrong)
