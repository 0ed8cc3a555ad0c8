"""`/tokenize`, `/detokenize` and `/apply-template`, also under `/v1`."""

import asyncio
from typing import Any, Dict, List

from starlette.requests import Request
from starlette.responses import Response

from llama.server.bodies import Chat, Detokenize, Tokenize
from llama.server.chat import shown_tools
from llama.server.dialogs import encode
from llama.server.errors import invalid
from llama.server.service import received
from llama.server.streams import json
from llama.server.texts import text_ids
from llama.text.encoder import IMAGE
from llama.tokenizer import Tokenizer


async def tokenize(request: Request) -> Response:
    """Token ids of a text ("prompt" as vLLM, "content" as llama.cpp says) or of a dialog."""
    service, body, headers = await received(request, Tokenize)
    service.adapter(body.model)
    tokenizer = service.llama.tokenizer
    given = [x for x in (body.prompt, body.content, body.messages) if x is not None]
    if len(given) != 1:
        raise invalid("give one of prompt, content and messages", "prompt")
    if body.messages is not None:
        dialog = Chat(
            messages=body.messages, tools=body.tools,
            add_generation_prompt=body.add_generation_prompt,
            continue_final_message=body.continue_final_message,
            chat_template_kwargs=body.chat_template_kwargs,
        )  # fmt: skip
        asked = await encode(service, dialog, shown_tools(dialog) or None)
        ids = await service.computed(*asked)
    else:
        bos, text = tokenizer.add_bos and body.add_special_tokens, str(given[0])
        ids = await asyncio.to_thread(text_ids, tokenizer, text, bos, body.parse_special)
    tokens: List[Any] = list(ids)
    if body.with_pieces:
        tokens = [{"id": i, "piece": _piece(_bytes(tokenizer, i))} for i in ids]
    found = {"tokens": tokens, "count": len(ids), "max_model_len": service.context}
    return json(found, headers)


def _bytes(tokenizer: Tokenizer, token: int) -> bytes:
    """Also of an image's token, which may be the first beyond the vocabulary."""
    return IMAGE.encode() if token == tokenizer.n_words else tokenizer.decode_bytes([token])


def _piece(data: bytes) -> Any:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return list(data)


async def detokenize(request: Request) -> Response:
    service, body, headers = await received(request, Detokenize)
    service.adapter(body.model)
    try:
        text = await asyncio.to_thread(service.llama.tokenizer.decode, body.tokens)
    except ValueError as error:
        raise invalid(str(error), "tokens") from None
    found: Dict[str, Any] = {"prompt": text, "content": text}
    return json(found, headers)


async def apply_template(request: Request) -> Response:
    """The text of a chat request as the model sees it, and its token ids."""
    service, body, headers = await received(request, Chat)
    service.adapter(body.model)
    ids = await service.computed(*await encode(service, body, shown_tools(body) or None))
    pieces = (_bytes(service.llama.tokenizer, i) for i in ids)
    text = b"".join(pieces).decode("utf-8", "replace")
    return json({"prompt": text, "tokens": ids, "count": len(ids)}, headers)
