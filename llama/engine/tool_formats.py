"""Structured outputs for calls of tools: which replies `tool_choice` and "strict" tools allow."""

import json
from typing import Any, Dict, Mapping, Optional, Sequence

from llama.engine.json_schema import LISTS, plain_schema
from llama.engine.structured import JSON_STYLE, ResponseFormat, check_format
from llama.text.tools import Tool, plain_json, split_tools


def call_format(
    tools: Optional[Sequence[Tool]],
    tool_choice: str,
    options: Mapping[str, Any],
    parallel: bool = False,
) -> Any:
    """The response format for tool_choice: a call of any tool ("required") or of the named one; for
    "auto" `strict_format`, if any, or `call_or_format` beside one of JSON among the options, or
    one of another kind alone. Of a response format for each prompt, a list for each.

    Args:
        parallel: several calls are allowed too.

    Raises:
        ValueError: no such tool, or one without a schema; the options have a response format too.
    """
    given = options.get("response_format")
    if isinstance(given, Sequence) and not isinstance(given, str):
        each = ({"response_format": one} for one in given)
        return [call_format(tools, tool_choice, one, parallel) for one in each]
    schemas, _ = split_tools(tools or [])
    if tool_choice == "auto":
        if given is None:
            return strict_format(schemas)
        of_json = isinstance(given, Mapping) and given.get("type") in ("json_schema", "json_object")
        return call_or_format(schemas, given) if schemas and of_json else given  # type: ignore[arg-type]
    if given is not None:
        raise ValueError(f"tool_choice={tool_choice!r} and response_format: choose one")
    names = [schema["function"]["name"] for schema in schemas]
    if tool_choice != "required":
        schemas = [schema for schema in schemas if schema["function"]["name"] == tool_choice]
    if not schemas:
        known = ", ".join(names) or "none"
        raise ValueError(
            f"tool_choice={tool_choice!r}: 'auto', 'required' or one of the tools ({known}); "
            "built-in ones have no schema"
        )
    return tool_call_format(schemas, parallel)


def tool_call_format(schemas: Sequence[Dict[str, Any]], parallel: bool = False) -> ResponseFormat:
    """The format of one call of one of these tools: {"name": ..., "parameters": {...}}.

    Unless its schema says otherwise, a call has no parameters but those that the tool names.

    Args:
        schemas: as `llama.text.tools.split_tools` returns them.
        parallel: or a list of at least two calls.
    """
    if not schemas:
        raise ValueError("tool_call_format takes at least one tool")
    calls = []
    for i, schema in enumerate(schemas):
        tool = schema["function"]
        at = f"#/$defs/call/anyOf/{i}/properties/parameters"
        taken = plain_schema(_parameters(tool), tool["name"], at)
        keys = {"name": {"const": tool["name"]}, "parameters": taken}
        calls.append({"type": "object", "properties": keys, "required": [*keys],
                      "additionalProperties": False})  # fmt: skip
    call: Dict[str, Any] = {"$ref": "#/$defs/call"}
    several = {"type": "array", "items": call, "minItems": 2, "maxItems": 128}
    top = {"anyOf": [call, several]} if parallel else call
    return {"type": "json_schema", "schema": {"$defs": {"call": {"anyOf": calls}}, **top}}


# How replies begin in which `ToolCallStream` looks for calls without tags, and the tags within
# text. A call has a name, beside any other keys in any order; an escaped key may be it.
_OBJECT = r'(\[\s*)?\{(?s:.)*("name"|\\u)'
_BEGIN = rf"\s*({_OBJECT}|\[\s*\w+\(|\w+\.call\(|<\|python_(tag|start)\|>)"
_TAGS = r"<function=|\[TOOL_CALLS\]"


def strict_format(schemas: Sequence[Dict[str, Any]]) -> Optional[ResponseFormat]:
    """The format of replies that may call a tool, when a tool has "strict": true.

    Such a reply is text, or one or several calls as `tool_call_format` has them, or text with calls
    in <tool_call>. Calls of strict tools fit their schemas; arguments for others are any object.
    What would be read as a call in another spelling isn't allowed. None without a strict tool.
    """
    if not any(schema["function"].get("strict") is True for schema in schemas):
        return None
    rules, calls, lists, more, tagged = [], [], [], [], []
    for i, schema in enumerate(schemas):
        tool = schema["function"]
        taken = _parameters(tool) if tool.get("strict") is True else {"type": "object"}
        taken = {**plain_schema(taken, tool["name"]), "x-guidance": JSON_STYLE}
        head = f'{{"name": {json.dumps(tool["name"], ensure_ascii=False)}, '
        call, spelled = json.dumps(f'{head}"parameters": '), json.dumps(f'\n{head}"arguments": ')
        # What competes with text is lazy: the lexer would prefer the longest, which is text.
        rules += [f"call_{i}[lazy]: {call}", f"list_{i}[lazy]: {call[0]}[{call[1:]}",
                  f"arguments_{i}: %json {json.dumps(taken)}"]  # fmt: skip
        calls.append(f'call_{i} arguments_{i} "}}"')
        lists.append(f'list_{i} arguments_{i} "}}" more+ "]"')
        more.append(f'{call[0]}, {call[1:]} arguments_{i} "}}"')
        tagged.append(f'{spelled} arguments_{i} "}}\\n</tool_call>"')
    grammar = f"""
start: {" | ".join(calls + lists)} | PLAIN | first tagged (following tagged)* REST
more: {" | ".join(more)}
tagged: {" | ".join(tagged)}
first[lazy]: FIRST
following[lazy]: FOLLOWING
PLAIN: REST & ~BEGIN
REST: ANY & ~TAGS & ~TAG
FIRST: FOLLOWING & ~BEGIN
FOLLOWING: TAG & ~TAGS
TAG: /(?s:.)*<tool_call>/
BEGIN: /{_BEGIN}(?s:.)*/
TAGS: /(?s:.)*({_TAGS})(?s:.)*/
ANY: /(?s:.)*/
"""
    return {"type": "grammar", "grammar": "\n".join([grammar, *rules])}


def call_or_format(schemas: Sequence[Dict[str, Any]], form: ResponseFormat) -> ResponseFormat:
    """The format of one or several calls, or else of an answer in JSON.

    Calls are as in `strict_format`, but have no text around them. Of those without tags, what is
    an answer of that format too needn't fit a strict tool's schema.

    Args:
        form: a response format of type json_schema or json_object.

    Raises:
        ValueError: one of another type, or what is wrong with it.
    """
    plain = plain_json(dict(form), "response_format")
    check_format(plain)
    where = f"response_format {plain['type']}"
    if plain["type"] not in ("json_schema", "json_object"):
        raise ValueError(
            f"{where}: no call of a tool would fit it; choose tool_choice 'required' or 'none', or "
            "a JSON schema"
        )
    answer = plain_schema(plain.get("schema", {"type": "object"}), where, "#/$defs/answer")
    anything = {"type": "object", "additionalProperties": True}
    given = [
        schema if schema["function"].get("strict") is True
        else {"function": {"name": schema["function"]["name"], "parameters": anything}}
        for schema in schemas
    ]  # fmt: skip
    whole = {**tool_call_format(given, parallel=True)["schema"], "x-guidance": JSON_STYLE}
    whole["$defs"]["answer"] = answer
    whole["anyOf"].append({"$ref": "#/$defs/answer"})
    rules, tagged = [f"answer: %json {json.dumps(whole)}"], []
    for i, tool in enumerate(schema["function"] for schema in given):
        taken = {**plain_schema(_parameters(tool), tool["name"]), "x-guidance": JSON_STYLE}
        rules.append(f"arguments_{i}: %json {json.dumps(taken)}")
        name = json.dumps(tool["name"], ensure_ascii=False)
        head = json.dumps(f'<tool_call>\n{{"name": {name}, "arguments": ')
        tagged.append(f'{head} arguments_{i} "}}\\n</tool_call>"')
    rules += ['start: answer | tagged ("\\n" tagged)*', f"tagged: {' | '.join(tagged)}"]
    return {"type": "grammar", "grammar": "\n".join(rules)}


def _parameters(tool: Dict[str, Any]) -> Dict[str, Any]:
    """The schema of a call's arguments."""
    taken = {"type": "object", **plain_json(tool.get("parameters") or {}, tool["name"])}
    if not taken.keys() & (LISTS | {"$ref", "patternProperties"}):
        taken.setdefault("additionalProperties", False)
    return taken
