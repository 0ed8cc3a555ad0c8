"""Messages of dialogs, checked, with the images and tool calls in them."""

import json
from typing import Any, List, Literal, NamedTuple, Optional, Required, Sequence, TypedDict, Union

from llama.text.tool_stream import parse_tool_calls
from llama.text.tools import BUILTINS, Tool, ToolCall, plain_json

Role = Literal["system", "user", "assistant", "ipython", "tool"]
ROLES = ("system", "user", "assistant", "ipython", "tool")


class _Message(TypedDict, total=False):
    role: Required[Role]
    tool_calls: List[ToolCall]  # of the assistant
    end_of_message: bool  # of the assistant: it waits for a tool's result (Llama 3.1's <|eom_id|>)
    name: str  # of the tool whose result this is, for templates
    tool_call_id: str  # of the call whose result this is, for templates


class Message(_Message):
    """A message of a dialog, with the assistant's tool calls or a tool's result.

    content is a string, or a list of parts: {"type": "text", "text": ...} and, for models that see,
    {"type": "image", "image": ...} with what `llama.vision.images.open_image` takes or an address.
    The key may be "path", "url", "data" or "base64" as well (text in data is base64), and the part
    OpenAI's {"type": "image_url", "image_url": {"url": ...}} or an object of Meta's, RawMediaItem.

    tool_calls are {"name": ..., "arguments": {...}}, with an "id" if the chat template needs one.
    OpenAI's format, {"type": "function", "function": {...}}, is accepted too.
    """

    content: Any  # a str, or a list of parts


class Answer(_Message):
    """A message that a model has generated."""

    content: str


Dialog = Sequence[Message]


def check_dialogs(dialogs: Sequence[Dialog], assistant_first: bool = False) -> None:
    """Raises ValueError unless it is a list of dialogs; see `check_dialog`."""
    if not hasattr(dialogs, "__len__"):  # what is read once
        raise ValueError(f"dialogs is a {type(dialogs).__name__}: pass a list of dialogs")
    for i, dialog in enumerate(dialogs):
        if not isinstance(dialog, Sequence) or isinstance(dialog, str):
            raise ValueError("dialogs is one dialog: pass a list of dialogs")
        check_dialog(i, dialog, assistant_first)


def check_dialog(i: int, dialog: Dialog, assistant_first: bool = False) -> None:
    """Raises ValueError for a malformed dialog, with its index i and what is wrong.

    Args:
        assistant_first: whether it may begin with the assistant, with a greeting for example.
    """
    if not dialog:
        raise ValueError(f"dialog {i} is empty: it takes at least one message")
    for message in dialog:
        try:
            _check_message(message)
        except ValueError as error:
            raise ValueError(f"dialog {i}: {error}") from None
    if dialog[0]["role"] == "assistant" and not assistant_first:
        raise ValueError(
            f"dialog {i} begins with the assistant: begin with a user or a system message"
        )


_CONTENT = "a message is {'role': ..., 'content': a string or a list of parts}"
_KINDS = {"tool_calls": list, "end_of_message": bool, "name": str, "tool_call_id": str}
_FROM_ASSISTANT = ("tool_calls", "end_of_message")


def _check_message(message: Any) -> None:
    if not isinstance(message, dict) or not {"role", "content"} <= set(message):
        raise ValueError(f"{_CONTENT}, not {message!r}")
    if message["role"] not in ROLES:
        raise ValueError(f"unknown role {message['role']!r}; roles are {', '.join(ROLES)}")
    for key in set(message) - {"role", "content"}:
        if key not in _KINDS:
            raise ValueError(f"{_CONTENT} and has no {key!r}; it may have {', '.join(_KINDS)}")
        if not isinstance(message[key], _KINDS[key]):
            raise ValueError(f"a message's {key} is a {_KINDS[key].__name__}: {message[key]!r}")
        if key in _FROM_ASSISTANT and message["role"] != "assistant":
            raise ValueError(f"{key} belongs to the assistant, not to {message['role']!r}")
    calls = tool_calls(message)
    if message["content"] is None and not calls:
        raise ValueError(f"{_CONTENT}, not {message!r}")
    parts_of(message)


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
    """A message's text; in OpenAI's format it may be None beside tool calls.

    Raises:
        ValueError: it has an image. Formats that have a place for these read `parts_of`.
    """
    parts = parts_of(message)
    if any(isinstance(part, ImagePart) for part in parts):
        raise ValueError(
            f"an image in a message of role {message['role']!r}: this model's chat format has no "
            "place for it there"
        )
    return "".join(parts)  # type: ignore[arg-type]


class ImagePart(NamedTuple):
    """An image in a message, as it was given."""

    source: Any


def parts_of(message: Any) -> List[Union[str, ImagePart]]:
    """A message's content in its order, each text apart.

    Raises:
        ValueError: a part that is neither text nor image.
    """
    content = message["content"]
    if content is None:
        return []
    parts = list(content) if isinstance(content, (list, tuple)) else [content]
    return [part if isinstance(part, str) else _part(part) for part in parts]


def _part(part: Any) -> Union[str, ImagePart]:
    def get(name: str) -> Any:
        return part.get(name) if isinstance(part, dict) else getattr(part, name, None)

    kind = get("type")
    if kind == "text" and isinstance(get("text"), str):
        return str(get("text"))
    if kind in ("image", "image_url"):
        sources = [get("image_url"), *map(get, ("image", "path", "url"))]
        if isinstance(sources[0], dict):
            sources[0] = sources[0].get("url")
        for data in map(get, ("data", "base64")):
            sources.append(f"data:;base64,{data}" if isinstance(data, str) else data)
        given = [source for source in sources if source is not None]
        if len(given) == 1:
            return ImagePart(given[0])
    raise ValueError(
        "a part of a message is {'type': 'text', 'text': ...} or {'type': 'image', 'image': ...}, "
        f"not {str(part)[:200]}"
    )


def image_sources(dialog: Dialog) -> List[Any]:
    """What the images of a dialog are given as, in order."""
    parts = [part for message in dialog for part in parts_of(message)]
    return [part.source for part in parts if isinstance(part, ImagePart)]


def texts_alone(prompts: Sequence[str]) -> Sequence[str]:
    """Prompts, for what takes no images.

    Raises:
        ValueError: one has an image.
    """
    for i, prompt in enumerate(prompts):
        if image_sources([{"role": "user", "content": prompt}]):
            raise ValueError(
                f"prompt {i} has an image, and beam search takes texts: leave it out, or use "
                "text_completion"
            )
    return prompts


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
