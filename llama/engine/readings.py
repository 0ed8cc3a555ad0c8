"""Requests whose tokens are read and not continued, for scores and embeddings.

They share passes and the cache with all other requests. Positions before the first one that is
wanted are taken from the cache where it knows them, so a context that many continuations have in
common is computed once.
"""

from collections import deque
from typing import Deque, Iterable, List, Sequence, Tuple

import torch

from llama.engine.engine import Engine
from llama.engine.projection import logprobs_of
from llama.engine.requests import Reading, Request
from llama.model import Transformer


class States:
    """Hidden states after the model's last norm, of the tokens from `start` on."""

    def __init__(self, start: int = 0):
        self.start = start
        self._parts: List[torch.Tensor] = []

    def read(self, model: Transformer, begin: int, h: torch.Tensor) -> None:
        if begin == self.start:  # at first, and again after a preemption
            self._parts = []
        self._parts.append(h.float().cpu())

    @property
    def states(self) -> torch.Tensor:
        """(tokens, dim), fp32, on the CPU."""
        return torch.cat(self._parts)


class Scores:
    """What the model says of ids[start:], each given those before it; start >= 1.

    Attributes:
        logprobs: of each, natural.
        greedy: whether each is the most probable token.
    """

    def __init__(self, ids: Sequence[int], start: int):
        self._ids, self.start = ids, start - 1  # the position that predicts the first of them
        self.logprobs: List[float] = []
        self.greedy: List[bool] = []

    def read(self, model: Transformer, begin: int, h: torch.Tensor) -> None:
        ids = torch.tensor(self._ids[begin + 1 : begin + 1 + len(h)], device=h.device)
        logprobs, greedy = logprobs_of(model, h, ids)
        done = begin - self.start  # less than before, after a preemption
        self.logprobs[done:], self.greedy[done:] = logprobs.tolist(), greedy.tolist()


def read(engine: Engine, texts: Iterable[Tuple[Sequence[int], Reading]], batch_size: int) -> None:
    """Compute token ids, and show their hidden states to a reading each; `batch_size` at a time.

    Steps that others make of the engine meanwhile do no harm. An error cancels what is left.
    """
    running: Deque[Request] = deque()
    try:
        for ids, reading in texts:
            if len(running) == batch_size:
                _finish(engine, running)
            running.append(engine.add(ids, 0, reading=reading))
        while running:
            _finish(engine, running)
    finally:
        for request in running:
            engine.cancel(request)
        engine.tidy()


def _finish(engine: Engine, running: Deque[Request]) -> None:
    """Make steps until one of the requests is finished, and drop those that are."""
    while not any(request.finished for request in running):
        engine.step()
    for request in [request for request in running if request.finished]:
        running.remove(request)
        if request.error is not None:
            raise request.error
