"""A step: what a plan says, computed, to the logits of those that are ready for a token."""

import math
from typing import Any, Dict, List, Mapping, Sequence, Tuple

import torch

from llama.engine.blocks import Blocks
from llama.engine.chunks import free_dropped
from llama.engine.events import details_of, guide
from llama.engine.images import Images, plain
from llama.engine.passes import hidden
from llama.engine.projection import PROJECTED
from llama.engine.requests import Part, Reading
from llama.engine.scheduler import Plan, Scheduler
from llama.engine.scheduler import Sequence as Scheduled
from llama.layers.cache import KVCache
from llama.layers.paged import PagedRows, copy_block
from llama.model import Transformer

# Of a pass on a CPU, what prompts get beside sequences that decode: there, twice the tokens take
# twice the time. A GPU computes hundreds in the time of one, and by quarters four times as slowly.
SHARE = 1 / 4

Ready = Tuple[List[Part], torch.Tensor, torch.Tensor]


def make_scheduler(blocks: Blocks, max_tokens: int, max_rows: int, device: str) -> Scheduler:
    """For a type of device."""
    limit = math.ceil(SHARE * max_tokens) if device == "cpu" else max_tokens
    return Scheduler(blocks, max_tokens=max_tokens, max_rows=max_rows, max_prefill=limit)


def compute(
    model: Transformer,
    pool: KVCache,
    scheduler: Scheduler,
    plan: Plan,
    parts: Mapping[Scheduled, Part],
    images: Images,
) -> Ready:
    """Compute a plan: the parts that are ready for a token, and for each of these and its draft
    tokens the logits, (positions, vocab_size), without guidance and with it."""
    free_dropped(pool, scheduler.blocks, [source for source, _ in plan.copies])
    for source, target in plan.copies:
        copy_block(pool, source, target)
    new: List[List[int]] = []
    views: List[Sequence[Any]] = []
    ends: List[Tuple[Part, Scheduled]] = []
    at: List[int] = []  # of each end, and of its draft tokens
    scored: List[Tuple[Part, int, int, int]] = []
    read: List[Tuple[Reading, int, int, int]] = []
    end = 0
    for sequence, n in plan.counts.items():
        part, known, draft = parts[sequence], sequence.computed, sequence.draft
        seen = part.row.images if sequence is part.sequence else ()
        new.append(plain(part.row, sequence.tokens[known : known + n]) + draft)
        views.append(images.of(part.row, known) if seen else ())
        if part.request.scored and part.row.echo and sequence is part.sequence:
            scored.append((part, known + 1, end, end + n))
        reading = part.request.reading
        if reading is not None and known + n > reading.start:
            begin = max(known, reading.start)
            read.append((reading, begin, end + begin - known, end + n))
        end += n
        if known + n - len(draft) == len(sequence.tokens):
            for one in (part, *part.siblings) if not part.row.answer else (part,):
                ends.append((one, sequence))
                at += range(end - one.asked, end)
    # On a GPU, later would wait for it.
    index = torch.tensor(at, dtype=torch.long, device=pool.k.device)
    sequences = list(plan.counts)
    cache = PagedRows(
        pool, [s.table for s in sequences], [s.computed for s in sequences],
        [s.adapter for s in sequences], views if any(views) else (),
    )  # fmt: skip
    h = hidden(model, new, cache)
    for part, begin, first, last in scored:
        _score(model, part, begin, h[first:last])
    for reading, begin, first, last in read:
        reading.read(model, begin, h[first:last])
    for sequence, n in plan.counts.items():
        scheduler.advance(sequence, n - len(sequence.draft))
    return _logits(model, ends, h[index]) if ends else ([], h, h)


def _logits(model: Transformer, ends: List[Tuple[Part, Scheduled]], h: torch.Tensor) -> Ready:
    """As `compute` returns it, from the hidden states h where sequences end."""
    if all(part.negative is None for part, _ in ends):
        logits = model.logits(h) if len(h) else h
        return [part for part, _ in ends], logits, logits
    plain: List[Part] = []
    guided: Dict[Part, None] = {}  # in order
    states: List[torch.Tensor] = []  # of plain parts
    at = 0
    for part, sequence in ends:
        stop = at + part.asked
        if part.negative is None:
            plain.append(part)
            states.append(h[at:stop])
        else:  # ready once both sequences are
            part.ready[sequence.extra] = h[at:stop]
            if len(part.ready) == 2:  # also where one was ready before both were preempted
                guided[part] = None
        at = stop
    if not plain and not guided:
        return [], h, h
    n = sum(map(len, states))
    own = model.logits(torch.cat(states + [part.ready[False] for part in guided]))
    if not guided:
        return plain, own, own
    negative = model.logits(torch.cat([part.ready[True] for part in guided]))
    for part in guided:
        part.ready = {}
    scales = [part.row.params.guidance_scale for part in guided]
    logits = torch.cat([own[:n], guide(own[n:], negative, scales)])
    return [*plain, *guided], own, logits


def _score(model: Transformer, part: Part, begin: int, h: torch.Tensor) -> None:
    """Score the prompt's tokens from `begin` on, from the hidden states before each."""
    request, following = part.request, part.row.prompt[begin : begin + len(h)]
    for at in range(0, len(following), PROJECTED):
        tokens = following[at : at + PROJECTED]
        ids = [[token if token < model.vocab_size else 0] for token in tokens]
        logits = model.logits(h[at : at + len(ids)])
        nothing: List[List[int]] = [[] for _ in ids]
        found = details_of(
            logits, ids, nothing, request.logprobs, request.top_logprobs, request.words
        )
        scores = request.scores[part.row.index]
        for i, (token, [one]) in enumerate(zip(tokens, found, strict=True), begin + at):
            scores[i] = one if token < model.vocab_size else (None, None)  # an image has no score
