"""`/v1/embeddings`."""

import base64
from functools import partial
from typing import Any, Dict, List

import torch
from starlette.requests import Request
from starlette.responses import Response

from llama.apps.server.bodies import Embeddings
from llama.apps.server.completions import token_ids
from llama.apps.server.errors import ApiError, invalid
from llama.apps.server.service import Service, received
from llama.apps.server.streams import whole
from llama.engine.embeddings import embed_ids
from llama.layers import parallel


async def embeddings(request: Request) -> Response:
    service, body, headers = await received(request, Embeddings)
    if service.adapter(body.model) is not None:
        raise invalid(f"model={body.model!r}: embeddings are the base model's", "model")
    if parallel.world_size() > 1:
        raise ApiError(501, "embeddings need a server on one rank", kind="server_error")
    width = service.llama.model.params.dim
    if body.dimensions is not None and not 1 <= body.dimensions <= width:
        raise invalid(f"dimensions={body.dimensions} must lie between 1 and {width}", "dimensions")
    texts = await token_ids(service.llama.tokenizer, body.input, "input")
    for ids in texts:
        service.check_length(ids, "input")
    reply = await whole(request, _embedded(service, body, texts))
    reply.headers.update(headers)
    return reply


async def _embedded(service: Service, body: Embeddings, texts: List[List[int]]) -> Dict[str, Any]:
    data = []
    for i, ids in enumerate(texts):  # one at a time: steps of the engine come between
        compute = partial(embed_ids, service.llama.model, [ids], body.pooling, normalize=False)
        [row] = await service.engine.call(compute)
        row = row[: body.dimensions]
        if body.normalize:
            row = torch.nn.functional.normalize(row, dim=-1)
        vector: Any = row.tolist()
        if body.encoding_format == "base64":
            vector = base64.b64encode(row.numpy().astype("<f4").tobytes()).decode()
        data.append({"object": "embedding", "index": i, "embedding": vector})
    tokens = sum(map(len, texts))
    service.metrics.prompt_tokens.inc(tokens)
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return {
        "object": "list", "data": data, "model": body.model or service.name, "usage": usage
    }  # fmt: skip
