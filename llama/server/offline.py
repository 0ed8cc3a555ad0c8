"""Requests of the server's API without a server: no connection, no port, and no uvicorn."""

import asyncio
import json
import queue
import threading
from concurrent.futures import Future
from contextlib import nullcontext, suppress
from itertools import islice
from typing import Any, Iterable, Iterator, List, Mapping, NamedTuple

from starlette.types import Message, Scope

from llama.server.app import make_app
from llama.server.service import Service, limits, load, model_name
from llama.server.settings import Settings


class Request(NamedTuple):
    """A request by its number: where it goes, its JSON, and a seed for want of one in it."""

    number: int
    path: str
    body: bytes
    seed: int


def beginning(request: Request) -> str:
    """How a request's prompt begins. Those that begin alike share what is computed for them, if
    they are answered one after the other by the same engine."""
    body = json.loads(request.body)
    names = ("model", "tools", "instructions", "messages", "prompt", "input")
    return json.dumps([body[name] for name in names if name in body])


class Reply(NamedTuple):
    """The number of the request, the status, and the JSON of the answer or the error."""

    number: int
    status: int
    body: bytes


class EngineFailed(RuntimeError):
    """Nothing can be answered any more. A request's own failure is its reply."""


class Offline:
    """A loaded model that answers requests as `llama serve` does, by the same application.

    Threads may share it. Leaving the context cancels what runs.

    Args:
        options: of `Llama.build`.

    Raises:
        ValueError, OSError: what loading the model fails with.
    """

    def __init__(self, options: Mapping[str, Any], settings: Settings):
        llama = load(options, settings)
        most = limits(llama, settings)
        engine = llama.async_engine(**most)
        self._window = 2 * most["max_rows"]  # requests under way, so that no row waits for one
        name = settings.served_name or model_name(str(options["ckpt_dir"]))
        self._app, self._stop = make_app(settings, nullcontext, []), asyncio.Event()
        loop: Future[asyncio.AbstractEventLoop] = Future()

        async def run() -> None:
            async with engine:
                self._app.state.service = Service(llama, engine, settings, name, local=True)
                loop.set_result(asyncio.get_running_loop())
                await self._stop.wait()

        self._thread = threading.Thread(target=lambda: asyncio.run(run()), daemon=True)
        self._thread.start()
        self._loop = loop.result()

    def __enter__(self) -> "Offline":
        return self

    def __exit__(self, *error: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    def submit(self, request: Request) -> "Future[Reply]":
        """The reply to come. Its exception may be EngineFailed."""
        return asyncio.run_coroutine_threadsafe(self._answer(request), self._loop)

    def answers(self, requests: Iterable[Request]) -> Iterator[List[Reply]]:
        """The replies, some at a time, in the order in which they are finished.

        Raises:
            EngineFailed: the engine has failed.
        """
        done: queue.SimpleQueue[Future[Reply]] = queue.SimpleQueue()
        running, waiting = 0, iter(requests)
        while True:
            for request in islice(waiting, self._window - running):
                self.submit(request).add_done_callback(done.put)
                running += 1
            if not running:
                return
            found = [done.get().result()]
            while not done.empty():
                found.append(done.get().result())
            running -= len(found)
            yield found

    async def _answer(self, request: Request) -> Reply:
        status, parts, unread = 500, [], [request.body]

        async def receive() -> Message:
            if unread:
                return {"type": "http.request", "body": unread.pop()}
            return await asyncio.get_running_loop().create_future()  # this client never leaves

        async def send(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            parts.append(message.get("body", b""))

        scope: Scope = {
            "type": "http", "method": "POST", "path": request.path, "query_string": b"",
            "headers": [(b"host", b"localhost")], "state": {"seed": request.seed},
        }  # fmt: skip
        with suppress(Exception):  # it has been answered, and is raised for a server's log
            await self._app(scope, receive, send)
        failure = self._app.state.service.engine.failure
        if failure is not None:
            raise EngineFailed(f"the engine has failed: {failure}") from failure
        return Reply(request.number, status, b"".join(parts))
