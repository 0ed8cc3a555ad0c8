"""`/v1/completions`."""

import asyncio
from contextlib import aclosing
from typing import Any, AsyncGenerator, Dict, List, Optional

from starlette.requests import Request
from starlette.responses import Response

from llama.engine.predictions import Event
from llama.server.bodies import Completion, Inputs, StreamOptions
from llama.server.errors import invalid
from llama.server.service import Running, received
from llama.server.streams import EventStream, whole
from llama.server.texts import MOST_TOP_LOGPROBS, Offsets, text_ids, text_logprobs
from llama.tokenizer import Tokenizer

DEFAULT_MAX_TOKENS = 16  # OpenAI's
MOST_PROMPTS = 2048


async def completions(request: Request) -> Response:
    service, body, headers = await received(request, Completion)
    service.adapter(body.model)
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise invalid("best_of isn't supported: use n, and choose by logprobs", "best_of")
    top = body.logprobs or 0
    if not 0 <= top <= MOST_TOP_LOGPROBS:
        raise invalid(f"logprobs={top} must lie between 0 and {MOST_TOP_LOGPROBS}", "logprobs")
    if body.prompt is None:
        raise invalid("prompt is missing", "prompt")
    tokenizer = service.llama.tokenizer
    bos = tokenizer.add_bos and body.add_special_tokens
    prompts = await token_ids(tokenizer, body.prompt, "prompt", bos, body.parse_special)
    most = DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
    running = await service.submit(
        request, prompts, body, most, logprobs=body.logprobs is not None, top_logprobs=top,
        echo=bool(body.echo),
    )  # fmt: skip
    head = service.head("cmpl", "text_completion", body.model)
    if not body.stream:
        reply = await whole(request, _collected(tokenizer, running, head, body.logprobs))
        reply.headers.update(headers)
        return reply
    events = _chunks(tokenizer, running, head, body.logprobs, body.stream_options)
    return EventStream(events, service.settings.timeout, headers=headers, close=running.end)


async def token_ids(
    tokenizer: Tokenizer, inputs: Inputs, name: str, bos: bool, special: bool = False
) -> List[List[int]]:
    """Texts or token ids, one or several, as token ids.

    Args:
        special: the names of control tokens in texts are these tokens.

    Raises:
        ApiError: none, too many, an empty one, or ids outside of the vocabulary.
    """
    several: List[Any] = [inputs] if isinstance(inputs, str) else inputs
    if any(isinstance(one, int) for one in several):
        if not all(isinstance(one, int) for one in several):
            raise invalid(f"{name}: token ids beside texts; give lists of ids", name)
        several = [several]
    if not 1 <= len(several) <= MOST_PROMPTS:
        raise invalid(f"{name}: give 1 to {MOST_PROMPTS} at once, not {len(several)}", name)

    def run() -> List[List[int]]:
        return [text_ids(tokenizer, x, bos, special) if isinstance(x, str) else x for x in several]

    found = await asyncio.to_thread(run)
    for ids in found:
        if not ids:
            raise invalid(f"{name}: an empty one; it takes at least one token", name)
        wrong = next((i for i in ids if not 0 <= i < tokenizer.n_words), None)
        if wrong is not None:
            raise invalid(
                f"{name}: token id {wrong}; this vocabulary has 0 to {tokenizer.n_words - 1}", name
            )
    return found


async def _collected(
    tokenizer: Tokenizer, running: Running, head: Dict[str, Any], best: Optional[int]
) -> Dict[str, Any]:
    count = len(running.answers) * running.each
    events: List[List[Event]] = [[] for _ in range(count)]
    async with aclosing(running.events()) as found:  # type: ignore[type-var]
        async for choice, event in found:
            events[choice].append(event)
    choices = [
        {
            "index": i,
            "text": "".join(event.text for event in of_choice),
            "logprobs": None
            if best is None
            else text_logprobs(tokenizer, of_choice, best, Offsets(tokenizer)),
            "finish_reason": of_choice[-1].finish_reason,
        }
        for i, of_choice in enumerate(events)
    ]
    return {**head, "choices": choices, "usage": running.usage()}


async def _chunks(
    tokenizer: Tokenizer,
    running: Running,
    head: Dict[str, Any],
    best: Optional[int],
    options: Optional[StreamOptions],
) -> AsyncGenerator[Dict[str, Any], None]:
    offsets: Dict[int, Offsets] = {}
    async with aclosing(running.events()) as found:  # type: ignore[type-var]
        async for choice, event in found:
            if not (event.text or event.finish_reason or best is not None):
                continue
            details = None
            if best is not None:
                of_choice = offsets.setdefault(choice, Offsets(tokenizer))
                details = text_logprobs(tokenizer, [event], best, of_choice)
            only = {
                "index": choice, "text": event.text, "logprobs": details,
                "finish_reason": event.finish_reason,
            }  # fmt: skip
            yield {**head, "choices": [only], **running.usage_of_chunk(options)}
    if options is not None and options.include_usage:
        yield {**head, "choices": [], "usage": running.usage()}
