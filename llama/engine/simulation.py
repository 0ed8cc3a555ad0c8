"""An engine's scheduler on a virtual clock: how long requests would wait, with nothing computed.

The scheduler is the engine's own, with its blocks, prefix caching and preemption. What a pass of
the model would take is said by a cost model, whose coefficients are fitted to measured passes.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Callable, Dict, Iterable, Iterator, List, NamedTuple, Sequence, Tuple

import numpy as np

from llama.engine.scheduler import Plan, Scheduler
from llama.engine.scheduler import Sequence as Scheduled


class Pass(NamedTuple):
    """What the time of a forward pass depends on."""

    rows: int  # sequences
    tokens: int
    positions: int  # of the cache, that attention reads: of each sequence, with its new ones
    pairs: int  # of a new token and a position that it attends to

    @classmethod
    def of(cls, counts: Iterable[Tuple[int, int]]) -> "Pass":
        """Of sequences, each with its new tokens and those that were computed before."""
        rows = tokens = positions = pairs = 0
        for n, known in counts:
            rows, tokens, positions = rows + 1, tokens + n, positions + known + n
            pairs += n * known + n * (n + 1) // 2
        return cls(rows, tokens, positions, pairs)

    @classmethod
    def planned(cls, plan: Plan) -> "Pass":
        return cls.of((n, sequence.computed) for sequence, n in plan.counts.items())


@dataclass(frozen=True)
class Cost:
    """Seconds of a pass: `cost(Pass(...))`.

    Args:
        points: numbers of tokens, and the seconds that a pass of so many takes, whatever the rows
            and their context: linear between them, and beyond the last two.
        row, position, pair: seconds of each.
    """

    points: Tuple[Tuple[float, float], ...]
    row: float = 0.0
    position: float = 0.0
    pair: float = 0.0

    def __call__(self, made: Pass) -> float:
        weights = _weights(made.tokens, [at for at, _ in self.points])
        base = sum(self.points[i][1] * share for i, share in weights)
        return base + made.rows * self.row + made.positions * self.position + made.pairs * self.pair


def _weights(tokens: float, points: Sequence[float]) -> List[Tuple[int, float]]:
    """The two points between which so many tokens lie, or that are nearest; and their shares."""
    if len(points) == 1:
        return [(0, 1.0)]
    last = next((i for i, at in enumerate(points[1:-1], 1) if tokens <= at), len(points) - 1)
    share = max(0.0, (tokens - points[last - 1]) / (points[last] - points[last - 1]))
    return [(last - 1, 1 - share), (last, share)]


def fit(measured: Sequence[Tuple[Pass, float]]) -> Cost:
    """The cost model nearest to measured passes: least squares of relative errors, none negative.

    It has a point for each number of tokens that was measured.

    Raises:
        ValueError: nothing to fit to.
    """
    if not measured:
        raise ValueError("no measured passes: a cost model is fitted to one or more")
    points = sorted({made.tokens for made, _ in measured})
    table = np.zeros((len(measured), len(points) + 3))
    for line, (made, seconds) in zip(table, measured, strict=True):
        for i, share in _weights(made.tokens, points):
            line[i] = share
        line[len(points) :] = made.rows, made.positions, made.pairs
        line /= seconds
    table /= (scale := np.abs(table).max(0))
    kept = list(range(len(scale)))
    while True:
        found = np.linalg.lstsq(table[:, kept], np.ones(len(table)), rcond=None)[0]
        if found.min() >= 0:
            break
        del kept[int(found.argmin())]
    values = np.zeros(len(scale))
    values[kept] = found / scale[kept]
    *bases, row, position, pair = map(float, values)
    return Cost(tuple(zip(map(float, points), bases, strict=True)), row, position, pair)


class Arrival(NamedTuple):
    """A request: it comes at a time, in seconds, and gets so many tokens for an answer."""

    at: float
    prompt: List[int]
    answer: int
    priority: int = 0


class Timing:
    """When a request came, and when it got each of its tokens, in seconds."""

    def __init__(self, at: float):
        self.at = at
        self.times: List[float] = []

    @property
    def first(self) -> float:
        """Seconds to the first token."""
        return self.times[0] - self.at

    @property
    def between(self) -> List[float]:
        """Seconds between each two tokens."""
        return [after - before for before, after in pairwise(self.times)]


def passes(
    scheduler: Scheduler,
    arrivals: Iterable[Arrival],
    seconds: Callable[[Pass], float],
    timings: List[Timing],
) -> Iterator[Plan]:
    """Runs requests to the end of the last one; yields each pass before it is computed.

    Args:
        arrivals: in the order of time.
        seconds: what a pass takes.
        timings: gets one for each request, in the order of arrival.

    Raises:
        ValueError: a request that the cache can't hold.
    """
    clock, todo = 0.0, iter(arrivals)
    running: Dict[Scheduled, Timing] = {}
    come = next(todo, None)
    while come or running:
        while come and come.at <= clock:
            length = len(come.prompt) + come.answer
            sequence = Scheduled(list(come.prompt), length, come.priority)
            scheduler.add(sequence)
            timings.append(Timing(come.at))
            running[sequence] = timings[-1]
            come = next(todo, None)
        plan = scheduler.plan()
        if not plan.counts:
            assert come
            clock = come.at
            continue
        made = Pass.planned(plan)
        yield plan
        clock += seconds(made)
        for sequence, n in plan.counts.items():
            scheduler.advance(sequence, n)
            if not sequence.remaining:
                running[sequence].times.append(clock)
                sequence.tokens.append(0)
                if len(sequence.tokens) >= sequence.max_len:
                    scheduler.remove(sequence)
                    del running[sequence]


def simulate(
    scheduler: Scheduler, arrivals: Iterable[Arrival], seconds: Callable[[Pass], float]
) -> List[Timing]:
    """When each request gets its tokens; see `passes`."""
    timings: List[Timing] = []
    for _ in passes(scheduler, arrivals, seconds, timings):
        pass
    return timings
