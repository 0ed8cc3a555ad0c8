"""Messages of the API as dialogs, and dialogs as token ids."""

import asyncio
import json
from typing import Any, Dict, List, Optional, Sequence, Tuple, Union

from llama.engine.seeing import sees
from llama.server.bodies import Chat, ChatMessage, Part
from llama.server.errors import invalid
from llama.server.service import Service
from llama.text.chat import Message, PromptOptions
from llama.text.context import TooLong, encode_dialogs, without
from llama.text.messages import image_sources

MOST_MESSAGES = 4096
# What PromptOptions' errors begin with, as it is called here.
_PARAMETERS = {
    "template_kwargs": "chat_template_kwargs",
    "continue_final_message": "continue_final_message",
}


async def encode(
    service: Service, body: Chat, tools: Optional[Sequence[Any]], truncate: Optional[str] = None
) -> Tuple[List[int], List[Any]]:
    """The token ids of a body's dialog and its images as they are given, in another thread:
    templates may take long.

    Args:
        truncate: as `Llama.chat_completion` takes it.

    Raises:
        ApiError, ValueError: messages that aren't a dialog, or that the chat format can't express.
    """
    dialog = messages_of(body.messages, sees(service.llama.model))
    given = {
        "add_generation_prompt": body.add_generation_prompt,
        "continue_final_message": body.continue_final_message,
        "template_kwargs": body.chat_template_kwargs,
    }
    options = PromptOptions(**{k: v for k, v in given.items() if v is not None})  # type: ignore[arg-type]
    formatter = service.llama.formatter
    if formatter is None:
        raise invalid("this model has no chat format: use /v1/completions", "messages")

    def run() -> Tuple[List[int], List[Any]]:
        try:
            [ids], [dropped] = encode_dialogs(
                formatter, [dialog], tools, truncate, body.max_tokens,
                service.context, options, assistant_first=True,
            )  # fmt: skip
        except TooLong as error:
            raise invalid(
                f"the last turn and system messages take {error.tokens} tokens, and beside the "
                f"answer the context has {error.limit}: shorten them, or ask for a shorter answer "
                "(max_output_tokens)", "messages", "context_length_exceeded",
            ) from None  # fmt: skip
        except ValueError as error:
            text = str(error).removeprefix("dialog 0: ").replace("dialog 0", "the dialog")
            raise invalid(text, _PARAMETERS.get(text.partition(":")[0], "messages")) from None
        return ids, image_sources(without(dialog, dropped))

    return await asyncio.to_thread(run)


def messages_of(messages: Sequence[ChatMessage], images: bool = False) -> List[Message]:
    """Raises ApiError: no messages, too many, or content that is neither text nor, if they are
    allowed, images."""
    if not 1 <= len(messages) <= MOST_MESSAGES:
        raise invalid(f"{len(messages)} messages: give 1 to {MOST_MESSAGES}", "messages")
    return [_message(i, message, images) for i, message in enumerate(messages)]


def _message(i: int, message: ChatMessage, images: bool) -> Message:
    where = f"messages[{i}]"
    role = "system" if message.role == "developer" else message.role
    given = message.refusal if message.content is None else message.content
    content = _content(where, given, images)
    found: Dict[str, Any] = {"role": role, "content": content}
    if message.tool_calls:
        found["tool_calls"] = [
            {"name": call.function.name, "arguments": _object(call)}
            | ({"id": call.id} if call.id else {})
            for call in message.tool_calls
        ]
    elif found["content"] is None:
        raise invalid(f"{where}: content is missing", f"{where}.content")
    if message.tool_call_id is not None:
        found["tool_call_id"] = message.tool_call_id
    if message.name is not None:
        found["name"] = message.name
    return found  # type: ignore[return-value]


def _content(
    where: str, content: Union[str, List[Part], None], images: bool
) -> Union[str, List[Any], None]:
    """One text, unless there are images between several."""
    if content is None or isinstance(content, str):
        return content
    found: List[Any] = []
    for part in content:
        if images and part.type == "image_url":
            found.append({"type": "image_url", "image_url": part.image_url})
            continue
        text = part.text if part.type in ("text", "input_text", "output_text") else part.refusal
        if text is None:
            reads = "texts, and images by image_url" if images else "only text"
            raise invalid(
                f"{where}: no text in a part of type {part.type[:50]!r}; the model reads {reads}",
                f"{where}.content",
            )
        found.append(text)
    return "".join(found) if all(isinstance(one, str) for one in found) else found


def _object(call: Any) -> Any:
    """A call's arguments. Those that a reply was cut off in, or that aren't an object, are kept as
    they are under a key of their own, so that the model sees what it wrote."""
    try:
        value = json.loads(call.function.arguments or "{}")
    except (ValueError, RecursionError):
        value = None
    return value if isinstance(value, dict) else {"arguments": call.function.arguments}
