"""Sampled tokens to the events of a row."""

from dataclasses import dataclass, field
from typing import Dict, Iterator, List, Optional, Set, Tuple

import torch

from llama.engine.predictions import Event, FinishReason, Prediction, Speculation
from llama.engine.requests import Details, Part, Request
from llama.engine.rows import Row
from llama.tokenizer import Tokenizer


def details_of(
    logits: torch.Tensor,
    sampled: List[List[int]],
    drafts: List[List[int]],
    logprobs: bool,
    top_logprobs: int,
    words: int,
) -> List[List[Details]]:
    """For each sampled token its log-probability, and the most probable of the first `words` tokens
    with theirs."""
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
        values, likeliest = (
            part.tolist() for part in distribution[:, :words].topk(min(top_logprobs, words))
        )
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


def advance(part: Part, tokens: List[int], details: List[Details], stops: bool) -> List[Event]:
    """The events of a part's new tokens, after those of its prompt if they are still to come."""
    row, request, draft = part.row, part.request, part.sequence.draft
    echoed = echo(part)
    if tokens:
        if row.speculation is not None:
            row.speculation["proposed"] += len(draft)
            row.speculation["accepted"] += min(len(tokens), len(draft) + 1) - 1
            row.speculation["passes"] += 1
        events = events_of(row, tokens, details, request.stop_tokens, stops)
        for sequence in part.sequences:
            sequence.tokens += [event.token for event in events if event.token is not None]
    elif row.full:  # from the beginning: no token was asked for
        text = row.decoder.finish()
        events = [Event(row.index, row.sample, None, text, finish_reason="length")]
    else:
        request.error = request.error or ValueError("sampling failed on rank 0: see its error")
        events = [Event(row.index, row.sample, None, "", finish_reason="error")]
    if events[-1].finish_reason is not None:
        events[-1] = events[-1]._replace(cached_tokens=part.first.sequence.found)
    return echoed + events


def echo(part: Part) -> List[Event]:
    """The events of a prompt's tokens, if they are still to come."""
    row, found = part.row, part.request.scores[part.row.index]
    tokens, row.echo = row.prompt if row.echo else (), False
    nothing: Details = (None, None)
    return [
        Event(
            row.index,
            row.sample,
            token,
            "" if token == row.image_id else row.decoder.feed(token),
            *found.get(i, nothing),
            echoed=True,
        )
        for i, token in enumerate(tokens)
    ]


def stopped(part: Part) -> Event:
    """The end of a part that should_stop ends before its next token."""
    row = part.row
    text = row.stops.feed(row.decoder.finish()) + row.stops.finish()
    return Event(
        row.index, row.sample, None, text, finish_reason="stop", speculation=row.speculation,
        cached_tokens=part.first.sequence.found,
    )  # fmt: skip


def guide(own: torch.Tensor, negative: torch.Tensor, scales: List[float]) -> torch.Tensor:
    """Classifier-free guidance (arXiv 2306.17806): logits to guided log-probabilities, all of them
    (rows, vocab_size)."""
    pairs = zip(own.log_softmax(-1), negative.log_softmax(-1), scales, strict=True)
    return torch.stack([less + scale * (more - less) for more, less, scale in pairs])


def details_of_all(
    parts: List[Part], sampled: List[List[int]], logits: torch.Tensor
) -> List[List[Details]]:
    """Log-probabilities of the sampled tokens of each part, where they were asked for."""
    nothing: Details = (None, None)
    found = [[nothing] * len(tokens) for tokens in sampled[: len(parts)]]
    groups: Dict[Tuple[bool, int, int], List[Tuple[int, List[int]]]] = {}
    at = 0
    for i, part in enumerate(parts):
        n = part.asked
        wanted = part.request.logprobs, part.request.top_logprobs, part.request.words
        if sampled[i] and any(wanted[:2]):
            groups.setdefault(wanted, []).append((i, list(range(at, at + n))))
        at += n
    for wanted, members in groups.items():
        rows = [position for _, positions in members for position in positions]
        some = logits if len(rows) == len(logits) else logits[rows]
        of_tokens = [sampled[i] for i, _ in members]
        drafts = [parts[i].sequence.draft for i, _ in members]
        for (i, _), one in zip(members, details_of(some, of_tokens, drafts, *wanted), strict=True):
            found[i] = one
    return found


@dataclass
class Collected:
    """The events of a row, collected."""

    text: str = ""
    tokens: List[int] = field(default_factory=list)
    logprobs: List[float] = field(default_factory=list)
    top_logprobs: List[List[Tuple[int, float]]] = field(default_factory=list)  # of the answer
    finish_reason: FinishReason = "length"
    speculation: Optional[Speculation] = None


def collect(events: Iterator[Event], request: Request) -> List[Collected]:
    """Run a request to its end and collect the events of each row, in the rows' order."""
    found = {(row.index, row.sample): Collected() for row in request.rows}
    echoed = {(r.index, r.sample): len(r.prompt) if r.echo else 0 for r in request.rows}
    for event in events:
        key = event.row, event.sample
        row = found[key]
        row.text += event.text
        row.finish_reason = event.finish_reason or row.finish_reason
        row.speculation = event.speculation or row.speculation
        if event.token is not None:
            row.tokens.append(event.token)
            row.logprobs.append(event.logprob or 0.0)  # None: of a prompt's first token
            if event.top_logprobs is not None and len(row.tokens) > echoed[key]:
                row.top_logprobs.append(event.top_logprobs)
    return list(found.values())


def prediction(row: Collected, tokenizer: Tokenizer, request: Request) -> Prediction:
    """A prediction's fields other than its generation."""

    def decode(token: int) -> str:  # the tokenizer doesn't know that of an echoed image
        return "" if token >= tokenizer.n_words else tokenizer.decode([token])

    details: Prediction = {"finish_reason": row.finish_reason}
    if request.logprobs:
        details["tokens"] = [decode(token) for token in row.tokens]
        details["logprobs"] = row.logprobs
    if request.top_logprobs:
        details["top_logprobs"] = [
            [(decode(token), value) for token, value in best] for best in row.top_logprobs
        ]
    if row.speculation is not None:
        details["speculation"] = row.speculation
    return details
