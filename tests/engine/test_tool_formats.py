"""Replies that "strict" tools allow while the model decides whether to call one."""

import json

import pytest
import torch
from conftest import with_user_defined

from llama import Tokenizer
from llama.engine.structured import GrammarCompiler
from llama.engine.tool_formats import call_format, call_or_format, strict_format
from llama.text.tool_stream import parse_tool_calls

ZONES = {"zone": {"enum": ["utc", "cet"]}}
CLOCK = {
    "type": "function",
    "function": {
        "name": "clock", "strict": True,
        "parameters": {"type": "object", "properties": ZONES, "required": ["zone"]},
    },
}  # fmt: skip
NOTE = {"type": "function", "function": {"name": "note", "parameters": {"required": ["text"]}}}
TOOLS = [CLOCK, NOTE]
BAD = '{"name": "clock", "parameters": {"zone": "pst"}}'
CET = '{"name": "clock", "%s": {"zone": "cet"}}'


@pytest.fixture(scope="module")
def compiler(smollm2_path) -> GrammarCompiler:
    tokenizer = Tokenizer(str(smollm2_path))
    return GrammarCompiler(tokenizer, tokenizer.n_words)


def takes(compiler: GrammarCompiler, text: str, form: dict | None = None) -> bool:
    stop = min(compiler.tokenizer.stop_tokens)
    constraint = compiler.constraint(form or strict_format(TOOLS), {stop})
    ids = [*compiler.tokenizer.encode(text, bos=False, eos=False), stop]
    return constraint.valid(ids) == len(ids)


@pytest.mark.parametrize(
    "text",
    [
        "", "It is noon.", "  \n{ braces } and [brackets] and <tags>", '{"hours": 12}', "[1, 2]",
        '[{"hour": 1}]', "{}", "a < b", '{"', "ends with <tool_cal",
        'Text before, {"name": "clock"} within.',
        CET % "parameters", f"[{CET % 'parameters'}, {CET % 'parameters'}]",
        '{"name": "note", "parameters": {"anything": [1, {"a": null}]}}',
        f"<tool_call>\n{CET % 'arguments'}\n</tool_call>",
        "Why?\n</think>\n\nIt is noon.",
        f"Why?\n</think>\n\n<tool_call>\n{CET % 'arguments'}\n</tool_call>",
        f"Let me see.\n<tool_call>\n{CET % 'arguments'}\n</tool_call>\n"
        f"<tool_call>\n{CET % 'arguments'}\n</tool_call> That is all.",
    ],
)  # fmt: skip
def test_text_and_calls_that_fit_are_allowed(compiler, text):
    assert takes(compiler, text)
    assert parse_tool_calls(text, TOOLS).error is None


@pytest.mark.parametrize(
    "text",
    [
        BAD,
        '{"name": "clock", "parameters": {}}',
        '{"name": "clock", "parameters": {"zone": "utc", "more": 1}}',
        ' {"name": "clock", "parameters": {"zone": "pst"}}',
        '{ "name": "clock", "parameters": {"zone": "pst"}}',
        '{"parameters": {"zone": "pst"}, "name": "clock"}',
        '{"type": "function", "function": {"name": "clock", "parameters": {"zone": "pst"}}}',
        '{"n\\u0061me": "clock", "parameters": {"zone": "pst"}}',
        '{"foo": 1, "name": "clock", "parameters": {"zone": "pst"}}',
        '[{"foo": {"": 1}, "name": "clock", "parameters": {"zone": "pst"}}]',
        '{"": 1, "n\\u0061me": "clock", "parameters": {"zone": "pst"}}',
        '{"name": "other", "parameters": {}}',
        f"[{BAD}]",
        '[clock(zone="pst")]',
        'clock.call(query="pst")',
        '<tool_call>\n{"name": "clock", "arguments": {"zone": "pst"}}\n</tool_call>',
        'So: <tool_call>\n{"name": "clock", "arguments": {"zone": "pst"}}\n</tool_call>',
        f"<tool_call>\n{CET % 'arguments'}\n</tool_call>"
        '<tool_call>\n{"name": "clock", "arguments": {"zone": "pst"}}\n</tool_call>',
        'Now <function=clock>{"zone": "pst"}</function>',
        '[TOOL_CALLS] [{"name": "clock", "arguments": {"zone": "pst"}}]',
        '<tool_call>[{"name": "clock", "arguments": {"zone": "pst"}}]',
        f"[{CET % 'parameters'}, {BAD}]", f"<|python_tag|>{BAD}", f"\u00a0{BAD}",
    ],
)  # fmt: skip
def test_calls_that_do_not_fit_are_not(compiler, text):
    assert not takes(compiler, text)
    read = parse_tool_calls(text, TOOLS)
    assert read.calls or read.error  # it would be read as a call


def test_tags_that_are_tokens_are_as_good(compiler):
    tokenizer = with_user_defined(compiler.tokenizer, "<tool_call>", "</tool_call>")
    tagged = GrammarCompiler(tokenizer, tokenizer.n_words)
    good, bad = (f"<tool_call>\n{CET % 'arguments'}\n</tool_call>".replace("cet", zone)
                 for zone in ("cet", "pst"))  # fmt: skip
    assert takes(tagged, good) and takes(tagged, f"So: {good}") and takes(tagged, "It is noon.")
    assert not takes(tagged, bad) and not takes(tagged, f"So: {bad}")


def test_whatever_is_drawn_has_no_other_calls(compiler):
    """Random logits, beginning with what comes before calls: those that are read fit."""
    stop = min(compiler.tokenizer.stop_tokens)
    encode, found = compiler.tokenizer.encode, 0
    for seed, start in enumerate(['{"', "<tool", "[", "So:\n<", '{"name": "clock"', " {"] * 8):
        rng = torch.Generator().manual_seed(seed)
        constraint = compiler.constraint(strict_format(TOOLS), {stop})
        ids = encode(start, bos=False, eos=False)
        ids = ids[: constraint.valid(ids)]
        for token in ids:
            constraint.accept(token)
        likely = encode(f"<tool_call>\n{BAD} arguments", bos=False, eos=False)
        while len(ids) < 80 and not constraint.finished:
            logits = torch.randn(compiler.vocab_size, generator=rng)
            logits[likely] += 4
            logits[stop] += 2
            ids.append(int(constraint.mask(logits).argmax()))
            constraint.accept(ids[-1])
        read = parse_tool_calls(compiler.tokenizer.decode(ids), TOOLS)
        found += len(read.calls)
        for call in read.calls:
            assert call["name"] == "note" or call["arguments"]["zone"] in ("utc", "cet"), call
    assert found


def test_only_strict_tools_ask_for_it():
    assert strict_format([NOTE]) is None and call_format([NOTE], "auto", {}) is None
    for format_ in ({"type": "regex", "regex": "a"}, {"type": "json_object"}):
        options = {"response_format": format_}
        assert call_format(["brave_search"], "auto", options) is format_
        of_both = call_format(TOOLS, "auto", options)
        assert of_both == (format_ if "regex" in format_ else call_or_format(TOOLS, format_))
    assert "clock" in json.dumps(call_format(TOOLS, "auto", {}))


ANSWER = {"type": "object", "properties": {"a": {"$ref": "#/$defs/b"}}, "required": ["a"],
          "$defs": {"b": {"type": "integer"}}}  # fmt: skip


@pytest.mark.parametrize(
    "form, fits, others",
    [
        ({"type": "json_schema", "json_schema": {"name": "r", "strict": True, "schema": ANSWER}},
         '{"a": 5}', ['{"a": "x"}', '{"a": 5, "b": 1}', BAD, f"[{BAD}, {BAD}]"]),
        ({"type": "json_schema", "schema": {"type": "object", "additionalProperties": False,
                                            "properties": {"name": {"type": "string"}}}},
         '{"name": "clock"}', [BAD]),
        ({"type": "json_schema", "schema": {"type": "array", "items": {"type": "integer"}}},
         "[1, 2]", ["[{}]", BAD]),
        ({"type": "json_object"}, '{"x": [1]}', ["[1]"]),
    ],
    ids=["strict", "named", "array", "object"],
)  # fmt: skip
def test_a_call_or_an_answer_of_a_format(compiler, form, fits, others):
    made = call_or_format(TOOLS, form)
    tagged = f"<tool_call>\n{CET % 'arguments'}\n</tool_call>"
    any_object = '{"name": "note", "parameters": {"anything": [1, {"a": null}]}}'
    calls = [CET % "parameters", f"[{CET % 'parameters'}, {any_object}]", any_object, tagged,
             f"{tagged}\n{tagged}"]  # fmt: skip
    for text in (fits, *calls):
        assert takes(compiler, text, made), text
        assert bool(parse_tool_calls(text, TOOLS).calls) == (text in calls)
    for text in ("", "It is noon.", f"So: {tagged}", tagged.replace("cet", "pst"), *others):
        assert not takes(compiler, text, made), text


def test_what_is_no_json_goes_beside_no_calls():
    for form in ({"type": "regex", "regex": "a"}, {"type": "choice", "choice": ["a"]}):
        with pytest.raises(ValueError, match=f"response_format {form['type']}: .*tool_choice"):
            call_or_format(TOOLS, form)
    with pytest.raises(ValueError, match="response_format json_schema: .*'if' isn't supported"):
        call_or_format(TOOLS, {"type": "json_schema", "schema": {"if": {}}})


def test_each_prompt_may_have_a_format_of_its_own():
    """Beside tools: what each would be alone."""
    of_json = {"type": "json_object"}
    expected = [call_format(TOOLS, "auto", {"response_format": one}) for one in (of_json, None)]
    assert call_format(TOOLS, "auto", {"response_format": [of_json, None]}) == expected
    assert expected[0] != of_json and expected[1] == strict_format(TOOLS)
    with pytest.raises(ValueError, match="choose one"):
        call_format(TOOLS, "required", {"response_format": [None, of_json]})
