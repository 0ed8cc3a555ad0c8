"""Dialogs to token ids: the messages, what a chat format is, and Llama 3's."""

import json
import warnings
from dataclasses import dataclass, field
from typing import (
    TYPE_CHECKING,
    Any,
    List,
    Literal,
    Mapping,
    Optional,
    Protocol,
    Sequence,
    TypedDict,
)

from llama.text.encoder import Encoder
from llama.text.tool_stream import parse_tool_calls
from llama.text.tools import BUILTINS, Tool, ToolCall, plain_json

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


@dataclass(frozen=True)
class PromptOptions:
    """How a prompt ends, and what a chat template is told.

    Args:
        add_generation_prompt: the header of the assistant's answer follows the dialog; by default
            unless the last message is continued.
        continue_final_message: the last message, the assistant's, is left open: the answer is its
            continuation.
        template_kwargs: further variables of a chat template, of JSON types.

    Raises:
        ValueError: both add_generation_prompt and continue_final_message.
    """

    add_generation_prompt: Optional[bool] = None
    continue_final_message: bool = False
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.continue_final_message and self.add_generation_prompt:
            raise ValueError(
                "add_generation_prompt begins a new message and continue_final_message goes on "
                "with the last one: choose one"
            )

    @property
    def begins_answer(self) -> bool:
        """Whether the header of a new message follows the dialog."""
        return self.add_generation_prompt is not False and not self.continue_final_message

    def check(self, dialog: Dialog, *, takes_kwargs: bool = False) -> None:
        """Raises ValueError for a last message that can't be continued, and for template_kwargs of
        a format without template."""
        last = dialog[-1] if dialog else {"role": "nobody", "content": ""}
        if self.continue_final_message and last["role"] != "assistant":
            raise ValueError(
                "continue_final_message: the last message is the assistant's, not of the role "
                f"{last['role']!r}"
            )
        if self.continue_final_message and (last.get("tool_calls") or last.get("end_of_message")):
            raise ValueError("continue_final_message: the last message ends with its tool calls")
        if self.template_kwargs and not takes_kwargs:
            named = ", ".join(map(str, self.template_kwargs))
            raise ValueError(f"template_kwargs: this model has no chat template to take {named}")


PLAIN = PromptOptions()


class Format(Protocol):
    """A chat format: how a checkpoint expects dialogs to be encoded."""

    def encode_dialog_prompt(
        self,
        dialog: Dialog,
        tools: Optional[Sequence[Tool]] = None,
        options: PromptOptions = PLAIN,
    ) -> List[int]:
        """The dialog, followed by the header of the assistant's answer; see `PromptOptions`.

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
        self,
        dialog: Dialog,
        tools: Optional[Sequence[Tool]] = None,
        options: PromptOptions = PLAIN,
    ) -> List[int]:
        """The dialog, and the header of the assistant's answer for the model to go on from.

        Raises:
            ValueError: there are tools or tool calls, or what `PromptOptions.check` raises.
        """
        options.check(dialog)
        if tools:
            raise ValueError("Llama 3's chat format knows no tools; Llama 3.1's does")
        ids = [self.tokenizer.special_tokens["<|begin_of_text|>"]]
        for message in dialog:
            ids.extend(self.encode_message(message))
        if options.continue_final_message:
            return ids[:-1]  # without the end of its turn
        header = self.encode_header({"role": "assistant", "content": ""})
        return ids + header if options.begins_answer else ids

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
