"""The generation loop: prompts in, an event per token out.

Completion, chat, streaming and sampling use it. Beam search (`llama.engine.beam`) and the JAX
network (`llama.families.flax_generation`) have their own.
"""

from dataclasses import dataclass, field
from math import isfinite
from typing import Callable, Iterator, List, Optional, Sequence, Set, Tuple

import torch

from llama.engine.predictions import Event, FinishReason, Prediction, Speculation
from llama.engine.prefill import padded, prefill
from llama.engine.prefixes import PrefixCache
from llama.engine.requests import Details
from llama.engine.rows import Options, Row
from llama.engine.sampling import sample_token
from llama.engine.speculative import MAX_DRAFT, Speculator
from llama.layers import parallel
from llama.model import Transformer
from llama.tokenizer import Tokenizer


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
    speculator: Optional[Speculator] = None,
    prefixes: Optional[PrefixCache] = None,
) -> Iterator[Event]:
    """Generate all rows (sequences) together: an event per token, in the order of sampling.

    Prompts are prefilled in groups of similar lengths, a prompt with several samples once. Then
    each pass takes every unfinished row's last token, and the draft tokens that the speculator
    proposes after it, at the row's own position. Finished rows are removed from batch and cache.
    All ranks run this in lockstep; rank 0 alone samples, and calls `should_stop`, which ends all
    rows.
    """
    device = model.norm.weight.device
    if any(row.adapter for row in rows):
        raise ValueError("adapters are chosen in an engine: use Llama.engine, and its `add`")
    for row in rows:
        row.begin(tokenizer, device)
        if speculator is not None:
            row.speculation = Speculation(proposed=0, accepted=0, passes=0)
    score = echo and logprobs  # this needs the logits of all prompt tokens, cached or not
    prefixes = None if score else prefixes
    new = {row.index: len(row.prompt) for row in rows}  # prompt tokens that aren't cached
    if prefixes is not None:
        prefixes.sync(model)
        if prefixes.grows:
            prefixes.share(model, [row.prompt for row in rows if row.sample == 0])
        new = {row.index: len(row.prompt) - prefixes.cached(row.prompt) for row in rows}
    # The order of rows in batch and cache: by number of new tokens, a prompt's samples adjacent.
    order = sorted(rows, key=lambda row: (new[row.index], row.index, row.sample))
    firsts = [row for row in order if row.sample == 0]
    place = {row.index: i for i, row in enumerate(firsts)}
    spare = 0 if speculator is None else MAX_DRAFT  # positions for draft tokens beyond max_len
    cache = model.new_cache(len(rows), max(row.max_len for row in rows) + spare)
    if prefixes is not None:
        cache.reserve(max(len(row.prompt) for row in rows))
        for i, row in enumerate(firsts):
            prefixes.fill(row.prompt, cache, i)
    h, scores = prefill(model, [row.prompt for row in firsts], cache, score)
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
    guided_rows = any(row.params.guidance_scale != 1 for row in batch)
    guidance = Guidance(model, batch, spare) if guided_rows else None
    drafts: List[List[int]] = [[] for _ in batch]
    width = 1  # positions of each row that the last pass computed and that tokens are sampled from
    while batch:
        # h: the hidden states to sample from, row after row: that of its last token, and those of
        # its draft tokens.
        logits = model.logits(h)
        guided = logits if guidance is None else guidance(logits)
        sampled, stopped = _sample(guided, batch, drafts, stop_tokens, should_stop)
        used = [min(len(s), len(d) + 1) for s, d in zip(sampled, drafts, strict=True)]
        details = details_of(logits, sampled, drafts, logprobs, top_logprobs)
        if speculator is not None:
            speculator.learn(sampled)
        unfinished, step = [], []
        for i, row in enumerate(batch):
            if row.speculation is not None:
                row.speculation["proposed"] += len(drafts[i])
                row.speculation["accepted"] += used[i] - 1
                row.speculation["passes"] += 1
            events = events_of(row, sampled[i], details[i], stop_tokens, stopped)
            if events[-1].finish_reason is None:
                unfinished.append(i)
            step += events
        rejected = [width - n for n in used]  # with the padding after shorter drafts
        cache.truncate([n - gone for n, gone in zip(cache.lengths, rejected, strict=True)])
        if guidance is not None:
            guidance.truncate(rejected)
        if len(unfinished) < len(batch):
            if prefixes is not None and prefixes.grows:
                for i in sorted({*range(len(batch))} - {*unfinished}):
                    text = [*batch[i].prompt, *batch[i].answer]
                    prefixes.add(text[: cache.lengths[i]], cache, i)
            cache.keep(unfinished)
            if guidance is not None:
                guidance.keep(unfinished)
            batch = [batch[i] for i in unfinished]
        yield from step
        if batch:
            drafts = [[] for _ in batch] if speculator is None else speculator.propose(batch)
            width = 1 + max(map(len, drafts))
            fed = [[row.answer[-1], *draft] for row, draft in zip(batch, drafts, strict=True)]
            tokens = padded(fed, device)
            # Before the pass, since copying indices to a GPU waits for what it is computing.
            places = [(i, j) for i, ids in enumerate(fed) for j in range(len(ids))]
            at = torch.tensor(places, device=device).unbind(1)
            h = model.hidden(tokens, cache.lengths, cache)[at]
            if guidance is not None:
                guidance.feed(tokens, at)


class Guidance:
    """Classifier-free guidance (arXiv 2306.17806): generates each row a second time, after its
    negative prompt."""

    def __init__(self, model: Transformer, batch: List[Row], spare: int):
        self._model = model
        prompts = [row.params.negative_prompt or row.prompt[-1:] for row in batch]
        lengths = [len(prompt) for prompt in prompts]
        ends = [n + row.max_len - len(row.prompt) for n, row in zip(lengths, batch, strict=True)]
        self._cache, last = model.new_cache(len(batch), max(ends) + spare), []
        self._cache.reserve(max(lengths))
        for i, prompt in enumerate(prompts):
            h, _ = prefill(model, [prompt], self._cache.part(i, i + 1))
            last.append(h)
        self._cache.lengths, self._h = lengths, torch.cat(last)
        self._scales = torch.tensor([r.params.guidance_scale for r in batch], device=self._h.device)
        self._row = torch.arange(len(batch), device=self._h.device)  # of each of h's positions

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits to guided log-probabilities: (positions, vocab_size), positions as in `run`."""
        own, negative = logits.log_softmax(-1), self._model.logits(self._h).log_softmax(-1)
        return negative + self._scales[self._row, None] * (own - negative)

    def feed(self, tokens: torch.Tensor, at: Tuple[torch.Tensor, ...]) -> None:
        """Compute the rows' new tokens, (B, T); those at (rows, columns) aren't padding."""
        self._h = self._model.hidden(tokens, self._cache.lengths, self._cache)[at]
        self._row = at[0]

    def truncate(self, rejected: List[int]) -> None:
        """Drop this many of each row's last tokens."""
        pairs = zip(self._cache.lengths, rejected, strict=True)
        self._cache.truncate([length - gone for length, gone in pairs])

    def keep(self, rows: List[int]) -> None:
        self._cache.keep(rows)
        self._scales = self._scales[rows]


@dataclass
class Collected:
    """The events of a row, collected."""

    text: str = ""
    tokens: List[int] = field(default_factory=list)
    logprobs: List[float] = field(default_factory=list)
    top_logprobs: List[List[Tuple[int, float]]] = field(default_factory=list)
    finish_reason: FinishReason = "length"
    speculation: Optional[Speculation] = None


def collect(events: Iterator[Event], rows: Sequence[Row]) -> List[Collected]:
    """Run the generation to its end and collect the events of each row, in the rows' order."""
    found = {(row.index, row.sample): Collected() for row in rows}
    for event in events:
        row = found[event.row, event.sample]
        row.text += event.text
        row.finish_reason = event.finish_reason or row.finish_reason
        row.speculation = event.speculation or row.speculation
        if event.token is not None:
            row.tokens.append(event.token)
            if event.logprob is not None:
                row.logprobs.append(event.logprob)
            if event.top_logprobs is not None:
                row.top_logprobs.append(event.top_logprobs)
    return list(found.values())


def prediction(
    row: Collected, tokenizer: Tokenizer, logprobs: bool, options: Options
) -> Prediction:
    """A prediction's fields other than its generation."""
    decode = tokenizer.decode
    details: Prediction = {"finish_reason": row.finish_reason}
    if logprobs:
        details["tokens"] = [decode([token]) for token in row.tokens]
        details["logprobs"] = row.logprobs
    if options.get("top_logprobs"):
        details["top_logprobs"] = [
            [(decode([token]), value) for token, value in best] for best in row.top_logprobs
        ]
    if row.speculation is not None:
        details["speculation"] = row.speculation
    return details


def _sample(
    logits: torch.Tensor,
    batch: List[Row],
    drafts: List[List[int]],
    stop_tokens: Set[int],
    should_stop: Optional[Callable[[], bool]],
) -> Tuple[List[List[int]], bool]:
    """The next tokens of each row, at least one, and whether to stop all rows.

    logits: (positions, vocab_size), of each row's last token and its draft tokens, row after row.
    Rank 0 decides for all.
    """
    largest, likeliest = (part.tolist() for part in logits.max(-1))  # max() returns NaN if any
    owners = [row for row, draft in zip(batch, drafts, strict=True) for _ in range(len(draft) + 1)]
    bad = [row for row, most in zip(owners, largest, strict=True) if not isfinite(most)]
    if bad:  # on all ranks alike, so that none waits for another
        prompts = sorted({row.index for row in bad})
        raise ValueError(
            f"the model's logits for prompt {prompts[0]} aren't finite at its token "
            f"{len(bad[0].prompt) + len(bad[0].answer)} (prompts {prompts}): broken weights, or a "
            "dtype too narrow for them; try dtype=torch.float32"
        )
    sampled: List[List[int]] = [[] for _ in range(len(batch) + 1)]  # the last one: the outcome
    failed: Optional[ValueError] = None
    if parallel.rank() == 0:
        try:
            sampled[-1] = [int(should_stop is not None and should_stop())]
            at = 0
            for row, draft, tokens in zip(batch, drafts, sampled, strict=False):
                sample_row(row, draft, logits[at:], likeliest[at:], stop_tokens, tokens)
                at += len(draft) + 1
        except ValueError as error:  # tell the other ranks, which would wait for tokens
            failed, sampled = error, [[] for _ in batch] + [[FAILED]]
    *sampled, [outcome] = parallel.share_lists(sampled, MAX_DRAFT + 2)
    if outcome == FAILED:
        raise failed or ValueError("sampling failed on rank 0: see its error")
    return sampled, bool(outcome)


FAILED = 2  # an outcome beside 0 and 1, should_stop's


def sample_row(
    row: Row,
    draft: List[int],
    logits: torch.Tensor,
    likeliest: List[int],
    stop_tokens: Set[int],
    tokens: List[int],
) -> None:
    """Sample a row's tokens one by one, up to the first that isn't the draft's."""
    constraint = row.constraint
    for i, proposed in enumerate([*draft, None]):
        if row.is_argmax and (constraint is None or constraint.allows(likeliest[i])):
            token = likeliest[i]
        else:
            allow = None if constraint is None else constraint.mask
            answer = [*row.answer, *tokens]
            token = sample_token(
                logits[i], row.params, row.prompt, answer, row.numbers, allow, stop_tokens
            )
        tokens.append(token)
        if constraint is not None:
            constraint.accept(token)
        if token != proposed or token in stop_tokens:
            break
    if constraint is not None and constraint.finished and token not in stop_tokens:
        tokens.append(min(stop_tokens))  # only a stop token can follow: no pass is needed


def details_of(
    logits: torch.Tensor,
    sampled: List[List[int]],
    drafts: List[List[int]],
    logprobs: bool,
    top_logprobs: int,
) -> List[List[Details]]:
    """For each sampled token its log-probability, and the most probable tokens with theirs."""
    if not logprobs and not top_logprobs:
        return [[(None, None)] * len(tokens) for tokens in sampled]
    # Of all rows together, since each value that is read waits for a GPU.
    at, used = 0, []  # positions, and the tokens sampled there
    for tokens, draft in zip(sampled, drafts, strict=True):
        used += list(enumerate(tokens[: len(draft) + 1], at))
        at += len(draft) + 1
    positions, ids = torch.tensor(used, device=logits.device).unbind(1)
    distribution = logits[positions].log_softmax(-1)
    chosen = distribution.gather(-1, ids[:, None])[:, 0]
    best: List[Optional[List[Tuple[int, float]]]] = [None] * len(used)
    if top_logprobs:
        values, likeliest = (part.tolist() for part in distribution.topk(top_logprobs))
        best = [list(zip(*pair, strict=True)) for pair in zip(likeliest, values, strict=True)]
    computed: Iterator[Details] = iter(zip(chosen.tolist(), best, strict=True))
    # A stop token that a constraint adds after the last position has none.
    return [
        [next(computed) if i <= len(draft) else (None, None) for i in range(len(tokens))]
        for tokens, draft in zip(sampled, drafts, strict=True)
    ]


def events_of(
    row: Row, sampled: List[int], details: List[Details], stop_tokens: Set[int], stopped: bool
) -> List[Event]:
    """Append sampled tokens to a row, until it ends: then the last event has a finish_reason."""
    events = []
    for n, (token, (logprob, best)) in enumerate(zip(sampled, details, strict=True), 1):
        reason: Optional[FinishReason] = None
        text = ""
        if token in stop_tokens:
            reason, place, logprob, best = "stop", None, None, None
        else:
            row.answer.append(token)
            text, place = row.decoder.feed(token), token
            if len(row.answer) >= row.params.min_tokens:
                text = row.stops.feed(text)
            if row.stops.stopped or (stopped and n == len(sampled)):
                reason = "stop"
            elif row.full and n == len(sampled):  # a stop token may still follow
                reason = "length"
        if reason is not None:
            text += row.stops.feed(row.decoder.finish()) + row.stops.finish()
        counts = row.speculation if reason else None
        events.append(Event(row.index, row.sample, place, text, logprob, best, reason, counts))
        if reason is not None:
            break
    return events
