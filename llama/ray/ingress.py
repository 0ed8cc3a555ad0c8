"""Where requests come in: reads each, chooses its replica, and passes the answer back.

torch isn't imported: these processes stay small.
"""

from typing import Any, Dict, List, Tuple

import msgspec
from ray.exceptions import RayActorError
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from llama.ray.routing import decoded, keys_of, references
from llama.server.errors import ApiError, busy, response
from llama.server.streams import json

PROMPTS = ("/chat/completions", "/completions")  # paths; beside those of responses
TRIES = 3  # replicas that may die of, or with, a request
SCOPE = ("type", "http_version", "method", "scheme", "path", "query_string", "headers", "client")

Whole = Tuple[int, bytes]  # an answer's status and body


class Ingress:
    """Passes requests to replicas, and their answers back."""

    def __init__(self, replicas: DeploymentHandle, max_body_mb: float):
        self._replicas, self._limit = replicas, max_body_mb * 1e6

    async def __call__(self, request: Request) -> Response:
        scope, body = {name: request.scope[name] for name in SCOPE}, bytearray()
        async for part in request.stream():
            body += part
            if len(body) > self._limit:
                break  # a replica refuses it
        path = request.url.path.removeprefix("/v1")
        if path in ("/metrics", "/stats"):
            return await self._all(scope, path)
        handle = self._replicas.options(stream=True, session_id=await self._keys(path, body))
        for _ in range(TRIES):
            answer: Any = handle.answer.remote(scope, bytes(body))
            try:
                return Passed(await anext(answer), answer)
            except RayActorError:  # nothing of an answer was sent yet: another replica can give it
                continue
            except BaseException:  # the client has left
                answer.cancel()
                raise
        return response(busy(f"{TRIES} replicas have ended before they answered", 1, 503))

    async def _keys(self, path: str, body: bytearray) -> str:
        """What a request's replica is chosen by: its prompt's beginning, or who keeps what it
        refers to."""
        responses = path.startswith("/responses")
        if path.startswith("/models"):  # of which one replica says when they were created
            return "models"
        if path not in PROMPTS and not responses:
            return ""
        value = decoded(bytes(body))
        kept = [*path.split("/")[2:3], *references(value)] if responses else []
        keepers = await self._ask_all("keeper", kept) if kept else []
        return next(filter(None, keepers), keys_of(value))

    async def _all(self, scope: Scope, path: str) -> Response:
        """Metrics of all replicas, each with its name; or the sum of their counts."""
        found: List[Whole] = await self._ask_all("whole", scope)
        if not found:
            return response(busy("there is no replica now", 5, 503))
        for status, body in found:
            if status != 200:
                return Response(body, status, media_type="application/json")
        if path == "/metrics":
            text = merged([body.decode() for _, body in found])
            return Response(text, media_type="text/plain; version=0.0.4")
        stats: List[Dict[str, int]] = [msgspec.json.decode(body) for _, body in found]
        return json({name: sum(one[name] for one in stats) for name in stats[0]})

    async def _ask_all(self, method: str, *args: Any) -> List[Any]:
        """What a method of each replica returns, without those that are ending."""
        asked = self._replicas.broadcast(method, *args)
        found = await asked.results_async(return_exceptions=True)
        return [one for one in found if not isinstance(one, BaseException)]


class Passed(Response):
    """An answer on its way from a replica to a client.

    If the replica dies, a stream of events ends with an error; another answer breaks off.
    """

    def __init__(self, first: List[Message], rest: "DeploymentResponseGenerator[List[Message]]"):
        super().__init__()
        self._messages, self._rest = first, rest

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        events = (b"content-type", b"text/event-stream; charset=utf-8")
        streams = events in map(tuple, self._messages[0]["headers"])
        try:
            for message in self._messages:
                await send(message)
            async for messages in self._rest:
                for message in messages:
                    await send(message)
        except RayActorError:
            if not streams:
                raise
            error = ApiError(503, "the replica has ended", kind="server_error", code="internal")
            data = msgspec.json.encode({"type": "error", **error.body})
            await send({"type": "http.response.body", "body": b"data: " + data + b"\n\n"})
        except BaseException:
            self._rest.cancel()
            raise


def merged(texts: List[str]) -> str:
    """Metrics of several replicas in Prometheus' text format: each described once."""
    found: Dict[str, List[str]] = {}
    for text in texts:
        lines: List[str] = []
        for line in text.splitlines():
            if line.startswith("# HELP "):
                lines = found.setdefault(line.split()[2], [])
            if line not in lines:
                lines.append(line)
    return "".join(f"{line}\n" for lines in found.values() for line in lines)
