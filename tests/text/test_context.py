"""Dialogs that outgrow the context."""

import pytest

from llama.text.context import oldest_turns_out, without


def message(role, content):
    return {"role": role, "content": content}


SYSTEM = message("system", "s" * 4)
DIALOG = [
    SYSTEM,
    message("user", "a" * 5), message("assistant", "b" * 5),
    message("user", "c" * 5), message("assistant", "d" * 5), message("tool", "e" * 5),
    message("user", "f" * 5),
]  # fmt: skip


def encode(dialog):  # a token per character
    return [ord(c) for m in dialog for c in m["content"]]


@pytest.mark.parametrize(
    "limit, left", [(34, ""), (33, "ab"), (24, "ab"), (23, "abcde"), (9, "abcde")]
)
def test_the_oldest_turns_go_and_the_system_message_stays(limit, left):
    for dialog in (DIALOG, DIALOG[1:]):
        room = limit - (0 if dialog is DIALOG else 4)
        ids, dropped = oldest_turns_out(dialog, encode, room)
        assert "".join(m["content"][0] for m in dropped) == left
        assert ids == encode([m for m in dialog if m not in dropped])
        assert len(dialog) == (7 if dialog is DIALOG else 6)  # itself unchanged


@pytest.mark.parametrize("at", range(1, len(DIALOG)))
def test_a_system_message_stays_wherever_it_is(at):
    late = message("system", "later")
    for begin in (0, 1):
        dialog = [*DIALOG[begin:at], late, *DIALOG[max(at, begin) :]]
        ids, dropped = oldest_turns_out(dialog, encode, 14)
        kept = [m for m in dialog if m["role"] == "system"] + DIALOG[-1:]
        assert dropped == DIALOG[1:-1] and without(dialog, dropped) == kept and ids == encode(kept)


def test_the_same_message_twice_is_dropped_once():
    dialog = [DIALOG[1], DIALOG[2], DIALOG[1]]
    ids, dropped = oldest_turns_out(dialog, encode, 5)
    assert (dropped, without(dialog, dropped), ids) == (dialog[:2], dialog[2:], encode(dialog[2:]))


def test_what_must_stay_and_does_not_fit_is_an_error():
    with pytest.raises(ValueError, match="take 9 tokens, and the limit is 8"):
        oldest_turns_out(DIALOG, encode, 8)


def test_a_long_chat_goes_on(tiny):
    dialog = [message("system", "Be kind."), message("user", "hello"), message("assistant", "hi")]
    dialog = [*dialog, message("user", "x" * 70), message("assistant", "y" * 20)]
    dialog += [message("user", "and?")]
    with pytest.raises(ValueError, match="prompt 0 has [0-9]+ tokens, and max_seq_len is 128"):
        tiny.chat_completion([dialog], max_gen_len=8)
    [answer] = tiny.chat_completion([dialog], 0, max_gen_len=8, truncate="oldest_turns")
    short = [dialog[0], *dialog[-1:]]
    assert answer["truncated"] == dialog[1:5]
    [expected] = tiny.chat_completion([short], 0, max_gen_len=8)
    assert answer["generation"] == expected["generation"] and "truncated" not in expected
    events = tiny.stream_chat([dialog], 0, max_gen_len=8, truncate="oldest_turns")
    assert "".join(event.text for event in events) == expected["generation"]["content"]
    found = [  # answers end where the context does, with truncate, too
        tiny.chat_completion([one], 0, max_gen_len=500, truncate=truncate)[0]["generation"]
        for one, truncate in ((short, None), (short, "oldest_turns"), (dialog, "oldest_turns"))
    ]
    assert found[0] == found[1] == found[2]
    with pytest.raises(ValueError, match="truncate='middle'"):
        tiny.chat_completion([dialog], truncate="middle")
