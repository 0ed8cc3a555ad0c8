"""What was asked of an engine, and what it is doing about it."""

from collections import deque
from typing import Deque, Dict, List, NamedTuple, Optional, Set, Tuple

from llama.engine.predictions import Event
from llama.engine.rows import Row
from llama.engine.scheduler import Sequence

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


class Request:
    """A prompt and what was asked for; one sequence for each sample.

    Attributes:
        parts: its sequences.
        scores: of its prompt's tokens, as far as they are computed, with echo and logprobs.
        error: why it failed, or None.
        events: those that haven't been read. Their `row` is 0.
    """

    def __init__(
        self,
        rows: List[Row],
        *,
        stop_tokens: Set[int],
        logprobs: bool,
        top_logprobs: int,
        echo: bool,
        priority: int,
        cache_prompt: bool,
    ):
        self.rows, self.stop_tokens = rows, stop_tokens
        self.logprobs, self.top_logprobs = logprobs, top_logprobs
        self.cache_prompt = cache_prompt
        self.scored = echo and bool(logprobs or top_logprobs)
        self.scores: Dict[int, Details] = {}
        reuses = cache_prompt and not self.scored  # this needs the hidden states of all tokens
        self.parts: List[Part] = []
        for row in rows:
            row.echo = echo
            sequence = Sequence(list(row.prompt), row.max_len, priority, reuses, row.adapter)
            self.parts.append(Part(self, row, sequence))
        self.events: Deque[Event] = deque()
        self.error: Optional[Exception] = None
        self.unfinished = {id(row) for row in rows}

    @property
    def finished(self) -> bool:
        """Whether it has ended: complete, cancelled or failed."""
        return not self.unfinished


class Part(NamedTuple):
    """A sequence of a request."""

    request: Request
    row: Row
    sequence: Sequence
