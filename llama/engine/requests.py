"""What was asked of an engine, and what it is doing about it."""

from collections import deque
from numbers import Real
from typing import Callable, Deque, Dict, List, NamedTuple, Optional, Protocol, Set, Tuple, cast

import torch

from llama.engine.images import keyed
from llama.engine.predictions import Event
from llama.engine.rows import Row
from llama.engine.scheduler import Scheduler, Sequence
from llama.engine.speculative import Speculator
from llama.model import Transformer

Details = Tuple[Optional[float], Optional[List[Tuple[int, float]]]]  # logprob, top_logprobs


class Stats(NamedTuple):
    """What an engine is doing, and what it has done so far."""

    waiting: int  # sequences: one for each sample of a request
    running: int
    blocks_used: int  # of the cache, by running requests
    blocks_known: int  # whose content later requests can use
    blocks: int  # of the cache
    computed_tokens: int  # of prompts and answers
    cached_tokens: int  # found in the cache
    preemptions: int  # sequences that lost their blocks and are computed again
    queried_tokens: int  # looked up in the cache


def stats_of(scheduler: Scheduler) -> Stats:
    blocks = scheduler.blocks
    return Stats(
        len(scheduler.waiting), len(scheduler.running), blocks.used, blocks.known, blocks.total,
        scheduler.computed, scheduler.reused, scheduler.preemptions, scheduler.queried,
    )  # fmt: skip


class Reading(Protocol):
    """Sees the hidden states of a prompt's tokens from `start` on, as they are computed.

    `read` gets those from position `begin` on, (tokens, dim), in order, and again from `start` if
    its request has been preempted.
    """

    start: int

    def read(self, model: Transformer, begin: int, h: torch.Tensor) -> None: ...


class Request:
    """Prompts and what was asked for; a part for each sample of each prompt.

    Attributes:
        scores: of its prompts' tokens, as far as they are computed, with echo and logprobs.
        words: ids that the tokenizer knows; a model's vocabulary may be padded beyond them.
        error: why it failed, or None.
        events: those that haven't been read.
    """

    def __init__(
        self,
        rows: List[Row],
        *,
        stop_tokens: Set[int],
        words: int,
        logprobs: bool,
        top_logprobs: int,
        echo: bool,
        priority: int,
        cache_prompt: bool,
        should_stop: Optional[Callable[[], bool]],
        speculator: Optional[Speculator],
        reading: Optional[Reading] = None,
    ):
        if not isinstance(cast(object, priority), Real):
            raise ValueError(f"priority={priority!r} isn't a number")
        self.reading = reading
        self.rows, self.stop_tokens, self.words = rows, stop_tokens, words
        self.logprobs, self.top_logprobs = logprobs, top_logprobs
        self.cache_prompt, self.should_stop = cache_prompt, should_stop
        self.speculator = speculator
        self.scored = echo and bool(logprobs or top_logprobs)
        self.scores: Dict[int, Dict[int, Details]] = {row.index: {} for row in rows}
        # Positions whose hidden states are needed are computed, whatever the cache knows of them.
        most = 0 if self.scored or not cache_prompt else reading.start if reading else None
        self.parts: List[Part] = []
        for row in rows:
            row.echo = echo
            sequence = Sequence(keyed(row), row.max_len, priority, most, row.adapter)
            self.parts.append(part := Part(self, row, sequence))
            if row.sample:
                part.first = self.parts[-1 - row.sample]
                part.first.siblings.append(part)
        self.events: Deque[Event] = deque()
        self.error: Optional[Exception] = None
        self.unfinished = {id(row) for row in rows}

    @property
    def finished(self) -> bool:
        """Whether it has ended: complete, cancelled or failed."""
        return not self.unfinished


class Part:
    """A row of a request, and its sequences in the cache.

    Attributes:
        first: that of the prompt's first sample, perhaps itself.
        siblings: the prompt's further samples, which begin when it is computed.
        negative: with guidance, the same answer after the negative prompt.
        ready: with guidance, the hidden states to sample from, once they are computed: of its own
            sequence (False) and of the negative one (True).
    """

    def __init__(self, request: Request, row: Row, sequence: Sequence):
        self.request, self.row, self.sequence = request, row, sequence
        self.first: Part = self
        self.siblings: List[Part] = []
        self.negative: Optional[Sequence] = None
        self.ready: Dict[bool, torch.Tensor] = {}
        if row.params.guidance_scale != 1:
            prompt = list(row.params.negative_prompt or row.prompt[-1:])
            length = len(prompt) + row.max_len - len(row.prompt)
            self.negative = Sequence(
                prompt, length, sequence.priority, sequence.reusable, row.adapter, extra=True
            )

    @property
    def asked(self) -> int:
        """The positions at which a pass that ends with its last known token predicts one."""
        return 0 if self.row.full and self.negative is None else 1 + len(self.sequence.draft)

    @property
    def sequences(self) -> List[Sequence]:
        return [self.sequence] if self.negative is None else [self.sequence, self.negative]
