"""Definitions of tools. Calls are read by `llama.text.tool_stream`."""

import enum
import inspect
import json
import re
import types
import typing
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple, Union

# A built-in tool by its name, a JSON schema, or a Python function with type hints and docstring.
Tool = Union[str, Dict[str, Any], Callable[..., Any]]
Tools = Optional[Sequence[Tool]]
# {"name": str, "arguments": dict of JSON values}, and "id" where the model's format has one.
ToolCall = Dict[str, Any]

# The tools that Llama 3.1 was trained on. The first three take a query, the last one code.
BUILTINS = ("brave_search", "wolfram_alpha", "photogen", "code_interpreter")
PYTHON_TAG = "<|python_tag|>"
PYTHON_START, PYTHON_END = "<|python_start|>", "<|python_end|>"  # Llama 4's


def split_tools(tools: Sequence[Tool]) -> Tuple[List[Dict[str, Any]], List[str]]:
    """Split tools into schemas (see `tool_schema`) and built-in tools.

    Raises:
        ValueError: an unknown built-in tool, a duplicate name, or what `tool_schema` raises.
    """
    if isinstance(tools, (str, dict)) or callable(tools):
        raise ValueError("tools is one tool: pass a list of tools")
    builtins = [tool for tool in tools if isinstance(tool, str)]
    for name in builtins:
        if name not in BUILTINS:
            raise ValueError(
                f"no built-in tool {name!r}: those are {', '.join(BUILTINS)}; "
                "pass others as a JSON schema or a Python function"
            )
    schemas = [tool_schema(tool) for tool in tools if not isinstance(tool, str)]
    names = builtins + [schema["function"]["name"] for schema in schemas]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"two tools are named {name!r}: rename one")
    return schemas, builtins


def tool_schema(tool: Tool) -> Dict[str, Any]:
    """A tool's JSON schema as chat templates expect it: {"type": "function", "function": {...}}.

    Args:
        tool: such a schema, its inner part ({"name", "description", "parameters"}), or a Python
            function, whose type hints give the parameters' types and whose docstring, in Google's
            style, describes it and its parameters.

    Raises:
        ValueError: a schema without a name, or with values that JSON lacks; a function without
            docstring, or with a parameter that has no hint, no description or an unsupported type.
    """
    if callable(tool):
        return {"type": "function", "function": _function_schema(tool)}
    if not isinstance(tool, dict):
        raise ValueError(f"a tool is a JSON schema or a Python function, not {tool!r}")
    schema = plain_json(tool, "a tool's schema")
    if "function" not in schema:
        kind = {"type": schema.pop("type")} if schema.get("type") == "function" else {}
        schema = {"type": "function", **kind, "function": schema}
    inner = schema["function"]
    if schema.get("type") != "function" or not isinstance(inner, dict):
        raise ValueError(f"a tool is {{'type': 'function', 'function': {{...}}}}, not {tool!r}")
    if not isinstance(inner.get("name"), str) or not inner["name"]:
        raise ValueError(f"a tool needs a name, a string that isn't empty: {tool!r}")
    if not isinstance(inner.get("description", ""), str):
        raise ValueError(f"the description of the tool {inner['name']!r} isn't a string")
    if not isinstance(inner.get("parameters", {}), dict):
        raise ValueError(f"the parameters of the tool {inner['name']!r} aren't a JSON schema")
    return schema


def plain_json(value: Any, what: str) -> Any:
    """A copy that consists of JSON types only.

    Raises:
        ValueError: it has a value that JSON lacks, NaN included, or is nested too deeply.
    """
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{what} can't be written as JSON: {error}") from None


def _function_schema(function: Callable[..., Any]) -> Dict[str, Any]:
    name = getattr(function, "__name__", "")
    if not name:
        raise ValueError(f"{function!r} has no name to call it by: pass a function or a schema")
    description, described = _docstring(inspect.getdoc(function) or "")
    if not description:
        raise ValueError(f"the function {name} has no docstring to tell the model what it does")
    try:
        hints = typing.get_type_hints(function)
    except (NameError, TypeError) as error:
        raise ValueError(f"the type hints of {name} can't be resolved: {error}") from None
    properties, required = {}, []
    for key, parameter in inspect.signature(function).parameters.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise ValueError(f"{name} takes *{key}: a tool's parameters need names of their own")
        if key not in hints:
            raise ValueError(f"the parameter {key} of {name} has no type hint")
        if key not in described:
            raise ValueError(f"the docstring of {name} doesn't describe {key} under `Args:`")
        where = f"the parameter {key} of {name}"
        properties[key] = {**_type_schema(hints[key], where), "description": described[key]}
        if parameter.default is parameter.empty:
            required.append(key)
    parameters: Dict[str, Any] = {"type": "object", "properties": properties}
    if required:
        parameters["required"] = required
    return {"name": name, "description": description, "parameters": parameters}


_NAMES = {str: "string", int: "integer", float: "number", bool: "boolean", type(None): "null"}
_TYPES = {**_NAMES, list: "array", dict: "object"}


def _type_schema(hint: Any, where: str) -> Dict[str, Any]:
    """A type hint as JSON schema, the same as transformers' get_json_schema gives."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return {}
    if isinstance(hint, type) and origin is None and hint in _TYPES:
        return {"type": _TYPES[hint]}
    if isinstance(hint, type) and origin is None and issubclass(hint, enum.Enum):
        return _choices([member.value for member in hint], where)
    if origin in (list, dict) and not inner:  # typing.List and typing.Dict
        return {"type": _TYPES[origin]}
    if origin is typing.Literal:
        return _choices(list(inner), where)
    if origin is list:
        return {"type": "array", "items": _type_schema(inner[0], where)}
    if origin is dict and inner[0] is str:
        return {"type": "object", "additionalProperties": _type_schema(inner[1], where)}
    if origin in (Union, types.UnionType):
        kinds = [_type_schema(one, where) for one in inner if one is not type(None)]
        if len(kinds) == 1:
            schema = kinds[0]
        elif all(set(kind) == {"type"} for kind in kinds):
            schema = {"type": sorted({kind["type"] for kind in kinds})}
        else:
            schema = {"anyOf": kinds}
        return {**schema, "nullable": True} if type(None) in inner else schema
    raise ValueError(
        f"{where} has the type {hint!r}: a tool takes str, int, float, bool, list, dict[str, ...], "
        "None, Literal, enums and unions of them; write the JSON schema yourself for others"
    )


def _choices(values: List[Any], where: str) -> Dict[str, Any]:
    if not values or any(type(value) not in _NAMES for value in values):
        raise ValueError(f"{where} has the choices {values}: they need to be JSON's simple values")
    kinds = list(dict.fromkeys(_NAMES[type(value)] for value in values))
    return {"type": kinds[0] if len(kinds) == 1 else kinds, "enum": values}


_SECTION = re.compile(r"(Args|Arguments|Returns|Raises|Yields|Examples?|Notes?):")
_PARAMETER = re.compile(r"(\w+)(?: ?\([^()]*\))?:(.*)")


def _docstring(doc: str) -> Tuple[str, Dict[str, str]]:
    """The descriptions of a function and of its parameters, from a docstring in Google's style."""
    section, indent, key = "", None, ""
    description: List[str] = []
    parameters: Dict[str, List[str]] = {}
    for line in doc.splitlines():
        if _SECTION.fullmatch(line.rstrip()):
            section = line.strip()
        elif not section:
            description.append(line)
        elif section in ("Args:", "Arguments:") and line.strip():
            depth = len(line) - len(line.lstrip())
            indent = depth if indent is None else indent
            begun = _PARAMETER.fullmatch(line.strip()) if depth <= indent else None
            if begun:
                key = begun[1]
                parameters[key] = []
            if key:
                parameters[key].append((begun[2] if begun else line).strip())
    texts = {key: " ".join(filter(None, lines)) for key, lines in parameters.items()}
    return "\n".join(description).strip(), texts
