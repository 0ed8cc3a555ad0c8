"""Sampling: pure functions from one row's logits to a token, in fp32, in a fixed order.

    guidance, logit_bias, repetition_penalty, presence and frequency penalty, no_repeat_ngram_size,
    banned_tokens, min_tokens, logits_processor; then, unless the temperature is 0,
    temperature, top_k, top_p, min_p, typical_p, and sampling

This is the order of transformers' `generate`; what it lacks comes next to the most similar step.
Tokens that are ruled out get the logit -inf.
"""

import math
from collections import Counter
from typing import Callable, Collection, List, Mapping, NoReturn, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F

from llama.engine.params import SamplingParams

PART = 128  # logits of which the largest is found at once

# What a filter keeps: ids, ascending, and their logits. Where ids are None, it's the logits of all
# tokens, -inf where they are ruled out: on a GPU, counting the others would wait for it.
Kept = Tuple[Optional[torch.Tensor], torch.Tensor]


class RandomNumbers:
    """A row's random numbers, uniform in [0, 1); the n-th one samples the answer's n-th token.

    Each can be read several times: a draft model samples with the number that the model will use,
    so that both usually sample the same token.
    """

    def __init__(self, seed: int, device: torch.device):
        where = "cpu" if device.type == "mps" else device  # which has no float64
        self._generator = torch.Generator(where).manual_seed(seed)
        self._known: List[torch.Tensor] = []

    def __getitem__(self, n: int) -> torch.Tensor:
        generator = self._generator
        while len(self._known) <= n:
            self._known.append(
                torch.rand((), dtype=torch.float64, generator=generator, device=generator.device)
            )
        return self._known[n]


def sample_token(
    logits: torch.Tensor,
    params: SamplingParams,
    prompt: Sequence[int],
    answer: Sequence[int],
    numbers: RandomNumbers,
    allow: Optional[Callable[[torch.Tensor], torch.Tensor]] = None,
    stop_tokens: Collection[int] = (),
) -> int:
    """Sample the next token of a row from its logits (vocab_size,).

    Args:
        allow: sets the logits of tokens that violate a constraint to -inf. If params rule out all
            others, only allow is applied.
        stop_tokens: those that min_tokens bans.
    """
    own = logits.float()
    logits = constrained(own, params, prompt, answer, stop_tokens)
    if allow is not None:
        ruled = logits is not own  # comparing values would wait for a GPU
        logits = allow(logits)
        if ruled and logits.max() == -math.inf:
            logits = allow(own)
    if params.temperature == 0:
        largest, first = logits.max(-1)
        token = int(torch.where(largest.isfinite(), first, -1))
        return _none_left() if token < 0 else token
    ids, logits = warped(logits, params)
    return sample_from(torch.softmax(logits, -1), numbers[len(answer)], ids)


def sample_from(
    probs: torch.Tensor, number: torch.Tensor, ids: Optional[torch.Tensor] = None
) -> int:
    """Sample from a distribution (tokens,) by inverting its cumulative sum at a random number.

    One number per token, regardless of the size of the vocabulary and of the other rows.

    Args:
        ids: of the tokens; by default 0, 1, ...

    Raises:
        ValueError: probabilities that aren't numbers.
    """
    if probs.device.type == "mps":  # which has no float64; the token is read from it anyway
        probs, ids = probs.cpu(), None if ids is None else ids.cpu()
    none = len(probs) if ids is None else -1
    if not len(probs):
        token = none
    elif len(probs) % PART == 0 and probs.device.type == "cpu" and ids is None:
        token = _sample_from_parts(probs.view(-1, PART), number)
    else:
        cumulative = probs.double().cumsum(-1)
        # The first strictly greater: never a token of probability 0.
        at = torch.searchsorted(cumulative, number * cumulative[-1], right=True)
        token = int(at if ids is None else F.pad(ids, (0, 1), value=none)[at])
    return _none_left() if token == none else token


def _none_left() -> NoReturn:
    raise ValueError(
        "no token can be sampled: the temperature, a penalty or logit_bias makes logits infinite, "
        "or all tokens are banned; use milder values"
    )


def _sample_from_parts(parts: torch.Tensor, number: torch.Tensor) -> int:
    """`sample_from` by the sums of parts, which are found faster, and then by the tokens of one."""
    cumulative = parts.sum(-1, dtype=torch.float64).cumsum(-1)
    target = number * cumulative[-1]
    part = int(torch.searchsorted(cumulative, target, right=True))
    if part == len(parts):
        return parts.numel()
    left = target - cumulative[part - 1] if part else target
    tokens = parts[part].double()
    at = int(torch.searchsorted(tokens.cumsum(-1), left, right=True))
    last = int(tokens.nonzero()[-1])  # sums of parts are rounded otherwise
    return part * PART + min(at, last)


def constrained(
    logits: torch.Tensor,
    params: SamplingParams,
    prompt: Sequence[int],
    answer: Sequence[int],
    stop_tokens: Collection[int] = (),
) -> torch.Tensor:
    """Biases, penalties, bans and the logits processor: (vocab_size,) -> (vocab_size,)."""
    logits = logits.float()
    if params.logit_bias:
        logits = _added(logits, params.logit_bias)
    if params.repetition_penalty != 1:
        known = [token for token in (*prompt, *answer) if token < len(logits)]  # not an image
        logits = penalize_repetition(logits, params.repetition_penalty, known)
    if answer and (params.presence_penalty or params.frequency_penalty):
        presence, frequency = params.presence_penalty, params.frequency_penalty
        counts = Counter(answer).items()
        logits = _added(logits, {token: -(presence + n * frequency) for token, n in counts})
    banned = list(params.banned_tokens)
    if params.no_repeat_ngram_size:
        repeated = would_repeat([*prompt, *answer], params.no_repeat_ngram_size)
        banned += [token for token in repeated if token < len(logits)]
    if len(answer) < params.min_tokens:
        banned += [token for token in stop_tokens if 0 <= token < len(logits)]
    if banned:
        logits = logits.index_fill(0, torch.tensor(banned, device=logits.device), -math.inf)
    if params.logits_processor is not None:
        found = params.logits_processor([*prompt, *answer], logits.clone())  # it may write to it
        if not isinstance(found, torch.Tensor) or found.shape != logits.shape:
            what = tuple(found.shape) if isinstance(found, torch.Tensor) else repr(found)[:60]
            raise ValueError(
                f"logits_processor gave {what}: it gets logits of shape {tuple(logits.shape)}, and "
                "must give such a tensor back"
            )
        return found
    return logits


def most_probable(logits: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
    """The largest logit of each row, NaN if any is, and its token, of (rows, vocab_size)."""
    if logits.device.type != "cpu" or logits.shape[-1] % PART:
        return logits.max(-1)  # type: ignore[return-value]
    parts = logits.unflatten(-1, (-1, PART))  # values without their places are found faster
    largest, part = parts.amax(-1).max(-1)
    within = parts[torch.arange(len(parts)), part].argmax(-1)
    return largest, part * PART + within


def _added(logits: torch.Tensor, values: Mapping[int, float]) -> torch.Tensor:
    """Logits with values added to those of some tokens, all at once."""
    ids = torch.tensor(list(values), device=logits.device)
    added = torch.tensor(list(values.values()), dtype=logits.dtype, device=logits.device)
    return logits.index_add(0, ids, added)


def warped(logits: torch.Tensor, params: SamplingParams) -> Kept:
    """Temperature, then top_k, top_p, min_p and typical_p, of logits (vocab_size,)."""
    kept: Kept = None, logits / params.temperature
    if params.top_k:
        kept = _of(kept, keep_top_k(kept[1], params.top_k))
    if params.top_p < 1:
        kept = _of(kept, keep_top_p(kept[1], params.top_p))
    if params.min_p > 0 and len(kept[1]):  # nothing is left of NaN
        kept = _of(kept, keep_min_p(kept[1], params.min_p))
    if params.typical_p < 1 and len(kept[1]):
        kept = _of(kept, keep_typical(kept[1], params.typical_p))
    return kept


def _of(before: Kept, kept: Kept) -> Kept:
    """What a filter keeps of what those before it kept, by the ids of these."""
    ids, at = before[0], kept[0]
    return ids if at is None else at if ids is None else ids[at], kept[1]


def _picks(logits: torch.Tensor) -> bool:
    """Whether the tokens kept are picked out. Elsewhere than on a CPU, that would wait for them."""
    return logits.device.type == "cpu"


def _keep(logits: torch.Tensor, mask: torch.Tensor) -> Kept:
    if not _picks(logits):
        return None, logits.masked_fill(~mask, -math.inf)
    ids = mask.nonzero()[:, 0]
    return ids, logits[ids]


def penalize_repetition(logits: torch.Tensor, penalty: float, ids: Sequence[int]) -> torch.Tensor:
    """Divide the logits of tokens in ids by the penalty; multiply them if they are negative."""
    if not ids:
        return logits
    seen = torch.tensor(sorted(set(ids)), device=logits.device)
    old = logits[seen]
    return logits.index_put((seen,), torch.where(old < 0, old * penalty, old / penalty))


def would_repeat(ids: Sequence[int], n: int) -> List[int]:
    """The tokens that would complete an n-gram that ids already contain."""
    start = list(ids[len(ids) - n + 1 :]) if n > 1 else []
    if len(ids) < n:
        return []
    return [ids[i + n - 1] for i in range(len(ids) - n + 1) if list(ids[i : i + n - 1]) == start]


def keep_top_k(logits: torch.Tensor, k: int) -> Kept:
    """Keep the k most probable tokens, and those tied with the last of them."""
    some, peaks = logits, logits[: len(logits) // PART * PART].view(-1, PART).amax(-1)
    if len(peaks) >= k and _picks(logits):  # the k largest are no less than k peaks
        some = logits[~(logits < peaks.topk(k).values[-1])]
    return _keep(logits, ~(logits < some.topk(min(k, len(some))).values[-1]))  # NaN stays


def keep_top_p(logits: torch.Tensor, p: float) -> Kept:
    """Keep the smallest set of most probable tokens whose probabilities add up to p; at least one.

    Of tokens that are equally probable, those with smaller ids come first.
    """
    probs = torch.softmax(logits, -1)
    # Sorting all would take longest. Those rarer than (1 - p) / n add up to less than 1 - p, and
    # often so do more of them. Half of it, and not p alone: sums are rounded.
    likely: Kept = None, logits
    for rare in ((1 - p) / 256, (1 - p) / len(probs) / 2) if _picks(logits) else ():
        likely = _keep(logits, probs >= rare)
        if probs[likely[0]].sum() > p + 1e-3:
            break
    ordered, order = (probs if likely[0] is None else probs[likely[0]]).sort(
        descending=True, stable=True
    )
    within = ordered.cumsum(-1) - ordered <= p  # the sum before each
    return _of(likely, _keep(likely[1], torch.empty_like(within).scatter(0, order, within)))


def keep_min_p(logits: torch.Tensor, p: float) -> Kept:
    """Keep the tokens at least p times as probable as the most probable one."""
    probs = torch.softmax(logits, -1)
    return _keep(logits, probs >= p * probs.max())


def keep_typical(logits: torch.Tensor, p: float) -> Kept:
    """Keep the tokens whose -log p is closest to the entropy, until they add up to p.

    Source: locally typical sampling, arXiv 2202.00666.
    """
    logprobs = torch.log_softmax(logits, -1)
    probs = logprobs.exp()
    entropy = -(logprobs * probs).nansum()
    distance = (-logprobs - entropy).abs()
    ordered, ids = distance.sort(stable=True)
    last = (probs[ids].cumsum(-1) < p).sum().clamp(max=len(ids) - 1)
    return _keep(logits, distance <= ordered.take(last))


def sample_top_p(
    probs: torch.Tensor, p: float, generator: Optional[torch.Generator] = None
) -> torch.Tensor:
    """Meta's function of this name, with the same results; generation uses `sample_token`.

    Args:
        probs: (..., vocab_size), summing to 1.

    Returns:
        Ids of shape (..., 1).
    """
    ordered, ids = torch.sort(probs, dim=-1, descending=True)
    before = ordered.cumsum(dim=-1) - ordered
    ordered = ordered.masked_fill(before > p, 0.0)  # multinomial normalizes
    return ids.gather(-1, torch.multinomial(ordered, num_samples=1, generator=generator))
