"""Tools for formats without a place for them: what is written can be read again."""

import json

import pytest

from llama import parse_tool_calls, tool_schema
from llama.text.generic_tools import tools_as_text

ADD = {"name": "add", "description": "a + b", "parameters": {"type": "object", "properties": {}}}
ONE = {"name": "add", "arguments": {"a": 1, "b": 'é "x"'}}
TWO = {"name": "sub", "arguments": {}}


def said(role, content, **more):
    return {"role": role, "content": content, **more}


ASKED = said("user", "What?")


@pytest.mark.parametrize("system", [[], [said("system", "Be brief.")]])
def test_definitions_are_in_the_system_message(system):
    dialog = [*system, ASKED]
    first, *rest = tools_as_text(dialog, [ADD])
    assert rest == [ASKED] and first["role"] == "system"
    assert first["content"].startswith("Be brief.\n\n" if system else "You may call")
    assert json.dumps(tool_schema(ADD)["function"]) in first["content"].splitlines()
    assert dialog == [*system, ASKED] and tools_as_text(dialog, None) == dialog


@pytest.mark.parametrize("calls", [[ONE], [ONE, TWO]])
def test_calls_are_read_as_they_are_written(calls):
    dialog = [ASKED, said("assistant", None, tool_calls=calls)]
    written = tools_as_text(dialog, None)[1]
    assert set(written) == {"role", "content"}
    assert parse_tool_calls(written["content"], [ADD, {"name": "sub"}]) == ("", calls, None)
    openais = [{"type": "function", "id": "1", "function": call} for call in calls]
    dialog[1] = said("assistant", "Wait.", tool_calls=openais)
    assert tools_as_text(dialog, None)[1]["content"] == "Wait.\n" + written["content"]


def test_results_are_what_the_user_says_and_roles_alternate():
    results = [said("tool", "3"), said("ipython", "0", name="minus"), said("tool", "4")]
    dialog = [ASKED, said("assistant", "", tool_calls=[ONE, TWO]), *results, said("user", "And?")]
    dialog += [said("assistant", "Well."), said("user", "Thanks."), said("assistant", "")]
    _, _, told, *rest = tools_as_text(dialog, None)
    assert told == said(
        "user", "Result of add: 3\nResult of minus: 0\nResult of the function: 4\nAnd?"
    )
    assert rest == dialog[6:]


def test_results_in_another_order_are_told_by_their_ids():
    calls = [{"id": "a", **ONE}, {"id": "b", **TWO}]
    results = [said("tool", "0", tool_call_id="b"), said("tool", "3", tool_call_id="a")]
    *_, told = tools_as_text([ASKED, said("assistant", None, tool_calls=calls), *results], None)
    assert told == said("user", "Result of sub: 0\nResult of add: 3")


def test_the_demo_model_takes_tools(smollm2):
    """Whatever it answers; a call that is required is one, and its result can go back."""
    options = {"tools": [ADD], "max_gen_len": 30, "temperature": 0}
    [answer] = smollm2.chat_completion([[ASKED]], tool_choice="add", **options)
    message = answer["generation"]
    assert message["tool_calls"] == [{"name": "add", "arguments": {}}]
    [answer] = smollm2.chat_completion([[ASKED, message, said("tool", "3")]], 0, max_gen_len=2)
    assert answer["generation"]["role"] == "assistant"
