"""An engine for asyncio: a thread makes the steps, and any number of tasks await events."""

import asyncio
import threading
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from types import TracebackType
from typing import (
    Any,
    AsyncIterator,
    Callable,
    Deque,
    Dict,
    List,
    Optional,
    Sequence,
    Set,
    Tuple,
    Type,
    TypeVar,
)  # fmt: skip

from llama.engine.engine import Engine
from llama.engine.leader import Leader
from llama.engine.predictions import Event
from llama.engine.requests import Request, Stats
from llama.layers import parallel

HEARTBEAT = 60.0  # seconds after which idle ranks, which wait for a step, get an empty one

T = TypeVar("T")


class Answer:
    """The events of a request: `async for event in answer`, to the end of its last row.

    Raises, while it is read:
        Exception: what the request failed with.
        RuntimeError: the engine has been stopped, or has failed.
    """

    def __init__(self, engine: "AsyncEngine", request: Request):
        self._engine, self.request = engine, request
        self._unread = self._untold = len(request.rows)  # their ends
        self._events: asyncio.Queue[Event | Exception | None] = asyncio.Queue()

    def __aiter__(self) -> "Answer":
        return self

    async def __anext__(self) -> Event:
        if not self._unread:
            raise StopAsyncIteration
        event = await self._events.get()
        if not isinstance(event, Event):
            self._unread = 0
            raise event or StopAsyncIteration
        self._unread -= event.finish_reason is not None
        return event

    def cancel(self) -> None:
        """End it: nothing is computed for it from the next step on. Call it in the event loop, as
        often as you like; who reads it sees its end."""
        self._engine._leave(self.request)
        self._unread = 0
        self._events.put_nowait(None)

    def _tell(self, event: Event | Exception) -> bool:
        """Pass on what comes next; returns whether that is all."""
        self._events.put_nowait(event)
        ends = isinstance(event, Event) and event.finish_reason is not None
        self._untold = self._untold - ends if isinstance(event, Event) else 0
        return not self._untold


class AsyncEngine:
    """An engine's steps in a thread, while the context lasts:

        async with AsyncEngine(engine) as running:
            async for event in running.stream(prompt_tokens, max_gen_len=100):
                print(event.text, end="")

    The event loop never waits for a step. Leaving the context cancels all requests. On several
    ranks, rank 0 has the AsyncEngine, and the others call `llama.engine.leader.follow`.

    Attributes:
        failure: what ended the thread, if it has failed; nothing is generated any more then.
    """

    def __init__(self, engine: Engine):
        self._engine = engine if parallel.world_size() == 1 else Leader(engine)
        self.failure: Optional[Exception] = None
        self._answers: Dict[Request, Answer] = {}  # the event loop's
        self._calls: Set[Future[Any]] = set()
        self._inbox: Deque[Callable[[], None]] = deque()  # run by the thread between two steps
        self._changed = threading.Condition()
        self._stopping = False
        # Grammars are compiled one at a time: those that wait leave the threads of others alone.
        self._compiler = ThreadPoolExecutor(1, "llama grammars")
        self._thread = threading.Thread(target=self._work, name="llama engine", daemon=True)

    @property
    def stats(self) -> Stats:
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
        self._compiler.shutdown(wait=False)
        self._end_all(RuntimeError("the engine has been stopped"))

    async def submit(
        self, prompt_tokens: Sequence[int], max_gen_len: int, **options: Any
    ) -> Answer:
        """Queue a request before the next step; see `Engine.make` for the options.

        Raises:
            ValueError: what `Engine.make` raises.
            RuntimeError: the engine has been stopped, or has failed.
        """
        self._check()
        make = partial(self._engine.make, prompt_tokens, max_gen_len, **options)
        compiles = options.get("response_format") is not None
        loop = asyncio.get_running_loop()
        request = await loop.run_in_executor(self._compiler if compiles else None, make)
        self._check()
        self._answers[request] = answer = Answer(self, request)
        self._send(lambda: self._engine.submit(request))
        return answer

    async def stream(
        self, prompt_tokens: Sequence[int], max_gen_len: int, **options: Any
    ) -> AsyncIterator[Event]:
        """The events of a request; see `submit`. Closing the iterator, or cancelling the task that
        reads it, cancels the request."""
        answer = await self.submit(prompt_tokens, max_gen_len, **options)
        try:
            async for event in answer:
                yield event
        finally:
            answer.cancel()

    async def call(self, function: Callable[[], T]) -> T:
        """What a function returns that the thread calls between two steps.

        Raises:
            Exception: what the function raises.
            RuntimeError: the engine has been stopped, or has failed.
        """
        self._check()
        result: Future[T] = Future()

        def run() -> None:
            if not result.set_running_or_notify_cancel():
                return
            try:
                result.set_result(function())
            except Exception as error:
                result.set_exception(error)

        self._calls.add(result)
        result.add_done_callback(self._calls.discard)
        self._send(run)
        return await asyncio.wrap_future(result)

    def _check(self) -> None:
        if self._thread.ident is None:
            raise RuntimeError(
                "the engine isn't running: async with llama.async_engine() as engine"
            )
        if self.failure is not None:
            raise RuntimeError(f"the engine has failed: {self.failure}") from self.failure
        if self._stopping:
            raise RuntimeError("the engine has been stopped")

    def _send(self, call: Callable[[], None]) -> None:
        """Have the thread call something before its next step."""
        with self._changed:
            self._inbox.append(call)
            self._changed.notify()

    def _leave(self, request: Request) -> None:
        """A request's reader goes."""
        if self._answers.pop(request, None) is not None:
            self._send(lambda: self._engine.cancel(request))

    def _deliver(self, found: List[Tuple[Request, Event]]) -> None:
        for request, event in found:
            answer = self._answers.get(request)
            if answer is not None:
                failed = request.error if event.finish_reason == "error" else None
                if answer._tell(failed or event):
                    del self._answers[request]

    def _end_all(self, error: Exception) -> None:
        for answer in self._answers.values():
            answer._tell(error)
        self._answers.clear()
        for result in list(self._calls):  # which the thread will never make
            result.set_exception(error)

    # --- in the thread ----------------------------------------------------------------------------

    def _work(self) -> None:
        try:
            while self._wait():
                found = self._engine.step()
                for request, _ in found:
                    request.events.clear()
                if found:  # all of them with one call
                    self._loop.call_soon_threadsafe(self._deliver, found)
        except Exception as error:  # not a request's own, which `step` returns as an event
            self.failure = error
            stopped = RuntimeError(f"the engine has failed: {error}")
            stopped.__cause__ = error
            self._loop.call_soon_threadsafe(self._end_all, stopped)
        finally:
            self._engine.cancel_all()

    def _wait(self) -> bool:
        """Wait until there is something to compute; returns whether to go on."""
        while True:
            with self._changed:
                while not self._inbox and self._engine.idle and not self._stopping:
                    if not self._changed.wait(HEARTBEAT):
                        return True
                calls, stopping = list(self._inbox), self._stopping
                self._inbox.clear()
            for call in calls:
                call()
            if stopping:
                return False
            if not self._engine.idle:
                return True
