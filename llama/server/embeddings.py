"""`/v1/embeddings`."""

import base64
from typing import Any, Dict, List, Optional

import torch
from starlette.requests import Request
from starlette.responses import Response

from llama.engine.async_engine import Answer
from llama.engine.embeddings import Pooling, pooled, pooled_states
from llama.engine.readings import States
from llama.server.bodies import Embeddings
from llama.server.completions import token_ids
from llama.server.errors import invalid
from llama.server.service import Service, received
from llama.server.streams import whole


async def embeddings(request: Request) -> Response:
    service, body, headers = await received(request, Embeddings)
    adapter = service.adapter(body.model)
    width = service.llama.model.params.dim
    if body.dimensions is not None and not 1 <= body.dimensions <= width:
        raise invalid(f"dimensions={body.dimensions} must lie between 1 and {width}", "dimensions")
    tokenizer = service.llama.tokenizer
    texts = await token_ids(tokenizer, body.input, "input", tokenizer.add_bos)
    for ids in texts:
        service.check_length(ids, "input", answer=0)
    at_once = min(len(texts), service.llama.model.params.max_batch_size)
    service.admit(at_once)
    service.rows += at_once
    try:
        reply = await whole(request, _embedded(service, body, texts, adapter))
    finally:
        service.rows -= at_once
    reply.headers.update(headers)
    return reply


async def _embedded(
    service: Service, body: Embeddings, texts: List[List[int]], adapter: Optional[str]
) -> Dict[str, Any]:
    data: List[Dict[str, Any]] = []
    most = service.llama.model.params.max_batch_size
    for begin in range(0, len(texts), most):
        for states in await _states(service, texts[begin : begin + most], body.pooling, adapter):
            row = pooled(states)[: body.dimensions]
            if body.normalize:
                row = torch.nn.functional.normalize(row, dim=-1)
            vector: Any = row.tolist()
            if body.encoding_format == "base64":
                vector = base64.b64encode(row.numpy().astype("<f4").tobytes()).decode()
            data.append({"object": "embedding", "index": len(data), "embedding": vector})
    tokens = sum(map(len, texts))
    service.metrics.prompt_tokens.inc(tokens)
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return {
        "object": "list", "data": data, "model": body.model or service.name, "usage": usage
    }  # fmt: skip


async def _states(
    service: Service, texts: List[List[int]], pooling: Pooling, adapter: Optional[str]
) -> List[States]:
    """The states of texts, which are requests like others to the engine."""
    readings = [pooled_states(ids, pooling) for ids in texts]
    answers: List[Answer] = []
    try:
        for ids, reading in zip(texts, readings, strict=True):
            answer = await service.engine.submit(ids, 0, reading=reading, adapter=adapter)
            answers.append(answer)
        for answer in answers:
            async for _ in answer:
                pass
    finally:  # a client that has left waits for nothing
        for answer in answers:
            answer.cancel()
    return readings
