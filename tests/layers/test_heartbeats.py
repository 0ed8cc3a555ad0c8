"""Signs of life on a clock of the test's own. What becomes of real ranks is in test_nodes.py."""

from types import SimpleNamespace

import pytest
import torch.distributed as dist

from llama.layers import heartbeats
from llama.layers.heartbeats import BEATS, ENDED, Heartbeats

TIMEOUT = 60.0
RAISES = "def all_reduce():\n    raise RuntimeError('connection closed')"


class Ended(Exception):
    """In place of the process' end."""


class Clock:
    """An event, whose waits take the times given, and then as long as is asked for."""

    def __init__(self, *times: float):
        self.now, self.times, self.waits = 0.0, [*times], 0

    def monotonic(self) -> float:
        return self.now

    def wait(self, seconds: float) -> bool:
        self.now += self.times.pop(0) if self.times else seconds
        self.waits += 1
        return False

    def is_set(self) -> bool:
        return False

    def set(self) -> None: ...

    clear = set


@pytest.fixture
def made(monkeypatch):
    """Rank 0 of two, of which the other one gives no further sign; without its threads."""

    def make(clock: Clock) -> Heartbeats:
        rank = Heartbeats.__new__(Heartbeats)
        rank._rank, rank._timeout, rank._interval = 0, TIMEOUT, TIMEOUT / BEATS
        rank._signs, rank._closed = [(b"a 0", 0.0), (b"b 0", 0.0)], None
        rank._answered = rank._stopping = clock  # type: ignore[assignment]
        monkeypatch.setattr(heartbeats, "time", SimpleNamespace(monotonic=clock.monotonic))
        monkeypatch.setattr(rank, "_exchange", lambda sign: None)

        def end(lost: str) -> None:
            raise Ended(lost)

        monkeypatch.setattr(rank, "_end", end)
        return rank

    return make


@pytest.mark.parametrize("suspended", [0, 10 * TIMEOUT])
def test_time_while_this_process_is_suspended_does_not_count(made, suspended):
    for loop in (Heartbeats._beat, Heartbeats._watch):
        clock = Clock(1.0, 1.0 + suspended)
        with pytest.raises(Ended, match="rank 1 on host b" if loop is Heartbeats._beat else "^$"):
            loop(made(clock))
        assert clock.waits >= BEATS


def test_a_failed_collective_is_found_behind_the_error_that_it_caused():
    """As the engine's thread raises it, and then the main one."""
    names: dict = {}
    exec(compile(RAISES, "/site-packages/torch/distributed/distributed_c10d.py", "exec"), names)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True)
    store.set("sign of life of rank 1", f"there {ENDED}")
    rank_0 = Heartbeats(store, "here", rank=0, world=2, timeout=20)
    try:
        try:
            names["all_reduce"]()
        except RuntimeError as error:
            cause = error
        found = RuntimeError("the engine has failed")
        found.__cause__ = cause
        said = rank_0.explain(found)
        assert said and said.startswith("error: rank 1 on host there has ended; rank 0 on host ")
        assert said.endswith(" waited for all_reduce")
        assert rank_0.explain(RuntimeError("its own")) is None
    finally:
        rank_0.stop()
