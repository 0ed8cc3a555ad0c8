"""Dialogs to token ids: the messages, and the formats of the Llama family itself."""

import datetime
import json
import warnings
from typing import TYPE_CHECKING, Any, Dict, List, Literal, Optional, Protocol, Sequence, TypedDict

from llama.text.encoder import Encoder
from llama.text.tools import (
    BUILTINS,
    PYTHON_TAG,
    Tool,
    ToolCall,
    parse_tool_calls,
    plain_json,
    split_tools,
)

if TYPE_CHECKING:
    import torch

Role = Literal["system", "user", "assistant", "ipython", "tool"]
ROLES = ("system", "user", "assistant", "ipython", "tool")


class _Message(TypedDict):
    role: Role
    content: str


class Message(_Message, total=False):
    """A message of a dialog, with the assistant's tool calls or a tool's result.

    tool_calls are {"name": ..., "arguments": {...}}, with an "id" if the chat template needs one.
    OpenAI's format, {"type": "function", "function": {...}}, is accepted too.
    """

    tool_calls: List[ToolCall]  # of the assistant
    end_of_message: bool  # of the assistant: it waits for a tool's result (Llama 3.1's <|eom_id|>)
    name: str  # of the tool whose result this is, for templates
    tool_call_id: str  # of the call whose result this is, for templates


Dialog = Sequence[Message]


class Format(Protocol):
    """A chat format: how a checkpoint expects dialogs to be encoded."""

    def encode_dialog_prompt(
        self, dialog: Dialog, tools: Optional[Sequence[Tool]] = None
    ) -> List[int]:
        """The dialog, followed by the header of the assistant's answer.

        Raises:
            ValueError: something that the format can't express, tools for example.
        """


# --- messages ------------------------------------------------------------------------------------


def check_dialogs(dialogs: Sequence[Dialog]) -> None:
    """Raises ValueError unless it is a list of dialogs."""
    for i, dialog in enumerate(dialogs):
        if not isinstance(dialog, Sequence) or isinstance(dialog, str):
            raise ValueError("dialogs is one dialog: pass a list of dialogs")
        check_dialog(i, dialog)


def check_dialog(i: int, dialog: Dialog) -> None:
    """Raises ValueError for a malformed dialog, with its index i and what is wrong."""
    if not dialog:
        raise ValueError(f"dialog {i} is empty: it takes at least one message")
    for message in dialog:
        try:
            _check_message(message)
        except ValueError as error:
            raise ValueError(f"dialog {i}: {error}") from None
    if dialog[0]["role"] == "assistant":
        raise ValueError(
            f"dialog {i} begins with the assistant: begin with a user or a system message"
        )


_KINDS = {"tool_calls": list, "end_of_message": bool, "name": str, "tool_call_id": str}
_FROM_ASSISTANT = ("tool_calls", "end_of_message")


def _check_message(message: Any) -> None:
    if not isinstance(message, dict) or not {"role", "content"} <= set(message):
        raise ValueError(f"a message is {{'role': ..., 'content': a string}}, not {message!r}")
    if message["role"] not in ROLES:
        raise ValueError(f"unknown role {message['role']!r}; roles are {', '.join(ROLES)}")
    for key in set(message) - {"role", "content"}:
        if key not in _KINDS:
            raise ValueError(
                f"a message is {{'role': ..., 'content': a string}} and has no {key!r}; "
                f"it may have {', '.join(_KINDS)}"
            )
        if not isinstance(message[key], _KINDS[key]):
            raise ValueError(f"a message's {key} is a {_KINDS[key].__name__}: {message[key]!r}")
        if key in _FROM_ASSISTANT and message["role"] != "assistant":
            raise ValueError(f"{key} belongs to the assistant, not to {message['role']!r}")
    calls = tool_calls(message)
    if not isinstance(message["content"], str) and not (message["content"] is None and calls):
        raise ValueError(f"a message is {{'role': ..., 'content': a string}}, not {message!r}")


def tool_calls(message: Any) -> List[ToolCall]:
    """A message's tool calls as {"name", "arguments"} (and "id"), copied, of JSON types only.

    Raises:
        ValueError: a call that is neither in this format nor in OpenAI's.
    """
    calls = []
    for call in message.get("tool_calls") or []:
        inner = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
            raise ValueError(f"a tool call is {{'name': ..., 'arguments': {{...}}}}, not {call!r}")
        arguments = inner.get("arguments")
        if isinstance(arguments, str):  # OpenAI's format
            try:
                arguments = json.loads(arguments)
            except (ValueError, RecursionError):
                arguments = None
        if not isinstance(arguments, dict):
            raise ValueError(
                f"the arguments of the tool call {inner['name']!r} are a dict, "
                f"not {inner.get('arguments')!r}"
            )
        arguments = plain_json(arguments, f"the arguments of the tool call {inner['name']!r}")
        identifier = {"id": str(call["id"])} if call.get("id") is not None else {}
        calls.append({**identifier, "name": inner["name"], "arguments": arguments})
    return calls


def content_of(message: Message) -> str:
    """A message's text; in OpenAI's format it may be None beside tool calls."""
    return message["content"] or ""


def read_calls(message: Message, tools: Sequence[Tool]) -> Optional[str]:
    """Move the tool calls in an assistant's content to its tool_calls, in place.

    A message that calls built-in tools gets end_of_message: Llama 3.1 ends it with <|eom_id|>.

    Returns:
        None, or what is wrong with a malformed call, which is left in the text.
    """
    reply = parse_tool_calls(message["content"], tools)
    message["content"] = reply.content
    if reply.calls:
        message["tool_calls"] = reply.calls
    if any(call["name"] in BUILTINS for call in reply.calls):
        message["end_of_message"] = True
    return reply.error


# --- Llama 3 -------------------------------------------------------------------------------------


class ChatFormat:
    """Llama 3's chat format: <|start_header_id|>role<|end_header_id|>\\n\\ncontent<|eot_id|>.

    Source: Meta's `ChatFormat` (meta-llama/llama3, llama/tokenizer.py). Roles and contents are
    encoded as ordinary text, so that the only control tokens are those inserted here.
    """

    def __init__(self, tokenizer: Encoder):
        self.tokenizer = tokenizer

    def encode_header(self, message: Message) -> List[int]:
        special, encode = self.tokenizer.special_tokens, self.tokenizer.encode
        role = "ipython" if message["role"] == "tool" else message["role"]
        return [
            special["<|start_header_id|>"],
            *encode(role, bos=False, eos=False),
            special["<|end_header_id|>"],
            *encode("\n\n", bos=False, eos=False),
        ]

    def encode_message(self, message: Message) -> List[int]:
        if tool_calls(message):
            raise ValueError("Llama 3's chat format has no tool calls; Llama 3.1's has")
        return [
            *self.encode_header(message),
            *self.tokenizer.encode(content_of(message).strip(), bos=False, eos=False),
            self.tokenizer.special_tokens["<|eot_id|>"],
        ]

    def encode_dialog_prompt(
        self, dialog: Dialog, tools: Optional[Sequence[Tool]] = None
    ) -> List[int]:
        """The dialog, and the header of the assistant's answer for the model to go on from.

        Raises:
            ValueError: there are tools or tool calls.
        """
        if tools:
            raise ValueError("Llama 3's chat format knows no tools; Llama 3.1's does")
        ids = [self.tokenizer.special_tokens["<|begin_of_text|>"]]
        for message in dialog:
            ids.extend(self.encode_message(message))
        return ids + self.encode_header({"role": "assistant", "content": ""})

    def turn_ids(self) -> List[int]:
        """The control tokens that a model must have been trained on to chat."""
        return [self.tokenizer.special_tokens[n] for n in ("<|start_header_id|>", "<|eot_id|>")]


def warn_of_base_model(turns: "torch.Tensor", others: "torch.Tensor") -> None:
    """Warn if the control tokens of chats look untrained.

    Base models share the tokenizer file of chat models, but the embeddings of tokens that occur
    only in chats are still as initialized: nearly zero, or all the same.

    Args:
        turns: embeddings of such control tokens, (at least 2, dim).
        others: embeddings of ordinary tokens, (n, dim).
    """
    usual = others.float().norm(dim=-1).median()
    small = turns.float().norm(dim=-1).max() < 1e-3 * usual
    if small or bool((turns == turns[:1]).all()):
        warnings.warn(
            "this looks like a base model: its chat format's control tokens were never trained, "
            "so expect no sensible answers; use the -Instruct checkpoint, or text_completion",
            stacklevel=6,
        )


# --- Llama 3.1 and later -------------------------------------------------------------------------

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
        if calls and calls[0]["name"] == "code_interpreter":
            ids.append(special[PYTHON_TAG])
        for text in (content_of(message), *(write_call(call, self.call_format) for call in calls)):
            ids.extend(self.tokenizer.encode(text, bos=False, eos=False))
        waits = message["role"] == "assistant" and message.get("end_of_message", False)
        return [*ids, special["<|eom_id|>" if waits else "<|eot_id|>"]]

    def encode_dialog_prompt(
        self, dialog: Dialog, tools: Optional[Sequence[Tool]] = None
    ) -> List[int]:
        """The dialog with its tools, and the header of the assistant's answer.

        Raises:
            ValueError: what `with_tools` or `write_call` raises, or tools with a call_format other
                than "json", for which their definitions ask.
        """
        if tools:
            if self.call_format != "json":
                raise ValueError(
                    f"definitions of tools ask for calls in JSON, and call_format is "
                    f"{self.call_format!r}: use 'json', or define them in the system message"
                )
            dialog = with_tools(dialog, tools, in_system=self.tools_in_system, date=self.date)
        return super().encode_dialog_prompt(dialog)


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
    dialog: Dialog, tools: Sequence[Tool], *, in_system: bool = False, date: Optional[str] = None
) -> List[Message]:
    """A new dialog with definitions of the tools, in the words that Llama 3.1 was trained on.

    Source: Meta's page on Llama 3.1's prompt format, and the chat template of Llama-3.1-Instruct.

    Args:
        in_system: definitions go into the system message; by default into the first user message.
        date: "26 Jul 2024"; by default today.

    Raises:
        ValueError: what isn't a tool, or no user message to put definitions in.
    """
    schemas, builtins = split_tools(tools)
    turns = [*dialog]
    system = content_of(turns.pop(0)) if turns and turns[0]["role"] == "system" else ""
    named = ", ".join(name for name in builtins if name != "code_interpreter")
    today = date or datetime.date.today().strftime("%d %b %Y")
    head = "Environment: ipython\n" + (f"Tools: {named}\n\n" if named else "")
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
        content = _ASK_USER + definitions + turns[first]["content"]
        turns[first] = {"role": "user", "content": content}
    return [{"role": "system", "content": head + system}, *turns]


# --- Llama 2 -------------------------------------------------------------------------------------

_TAGS = ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>")


class Llama2Format:
    """Llama 2's chat format: <s>[INST] user [/INST] assistant </s><s>[INST] user [/INST].

    Source: Meta's `chat_completion` (meta-llama/llama, llama/generation.py). The system message is
    part of the first user message. The tags are ordinary text to the model, so that one inside of a
    message can't be distinguished from the format's: such messages are refused.
    """

    def __init__(self, tokenizer: Encoder):
        self.tokenizer = tokenizer

    def encode_dialog_prompt(
        self, dialog: Dialog, tools: Optional[Sequence[Tool]] = None
    ) -> List[int]:
        """The dialog up to and including the last user message.

        Raises:
            ValueError: tools, roles that don't alternate, or one of the tags in a message.
        """
        if tools or any(tool_calls(message) for message in dialog):
            raise ValueError("Llama 2's chat format knows no tools; Llama 3.1's does")
        texts = [content_of(message) for message in dialog]
        for tag in _TAGS:
            if any(tag in text for text in texts):
                raise ValueError(
                    f"a message contains {tag!r}, which Llama 2 can't tell from the end of a "
                    "message: write it differently"
                )
        roles = [message["role"] for message in dialog]
        if roles[:1] == ["system"] and roles[1:2] == ["user"]:
            texts[:2] = [f"<<SYS>>\n{texts[0]}\n<</SYS>>\n\n{texts[1]}"]
            roles = roles[1:]
        if len(roles) % 2 == 0 or roles != (["user", "assistant"] * len(roles))[: len(roles)]:
            raise ValueError(
                "Llama 2's dialogs are an optional system message, then user and assistant in "
                f"turns, a user last: not {', '.join(message['role'] for message in dialog)}"
            )
        ids: List[int] = []
        for user, answer in zip(texts[::2], texts[1::2], strict=False):
            turn = f"[INST] {user.strip()} [/INST] {answer.strip()} "
            ids += self.tokenizer.encode(turn, bos=True, eos=True)
        return ids + self.tokenizer.encode(
            f"[INST] {texts[-1].strip()} [/INST]", bos=True, eos=False
        )
