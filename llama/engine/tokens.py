"""The next tokens of the rows in a pass: drafts proposed before it, tokens sampled after it."""

from itertools import accumulate
from math import inf, isfinite
from typing import Dict, Iterable, List, NamedTuple, Set, Tuple

import torch

from llama.engine.requests import Part, Request
from llama.engine.rows import Row
from llama.engine.sampling import most_probable, sample_token
from llama.engine.scheduler import Plan
from llama.engine.speculative import MAX_DRAFT, Speculator
from llama.layers import parallel

GOES_ON, STOPS, FAILS = range(3)  # what a request's `should_stop` says


def propose(parts: Iterable[Part]) -> Dict[Speculator, Tuple[List[Part], int]]:
    """Give drafts to the parts that decode: those that each speculator saw, and the tokens of a
    pass with nothing but these."""
    seen: Dict[Speculator, List[Part]] = {}
    for part in parts:
        speculator, sequence = part.request.speculator, part.sequence
        sequence.draft = []
        if speculator is None or part.negative is not None:
            continue
        if part.row.answer and sequence.remaining == 1:
            seen.setdefault(speculator, []).append(part)
    found: Dict[Speculator, Tuple[List[Part], int]] = {}
    for speculator, those in seen.items():
        drafts = speculator.propose([part.row for part in those])
        for part, draft in zip(those, drafts, strict=True):
            part.sequence.draft = draft
        found[speculator] = those, len(those) + sum(map(len, drafts))
    return found


def learn(
    proposed: Dict[Speculator, Tuple[List[Part], int]], plan: Plan, sampled: Dict[Part, List[int]]
) -> None:
    """Tell the speculators of `propose` what came of their drafts in a pass."""
    for speculator, (parts, tokens) in proposed.items():
        alone = tokens == sum(plan.counts.values()) and len(parts) == len(plan.counts)
        speculator.learn([sampled.get(part, []) for part in parts], alone)


class Drawn(NamedTuple):
    """What came of a pass."""

    tokens: List[List[int]]  # of each part; none if its sampling failed
    asked: Dict[Request, int]  # requests whose `should_stop` was called, and what it said
    broken: Set[Part]  # whose logits aren't finite


def draw(parts: List[Part], logits: torch.Tensor) -> Drawn:
    """Sample the next tokens of parts, on rank 0, for all ranks.

    Args:
        logits: at each part's last known token and its draft's, (positions, vocab_size).
    """
    if (words := parts[0].request.words) < logits.shape[-1]:  # what nothing can be decoded from
        logits = logits.clone()
        logits[:, words:] = -inf
    largest, likeliest = (values.tolist() for values in most_probable(logits))
    asking = list({p.request: None for p in parts if p.request.should_stop and not p.row.full})
    ends = accumulate(part.asked for part in parts)
    spans = [slice(end - part.asked, end) for end, part in zip(ends, parts, strict=True)]
    broken = {
        part
        for part, span in zip(parts, spans, strict=True)
        if not part.row.full and not all(map(isfinite, largest[span]))
    }
    drawn: List[List[int]] = [[] for _ in (*parts, *asking)]
    if parallel.rank() == 0:
        for i, (part, span) in enumerate(zip(parts, spans, strict=True)):
            if not part.row.full:
                drawn[i] = _sample(part, logits[span], likeliest[span], part not in broken)
        for i, request in enumerate(asking, len(parts)):
            drawn[i] = [_asks_to_stop(request)]
    drawn = parallel.share_lists(drawn, MAX_DRAFT + 2)
    answers = {r: answer for r, [answer] in zip(asking, drawn[len(parts) :], strict=True)}
    return Drawn(drawn[: len(parts)], answers, broken)


def _sample(part: Part, logits: torch.Tensor, likeliest: List[int], finite: bool) -> List[int]:
    """The next tokens of a part, and the stop token that a finished grammar implies; none if that
    fails. logits: of its last token and of its draft's, (positions, vocab_size)."""
    tokens: List[int] = []
    row, request = part.row, part.request
    try:
        if not finite:
            raise ValueError(
                f"the model's logits for prompt {row.index} aren't finite at its token "
                f"{len(row.prompt) + len(row.answer)}: broken weights, or a dtype too narrow for "
                "them; try dtype=torch.float32"
            )
        _sample_row(row, part.sequence.draft, logits, likeliest, request.stop_tokens, tokens)
    except Exception as error:  # of the caller's own code, too: other requests go on
        request.error = error
        return []
    return tokens


def _asks_to_stop(request: Request) -> int:
    """Ask `should_stop`; if it raises, the request fails with that."""
    try:
        return STOPS if request.should_stop is not None and request.should_stop() else GOES_ON
    except Exception as error:
        request.error = error
        return FAILS


def _sample_row(
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
