"""The generation loop: prompts in, events out. Everything that generates text runs through it."""

from dataclasses import dataclass, field
from math import isfinite
from typing import Callable, Iterator, List, Optional, Sequence, Set, Tuple

import torch

from llama import parallel
from llama.cache import KVCache
from llama.model import Transformer
from llama.predictions import Event, FinishReason
from llama.sampling import SamplingParams, draw
from llama.stopping import StopStrings
from llama.tokenizer import StreamDecoder, Tokenizer

# Tokens that go through the model at a time: what a layer keeps for them is bounded by that, and
# not by the length of a prompt.
PASS = 4096


@dataclass
class Row:
    """One text in the making.

    Args:
        index: of its prompt, among those of the call.
        sample: which of the prompt's samples it is, from 0.
        max_len: tokens of prompt and answer together.
        seed: of its random numbers. Its tokens depend on this, on its prompt and its parameters,
            and not on its neighbours in the batch.
    """

    index: int
    sample: int
    prompt: Sequence[int]
    max_len: int
    params: SamplingParams
    seed: int
    stop: Sequence[str]
    answer: List[int] = field(default_factory=list)

    @property
    def full(self) -> bool:
        return len(self.prompt) + len(self.answer) >= self.max_len

    def __post_init__(self) -> None:
        self.stops = StopStrings(self.stop)
        self.is_argmax = self.params.is_argmax

    def begin(self, tokenizer: Tokenizer, device: torch.device) -> None:
        """What it takes to draw tokens and to turn them into text."""
        seed = self.seed
        self.generator = torch.Generator(device).manual_seed(seed)
        self.decoder: StreamDecoder = tokenizer.stream()


def check(model: Transformer, prompts: Sequence[Sequence[int]], max_gen_len: int, n: int) -> None:
    """Raises ValueError for prompts that can't be generated from, by number, limit and way out."""
    params = model.params
    if not prompts:
        raise ValueError("no prompts: pass at least one")
    if len(prompts) * n > params.max_batch_size:
        samples = f" of {n} samples" if n > 1 else ""
        raise ValueError(
            f"{len(prompts)} prompts{samples}, and max_batch_size is {params.max_batch_size}: "
            "pass fewer at a time, or build with a larger max_batch_size"
        )
    if n < 1:
        raise ValueError(f"n={n} must be at least 1")
    if max_gen_len < 0:
        raise ValueError(f"max_gen_len={max_gen_len} must be 0 or more")
    for row, prompt in enumerate(prompts):
        if not len(prompt):
            raise ValueError(f"prompt {row} is empty: it takes at least one token")
        if len(prompt) > params.max_seq_len:
            raise ValueError(
                f"prompt {row} has {len(prompt)} tokens, and max_seq_len is "
                f"{params.max_seq_len}: shorten it, or build with a larger max_seq_len"
            )
        low, high = min(prompt), max(prompt)
        if low < 0 or high >= params.vocab_size:
            raise ValueError(
                f"prompt {row} has the token id {low if low < 0 else high}: "
                f"this model knows 0 to {params.vocab_size - 1}"
            )


@torch.inference_mode()
def run(
    model: Transformer,
    tokenizer: Tokenizer,
    rows: List[Row],
    *,
    stop_tokens: Set[int],
    logprobs: bool = False,
    top_logprobs: int = 0,
    echo: bool = False,
    should_stop: Optional[Callable[[], bool]] = None,
) -> Iterator[Event]:
    """Generate all rows together: an event per token, in the order in which tokens come about.

    Prompts go through the model whole, those of similar lengths together, and a prompt that has
    several samples once. Then each step feeds every unfinished row's last token at that row's own
    position; finished rows leave the batch and the cache. All ranks run this in step; rank 0 alone
    draws the tokens and asks `should_stop`, which ends every row.
    """
    device = model.norm.weight.device
    for row in rows:
        row.begin(tokenizer, device)
    # In the batch and the cache, rows stand in the order of their lengths, samples side by side.
    order = sorted(rows, key=lambda row: (len(row.prompt), row.index, row.sample))
    firsts = [row for row in order if row.sample == 0]
    place = {row.index: i for i, row in enumerate(firsts)}
    cache = model.new_cache(len(rows), max(row.max_len for row in rows))
    h, scores = prefill(model, [row.prompt for row in firsts], cache, echo and logprobs)
    if echo:
        for row in rows:
            known = scores[place[row.index]] if logprobs else [None] * len(row.prompt)
            for token, logprob in zip(row.prompt, known, strict=True):
                yield Event(row.index, row.sample, token, row.decoder.feed(token), logprob)
    sources = [place[row.index] for row in order]
    cache.spread(sources)
    for row in order:
        if row.full:
            yield Event(row.index, row.sample, None, row.decoder.finish(), finish_reason="length")
    unfinished = [i for i, row in enumerate(order) if not row.full]
    cache.keep(unfinished)
    batch, h = [order[i] for i in unfinished], h[[sources[i] for i in unfinished]]
    guidance = Guidance(model, batch) if any(r.params.guidance_scale != 1 for r in batch) else None
    while batch:
        logits = model.logits(h)
        guided = logits if guidance is None else guidance(logits)
        drawn, stopped = _draw(guided, batch, should_stop)
        tokens: List[int] = drawn.tolist()
        chosen: List[Optional[float]] = [None] * len(batch)
        best: List[Optional[List[Tuple[int, float]]]] = [None] * len(batch)
        if logprobs or top_logprobs:
            distribution = logits.log_softmax(-1)
            chosen = distribution.gather(-1, drawn[:, None])[:, 0].tolist()
            if top_logprobs:
                values, ids = (part.tolist() for part in distribution.topk(top_logprobs))
                best = [list(zip(*pair, strict=True)) for pair in zip(ids, values, strict=True)]
        unfinished = []  # places in the batch
        for i, row in enumerate(batch):
            if tokens[i] in stop_tokens:
                text = row.stops.feed(row.decoder.finish()) + row.stops.finish()
                yield Event(row.index, row.sample, None, text, finish_reason="stop")
                continue
            row.answer.append(tokens[i])
            text = row.stops.feed(row.decoder.feed(tokens[i]))
            reason: Optional[FinishReason] = "stop" if row.stops.stopped or stopped else None
            if reason is None and row.full:
                reason = "length"
            if reason is None:
                unfinished.append(i)
            else:
                text += row.stops.feed(row.decoder.finish()) + row.stops.finish()
            yield Event(row.index, row.sample, tokens[i], text, chosen[i], best[i], reason)
        if len(unfinished) < len(batch):
            cache.keep(unfinished)
            if guidance is not None:
                guidance.keep(unfinished)
            batch, drawn = [batch[i] for i in unfinished], drawn[unfinished]
        if batch:
            if guidance is not None:
                guidance.feed(drawn)
            h = model.hidden(drawn[:, None], cache.lengths, cache)[:, -1]


class Guidance:
    """Classifier-free guidance (2306.17806): each row a second time, after its negative prompt."""

    def __init__(self, model: Transformer, batch: List[Row]):
        self._model = model
        prompts = [row.params.negative_prompt or row.prompt[-1:] for row in batch]
        lengths = [len(prompt) for prompt in prompts]
        room = max(n + row.max_len - len(row.prompt) for n, row in zip(lengths, batch, strict=True))
        self._cache, last = model.new_cache(len(batch), room), []
        self._cache.reserve(max(lengths))
        for i, prompt in enumerate(prompts):
            h, _ = prefill(model, [prompt], self._cache.part(i, i + 1), score=False)
            last.append(h)
        self._cache.lengths, self._h = lengths, torch.cat(last)
        scales = [[row.params.guidance_scale] for row in batch]
        self._scales = torch.tensor(scales, device=self._h.device)

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        """The guided log-probabilities: (B, vocab_size) -> (B, vocab_size)."""
        own, negative = logits.log_softmax(-1), self._model.logits(self._h).log_softmax(-1)
        return negative + self._scales * (own - negative)

    def feed(self, drawn: torch.Tensor) -> None:
        """Go on with the rows' new tokens, (B,)."""
        self._h = self._model.hidden(drawn[:, None], self._cache.lengths, self._cache)[:, -1]

    def keep(self, rows: List[int]) -> None:
        self._cache.keep(rows)
        self._h, self._scales = self._h[rows], self._scales[rows]


@dataclass
class Collected:
    """The events of a row, put together."""

    text: str = ""
    tokens: List[int] = field(default_factory=list)
    logprobs: List[float] = field(default_factory=list)
    top_logprobs: List[List[Tuple[int, float]]] = field(default_factory=list)
    finish_reason: FinishReason = "length"


def collect(events: Iterator[Event], rows: Sequence[Row]) -> List[Collected]:
    """Take all events; what came of each row, in the rows' order."""
    found = {(row.index, row.sample): Collected() for row in rows}
    for event in events:
        row = found[event.row, event.sample]
        row.text += event.text
        row.finish_reason = event.finish_reason or row.finish_reason
        if event.token is not None:
            row.tokens.append(event.token)
            if event.logprob is not None:
                row.logprobs.append(event.logprob)
            if event.top_logprobs is not None:
                row.top_logprobs.append(event.top_logprobs)
    return list(found.values())


def prefill(
    model: Transformer, prompts: List[Sequence[int]], cache: KVCache, score: bool
) -> Tuple[torch.Tensor, List[List[float]]]:
    """Fill the first rows of a cache with prompts of ascending lengths, padded on the right.

    Returns:
        The hidden state of each one's last token, (B, dim), and their scores if asked for.
    """
    lengths = [len(prompt) for prompt in prompts]
    device = model.norm.weight.device
    cache.reserve(lengths[-1])
    last, scores = [], []
    for start, stop in similar(lengths):
        rows, width, part = stop - start, lengths[stop - 1], cache.part(start, stop)
        tokens = torch.zeros(rows, width, dtype=torch.long)
        for i, prompt in enumerate(prompts[start:stop]):
            tokens[i, : len(prompt)] = torch.tensor(prompt)
        tokens = tokens.to(device)
        ends = torch.tensor(lengths[start:stop], device=device) - 1
        of_last = torch.empty(rows, model.params.dim, dtype=model.norm.weight.dtype, device=device)
        of_next = torch.zeros(tokens.shape, device=device)
        step = max(PASS // rows, 1)
        for begin in range(0, width, step):
            h = model.hidden(tokens[:, begin : begin + step], begin, part)
            here = (ends >= begin) & (ends < begin + step)
            of_last[here] = h[here, ends[here] - begin]
            if score:
                following = tokens[:, begin + 1 : begin + 1 + step]
                of_next[:, begin + 1 : begin + 1 + step] = _score(model, h, following)
        last.append(of_last)
        if score:
            known = zip(of_next.tolist(), lengths[start:stop], strict=True)
            scores += [row[:length] for row, length in known]
    cache.lengths[: len(lengths)] = lengths
    return torch.cat(last), scores


def _draw(
    logits: torch.Tensor, batch: List[Row], should_stop: Optional[Callable[[], bool]]
) -> Tuple[torch.Tensor, bool]:
    """The next token of each row, (B, vocab_size) -> (B,), and whether all shall stop.

    Rank 0 decides both for all.
    """
    largest, likeliest = logits.max(-1)  # NaN is larger than anything
    if not all(map(isfinite, largest.tolist())):  # on all ranks alike: none waits for another
        bad = [row for row, most in zip(batch, largest.tolist(), strict=True) if not isfinite(most)]
        prompts = sorted({row.index for row in bad})
        raise ValueError(
            f"the model's logits for prompt {prompts[0]} aren't finite at its token "
            f"{len(bad[0].prompt) + len(bad[0].answer)} (prompts {prompts}): broken weights, or a "
            "dtype too narrow for them; try dtype=torch.float32"
        )
    decided = torch.zeros(len(batch) + 1, dtype=torch.long, device=logits.device)
    if parallel.rank() == 0:
        if all(row.is_argmax for row in batch):
            decided[:-1] = likeliest
        else:
            for i, row in enumerate(batch):
                decided[i] = draw(logits[i], row.params, row.prompt, row.answer, row.generator)
        decided[-1] = should_stop is not None and should_stop()
    parallel.broadcast(decided)
    return decided[:-1], bool(decided[-1])


def _score(model: Transformer, h: torch.Tensor, following: torch.Tensor) -> torch.Tensor:
    """Log-probability of the token that follows each position: (B, T, dim), (B, T) -> (B, T).

    The vocabulary is wide, so a few positions are projected at a time.
    """
    scores = torch.empty(following.shape, dtype=torch.float32, device=h.device)
    for begin in range(0, following.shape[1], 64):
        actual = following[:, begin : begin + 64, None]
        predicted = model.logits(h[:, begin : begin + actual.shape[1]]).log_softmax(-1)
        scores[:, begin : begin + 64] = predicted.gather(-1, actual)[..., 0]
    return scores


def similar(lengths: List[int]) -> Iterator[Tuple[int, int]]:
    """Cut ascending lengths into runs (start, stop) whose padding is at most a quarter of them.

    Up to 256 tokens a pass costs about the same with padding as without.
    """
    start = 0
    for stop in range(1, len(lengths) + 1):
        if stop < len(lengths):
            padded, real = (stop + 1 - start) * lengths[stop], sum(lengths[start : stop + 1])
            if padded <= max(256, 1.25 * real):
                continue
        yield start, stop
        start = stop
