"""An engine on several ranks whose requests reach rank 0 alone, as a server's do.

Before each step rank 0 sends what has changed since the last one: requests to add, requests to
cancel, or the end. The other ranks make the same changes and the same step. A request's callbacks
(`logits_processor`, `should_stop`) stay on rank 0, which alone samples.
"""

from dataclasses import replace
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple
from weakref import WeakKeyDictionary

from llama.engine.engine import Engine
from llama.engine.predictions import Event
from llama.engine.requests import Request
from llama.layers import parallel

OWN = ("should_stop", "response_format")  # which only rank 0 looks at


def _is_asked_elsewhere() -> bool:
    """In the place of a `should_stop`: ranks know which requests have one, and rank 0 asks it."""
    return False


class _Changes(NamedTuple):
    """What rank 0 sends before a step."""

    added: List[Tuple[int, Sequence[int], int, Dict[str, Any]]]  # number, prompt, length, options
    cancelled: List[int]
    stop: bool


class Leader:
    """Rank 0's engine, with the methods of `Engine` that `AsyncEngine` uses. The other ranks call
    `follow` with theirs. On one rank it changes nothing."""

    def __init__(self, engine: Engine):
        self._engine = engine
        self._asked: WeakKeyDictionary[Request, Tuple[Any, ...]] = WeakKeyDictionary()
        self._numbers: Dict[Request, int] = {}  # of those that are running
        self._count = 0
        self._changes = _Changes([], [], False)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def make(self, prompt_tokens: Sequence[int], max_gen_len: int, **options: Any) -> Request:
        """`Engine.make`."""
        request = self._engine.make(prompt_tokens, max_gen_len, **options)
        sent = {name: value for name, value in options.items() if name not in OWN}
        if options.get("should_stop") is not None:
            sent["should_stop"] = _is_asked_elsewhere
        sent["seed"] = request.rows[0].seed  # drawn here, if none was given
        if sent.get("params") is not None:
            sent["params"] = replace(sent["params"], logits_processor=None)
        self._asked[request] = list(prompt_tokens), max_gen_len, sent
        return request

    def submit(self, request: Request) -> None:
        """`Engine.submit`; call it from the thread that makes the steps."""
        asked = self._asked.pop(request)
        if not request.finished:
            self._numbers[request] = self._count
            self._changes.added.append((self._count, *asked))
            self._count += 1
            self._engine.submit(request)

    def cancel(self, request: Request) -> None:
        """`Engine.cancel`; call it from the thread that makes the steps."""
        self._asked.pop(request, None)
        number = self._numbers.pop(request, None)
        if number is not None and not request.finished:
            self._changes.cancelled.append(number)
        self._engine.cancel(request)

    def step(self) -> List[Tuple[Request, Event]]:
        """`Engine.step`, on all ranks."""
        self._send(stop=False)
        found = self._engine.step()
        for request, _ in found:
            if request.finished:
                self._numbers.pop(request, None)
        return found

    def cancel_all(self) -> None:
        """Cancel all requests, and end `follow` on the other ranks."""
        self._engine.cancel_all()
        self._numbers.clear()
        self._send(stop=True)

    def _send(self, stop: bool) -> None:
        changes, self._changes = self._changes._replace(stop=stop), _Changes([], [], False)
        parallel.broadcast_object(changes)


def follow(engine: Engine) -> None:
    """Make the steps of rank 0's `Leader`, until its end. For all ranks but 0."""
    requests: Dict[int, Request] = {}
    while True:
        changes: Optional[_Changes] = parallel.broadcast_object(None)
        assert changes is not None
        if changes.stop:
            engine.cancel_all()
            return
        for number, prompt, max_gen_len, options in changes.added:
            requests[number] = engine.add(prompt, max_gen_len, **options)
        for number in changes.cancelled:
            engine.cancel(requests.pop(number))
        engine.step()
        requests = {number: r for number, r in requests.items() if not r.finished}
        for request in requests.values():
            request.events.clear()
