"""The chat format of Llama 3.1 and later, with its tools."""

import datetime
import json
from typing import Any, Dict, List, Literal, Optional, Sequence

from llama.text.chat import (
    PLAIN,
    ChatFormat,
    Dialog,
    Message,
    PromptOptions,
    content_of,
    encode_parts,
    tool_calls,
)
from llama.text.encoder import Encoder
from llama.text.tools import BUILTINS, PYTHON_TAG, Tool, ToolCall, Tools, split_tools

CallFormat = Literal["json", "function_tag", "python_list"]
CALL_FORMATS = ("json", "function_tag", "python_list")


class Llama31Format(ChatFormat):
    """Llama 3.1's chat format: contents unstripped, tool calls, and <|eom_id|> at the end of a
    message after which the assistant waits for a tool's result.

    Source: Meta's `ChatFormat` (meta-llama/llama-models, llama3/chat_format.py). Without tools no
    text is added to the messages.

    Args:
        call_format: how calls in the dialog are written; Meta's ToolPromptFormat.
        tools_in_system: tools are defined in the system message, not in the first user message.
        date: today's date in the tool definitions; by default the clock's.
    """

    code_tag: Optional[str] = PYTHON_TAG  # before code for code_interpreter

    def __init__(
        self,
        tokenizer: Encoder,
        *,
        call_format: CallFormat = "json",
        tools_in_system: bool = False,
        date: Optional[str] = None,
    ):
        if call_format not in CALL_FORMATS:
            raise ValueError(f"call_format={call_format!r}: choose one of {CALL_FORMATS}")
        super().__init__(tokenizer)
        self.call_format = call_format
        self.tools_in_system = tools_in_system
        self.date = date

    def encode_message(self, message: Message) -> List[int]:
        special, calls = self.tokenizer.special_tokens, tool_calls(message)
        ids = self.encode_header(message)
        if self.code_tag and calls and calls[0]["name"] == "code_interpreter":
            ids.append(special[self.code_tag])
        ids += encode_parts(self.tokenizer, message)
        for call in calls:
            written = write_call(call, self.call_format)
            ids.extend(self.tokenizer.encode(written, bos=False, eos=False))
        return [*ids, special[self.end_of_message if self.goes_on(message) else self.end_of_turn]]

    def goes_on(self, message: Message) -> bool:
        """Whether a message ends without the turn: a tool's result follows."""
        return message["role"] == "assistant" and message.get("end_of_message", False)

    def encode_dialog_prompt(
        self, dialog: Dialog, tools: Tools = None, options: PromptOptions = PLAIN
    ) -> List[int]:
        """The dialog with its tools, and the header of the assistant's answer.

        Raises:
            ValueError: what `with_tools`, `write_call` or `PromptOptions.check` raises, or tools
                with a call_format other than "json", for which their definitions ask.
        """
        if tools:
            if self.call_format != "json":
                raise ValueError(
                    f"definitions of tools ask for calls in JSON, and call_format is "
                    f"{self.call_format!r}: use 'json', or define them in the system message"
                )
            dialog = self.with_tools(dialog, tools)
        options.check(dialog)
        return self._encode_dialog(dialog, options)

    def with_tools(self, dialog: Dialog, tools: Sequence[Tool]) -> List[Message]:
        """The dialog with definitions of tools; see `with_tools`."""
        return with_tools(dialog, tools, in_system=self.tools_in_system, date=self.date)


def write_call(call: ToolCall, call_format: CallFormat) -> str:
    """A call as Meta's `ToolUtils.encode_tool_call` writes it; quotes aren't escaped.

    Raises:
        ValueError: a call of a built-in tool without its query or code.
    """
    name, arguments = call["name"], call["arguments"]
    if name in BUILTINS:
        key = "code" if name == "code_interpreter" else "query"
        if not isinstance(arguments.get(key), str):
            raise ValueError(f"the built-in tool {name} takes {{{key!r}: a string}}: {arguments}")
        return arguments[key] if key == "code" else f'{name}.call(query="{arguments[key]}")'
    if call_format == "function_tag":
        return f"<function={name}>{json.dumps(arguments)}</function>"
    if call_format == "python_list":
        return f"[{name}({_assigned(arguments)})]"
    return json.dumps({"type": "function", "name": name, "parameters": arguments})


def _python(value: Any) -> str:
    if isinstance(value, str):
        return f'"{value}"'
    if isinstance(value, list):
        return f"[{', '.join(map(_python, value))}]"
    return f"{{{_assigned(value)}}}" if isinstance(value, dict) else str(value)


def _assigned(values: Dict[str, Any]) -> str:
    return ", ".join(f"{key}={_python(value)}" for key, value in values.items())


_ASK_USER = (
    "Given the following functions, please respond with a JSON for a function call with its "
    "proper arguments that best answers the given prompt.\n\n"
)
_ASK_SYSTEM = (
    "You have access to the following functions. To call a function, please respond with JSON "
    "for a function call."
)
_HOW = (
    'Respond in the format {"name": function name, "parameters": dictionary of argument name and '
    "its value}.Do not use variables.\n\n"
)


def with_tools(
    dialog: Dialog,
    tools: Sequence[Tool],
    *,
    in_system: bool = False,
    date: Optional[str] = None,
    dated: bool = True,
) -> List[Message]:
    """A new dialog with definitions of the tools, in the words that Llama 3.1 was trained on.

    Source: Meta's page on Llama 3.1's prompt format, and the chat template of Llama-3.1-Instruct.

    Args:
        in_system: definitions go into the system message; by default into the first user message.
        date: "26 Jul 2024"; by default today.
        dated: whether the system message says it.

    Raises:
        ValueError: what isn't a tool, or no user message to put definitions in.
    """
    schemas, builtins = split_tools(tools)
    turns = [*dialog]
    system = content_of(turns.pop(0)) if turns and turns[0]["role"] == "system" else ""
    named = ", ".join(name for name in builtins if name != "code_interpreter")
    today = date or datetime.date.today().strftime("%d %b %Y")
    head = "Environment: ipython\n" + (f"Tools: {named}\n\n" if named else "")
    if dated:
        head += f"Cutting Knowledge Date: December 2023\nToday Date: {today}\n\n"
    definitions = _HOW + "".join(
        json.dumps(schema, indent=4, ensure_ascii=False) + "\n\n" for schema in schemas
    )
    if schemas and in_system:
        head += _ASK_SYSTEM + definitions
    elif schemas:
        first = next((i for i, turn in enumerate(turns) if turn["role"] == "user"), None)
        if first is None:
            raise ValueError("no user message to put the tools in: pass tools_in_system=True")
        asked, content = _ASK_USER + definitions, turns[first]["content"]
        content = asked + content if isinstance(content, str) else [asked, *content]
        turns[first] = {"role": "user", "content": content}
    return [{"role": "system", "content": head + system}, *turns]
