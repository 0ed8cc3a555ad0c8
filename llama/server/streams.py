"""Answers that end when their reader leaves: whole ones, and server-sent events."""

import asyncio
import math
from contextlib import aclosing, suppress
from typing import Any, AsyncGenerator, Callable, Coroutine, Mapping, Optional, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from llama.server.errors import as_api_error

T = TypeVar("T")
KEEP_ALIVE = 10  # seconds of silence after which a comment tells that the answer is under way


class Left(Exception):
    """The client has closed the connection."""


async def until_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of some work, which is cancelled when the client leaves.

    Raises:
        Left: it has left.
    """
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait([task, gone], return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Left
        return task.result()
    finally:
        for one in (task, gone):
            one.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def whole(request: Request, work: Coroutine[Any, Any, Any]) -> Response:
    """JSON of what the work returns."""
    try:
        return json(await until_gone(request.receive, work))
    except Left:
        return Response(status_code=499)  # nobody reads it


def json(value: Any, headers: Optional[Mapping[str, str]] = None) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json", headers=headers)


class EventStream(Response):
    """Server-sent events: objects as `data: JSON`, or with names; at the end `data: [DONE]`.

    A failure in the middle becomes an event in the shape of an error. While nothing comes, comments
    keep the connection open. A client that reads nothing for `timeout` seconds is dropped.

    Args:
        events: objects; a dict with a "type" of a "named" stream has that as the event's name.
        done: the last line.
        close: called in the end, also if the client has left before the first event.
    """

    def __init__(
        self,
        events: AsyncGenerator[Any, None],
        timeout: float,
        *,
        named: bool = False,
        done: bytes = b"data: [DONE]\n\n",
        headers: Optional[Mapping[str, str]] = None,
        close: Callable[[], None],
    ):
        super().__init__(
            media_type="text/event-stream",
            headers={"cache-control": "no-cache", "x-accel-buffering": "no", **(headers or {})},
        )
        del self.headers["content-length"]
        self._events, self._timeout, self._named, self._done = events, timeout, named, done
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        now = asyncio.get_running_loop().time
        spoke = math.inf  # when the last event was sent; infinite while there must be no comment

        async def write(data: bytes, more: bool = True) -> None:
            nonlocal spoke
            spoke = math.inf
            async with asyncio.timeout(self._timeout):
                await send({"type": "http.response.body", "body": data, "more_body": more})
            if more:
                spoke = now()

        async def work() -> None:
            nonlocal spoke
            async with aclosing(self._events) as events:
                await send(
                    {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
                )
                spoke = now()
                try:
                    async for value in events:
                        await write(self._format(value))
                    await write(self._done, more=False)
                except TimeoutError:
                    raise Left from None
                except Exception as error:
                    await write(self._format({"type": "error", **as_api_error(error).body}))
                    await write(b"", more=False)

        async def heard() -> Message:
            """What the client says, while comments are sent: here rather than where events are,
            so that these need no timers."""
            while True:
                with suppress(TimeoutError):
                    async with asyncio.timeout_at(min(spoke, now()) + KEEP_ALIVE):
                        return await receive()
                if now() - spoke >= KEEP_ALIVE:
                    try:
                        await write(b": working\n\n")
                    except TimeoutError:
                        return {"type": "http.disconnect"}

        try:
            with suppress(Left):
                await until_gone(heard, work())
        finally:
            self._close()

    def _format(self, value: Any) -> bytes:
        name = b"event: " + value["type"].encode() + b"\n" if self._named else b""
        return name + b"data: " + msgspec.json.encode(value) + b"\n\n"
