"""Calls read while they come are those of the whole reply, however it is cut into pieces."""

import itertools
import json
import random
from typing import List, Tuple

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_tools import CALLS, MALFORMED, PIECES, TOOLS

from llama import parse_tool_calls
from llama.text.tool_stream import Delta, ToolCallStream
from llama.text.tools import BUILTINS


def streamed(pieces: List[str]) -> Tuple[ToolCallStream, List[Delta]]:
    stream = ToolCallStream(TOOLS)
    deltas = [delta for piece in pieces for delta in stream.feed(piece)]
    return stream, deltas + stream.finish()


def joined(deltas: List[Delta]) -> Tuple[str, List[dict]]:
    """The text and the calls that deltas say, which are checked to be well formed."""
    calls: List[dict] = []
    for delta in deltas:
        assert delta != Delta()
        if delta.index is None:
            assert delta == Delta(delta.text)
        elif delta.index == len(calls):  # a call begins: indices ascend
            assert delta.id and delta.name and not delta.text
            calls.append({"id": delta.id, "name": delta.name, "arguments": delta.arguments})
        else:
            assert delta.index == len(calls) - 1 and delta == Delta(
                index=delta.index, arguments=delta.arguments
            )
            calls[-1]["arguments"] += delta.arguments
    assert len({call["id"] for call in calls}) == len(calls)
    return "".join(delta.text for delta in deltas), calls


def cut(text: str, places: List[int]) -> List[str]:
    bounds = [0, *sorted({place % (len(text) + 1) for place in places}), len(text)]
    return [text[a:b] for a, b in itertools.pairwise(bounds)]


def check(pieces: List[str]) -> None:
    text = "".join(pieces)
    whole = parse_tool_calls(text, TOOLS)
    stream, deltas = streamed(pieces)
    content, calls = joined(deltas)
    assert bool(stream.error) == bool(whole.error)
    if whole.error:
        assert whole[:2] == (text, [])
        assert calls or content == text
        return
    assert content == whole.content and stream.calls == whole.calls
    assert [(call["name"], json.loads(call["arguments"])) for call in calls] == [
        (call["name"], call["arguments"]) for call in whole.calls
    ]


OTHERS = [
    "Hello.", "\n a [b] <c>\n", "{", '{"a": 1}', "<think> <tool_call> </think>\n [f(a=1)]",
    'Hm.\n</think> {"name": "f", "arguments": {"a": 1}}', "<thin", "</think></think>{}",
]  # fmt: skip


@pytest.mark.parametrize("text", [*CALLS, *MALFORMED, *OTHERS])
def test_however_a_reply_is_cut_it_is_read_alike(text):
    check([*text])
    check([text])
    for place in range(len(text)):
        check([text[:place], text[place:]])


PARTS = [
    *CALLS, *PIECES[:-2], "Look: ", " and\n", '{"x": 1}', '"id": "x1", ', '"name": "g"', "[1, 2]",
    "<think>", "</think>", '"arguments": {"q": "a\\"}"}', ', "parameters": {"a": 2}}',
]  # fmt: skip


@settings(max_examples=500)
@given(
    st.lists(st.sampled_from(PARTS) | st.text(max_size=3), min_size=1, max_size=5).map("".join),
    st.lists(st.integers(0, 10_000), max_size=12),
    st.integers(0, 10_000),
    st.sampled_from(["", "}", '"', "x", ",", "\\"]),
)
@example('{"name": "f", "arguments": {"a": 1}, "arguments": {"a": 2}}', [], 0, "")
@example('{"name": "f", "arguments": {"a": 1}, "parameters": {"a": 2}}', [], 0, "")
@example('{"name": "f", "arguments": {}, "name": "g"}', [], 0, "")
def test_any_text_in_any_pieces_is_read_alike(text, places, at, typo):
    at %= len(text) + 1
    for one in (text, text[:at] + typo + text[at + 1 :]):
        check(cut(one, places))


def pieces_of(text: str) -> List[List[Delta]]:
    stream = ToolCallStream(TOOLS)
    return [stream.feed(char) for char in text] + [stream.finish()]


def test_text_is_handed_on_at_once():
    assert [delta.text for deltas in pieces_of("Hello, you!") for delta in deltas] == [
        "H", "e", "l", "l", "o", ",", " y", "o", "u", "!",
    ]  # fmt: skip
    found = pieces_of("a <b> [c] <tool_call>")
    assert [delta.text for deltas in found[:10] for delta in deltas] == [
        "a",
        " <b",
        ">",
        " [c",
        "]",
    ]
    assert joined(found[-1])[0] == " <tool_call>"  # nothing came of it


def test_white_space_waits_for_what_follows():
    stream = ToolCallStream(TOOLS)
    assert stream.feed("Well:\n\n") == [Delta("Well:")]
    assert stream.feed("<function=f>{}</function>\n")[0][1:4:2] == (0, "f")
    assert stream.feed("Done.\n") == [Delta("\n\n\nDone.")] and stream.finish() == []


@pytest.mark.parametrize(
    "before, after",
    [
        ('{"name": "f", "parameters": ', "}"),
        ('{"type": "function", "function": {"name": "f", "arguments": ', "}}"),
        ("<function=f>", "</function>"),
        ('<tool_call>{"name": "f", "arguments": ', "}</tool_call>"),
        ('[TOOL_CALLS] [{"name": "f", "arguments": ', "}]"),
        ('<|python_tag|>{"name": "f", "arguments": ', "}"),
    ],
)
def test_arguments_come_as_they_are_written(before, after):
    arguments = '{"a": "two \\"words\\"", "b": [1, {"c": 2}]}'
    stream, said = ToolCallStream(TOOLS, make_id=lambda: "id1"), ""
    assert [delta for char in before for delta in stream.feed(char)] == []
    assert stream.feed("{") == []  # what follows tells whether this is JSON
    for i, char in enumerate(arguments[1:], 2):
        for delta in stream.feed(char):
            first = delta.index == 0 and not said and not delta.arguments
            assert (delta.id, delta.name) == (("id1", "f") if first else ("", ""))
            said += delta.arguments
        assert arguments[:i].startswith(said) and len(said) >= i - 1
    assert said == arguments
    assert [delta for char in after for delta in stream.feed(char)] + stream.finish() == []
    assert stream.calls == [{"name": "f", "arguments": json.loads(arguments)}] and not stream.error


def test_code_comes_as_it_is_written():
    code = 'x = "é\n"\n  # {"name": "f"}  '
    stream, said = ToolCallStream(()), ""
    stream.feed("<|python_tag|>")
    for char in code:
        deltas = stream.feed(char)
        assert char == " " or deltas
        said += "".join(delta.arguments for delta in deltas)
    said += "".join(delta.arguments for delta in stream.finish())
    assert json.loads(said) == {"code": code.rstrip(" ")}


def test_an_id_before_the_arguments_is_the_calls_own():
    call = '{"id": "abc", "type": "function", "function": {"name": "f", "arguments": {}}}'
    [first, *_] = ToolCallStream(TOOLS).feed(call)
    assert first.id == "abc"
    late = '[TOOL_CALLS][{"name": "f", "arguments": {}, "id": "abc"}]'
    stream = ToolCallStream(TOOLS, make_id=lambda: "made")
    assert stream.feed(late)[0].id == "made" and stream.calls[0]["id"] == "abc"


@pytest.mark.parametrize(
    "begun, rest",
    [
        ('{"name": "f", "arguments": {"a": 1}}', ", or not"),
        ('<tool_call>{"name": "f", "arguments": {"a": 1}}', " and"),
        ('<tool_call>{"name": "f", "arguments": {"a": 1}', ", oops}"),
        ('<function=f>{"a": 1}</function>', '<function=h>{"a": 1}</function>'),
    ],
)
def test_a_call_that_goes_wrong_after_it_began_leaves_the_rest_as_text(begun, rest):
    stream, deltas = streamed([*begun, *rest])
    text, calls = joined(deltas)
    assert (stream.error and text == rest.strip()) or text == rest
    assert [(call["name"], call["arguments"]) for call in calls] == [("f", '{"a": 1}')]


def test_long_replies_in_pieces():
    """Each piece is looked at once; otherwise this would take minutes."""
    rng = random.Random(3)
    texts = ['{"a":"' + "x" * 100_000 + '"}', '{"a":' + "[1," * 30_000 + "1" + "]" * 30_000 + "}"]
    for text in [*texts, "x " * 50_000, " " * 50_000 + "x", "<|python_tag|>" + "x = 1\n" * 9_000]:
        for one in (text, '<tool_call>{"name": "f", "arguments": ' + text):
            cuts = cut(one, [rng.randrange(len(one)) for _ in range(20_000)])
            content, calls = joined(streamed(cuts)[1])
            assert content or calls


@pytest.mark.parametrize(
    "text, name",
    [
        ('brave_search.call(query="llamas")', "brave_search"),
        ("<|python_tag|>print(2**100)", "code_interpreter"),
        ("<|python_start|>print(1)", "code_interpreter"),
        ('<tool_call>{"name": "code_interpreter", "arguments": {"code": "1"}}</tool_call>',
         "code_interpreter"),
        ('{"name": "photogen", "parameters": {"query": "a"}}', "photogen"),
    ],
)  # fmt: skip
def test_built_in_tools_may_have_to_be_declared(text, name):
    def read(tools, builtins):
        stream = ToolCallStream(tools, builtins=builtins)
        deltas = [delta for char in text for delta in stream.feed(char)]
        return joined(deltas + stream.finish()), [call["name"] for call in stream.calls]

    assert read(TOOLS, ()) == ((text, []), [])
    declared = {"type": "function", "function": {"name": name}}
    for tools, builtins in ((TOOLS, BUILTINS), ([declared], ())):
        assert read(tools, builtins)[1] == [name]
