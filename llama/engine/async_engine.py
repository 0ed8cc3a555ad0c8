"""An engine for asyncio: a thread makes the steps, and any number of tasks await events."""

import asyncio
import threading
from collections import deque
from concurrent.futures import Future
from types import TracebackType
from typing import Any, AsyncIterator, Callable, Deque, Dict, Optional, Sequence, Type, TypeVar

from llama.engine.engine import Engine, Request, Stats
from llama.engine.predictions import Event

T = TypeVar("T")


class AsyncEngine:
    """An engine's steps in a thread, while the context lasts:

        async with AsyncEngine(engine) as running:
            async for event in running.stream(prompt_tokens, max_gen_len=100):
                print(event.text, end="")

    The event loop never waits for a step. Leaving the context cancels all requests.
    """

    def __init__(self, engine: Engine):
        self._engine = engine
        self._readers: Dict[Request, asyncio.Queue[Event | Exception]] = {}
        self._inbox: Deque[Callable[[], None]] = deque()  # run by the thread between two steps
        self._changed = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._work, name="llama engine", daemon=True)

    @property
    def stats(self) -> Stats:
        """The engine's, as of the last step."""
        return self._engine.stats

    async def __aenter__(self) -> "AsyncEngine":
        self._loop = asyncio.get_running_loop()
        self._thread.start()
        return self

    async def __aexit__(
        self,
        kind: Optional[Type[BaseException]],
        error: Optional[BaseException],
        traceback: Optional[TracebackType],
    ) -> None:
        with self._changed:
            self._stopping = True
            self._changed.notify()
        await asyncio.to_thread(self._thread.join)

    async def stream(
        self, prompt_tokens: Sequence[int], max_gen_len: int, **options: Any
    ) -> AsyncIterator[Event]:
        """The events of a request; see `Engine.add` for the options.

        Closing the iterator, or cancelling the task that reads it, cancels the request: nothing is
        computed for it from the next step on.

        Raises:
            ValueError: what `Engine.add` raises.
            Exception: what the request failed with.
            RuntimeError: the engine has been stopped.
        """
        events: asyncio.Queue[Event | Exception] = asyncio.Queue()

        def add() -> Request:
            request = self._engine.add(prompt_tokens, max_gen_len, **options)
            self._readers[request] = events
            return request

        adding = self._submit(add)
        try:
            request = await asyncio.shield(asyncio.wrap_future(adding))
            unfinished = len(request.rows)
            while unfinished:
                event = await events.get()
                if isinstance(event, Exception):
                    raise event
                yield event
                unfinished -= event.finish_reason is not None
        finally:
            self._submit(lambda: self._leave(adding))

    def _submit(self, call: Callable[[], T]) -> "Future[T]":
        """Have the thread call something before its next step."""
        result: Future[T] = Future()

        def run() -> None:
            try:
                result.set_result(call())
            except Exception as error:
                result.set_exception(error)

        with self._changed:
            if self._stopping:
                result.set_exception(RuntimeError("the engine has been stopped"))
            else:
                self._inbox.append(run)
                self._changed.notify()
        return result

    # --- in the thread ----------------------------------------------------------------------------

    def _leave(self, adding: "Future[Request]") -> None:
        """A request's reader has gone."""
        if adding.exception() is None:
            self._readers.pop(adding.result(), None)
            self._engine.cancel(adding.result())

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._inbox and self._engine.idle and not self._stopping:
                    self._changed.wait()
                calls, stopping = list(self._inbox), self._stopping
                self._inbox.clear()
            for call in calls:
                call()
            if stopping:
                self._end_all(RuntimeError("the engine has been stopped"))
                return
            try:
                found = self._engine.step()
            except Exception as error:  # not a request's own, which `step` returns as an event
                self._end_all(error)
                continue
            for request, event in found:
                request.events.clear()
                failed = request.error if event.finish_reason == "error" else None
                self._tell(request, failed or event)

    def _tell(self, request: Request, what: Event | Exception) -> None:
        reader = self._readers.get(request)
        if reader is not None:
            self._loop.call_soon_threadsafe(reader.put_nowait, what)

    def _end_all(self, error: Exception) -> None:
        for request in list(self._readers):
            self._tell(request, error)
            self._engine.cancel(request)
        self._readers.clear()
