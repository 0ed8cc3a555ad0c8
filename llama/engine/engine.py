"""The engine: requests come and go, and each step is one forward pass for all that run.

A request's tokens depend on its prompt, parameters and seed alone. With the CPU kernels they are
bit-identical whatever else is computed with it, in whatever chunks, after however many preemptions.
"""

import threading
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple, Unpack

import torch

from llama.engine.chunks import make_blocks
from llama.engine.events import advance, details_of_all, stopped
from llama.engine.images import Images
from llama.engine.predictions import Event, Speculation
from llama.engine.requests import Part, Reading, Request, Stats, stats_of
from llama.engine.rows import Options, constrain, make_rows, params_of
from llama.engine.scheduler import Sequence as Scheduled
from llama.engine.seeing import laid_out
from llama.engine.speculative import Speculators
from llama.engine.steps import compute, make_scheduler
from llama.engine.structured import GrammarCompiler
from llama.engine.tokens import FAILS, STOPS, draw, learn, propose
from llama.layers.paged import PAGE, blocks_for, erase_blocks
from llama.layers.revision import revision
from llama.model import Transformer
from llama.tokenizer import Tokenizer


class Engine:
    """Generates the answers of any number of requests together.

    Args:
        max_tokens_per_step: tokens of a forward pass at most; longer prompts take several.
        max_rows: requests that run at once; others wait.
        cache_tokens: positions of the cache.
        generator: of the seeds of requests that are made without one.
        draft: a smaller model, for speculative decoding.

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
        generator: torch.Generator,
        draft: Optional[Transformer] = None,
    ):
        sizes = dict(max_tokens_per_step=max_tokens_per_step, max_rows=max_rows)
        for name, value in {**sizes, "cache_tokens": cache_tokens}.items():
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        self.model, self.tokenizer, self._generator = model, tokenizer, generator
        self.pool = model.new_cache(1 + blocks_for(cache_tokens), PAGE)
        blocks, device = make_blocks(self.pool, model.params), self.pool.k.device.type
        self.scheduler = make_scheduler(blocks, max_tokens_per_step, max_rows, device)
        self.speculators, self.images = Speculators(draft, blocks.total), Images(model)
        self._parts: Dict[Scheduled, Part] = {}
        self._stepping, self._leaving = 0, dict[Request, None]()  # steps within steps; see `cancel`
        self._revision = revision(model)  # of its weights
        self._compiler: Optional[GrammarCompiler] = None
        self.lock, self._compiling = threading.RLock(), threading.Lock()  # the first during steps

    @property
    def idle(self) -> bool:
        """Whether no request waits or runs."""
        return not self._parts

    @property
    def stats(self) -> Stats:
        """Counts; during a step, of its beginning or its end."""
        return stats_of(self.scheduler)

    def make(self, prompt_tokens: Sequence[int], max_gen_len: int, **options: Any) -> Request:
        """A request for `submit`, checked, its response format compiled. It waits for no step.

        See `make_all` for the options and errors.
        """
        return self.make_all([prompt_tokens], max_gen_len, **options)

    def make_all(
        self,
        prompts: Sequence[Sequence[int]],
        max_gen_len: int,
        temperature: float = 0.6,
        top_p: float = 0.9,
        logprobs: bool = False,
        echo: bool = False,
        priority: int = 0,
        cache_prompt: bool = True,
        reading: Optional[Reading] = None,
        **options: Unpack[Options],
    ) -> Request:
        """A request of several prompts, which fail together. See `Llama.generate` for the
        arguments, and `Options`.

        Args:
            echo: the events of a prompt's tokens come first, with their log-probabilities if those
                were asked for; None for the first token.
            priority: a request of priority p may overtake those of priority 0 that came up to 100 p
                steps earlier.
            cache_prompt: False computes whole prompts, whatever the cache knows of them.
            reading: sees the hidden states of the prompt, of which there is one.

        Raises:
            ValueError: what `Llama.generate` raises; a sequence that the cache can't hold.
        """
        params = params_of(options, temperature, top_p)
        stops = options.get("stop_tokens")
        stops = self.tokenizer.stop_tokens if stops is None else stops
        prompts = laid_out(self.model, self.tokenizer, prompts, options.get("images"))
        rows = make_rows(self.model, prompts, max_gen_len, params, self._generator, options)
        speculator = self.speculators(options.get("speculate"), any(row.images for row in rows))
        request = Request(
            rows, stop_tokens=stops, words=self.tokenizer.n_words, logprobs=logprobs,
            top_logprobs=options.get("top_logprobs", 0), echo=echo, priority=priority,
            cache_prompt=cache_prompt, should_stop=options.get("should_stop"),
            speculator=speculator, reading=reading,
        )  # fmt: skip
        for part in request.parts:
            self.scheduler.check(part.sequences)
        if (formats := options.get("response_format")) is not None:
            with self._compiling:
                if self._compiler is None:
                    self._compiler = GrammarCompiler(self.tokenizer, self.model.params.vocab_size)
                constrain(rows, self._compiler, formats, stops)
        for row in rows:
            row.begin(self.tokenizer, self.model.norm.weight.device)
            if speculator is not None:
                row.speculation = Speculation(proposed=0, accepted=0, passes=0)
        return request

    def submit(self, request: Request) -> None:
        """Queue a request that `make` made; not one that was cancelled since."""
        with self.lock:
            for part in request.parts if not request.finished else ():
                if not part.row.sample:  # the others begin when the prompt is computed
                    self._queue(part)

    def add(self, prompt_tokens: Sequence[int], max_gen_len: int, **options: Any) -> Request:
        """`make` and `submit`."""
        request = self.make(prompt_tokens, max_gen_len, **options)
        self.submit(request)
        return request

    def cancel(self, request: Request) -> None:
        """End a request: its blocks are free at once, and nothing more is computed for it. Within a
        step (by its own code, or as an iterator is collected), at the step's end."""
        with self.lock:
            if self._stepping:  # which has planned with its blocks
                self._leaving[request] = None
                return
            for part in request.parts:
                self._end(part)

    def cancel_all(self) -> None:
        with self.lock:
            for part in list(self._parts.values()):
                self.cancel(part.request)

    @torch.inference_mode()
    def step(self) -> List[Tuple[Request, Event]]:
        """One forward pass; the new tokens of the requests in it.

        A request that fails (a logits processor that raises, logits that aren't finite) ends with
        an event of finish_reason "error", and has an `error`; others aren't affected.
        """
        with self.lock:
            self.sync()
            self._stepping += 1
            try:
                return self._step()
            finally:
                self._stepping -= 1
                while self._leaving and not self._stepping:
                    self.cancel(self._leaving.popitem()[0])

    def sync(self) -> None:
        """Forget what was computed with weights that have been changed since."""
        if revision(self.model) != self._revision:
            self.scheduler.blocks.clear()
            self.images.clear()
            self._revision = revision(self.model)

    def run(self, request: Request) -> Iterator[Event]:
        """`submit` and `events`, once the iterator is begun; then forgets what isn't to be kept."""
        self.submit(request)
        try:
            yield from self.events(request)
        finally:
            self.tidy()

    def tidy(self) -> None:
        """Forget what isn't to be kept, unless something is being computed."""
        with self.lock:
            if self.idle:
                self.scheduler.blocks.tidy()

    def events(self, request: Request) -> Iterator[Event]:
        """The events of a request, as steps are made for it. Closing the iterator cancels it.

        Raises:
            Exception: its error; ValueError for one that was never queued.
        """
        try:
            while True:
                with self.lock:  # another thread's steps may give the last events from here on
                    finished = request.finished
                while request.events:
                    event = request.events.popleft()
                    if event.finish_reason == "error" and request.error is not None:
                        raise request.error
                    yield event
                if finished:
                    return
                if not self.step() and self.idle and not request.finished:
                    raise ValueError("this request isn't queued: submit it before reading it")
        finally:
            self.cancel(request)

    # --- a step -----------------------------------------------------------------------------------

    def _step(self) -> List[Tuple[Request, Event]]:
        proposed = propose([self._parts[sequence] for sequence in self.scheduler.running])
        plan = self.scheduler.plan()
        if not plan.counts:
            return []
        try:
            found, sampled = self._sample(
                *compute(self.model, self.pool, self.scheduler, plan, self._parts, self.images)
            )
        except BaseException:
            self.scheduler.restart()
            raise
        learn(proposed, plan, sampled)
        for request, event in found:
            request.events.append(event)
        return found

    def _queue(self, part: Part, beside: Optional[Part] = None) -> None:
        for sequence in part.sequences:
            self.scheduler.add(sequence, None if beside is None else beside.sequence)
            self._parts[sequence] = part

    def _end(self, part: Part, broken: bool = False) -> None:
        """End a part that is queued or running, or not queued yet."""
        part.request.unfinished.discard(id(part.row))
        part.row.views = None
        for sequence in part.sequences:
            if self._parts.pop(sequence, None) is None:
                continue
            if part.request.speculator is not None:
                part.request.speculator.forget(part.row)
            if not broken or sequence not in self.scheduler.running:
                self.scheduler.remove(sequence)
                continue
            erase_blocks(self.pool, self.scheduler.discard(sequence))

    def _sample(
        self, parts: List[Part], own: torch.Tensor, logits: torch.Tensor
    ) -> Tuple[List[Tuple[Request, Event]], Dict[Part, List[int]]]:
        """Sample the next tokens of parts, from logits as `compute` returns them."""
        if not parts:
            return [], {}
        drafts = [part.sequence.draft for part in parts]
        sampled, asked, broken = draw(parts, logits)
        stopping = [request for request, answer in asked.items() if answer == STOPS]
        for part in broken:
            self._end(part, broken=True)
        found: List[Tuple[Request, Event]] = []
        details = details_of_all(parts, sampled, own)
        for part, draft, tokens, of_tokens in zip(parts, drafts, sampled, details, strict=True):
            request = part.request
            if request in self._leaving:  # failed, or cancelled
                continue
            if request.scored and part.row.echo and not part.row.sample:
                part.sequence.reusable = None if request.cache_prompt else 0
            tokens = [] if asked.get(request) == FAILS else tokens
            events = advance(part, tokens, of_tokens, request in stopping)
            found += [(request, event) for event in events]
            if events[-1].finish_reason == "error":
                self.cancel(request)
            elif events[-1].finish_reason is not None:
                self._end(part)
            elif part.sequence not in self._parts:  # one of several samples
                self._queue(part, part.first)
            elif draft:
                self.scheduler.advance(part.sequence, min(len(tokens), len(draft) + 1) - 1)
        for request in stopping:
            for part in request.parts:
                if id(part.row) in request.unfinished:  # it wasn't in this pass
                    found.append((request, stopped(part)))
                    self._end(part)
        return found, dict(zip(parts, sampled, strict=True))
