"""Messages of the API as dialogs, and dialogs as token ids."""

import asyncio
import json
from typing import Any, Dict, List, Optional, Sequence, Union

from llama.generation import Llama
from llama.server.bodies import Chat, ChatMessage, Part
from llama.server.errors import invalid
from llama.text.chat import Message, PromptOptions
from llama.text.context import encode_dialogs

MOST_MESSAGES = 4096
# What PromptOptions' errors begin with, as it is called here.
_PARAMETERS = {
    "template_kwargs": "chat_template_kwargs",
    "continue_final_message": "continue_final_message",
}


async def encode(
    llama: Llama, body: Chat, tools: Optional[Sequence[Any]], truncate: Optional[str] = None
) -> List[int]:
    """The token ids of a body's dialog, in another thread: templates may take long.

    Args:
        truncate: as `Llama.chat_completion` takes it.

    Raises:
        ApiError, ValueError: messages that aren't a dialog, or that the chat format can't express.
    """
    dialog = messages_of(body.messages)
    given = {
        "add_generation_prompt": body.add_generation_prompt,
        "continue_final_message": body.continue_final_message,
        "template_kwargs": body.chat_template_kwargs,
    }
    options = PromptOptions(**{k: v for k, v in given.items() if v is not None})  # type: ignore[arg-type]
    formatter = llama.formatter
    if formatter is None:
        raise invalid("this model has no chat format: use /v1/completions", "messages")

    def run() -> List[int]:
        try:
            [ids], _ = encode_dialogs(
                formatter, [dialog], tools, truncate, body.max_tokens,
                llama.model.params.max_seq_len, options,
            )  # fmt: skip
        except ValueError as error:
            text = str(error).removeprefix("dialog 0: ").replace("dialog 0", "the dialog")
            raise invalid(text, _PARAMETERS.get(text.partition(":")[0], "messages")) from None
        return ids

    return await asyncio.to_thread(run)


def messages_of(messages: Sequence[ChatMessage]) -> List[Message]:
    """Raises ApiError: no messages, too many, or content that isn't text."""
    if not 1 <= len(messages) <= MOST_MESSAGES:
        raise invalid(f"{len(messages)} messages: give 1 to {MOST_MESSAGES}", "messages")
    return [_message(i, message) for i, message in enumerate(messages)]


def _message(i: int, message: ChatMessage) -> Message:
    where = f"messages[{i}]"
    role = "system" if message.role == "developer" else message.role
    content = _text(where, message.refusal if message.content is None else message.content)
    found: Dict[str, Any] = {"role": role, "content": content}
    if message.tool_calls:
        found["tool_calls"] = [
            {"id": call.id or "", "name": call.function.name, "arguments": _object(where, call)}
            for call in message.tool_calls
        ]
    elif found["content"] is None:
        raise invalid(f"{where}: content is missing", f"{where}.content")
    if message.tool_call_id is not None:
        found["tool_call_id"] = message.tool_call_id
    if message.name is not None:
        found["name"] = message.name
    return found  # type: ignore[return-value]


def _text(where: str, content: Union[str, List[Part], None]) -> Optional[str]:
    if content is None or isinstance(content, str):
        return content
    texts = []
    for part in content:
        text = part.text if part.type in ("text", "input_text", "output_text") else part.refusal
        if text is None:
            raise invalid(
                f"{where}: no text in a part of type {part.type[:50]!r}; the model reads only text",
                f"{where}.content",
            )
        texts.append(text)
    return "".join(texts)


def _object(where: str, call: Any) -> Any:
    try:
        return json.loads(call.function.arguments or "{}")
    except (ValueError, RecursionError):
        raise invalid(
            f"{where}: the arguments of the call of {call.function.name[:100]!r} aren't JSON",
            f"{where}.tool_calls",
        ) from None
