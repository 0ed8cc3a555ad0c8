"""Signs of life of all ranks: one that dies, hangs or is cut off ends the others, which name it.

A collective doesn't say whom it waits for, and waits for long: other ranks may load a model
meanwhile, or a user may think. So a thread of each rank counts in the job's store, and ends its
process when another rank's count, or the store, has stood still for too long.
"""

import os
import socket
import sys
import threading
import time
import traceback
from itertools import count
from pathlib import Path
from types import FrameType
from typing import Iterable, Optional, Tuple

import torch.distributed as dist

PACKAGE = Path(__file__).resolve().parents[1]
COLLECTIVES = os.path.join("torch", "distributed", "")
BEATS = 20  # of a timeout
START = 5  # timeouts that all ranks have for starting, which takes some of them longer
ENDED = "ended"  # the last sign of a rank that has come to its end by itself


class Heartbeats:
    """Counts from now on until `stop`, or until it ends the process.

    Args:
        store: of the job; the ranks of another start of it have another one.
        place: where the store is, for messages.
        timeout: seconds without a sign of life after which a rank is taken for lost.
    """

    def __init__(self, store: dist.Store, place: str, rank: int, world: int, timeout: float):
        self._store = store.clone()  # type: ignore[attr-defined]  # another thread may wait in it
        self._place, self._rank, self._timeout = place, rank, timeout
        self._interval = timeout / BEATS
        self._keys = [f"sign of life of rank {i}" for i in range(world)]
        self._signs = [(b"", time.monotonic())] * world  # the last ones, and since when
        self._closed: Optional[float] = None  # when the store was found to be
        self._answered, self._stopping = threading.Event(), threading.Event()
        self._beating = threading.Thread(target=self._beat, name="heartbeats", daemon=True)
        self._beating.start()
        threading.Thread(target=self._watch, name="heartbeats of store", daemon=True).start()

    def stop(self) -> None:
        """Tell the others that this rank has ended by itself."""
        self._stopping.set()
        self._answered.set()
        self._beating.join(self._timeout)

    def explain(self, error: BaseException) -> Optional[str]:
        """Whom a collective waited for that failed; None for an error of this rank's own.

        A peer that was killed stands still only from then on: it takes a few heartbeats to see it.
        Rank 0 waits for some more, since the store, in which the others look, ends with it.
        """
        waited_for: Optional[str] = None
        cause: Optional[BaseException] = error
        while isinstance(cause, RuntimeError) and waited_for is None:
            waited_for = _collective(traceback.walk_tb(cause.__traceback__))
            cause = cause.__cause__
        if waited_for is None:
            return None
        few, deadline = 4 * self._interval, time.monotonic() + self._timeout
        wait = few if self._rank else 1.5 * few
        while not (self._lost(wait, ended=True) or self._closed or time.monotonic() > deadline):
            time.sleep(self._interval)
        alive = "" if self._closed else "all ranks are alive, but one hasn't come in time"
        return self._message(self._lost(few, ended=True) or alive, waited_for)

    # --- in threads of their own ------------------------------------------------------------------

    def _beat(self) -> None:
        """Count, and look whether the others do."""
        for number in count():
            last = self._stopping.is_set()
            try:
                self._exchange(ENDED if last else str(number))
            except RuntimeError:
                self._closed = time.monotonic()
            self._answered.set()
            if last or self._closed:
                break
            if lost := self._lost(self._timeout):
                self._end(lost)
            before = time.monotonic()
            self._stopping.wait(self._interval)
            now = time.monotonic()
            if now - before > self._timeout / 2:  # suspended, as others were and may be yet
                self._signs = [(value, now) for value, _ in self._signs]
        if not last and (lost := self._lost(self._timeout / 2)):
            self._end(lost)  # that's why the store's rank has ended, too

    def _exchange(self, sign: str) -> None:
        self._store.set(self._keys[self._rank], f"{socket.gethostname()} {sign}")
        if self._store.check(self._keys):
            for rank, value in enumerate(self._store.multi_get(self._keys)):
                if value != self._signs[rank][0]:
                    self._signs[rank] = value, time.monotonic()
        elif (waited := time.monotonic() - self._signs[self._rank][1]) > START * self._timeout:
            late = [rank for rank, key in enumerate(self._keys) if not self._store.check([key])]
            self._end(f"ranks {', '.join(map(str, late))} have not started after {waited:.0f} s")

    def _watch(self) -> None:
        """The store's machine may be the one that is cut off; then `_beat` waits in it.

        Short waits are counted, so that none passes while this process is suspended."""
        waits = 0
        while waits < BEATS:
            waits = 0 if self._answered.wait(self._interval) else waits + 1
            self._answered.clear()
            if self._stopping.is_set():
                return
        self._end("")

    def _end(self, lost: str) -> None:
        frames, main = sys._current_frames(), threading.main_thread().ident
        stacks = (
            reversed([*traceback.walk_stack(frames[thread])])
            for thread in sorted(frames, key=lambda thread: thread != main)
        )
        waited_for = next(filter(None, map(_collective, stacks)), None)
        os.write(2, f"{self._message(lost, waited_for)}\n".encode())
        os._exit(1)  # the main thread can't be interrupted while it waits

    # --- messages ---------------------------------------------------------------------------------

    def _lost(self, seconds: float, ended: bool = False) -> str:
        """The ranks that have given no sign for so long, or have ended; "" if there are none."""
        found, now = [], self._closed or time.monotonic()
        for rank, (value, since) in enumerate(self._signs):
            host, _, sign = value.decode().partition(" ")
            if rank == self._rank or not sign:  # it hasn't started
                continue
            if sign == ENDED and ended:
                found.append(f"rank {rank} on host {host} has ended")
            elif sign != ENDED and now - since >= seconds:
                found.append(f"rank {rank} on host {host} has not answered for {now - since:.0f} s")
        return "; ".join(found)

    def _message(self, lost: str, waited_for: Optional[str]) -> str:
        """Why this rank ends, of which only some other one or the store can be the reason."""
        if not lost:
            host = self._signs[0][0].decode().partition(" ")[0]
            lost = f"the job's store at {self._place}, beside rank 0 on host {host}, has " + (
                "closed the connection" if self._closed else f"not answered for {self._timeout:g} "
                "s: that machine or this one is cut off from the network"
            )  # fmt: skip
        me = f"rank {self._rank} on host {socket.gethostname()}"
        return f"error: {lost}; {me} " + (f"waited for {waited_for}" if waited_for else "ends")


def _collective(stack: Iterable[Tuple[FrameType, int]]) -> Optional[str]:
    """What a stack, outermost frame first, waits for, as `all_reduce in Attention.forward (...)`;
    None if it is in no collective."""
    caller = ""
    for frame, line in stack:
        path, code = Path(frame.f_code.co_filename), frame.f_code
        if COLLECTIVES in code.co_filename and path.name != "c10d_logger.py":
            return code.co_name + caller
        if PACKAGE in path.parents and path.name != "parallel.py":
            caller = f" in {code.co_qualname} ({path.relative_to(PACKAGE.parent)}:{line})"
    return None
