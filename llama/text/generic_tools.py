"""Tools for chat formats that have no place for them: written as text, as any model can read it."""

import json
from typing import Dict, List, Optional, Sequence

from llama.text.messages import Dialog, Message, content_of, tool_calls
from llama.text.tools import Tool, split_tools

_ASK = (
    "You may call these functions, each given with the JSON schema of its parameters:\n\n{}\n\n"
    "To call one, answer with nothing but a line of JSON in this form:\n"
    '{{"name": "...", "arguments": {{...}}}}\n'
    "You are then told what it returned. If no call is needed, answer in plain words."
)


def has_calls(dialog: Dialog) -> bool:
    return any(tool_calls(message) for message in dialog)


def tools_as_text(dialog: Dialog, tools: Optional[Sequence[Tool]]) -> List[Message]:
    """A new dialog of system, user and assistant messages only.

    Definitions of tools are in the system message, calls in the assistant's contents as lines of
    JSON, which `parse_tool_calls` reads, and results are what the user says next.

    Raises:
        ValueError: a built-in tool, which has no schema, or what isn't a tool.
    """
    schemas, builtins = split_tools(tools or [])
    if builtins:
        raise ValueError(
            f"this model's chat format has no place for built-in tools: pass {builtins[0]!r} as a "
            "JSON schema or a Python function"
        )
    written: List[Message] = []
    names: List[str] = []  # of the calls whose results follow
    by_id: Dict[str, str] = {}
    told = False  # the last message holds results
    for message in dialog:
        content = content_of(message)
        if message["role"] in ("tool", "ipython"):
            name = names.pop(0) if names else ""
            name = by_id.get(message.get("tool_call_id", ""), name)
            name = message.get("name") or name or "the function"
            content = f"Result of {name}: {content}"
        elif message["role"] == "assistant":
            calls = tool_calls(message)
            names = [call["name"] for call in calls]
            by_id.update((call["id"], call["name"]) for call in calls if "id" in call)
            lines = [
                json.dumps({k: call[k] for k in ("name", "arguments")}, ensure_ascii=False)
                for call in calls
            ]
            content = "\n".join([content] * bool(content or not lines) + lines)
        if message["role"] in ("system", "assistant"):
            written.append({"role": message["role"], "content": content})
        elif told:  # roles alternate
            written[-1]["content"] += f"\n{content}"
        else:
            written.append({"role": "user", "content": content})
        told = message["role"] in ("tool", "ipython")
    if schemas:
        lines = [json.dumps(schema["function"], ensure_ascii=False) for schema in schemas]
        defined = _ASK.format("\n".join(lines))
        has_one = bool(written) and written[0]["role"] == "system"
        said = written.pop(0)["content"] if has_one else ""
        written.insert(0, {"role": "system", "content": f"{said}\n\n{defined}".strip()})
    return written
