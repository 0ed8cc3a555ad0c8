"""Definitions of tools against transformers', calls against Meta's, and what is no call."""

import enum
import json
import random
import re
import time
from types import SimpleNamespace
from typing import Any, Dict, List, Literal, Optional, Union

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from llama_models.datatypes import StopReason
from llama_models.llama3.chat_format import ChatFormat as MetaChatFormat
from llama_models.llama3.tokenizer import Tokenizer as MetaTokenizer
from transformers.utils import get_json_schema

from llama import Event, Llama, parse_tool_calls, tool_schema
from llama.engine.events import collect
from llama.text.llama31 import Llama31Format, write_call
from llama.text.templates import TemplateFormat

# --- definitions ---------------------------------------------------------------------------------


class Unit(enum.Enum):
    CELSIUS = "c"
    KELVIN = "k"


def weather(city: str, days: int = 1):
    """The weather in a city.

    It is looked up at once, and
    costs nothing.

    Args:
        city: the city's name,
            in any language: Köln, or Cologne
        days: how many

    Returns:
        A text.
    """


def numbers(a: float, b: bool, c: list, d: dict, e: Any):
    """
    All simple types

    Args:
        a: one
        b: two
        c: three
        d: four
        e: five
    """


def nested(
    a: List[int], b: Dict[str, float], c: list[dict[str, list[str]]], d: list[Optional[int]]
):
    """Containers.

    Args:
        a: one
        b: two
        c: three
        d: four
    """


def unions(
    a: Optional[str],
    b: Union[int, str],
    c: int | float | None = None,
    d: Union[List[int], str] = "",
    e: Optional[Dict[str, int]] = None,
):
    """Unions.

    Args:
        a: one
        b: two
        c: three
        d: four
        e: five
    """


def choices(a: Literal["x", "y"], b: Literal[1, 2, None], c: Unit, d: Optional[Unit] = None):
    """Choices.

    Args:
        a: one
        b: two
        c: three
        d: four

    Raises:
        ValueError: never.
    """


def nothing():
    """Takes nothing."""


def one_section(a: str):
    """Only this.

    Args:
        a: the last line"""


class Shop:
    def price(self, item: str):
        """What it costs.

        Args:
            item: what
        """


FUNCTIONS = [weather, numbers, nested, unions, choices, nothing, one_section, Shop().price]


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_schemas_of_functions_are_those_of_transformers(function):
    assert tool_schema(function) == get_json_schema(function)


def test_bare_hints_of_typing_are_the_plain_types():
    def function(a: List, b: Dict):
        """Do something.

        Args:
            a: some
            b: others
        """

    found = tool_schema(function)["function"]["parameters"]["properties"]
    assert [found[key]["type"] for key in ("a", "b")] == ["array", "object"]
    assert all(set(schema) == {"type", "description"} for schema in found.values())
    assert tool_schema(tool_schema(function)) == tool_schema(function)
    assert tool_schema(tool_schema(function)["function"]) == tool_schema(function)


def test_types_in_the_docstring_and_return_hints_are_left_out():
    def add(a: int, b: int = 2) -> int:
        """a + b

        Args:
            a (int): one: the first
            b (int, optional): two
        """

    described = tool_schema(add)["function"]
    assert described["parameters"]["properties"]["a"]["description"] == "one: the first"
    assert described["parameters"]["properties"]["b"]["description"] == "two"
    assert described["parameters"]["required"] == ["a"] and "return" not in described


def undocumented(a: int):
    pass


def unhinted(a):
    """x

    Args:
        a: b
    """


def undescribed(a: int):
    """x"""


def starred(*a: int):
    """x

    Args:
        a: b
    """


def unsupported(a: bytes):
    """x

    Args:
        a: b
    """


def unresolved(a: "Nowhere"):  # noqa: F821
    """x

    Args:
        a: b
    """


WRONG = {
    "undocumented": (undocumented, "undocumented has no docstring"),
    "unhinted": (unhinted, "the parameter a of unhinted has no type hint"),
    "undescribed": (undescribed, "the docstring of undescribed doesn't describe a"),
    "starred": (starred, r"starred takes \*a"),
    "unsupported": (unsupported, "parameter a of unsupported has the type .*bytes.*write the JSON"),
    "unresolved": (unresolved, "hints of unresolved can't be resolved.*Nowhere"),
    "a number": (3, "a tool is a JSON schema or a Python function, not 3"),
    "no name": ({"description": "x"}, "a tool needs a name"),
    "an empty name": ({"name": ""}, "a tool needs a name"),
    "another type": ({"type": "file", "function": {"name": "x"}}, "a tool is {'type': 'function'"),
    "no object": ({"type": "function", "function": "x"}, "a tool is {'type': 'function'"),
    "a description": ({"name": "f", "description": 3}, "description of the tool 'f'"),
    "parameters": ({"name": "f", "parameters": []}, "parameters of the tool 'f'"),
    "not JSON": ({"name": "f", "parameters": {"x": {1}}}, "can't be written as JSON"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_no_tool_is_named(case):
    tool, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        tool_schema(tool)


@pytest.mark.parametrize(
    "tools, message",
    [
        (weather, "pass a list"),
        ({"name": "f"}, "pass a list"),
        ("brave_search", "pass a list"),
        (["google"], "no built-in tool 'google': those are brave_search"),
        ([weather, {"name": "weather"}], "two tools are named 'weather'"),
        (["photogen", {"name": "photogen"}], "two tools are named 'photogen'"),
    ],
)
def test_lists_of_tools_are_checked(tools, message):
    with pytest.raises(ValueError, match=message):
        parse_tool_calls("x", tools)


# --- calls ---------------------------------------------------------------------------------------

TOOLS = [{"name": "f"}, {"name": "g"}, weather]
F = {"name": "f", "arguments": {"a": 1}}
G = {"name": "g", "arguments": {"b": ["x", {"c": None}], "d": True}}
GJ = '{"b": ["x", {"c": null}], "d": true}'

CALLS = {
    '{"name": "f", "parameters": {"a": 1}}': [F],
    '{"name": "f", "arguments": {"a": 1}}': [F],
    ' \n{"type": "function", "name": "f", "parameters": {"a": 1}}\n': [F],
    '{"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}': [F],
    '{"type": "function", "function": {"name": "f", "arguments": "{\\"a\\": 1}"}}': [F],
    '{"name": "f", "parameters": {"a": 1}}\n{"name": "g", "parameters": %s}'.replace("%s", GJ): [
        F,
        G,
    ],
    '{"name": "f", "parameters": {"a": 1}}; {"name": "g", "parameters": %s};'.replace("%s", GJ): [
        F,
        G,
    ],
    '[{"name": "f", "arguments": {"a": 1}}, {"name": "g", "arguments": %s}]'.replace("%s", GJ): [
        F,
        G,
    ],
    '<|python_tag|>{"name": "f", "parameters": {"a": 1}}': [F],
    '<function=f>{"a": 1}</function>': [F],
    '<function=f>{"a": 1}': [F],
    '<function=f>{"a": 1}</function>\n<function=g> %s </function>'.replace("%s", GJ): [F, G],
    "[f(a=1)]": [F],
    "[f(a=1), g(b=['x', {'c': None}], d=True)]": [F, G],
    '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>': [F],
    '<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>\n<tool_call>\n'
    '{"name": "g", "arguments": %s}\n</tool_call>'.replace("%s", GJ): [F, G],
    '[TOOL_CALLS] [{"name": "f", "arguments": {"a": 1}}, {"name": "g", "arguments": %s}]'.replace(
        "%s", GJ
    ): [
        F,
        G,
    ],
    '[TOOL_CALLS][{"name": "f", "arguments": {"a": 1}, "id": "123456789"}]': [
        {**F, "id": "123456789"}
    ],
    '<|tool_call|>[{"name": "f", "arguments": {"a": 1}}, {"name": "g", "arguments": %s}]'.replace(
        "%s", GJ
    ): [
        F,
        G,
    ],
    '<|tool_call|> {"name": "f", "arguments": {"a": 1}}': [F],
    '<tool_call>[{"name": "f", "arguments": {"a": 1}}]': [F],
    '<tool_call>[{"name": "f", "arguments": {"a": 1}}]\n</tool_call>': [F],
    'brave_search.call(query="who? (me)")': [
        {"name": "brave_search", "arguments": {"query": "who? (me)"}}
    ],
    '<|python_tag|>wolfram_alpha.call(query="1 + "2"")': [
        {"name": "wolfram_alpha", "arguments": {"query": '1 + "2"'}}
    ],
    '<|python_tag|>import os\nprint("<tool_call>")\n': [
        {
            "name": "code_interpreter",
            "arguments": {"code": 'import os\nprint("<tool_call>")\n'},
        }
    ],
    "<|python_tag|>[h(a=1)]": [{"name": "code_interpreter", "arguments": {"code": "[h(a=1)]"}}],
    '<tool_call>{"name": "f", "arguments": {"a": "</tool_call> {\\"}"}}</tool_call>': [
        {"name": "f", "arguments": {"a": '</tool_call> {"}'}}
    ],
}


@pytest.mark.parametrize("text", CALLS)
def test_the_usual_spellings_are_read(text):
    assert parse_tool_calls(text, TOOLS) == ("", CALLS[text], None)


def test_text_around_tagged_calls_is_the_content():
    text = 'I look.\n<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call> Wait.'
    assert parse_tool_calls(text, TOOLS) == ("I look.\n Wait.", [F], None)
    text = 'Well: <function=f>{"a": 1}</function>'
    assert parse_tool_calls(text, TOOLS) == ("Well:", [F], None)


@pytest.mark.parametrize(
    "reasoning", ["<think>\nWhy [f(a=2)]? {x}\n</think>", "Why?\n</think>", "</think>"]
)
@pytest.mark.parametrize("text", CALLS)
def test_calls_after_reasoning_are_read(reasoning, text):
    assert parse_tool_calls(f"{reasoning}\n\n{text}", TOOLS) == (reasoning, CALLS[text], None)


def test_calls_of_strict_tools_after_reasoning_have_tags():
    """Others would get round their schemas: see `strict_format`."""
    tools = [{"type": "function", "function": {"name": "f", "strict": True}}]
    for thought in ("<think>Why?</think>", "Why?</think>"):
        text = f'{thought} {{"name": "f", "parameters": {{"a": 1}}}}'
        assert parse_tool_calls(text, tools) == (text, [], None)
        text = f'{thought}<tool_call>{{"name": "f", "arguments": {{"a": 1}}}}</tool_call>'
        assert parse_tool_calls(text, tools) == (thought, [F], None)


def test_calls_within_reasoning_are_none():
    thought = '<think>\n<tool_call>{"name": "g", "arguments": {}}</tool_call> or <tool_call>?'
    text = f'{thought}</think> <function=f>{{"a": 1}}</function>'
    assert parse_tool_calls(text, TOOLS) == (f"{thought}</think>", [F], None)
    assert parse_tool_calls(thought, TOOLS) == (thought, [], None)  # cut off


MALFORMED = {
    '{"name": "f", "parameters": {"a": 1}': "the call isn't JSON: .*char",
    '{"name": "f", "parameters": {"a": NaN}}': "arguments for 'f'.*can't be written as JSON",
    '{"name": "f", "parameters": {"a": 1e999}}': "arguments for 'f'.*can't be written as JSON",
    '{"name": "f", "parameters": [1]}': "arguments for 'f': they are a dict",
    '{"name": "f", "parameters": "x"}': "arguments for 'f': Expecting",
    '{"name": "f"}': "arguments for 'f': they are a dict",
    '{"name": "h", "parameters": {}}': "no tool 'h'; those given: f, g, weather",
    '{"name": "f", "parameters": {}} {"x": 1}': "a call is ",
    '{"name": "f", "parameters": {}}, or not': "isn't JSON",
    "<function=f>(a=1)</function>": "after <function=f> comes no JSON",
    '<function=f>{"a": 1}</f>': "isn't closed by </function>",
    "<function=h>{}</function>": "no tool 'h'",
    "<tool_call>f(1)</tool_call>": "after <tool_call> comes no JSON",
    '<tool_call>{"name": "f"}': "they are a dict",
    '<tool_call>{"name": "f", "arguments": {}} and': "isn't closed by </tool_call>",
    "<tool_call>[1]</tool_call>": "a call is ",
    "[TOOL_CALLS] f": "comes no JSON",
    "[f(1)]": "list of calls can't be read: every element",
    "[f(a=1), 2]": "list of calls can't be read: every element",
    "[f(a=1": "list of calls can't be read",
    "[f(a=open('x'))]": "list of calls can't be read: malformed",
    "[f(**{'a': 1})]": "isn't an argument",
    "[f(a=b'x')]": "can't be written as JSON",
    "[f(a=1j)]": "can't be written as JSON",
    "[h(a=1)]": "no tool 'h'",
    "brave_search.call(query=1)": "a call of a built-in tool is",
    'brave_search.call(query="x") brave_search.call(query="y")': "a call of a built-in tool is",
    'google.call(query="x")': "no tool 'google'",
    '<|python_tag|>{"name": "f", "parameters": {': "isn't JSON",
}


@pytest.mark.parametrize("text", MALFORMED)
def test_malformed_calls_stay_text_and_say_why(text):
    content, calls, error = parse_tool_calls(text, TOOLS)
    assert (content, calls) == (text, [])
    assert re.search(MALFORMED[text], error), error


@pytest.mark.parametrize(
    "text",
    [
        "", " ", "Hello.", '{"answer": 42}', '{"name": "Bob", "age": 3}', "[1, 2]", "[]", "{}", "{",
        "[a(b) is text", "[see f(x)]", '"f"', "f(a=1)", "Call f!",
        'say brave_search.call(query="x")', "```json\n{}\n```", "[x for x in y]", "<b>bold</b>",
        "function=f", '{"parameters": 1}', "null",
    ],
)  # fmt: skip
def test_other_text_is_left_alone(text):
    assert parse_tool_calls(text, TOOLS) == (text, [], None)


def test_one_malformed_call_keeps_all_in_the_text():
    text = '<tool_call>{"name": "f", "arguments": {}}</tool_call><tool_call>{</tool_call>'
    content, calls, error = parse_tool_calls(text, TOOLS)
    assert (content, calls) == (text, []) and error


def single_calls(seed: int, n: int) -> List[dict]:
    rng = random.Random(seed)
    texts = ["Paris", "a b", "é 你好", "x=1, y", "3.5", "", "[z]", "line\nbreak", "50%"]
    simple = [*texts, 1, -2, 3.5, True, False, None]
    found: List[dict] = []
    for _ in range(n):
        name = rng.choice(
            ["f", "g", "weather", "brave_search", "wolfram_alpha", "photogen", "code"]
        )
        if name == "code":
            call = {
                "name": "code_interpreter",
                "arguments": {"code": f"x = {rng.choice(simple)!r}"},
            }
        elif name in ("f", "g", "weather"):
            arguments = {k: rng.choice(simple) for k in rng.sample("abcd", rng.randrange(4))}
            call = {"name": name, "arguments": arguments}
        else:
            call = {"name": name, "arguments": {"query": rng.choice(texts)}}
        found.append(call)
    return found


@pytest.mark.parametrize("call_format", ["json", "function_tag", "python_list"])
def test_single_calls_are_read_as_meta_reads_them(llama3_tokenizer_path, call_format):
    """Except where Meta's parser goes wrong: it turns ' into " before it reads a tag's JSON, ends
    that at the first }, and wants a line break in a Python text escaped that its own writer
    doesn't escape. No call here has those."""
    meta = MetaChatFormat(MetaTokenizer(llama3_tokenizer_path))
    compared = 0
    for call in single_calls(1, 200):
        text = write_call(call, call_format)
        if call["name"] == "code_interpreter":
            text = "<|python_tag|>" + text
        elif (
            call_format == "python_list" and "\n" in text and call["name"] in ("f", "g", "weather")
        ):
            continue
        message = meta.decode_assistant_message_from_content(text, StopReason.end_of_turn)
        [theirs] = message.tool_calls
        name = getattr(theirs.tool_name, "value", theirs.tool_name)
        assert parse_tool_calls(text, TOOLS) == (
            message.content,
            [{"name": name, "arguments": theirs.arguments}],
            None,
        )
        assert {"name": name, "arguments": theirs.arguments} == call
        compared += 1
    assert compared >= 150


def test_quotes_and_braces_that_metas_parser_trips_over_are_read():
    arguments = {"a": "it's {\"x\": '}'}", "b": {"c": {"d": "</function>"}}}
    for call_format in ("json", "function_tag"):
        text = write_call({"name": "f", "arguments": arguments}, call_format)
        assert parse_tool_calls(text, TOOLS).calls == [{"name": "f", "arguments": arguments}]


PIECES = [
    '{"name": "f", "parameters": {"a": 1}}', '{"name": "f", "arguments": ', "<function=f>", "{",
    "}", "</function>", "<tool_call>", "</tool_call>", "<|tool_call|>", "[TOOL_CALLS]", "[", "]",
    "[f(a=", ")", "(",
    "f", 'brave_search.call(query="', '")', "<|python_tag|>", ";", "\n", " ", '"', "'", "\\",
    "\x00", ",", "-", "1e999", "NaN", "lambda: 0", "**x", "f'{1}'",
    "\ud800", "0x", "=", ":", "1" * 5000,
    "...", "<think>", "</think>",
]  # fmt: skip


@settings(max_examples=400)
@given(st.lists(st.sampled_from(PIECES) | st.text(max_size=4), max_size=12).map("".join))
@example("[f(a=" + "9" * 5000 + ")]")
@example('{"name": "f", "parameters": {"a": ' + "9" * 5000 + "}}")
@example("[f(a='\\d')]")
def test_no_text_raises(text):
    content, calls, error = parse_tool_calls(text, TOOLS)
    assert not (calls and error) and (calls or content == text)
    for call in calls:
        assert set(call) >= {"name", "arguments"}
        json.dumps(call["arguments"], allow_nan=False)


LONG = 200_000


@pytest.mark.parametrize(
    "text",
    [
        "<function=" * LONG, "<function=f>" * LONG, "<tool_call>" * LONG, "[TOOL_CALLS]" * LONG,
        "<tool_call>" + " " * LONG, "<tool_call>{" * LONG, "{" * LONG, "[" * LONG, '{"a":' * LONG,
        '{"name": "f", "parameters": ' + "[" * LONG, '{"name": "f", "arguments": ' * 9999,
        "[f(a=" * LONG, "[f(a=" + "[" * LONG, "[f(a=" + "-" * LONG + "1)]", "[f(a=" + "1+" * LONG,
        "[f(a=" + "not " * LONG + "1)]", "[f(a=x" + ".x" * LONG + ")]", "[ " * LONG, "\n" * LONG,
        "[f(a=" + "x(" * 5000, "[f(a=1)," * 9999, "[f(" + "a=1," * 9999 + ")]", "[" + " " * LONG,
        'brave_search.call(query="' * LONG, "x" * LONG + ".call(query=", "; " * LONG, "[a" * LONG,
        "<|python_tag|>" + "[f(a=" * LONG, "<|python_tag|>" * LONG, "[f(a='" + "\\" * LONG + "')]",
        '{"name": "f", "parameters": {}};' * 9999, '<function=f>{"a": 1}</function>' * 9999,
        "</think>" * LONG, '</think>{"a":' * LONG, "<think>" + "</thin" * LONG,
    ],
    ids=lambda text: text[:24],
)  # fmt: skip
def test_long_texts_neither_raise_nor_take_long(text):
    """Were anything quadratic in the length, these would take minutes of CPU time."""
    start = time.process_time()
    content, calls, _ = parse_tool_calls(text, TOOLS)
    assert calls or content == text
    assert time.process_time() - start < 60


# --- a model that calls --------------------------------------------------------------------------


class Says:
    """A Llama whose model is replaced by given replies."""

    def __new__(cls, llama, formatter, *replies):
        one = Llama(llama.model, llama.tokenizer, formatter)

        def run(request):
            said = zip(request.rows, replies, strict=False)
            return iter([Event(row.index, 0, None, r, finish_reason="stop") for row, r in said])

        def make(ids, *_, **__):
            row = {"sample": 0, "prompt": [], "echo": False}
            rows = [SimpleNamespace(index=i, **row) for i in range(len(ids))]
            return SimpleNamespace(rows=rows, logprobs=False, top_logprobs=0)

        def collected(request):
            return collect(run(request), request)

        one._calls = SimpleNamespace(make=make, run=run, collect=collected)
        return one


ASKED = [{"role": "user", "content": "x"}]


def test_replies_with_calls_come_apart_and_go_back_into_a_dialog(tiny):
    replies = [
        '{"name": "f", "parameters": {"a": 1}}',
        "Hello.",
        '{"name": "h", "parameters": {}}',
        'brave_search.call(query="x")',
    ]
    formatter = Llama31Format(tiny.tokenizer)
    llama = Says(tiny, formatter, *replies)
    answers = llama.chat_completion([ASKED] * 4, tools=["brave_search", *TOOLS])
    assert [answer["generation"] for answer in answers] == [
        {"role": "assistant", "content": "", "tool_calls": [F]},
        {"role": "assistant", "content": "Hello."},
        {"role": "assistant", "content": replies[2]},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"name": "brave_search", "arguments": {"query": "x"}}],
            "end_of_message": True,
        },
    ]
    errors = [answer.get("tool_call_error") for answer in answers]
    assert errors[:2] + errors[3:] == [None] * 3 and "no tool 'h'" in errors[2]
    for answer in answers:
        dialog = [*ASKED, answer["generation"], {"role": "tool", "content": "y"}]
        llama.chat_completion([dialog], tools=["brave_search", *TOOLS])


def test_a_stream_says_the_calls_of_each_row(tiny):
    replies = ['<tool_call>{"name": "f", "arguments": {"a": 1}}', "Hello.", "{"]
    llama = Says(tiny, Llama31Format(tiny.tokenizer), *replies)
    events = [*llama.stream_chat([ASKED] * 3, tools=TOOLS)]
    assert [event.text for event in events] == replies
    [first, *rest] = events[0].deltas
    assert (first.index, first.name, first.text) == (0, "f", "") and first.id
    assert "".join(delta.arguments for delta in rest) == '{"a": 1}'
    assert [[delta.text for delta in event.deltas] for event in events[1:]] == [["Hello."], ["{"]]
    [event, *_] = llama.stream_chat([ASKED])
    assert event.deltas is None


def test_without_tools_a_reply_is_text(tiny):
    reply = '{"name": "f", "parameters": {"a": 1}}'
    for tools in ({}, {"tools": None}, {"tools": []}):
        [answer] = Says(tiny, None, reply).chat_completion([ASKED], **tools)
        assert answer == {
            "generation": {"role": "assistant", "content": reply},
            "finish_reason": "stop",
        }


def test_tools_reach_the_template(tiny):
    template = "{{ tools | tojson }}<|eot_id|>"
    ours = TemplateFormat(tiny.tokenizer, template)
    text = tiny.tokenizer.decode(ours.encode_dialog_prompt(ASKED, TOOLS))
    assert (
        text == json.dumps([tool_schema(tool) for tool in TOOLS], ensure_ascii=False) + "<|eot_id|>"
    )
