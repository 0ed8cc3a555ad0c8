"""The engine: requests come and go, and each step is one forward pass for all that run.

A request's tokens depend on its prompt, parameters and seed alone. With the CPU kernels they are
bit-identical whatever else is computed with it, in whatever chunks, after however many preemptions.
"""

import threading
from math import isfinite
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple, Unpack

import torch

from llama.engine.blocks import Blocks
from llama.engine.loop import details_of, events_of, sample_row
from llama.engine.params import SamplingParams
from llama.engine.passes import hidden
from llama.engine.predictions import Event
from llama.engine.projection import PROJECTED
from llama.engine.requests import Details, Part, Request, Stats
from llama.engine.rows import Options, constrain, make_rows
from llama.engine.scheduler import Plan, Scheduler
from llama.engine.scheduler import Sequence as Scheduled
from llama.engine.structured import GrammarCompiler
from llama.layers import parallel
from llama.layers.paged import PAGE, PagedRows, blocks_for, copy_block
from llama.layers.revision import revision
from llama.model import Transformer
from llama.tokenizer import Tokenizer


class Engine:
    """Generates the answers of any number of requests together.

    Args:
        max_tokens_per_step: tokens of a forward pass at most; longer prompts take several.
        max_rows: requests that run at once; others wait.
        cache_tokens: positions of the cache.
        seed: of the requests that are added without one.

    Threads may share an engine; on several ranks, all make the same calls.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        *,
        max_tokens_per_step: int = 512,
        max_rows: int = 64,
        cache_tokens: int,
        seed: int = 1,
    ):
        for name, value in (
            ("max_tokens_per_step", max_tokens_per_step),
            ("max_rows", max_rows),
            ("cache_tokens", cache_tokens),
        ):
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        self._model, self._tokenizer = model, tokenizer
        blocks = Blocks(1 + blocks_for(cache_tokens), PAGE)
        self._pool = model.new_cache(1 + blocks.total, PAGE)
        self._scheduler = Scheduler(blocks, max_tokens=max_tokens_per_step, max_rows=max_rows)
        self._parts: Dict[Scheduled, Part] = {}
        self._revision = revision(model)  # of its weights
        self._compiler: Optional[GrammarCompiler] = None
        self._generator = torch.Generator().manual_seed(seed)  # of the seeds of rows
        self._lock = threading.RLock()  # held during steps
        self._compiling = threading.Lock()

    @property
    def idle(self) -> bool:
        """Whether no request waits or runs."""
        return not self._parts

    @property
    def stats(self) -> Stats:
        """Counts; during a step, of its beginning or its end."""
        scheduler, blocks = self._scheduler, self._scheduler.blocks
        return Stats(
            len(scheduler.waiting), len(scheduler.running), blocks.used, blocks.known,
            blocks.total, scheduler.computed, scheduler.reused, scheduler.preemptions,
        )  # fmt: skip

    def make(
        self,
        prompt_tokens: Sequence[int],
        max_gen_len: int,
        temperature: float = 0.6,
        top_p: float = 0.9,
        logprobs: bool = False,
        echo: bool = False,
        priority: int = 0,
        cache_prompt: bool = True,
        **options: Unpack[Options],
    ) -> Request:
        """A request for `submit`, checked, its response format compiled. It waits for no step.

        See `Llama.generate` for the arguments, and `Options`.

        Args:
            echo: the events of the prompt's tokens come first, with their log-probabilities if
                those were asked for; None for the first token.
            priority: a request of priority p may overtake those of priority 0 that came up to 100 p
                steps earlier.
            cache_prompt: False computes the whole prompt, whatever the cache knows of it.

        Raises:
            ValueError: what `Llama.generate` raises; a request that the cache can't hold.
        """
        params = options.get("params") or SamplingParams(temperature=temperature, top_p=top_p)
        if params.guidance_scale != 1 or options.get("speculate") not in (None, "off"):
            raise ValueError("guidance and speculative decoding: use Llama.generate")
        stops = options.get("stop_tokens")
        stops = self._tokenizer.stop_tokens if stops is None else stops
        rows = make_rows(
            self._model, [prompt_tokens], max_gen_len, params, self._generator, options
        )
        request = Request(
            rows, stop_tokens=stops, logprobs=logprobs, top_logprobs=options.get("top_logprobs", 0),
            echo=echo, priority=priority, cache_prompt=cache_prompt,
        )  # fmt: skip
        self._scheduler.check(request.parts[0].sequence)
        formats = options.get("response_format")
        if formats is not None:
            with self._compiling:
                if self._compiler is None:
                    self._compiler = GrammarCompiler(self._tokenizer, self._model.params.vocab_size)
                constrain(rows, self._compiler, formats, stops)
        for row in rows:
            row.begin(self._tokenizer, self._model.norm.weight.device)
        return request

    def submit(self, request: Request) -> None:
        """Queue a request that `make` made; not one that was cancelled since.

        Raises:
            ValueError: the cache could never hold it.
        """
        with self._lock:
            if not request.finished:
                self._queue(request.parts[:1] if request.scored else request.parts)

    def add(self, prompt_tokens: Sequence[int], max_gen_len: int, **options: Any) -> Request:
        """`make` and `submit`."""
        request = self.make(prompt_tokens, max_gen_len, **options)
        self.submit(request)
        return request

    def cancel(self, request: Request) -> None:
        """End a request: its blocks are free at once, and nothing more is computed for it."""
        with self._lock:
            for part in request.parts:
                if part.sequence in self._parts:
                    self._end(part)
            request.unfinished.clear()

    def cancel_all(self) -> None:
        with self._lock:
            for part in list(self._parts.values()):
                self.cancel(part.request)

    @torch.inference_mode()
    def step(self) -> List[Tuple[Request, Event]]:
        """One forward pass; the new tokens of the requests in it.

        A request that fails (a logits processor that raises, logits that aren't finite) ends with
        an event of finish_reason "error", and has an `error`; others aren't affected.
        """
        with self._lock:
            if revision(self._model) != self._revision:  # what is known was computed by others
                self._scheduler.blocks.clear()
                self._revision = revision(self._model)
            plan = self._scheduler.plan()
            if not plan.counts:
                return []
            found = self._run(plan)
            for request, event in found:
                request.events.append(event)
            return found

    def events(self, request: Request) -> Iterator[Event]:
        """The events of a request, as steps are made for it. Closing the iterator cancels it.

        Raises:
            Exception: its error.
        """
        try:
            while True:
                while request.events:
                    event = request.events.popleft()
                    if event.finish_reason == "error" and request.error is not None:
                        raise request.error
                    yield event
                if request.finished:
                    return
                self.step()
        finally:
            self.cancel(request)

    def _queue(self, parts: Sequence[Part]) -> None:
        for part in parts:
            self._scheduler.add(part.sequence)
            self._parts[part.sequence] = part

    # --- a step -----------------------------------------------------------------------------------

    def _run(self, plan: Plan) -> List[Tuple[Request, Event]]:
        for source, target in plan.copies:
            copy_block(self._pool, source, target)
        sequences = list(plan.counts)
        cache = PagedRows(
            self._pool, [s.table for s in sequences], [s.computed for s in sequences],
            [s.adapter for s in sequences],
        )  # fmt: skip
        new = [s.tokens[s.computed : s.computed + n] for s, n in plan.counts.items()]
        h = hidden(self._model, new, cache)
        ends, end = [], -1
        for sequence, n in plan.counts.items():
            part = self._parts[sequence]
            end += n
            if part.request.scored and part.row.echo:
                self._score(part, h[end - n + 1 : end + 1])
            self._scheduler.advance(sequence, n)
            if not sequence.remaining:
                ends.append((part, end))
        if not ends:
            return []
        return self._sample([part for part, _ in ends], h[[end for _, end in ends]])

    def _score(self, part: Part, h: torch.Tensor) -> None:
        """Score the prompt's tokens that follow the next ones, with their hidden states h."""
        request, begin = part.request, part.sequence.computed + 1
        following = part.row.prompt[begin : begin + len(h)]
        for at in range(0, len(following), PROJECTED):
            ids = [[token] for token in following[at : at + PROJECTED]]
            logits = self._model.logits(h[at : at + len(ids)])
            nothing: List[List[int]] = [[] for _ in ids]
            found = details_of(logits, ids, nothing, request.logprobs, request.top_logprobs)
            request.scores |= {begin + at + i: one for i, [one] in enumerate(found)}

    def _echo(self, part: Part) -> List[Event]:
        """The events of a prompt's tokens, if they are still to come."""
        row, request = part.row, part.request
        if not row.echo:
            return []
        row.echo, part.sequence.reuses = False, request.cache_prompt
        if request.scored and row.sample == 0:  # the others find it in the cache
            others = request.parts[1:]
            for other in others:
                other.sequence.reuses = request.cache_prompt
            self._queue(others)
        return [
            Event(
                row.index, row.sample, token, row.decoder.feed(token),
                *request.scores.get(i, (None, None)),
            )
            for i, token in enumerate(row.prompt)
        ]  # fmt: skip

    def _sample(self, parts: List[Part], h: torch.Tensor) -> List[Tuple[Request, Event]]:
        """Sample a token for each sequence from the hidden states h, (sequences, dim)."""
        logits = self._model.logits(h)
        largest, likeliest = (values.tolist() for values in logits.max(-1))  # NaN if any is
        sampled: List[List[int]] = [[] for _ in parts]
        if parallel.rank() == 0:
            for i, part in enumerate(parts):
                if not part.row.full:
                    sampled[i] = _tokens(part, logits[i : i + 1], largest[i], likeliest[i])
        sampled = parallel.share_lists(sampled, 2)
        details = self._details(parts, sampled, logits)
        found: List[Tuple[Request, Event]] = []
        for part, tokens, of_tokens, most in zip(parts, sampled, details, largest, strict=True):
            if part.request.finished:  # another of its sequences has failed
                continue
            row, request = part.row, part.request
            echoed = self._echo(part)
            if tokens:
                events = events_of(row, tokens, of_tokens, request.stop_tokens, False)
                part.sequence.tokens += [e.token for e in events if e.token is not None]
            elif row.full:  # from the beginning: no token was asked for
                text = row.decoder.finish()
                events = [Event(row.index, row.sample, None, text, finish_reason="length")]
            else:
                request.error = request.error or ValueError("sampling failed: see rank 0's error")
                events = [Event(row.index, row.sample, None, "", finish_reason="error")]
            if events[-1].finish_reason is not None:
                events[-1] = events[-1]._replace(cached_tokens=part.sequence.found)
            found += [(request, event) for event in echoed + events]
            if not isfinite(most) and not row.full:
                self._discard(part)
            if request.error is not None:
                self.cancel(request)
            elif events[-1].finish_reason is not None:
                self._end(part)
        return found

    def _details(
        self, parts: List[Part], sampled: List[List[int]], logits: torch.Tensor
    ) -> List[List[Details]]:
        """Log-probabilities of the sampled tokens of each sequence, where they were asked for."""
        nothing: Details = (None, None)
        found = [[nothing] * len(tokens) for tokens in sampled]
        for i, (part, tokens) in enumerate(zip(parts, sampled, strict=True)):
            wanted = part.request.logprobs, part.request.top_logprobs
            if tokens and any(wanted):
                [found[i]] = details_of(logits[i : i + 1], [tokens], [[]], *wanted)
        return found

    def _end(self, part: Part) -> None:
        part.request.unfinished.discard(id(part.row))
        del self._parts[part.sequence]
        self._scheduler.remove(part.sequence)

    def _discard(self, part: Part) -> None:
        """End a sequence whose keys and values are broken."""
        part.request.unfinished.discard(id(part.row))
        del self._parts[part.sequence]
        for block in self._scheduler.discard(part.sequence):
            for values in self._pool.parts.values():
                values[:, block] = 0  # a mask hides a value, but not that it isn't a number


def _tokens(part: Part, logits: torch.Tensor, largest: float, likeliest: int) -> List[int]:
    """The next token, and the stop token that a finished grammar implies; none if that fails."""
    tokens: List[int] = []
    try:
        if not isfinite(largest):
            raise ValueError(
                f"the model's logits at token {len(part.sequence.tokens)} of a request aren't "
                "finite: broken weights, or a dtype too narrow for them; try dtype=torch.float32"
            )
        sample_row(part.row, [], logits, [likeliest], part.request.stop_tokens, tokens)
    except Exception as error:  # of the caller's own code, too: other requests go on
        part.request.error = error
        return []
    return tokens
