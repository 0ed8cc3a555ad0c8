"""Calls of tools as values: read from JSON, Python's syntax and the one of built-in tools.

No part of a text is executed: only JSON and Python literals are parsed.
"""

import ast
import json
import re
import warnings
from typing import Any, List, Optional, Set

from llama.text.scanner import Malformed
from llama.text.tools import BUILTINS, ToolCall, plain_json

PYTHONIC = re.compile(r"\[\s*(\w+)\(")
_BUILTIN = re.compile(r'(\w+)\.call\(query="(.*)"\)', re.DOTALL)


class NoCall(Malformed):
    """This is no call."""

    def __init__(self) -> None:
        super().__init__('a call is {"name": ..., "arguments": {...}}')


def what_is_wrong(text: str) -> Optional[str]:
    """What is wrong with the JSON that a text begins with."""
    try:
        json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError) as error:
        return str(error)
    return None


def builtin_call(body: str, names: Set[str]) -> List[ToolCall]:
    """name.call(query="..."), where Llama escapes nothing in the query."""
    found = _BUILTIN.fullmatch(body)
    if found and '.call(query="' not in found[2]:
        return [read_call({"name": found[1], "arguments": {"query": found[2]}}, names)]
    if body.startswith(tuple(f"{name}.call(" for name in BUILTINS)):
        raise Malformed('a call of a built-in tool is name.call(query="...") and nothing else')
    return []


def python_list(body: str, names: Set[str]) -> List[ToolCall]:
    begin = PYTHONIC.match(body)
    if not begin:
        return []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of backslashes in the model's Python
            tree = ast.parse(body, mode="eval").body
        if not isinstance(tree, ast.List):
            return []
        calls = []
        for node in tree.elts:
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name) or node.args:
                raise ValueError("every element is name(parameter=value, ...)")
            arguments = {str(key.arg): ast.literal_eval(key.value) for key in node.keywords}
            if any(key.arg is None for key in node.keywords):
                raise ValueError("** isn't an argument")
            calls.append({"name": node.func.id, "arguments": arguments})
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError) as error:
        if begin[1] in names:
            raise Malformed(f"the list of calls can't be read: {str(error)[:200]}") from None
        return []
    return [read_call(call, names) for call in calls]


def _is_call(value: Any, names: Set[str]) -> bool:
    if isinstance(value, dict) and isinstance(value.get("function"), dict):
        value = value["function"]
    return (
        isinstance(value, dict)
        and isinstance(value.get("name"), str)
        and (value["name"] in names or "parameters" in value or "arguments" in value)
    )


def read_call(value: Any, names: Set[str]) -> ToolCall:
    """A call from its JSON value. Raises NoCall for other values, and Malformed."""
    if not _is_call(value, names):
        raise NoCall
    identifier = {"id": value["id"]} if isinstance(value.get("id"), str) else {}
    value = value["function"] if isinstance(value.get("function"), dict) else value
    name, arguments = value["name"], value.get("parameters", value.get("arguments"))
    if name not in names:
        given = ", ".join(sorted(names - set(BUILTINS))) or "none"
        raise Malformed(f"there is no tool {name[:80]!r}; those given: {given}")
    try:
        if isinstance(arguments, str):  # JSON within JSON, OpenAI's format
            arguments = json.loads(arguments)
        if not isinstance(arguments, dict):
            raise ValueError("they are a dict")
        arguments = plain_json(arguments, "they")
    except (ValueError, RecursionError) as error:
        raise Malformed(f"the arguments for {name!r}: {error}") from None
    return {**identifier, "name": name, "arguments": arguments}
