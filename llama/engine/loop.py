"""The generation loop: prompts in, an event per token out.

Completion, chat, streaming and sampling run on it. Beam search (`llama.engine.beam`) and the JAX
network (`llama.families.flax_generation`) have loops of their own.
"""

from dataclasses import dataclass, field
from math import isfinite
from typing import Callable, Iterator, List, Optional, Sequence, Set, Tuple

import torch

from llama.engine.predictions import Event, FinishReason, Prediction, Speculation
from llama.engine.prefill import padded, prefill
from llama.engine.prefixes import PrefixCache
from llama.engine.rows import Options, Row
from llama.engine.sampling import draw
from llama.engine.speculative import MOST, Speculator
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
    """Generate all rows together: an event per token, in the order in which they are sampled.

    Prompts go through the model whole, those of similar lengths together, and a prompt that has
    several samples once. Then each pass feeds every unfinished row's last token, and what the
    speculator guesses to follow it, at that row's own position; finished rows leave the batch and
    the cache. All ranks run this in step; rank 0 alone draws the tokens and asks `should_stop`,
    which ends every row.
    """
    device = model.norm.weight.device
    for row in rows:
        row.begin(tokenizer, device)
        if speculator is not None:
            row.speculation = Speculation(proposed=0, accepted=0, passes=0)
    score = echo and logprobs  # takes all positions of the prompts
    prefixes = None if score else prefixes
    new = {row.index: len(row.prompt) for row in rows}  # tokens that aren't known from before
    if prefixes is not None:
        prefixes.follow(model)
        if prefixes.grows:
            prefixes.share(model, [row.prompt for row in rows if row.sample == 0])
        new = {row.index: len(row.prompt) - prefixes.known(row.prompt) for row in rows}
    # In the batch and the cache, rows stand by how much of them is new, samples side by side.
    order = sorted(rows, key=lambda row: (new[row.index], row.index, row.sample))
    firsts = [row for row in order if row.sample == 0]
    place = {row.index: i for i, row in enumerate(firsts)}
    spare = 0 if speculator is None else MOST  # positions for guesses beyond the end
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
    guesses: List[List[int]] = [[] for _ in batch]
    width = 1  # positions that the last pass computed of each row; of prompts, the last one counts
    while batch:
        # h: the positions after which tokens are drawn, of one row after the other: that of its
        # last token, and those of its guesses.
        logits = model.logits(h)
        guided = logits if guidance is None else guidance(logits)
        drawn, stopped = _draw(guided, batch, guesses, stop_tokens, should_stop)
        used = [min(len(d), len(g) + 1) for d, g in zip(drawn, guesses, strict=True)]
        details = _details(logits, drawn, guesses, logprobs, top_logprobs)
        if speculator is not None:
            speculator.learn(drawn)
        unfinished, step = [], []
        for i, row in enumerate(batch):
            if row.speculation is not None:
                row.speculation["proposed"] += len(guesses[i])
                row.speculation["accepted"] += used[i] - 1
                row.speculation["passes"] += 1
            events = _events(row, drawn[i], details[i], stop_tokens, stopped)
            if events[-1].finish_reason is None:
                unfinished.append(i)
            step += events
        # What follows from guesses that weren't drawn is forgotten.
        beyond = [width - n for n in used]
        cache.truncate([n - gone for n, gone in zip(cache.lengths, beyond, strict=True)])
        if guidance is not None:
            guidance.forget(beyond)
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
            guesses = [[] for _ in batch] if speculator is None else speculator.guess(batch)
            width = 1 + max(map(len, guesses))
            fed = [[row.answer[-1], *g] for row, g in zip(batch, guesses, strict=True)]
            tokens = padded(fed, device)
            at = (
                [i for i, ids in enumerate(fed) for _ in ids],
                [j for ids in fed for j in range(len(ids))],
            )
            h = model.hidden(tokens, cache.lengths, cache)[at]
            if guidance is not None:
                guidance.feed(tokens, at)


class Guidance:
    """Classifier-free guidance (2306.17806): each row a second time, after its negative prompt."""

    def __init__(self, model: Transformer, batch: List[Row], spare: int):
        self._model = model
        prompts = [row.params.negative_prompt or row.prompt[-1:] for row in batch]
        lengths = [len(prompt) for prompt in prompts]
        room = max(n + row.max_len - len(row.prompt) for n, row in zip(lengths, batch, strict=True))
        self._cache, last = model.new_cache(len(batch), room + spare), []
        self._cache.reserve(max(lengths))
        for i, prompt in enumerate(prompts):
            h, _ = prefill(model, [prompt], self._cache.part(i, i + 1))
            last.append(h)
        self._cache.lengths, self._h = lengths, torch.cat(last)
        self._scales = torch.tensor([r.params.guidance_scale for r in batch], device=self._h.device)
        self._row = torch.arange(len(batch), device=self._h.device)  # of each of h's positions

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        """The guided log-probabilities: (positions, vocab_size), as `run` has them, to the same."""
        own, negative = logits.log_softmax(-1), self._model.logits(self._h).log_softmax(-1)
        return negative + self._scales[self._row, None] * (own - negative)

    def feed(self, tokens: torch.Tensor, at: Tuple[List[int], List[int]]) -> None:
        """Go on with the rows' new tokens, (B, T); those at (rows, columns) count."""
        self._h = self._model.hidden(tokens, self._cache.lengths, self._cache)[at]
        self._row = torch.tensor(at[0], device=self._h.device)

    def forget(self, beyond: List[int]) -> None:
        """So many of each row's last tokens."""
        pairs = zip(self._cache.lengths, beyond, strict=True)
        self._cache.truncate([length - gone for length, gone in pairs])

    def keep(self, rows: List[int]) -> None:
        self._cache.keep(rows)
        self._scales = self._scales[rows]


@dataclass
class Collected:
    """The events of a row, put together."""

    text: str = ""
    tokens: List[int] = field(default_factory=list)
    logprobs: List[float] = field(default_factory=list)
    top_logprobs: List[List[Tuple[int, float]]] = field(default_factory=list)
    finish_reason: FinishReason = "length"
    speculation: Optional[Speculation] = None


def collect(events: Iterator[Event], rows: Sequence[Row]) -> List[Collected]:
    """Take all events; what came of each row, in the rows' order."""
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
    """What a prediction says beside its generation."""
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


def _draw(
    logits: torch.Tensor,
    batch: List[Row],
    guesses: List[List[int]],
    stop_tokens: Set[int],
    should_stop: Optional[Callable[[], bool]],
) -> Tuple[List[List[int]], bool]:
    """The next tokens of each row, at least one, and whether all rows shall stop.

    logits: (positions, vocab_size), of a row's last token and its guesses, row after row. Rank 0
    decides for all.
    """
    largest, likeliest = (part.tolist() for part in logits.max(-1))  # NaN is the largest
    owners = [row for row, guess in zip(batch, guesses, strict=True) for _ in range(len(guess) + 1)]
    bad = [row for row, most in zip(owners, largest, strict=True) if not isfinite(most)]
    if bad:  # on all ranks alike: none waits for another
        prompts = sorted({row.index for row in bad})
        raise ValueError(
            f"the model's logits for prompt {prompts[0]} aren't finite at its token "
            f"{len(bad[0].prompt) + len(bad[0].answer)} (prompts {prompts}): broken weights, or a "
            "dtype too narrow for them; try dtype=torch.float32"
        )
    drawn: List[List[int]] = [[] for _ in range(len(batch) + 1)]  # and what comes of the step
    failed: Optional[ValueError] = None
    if parallel.rank() == 0:
        try:
            drawn[-1] = [int(should_stop is not None and should_stop())]
            at = 0
            for row, guess, tokens in zip(batch, guesses, drawn, strict=False):
                _draw_row(row, guess, logits[at:], likeliest[at:], stop_tokens, tokens)
                at += len(guess) + 1
        except ValueError as error:  # the others would wait
            failed, drawn = error, [[] for _ in batch] + [[FAILED]]
    *drawn, [outcome] = parallel.share_lists(drawn, MOST + 2)
    if outcome == FAILED:
        raise failed or ValueError("rank 0 could draw no token; it says why")
    return drawn, bool(outcome)


FAILED = 2


def _draw_row(
    row: Row,
    guess: List[int],
    logits: torch.Tensor,
    likeliest: List[int],
    stop_tokens: Set[int],
    tokens: List[int],
) -> None:
    """Draw a row's tokens one after the other, up to the first that isn't what was guessed."""
    constraint = row.constraint
    for i, guessed in enumerate([*guess, None]):
        if row.is_argmax and (constraint is None or constraint.allows(likeliest[i])):
            token = likeliest[i]
        else:
            allow = None if constraint is None else constraint.mask
            answer = [*row.answer, *tokens]
            token = draw(logits[i], row.params, row.prompt, answer, row.numbers, allow)
        tokens.append(token)
        if constraint is not None:
            constraint.accept(token)
        if token != guessed or token in stop_tokens:
            break
    if constraint is not None and constraint.finished and token not in stop_tokens:
        tokens.append(min(stop_tokens))  # all that could follow; it needs no pass


Details = Tuple[Optional[float], Optional[List[Tuple[int, float]]]]  # logprob, top_logprobs


def _details(
    logits: torch.Tensor,
    drawn: List[List[int]],
    guesses: List[List[int]],
    logprobs: bool,
    top_logprobs: int,
) -> List[List[Details]]:
    """For each token drawn its log-probability, and the most probable tokens with theirs."""
    if not logprobs and not top_logprobs:
        return [[(None, None)] * len(tokens) for tokens in drawn]
    found, at = [], 0
    for tokens, guess in zip(drawn, guesses, strict=True):
        distribution = logits[at : at + min(len(tokens), len(guess) + 1)].log_softmax(-1)
        ids = torch.tensor(tokens[: len(distribution)], device=logits.device)[:, None]
        chosen = distribution.gather(-1, ids)[:, 0].tolist()
        best: List[Optional[List[Tuple[int, float]]]] = [None] * len(chosen)
        if top_logprobs:
            values, places = (part.tolist() for part in distribution.topk(top_logprobs))
            best = [list(zip(*pair, strict=True)) for pair in zip(places, values, strict=True)]
        of_row: List[Details] = list(zip(chosen, best, strict=True))
        found.append(of_row + [(None, None)] * (len(tokens) - len(of_row)))
        at += len(guess) + 1
    return found


def _events(
    row: Row, drawn: List[int], details: List[Details], stop_tokens: Set[int], stopped: bool
) -> List[Event]:
    """Add tokens to a row, up to what ends it: the last event has a finish_reason then."""
    events = []
    for n, (token, (logprob, best)) in enumerate(zip(drawn, details, strict=True), 1):
        reason: Optional[FinishReason] = None
        text = ""
        if token in stop_tokens:
            reason, place, logprob, best = "stop", None, None, None
        else:
            row.answer.append(token)
            text, place = row.stops.feed(row.decoder.feed(token)), token
            if row.stops.stopped or (stopped and n == len(drawn)):
                reason = "stop"
            elif row.full and n == len(drawn):  # a stop token may still follow
                reason = "length"
        if reason is not None:
            text += row.stops.feed(row.decoder.finish()) + row.stops.finish()
        guessed = row.speculation if reason else None
        events.append(Event(row.index, row.sample, place, text, logprob, best, reason, guessed))
        if reason is not None:
            break
    return events
