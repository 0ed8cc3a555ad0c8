"""Sampling: pure functions from one row's logits to a token, in fp32, in a fixed order.

    guidance, logit_bias, repetition_penalty, presence and frequency penalty, no_repeat_ngram_size,
    banned_tokens, min_tokens, logits_processor; then, unless the temperature is 0,
    temperature, top_k, top_p, min_p, typical_p, and sampling

This is the order of transformers' `generate`; what it lacks comes next to the most similar step.
Tokens that are ruled out get the logit -inf.
"""

import math
from collections import Counter
from typing import Callable, Collection, List, Mapping, Optional, Sequence

import torch

from llama.engine.params import SamplingParams

HEAD = 1024  # most probable tokens, among which top_p usually stops


class RandomNumbers:
    """A row's random numbers, uniform in [0, 1); the n-th one samples the answer's n-th token.

    Each can be read several times: a draft model samples with the number that the model will use,
    so that both usually sample the same token.
    """

    def __init__(self, seed: int, device: torch.device):
        self._generator = torch.Generator(device).manual_seed(seed)
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
        return int(logits.argmax())
    return sample_from(torch.softmax(warped(logits, params), -1), numbers[len(answer)])


def sample_from(probs: torch.Tensor, number: torch.Tensor) -> int:
    """Sample from a distribution (vocab_size,) by inverting its cumulative sum at a random number.

    One number per token, regardless of the size of the vocabulary and of the other rows.

    Raises:
        ValueError: probabilities that aren't numbers.
    """
    cumulative = probs.double().cumsum(-1)
    # The first strictly greater: never a token of probability 0.
    token = int(torch.searchsorted(cumulative, number * cumulative[-1], right=True))
    if token == len(probs):
        raise ValueError(
            "no token can be sampled: the temperature, a penalty or logit_bias makes logits "
            "infinite, or all tokens are banned; use milder values"
        )
    return token


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
        found = params.logits_processor([*prompt, *answer], logits)
        if not isinstance(found, torch.Tensor) or found.shape != logits.shape:
            what = tuple(found.shape) if isinstance(found, torch.Tensor) else repr(found)[:60]
            raise ValueError(
                f"logits_processor gave {what}: it gets logits of shape {tuple(logits.shape)}, and "
                "must give such a tensor back"
            )
        return found
    return logits


def _added(logits: torch.Tensor, values: Mapping[int, float]) -> torch.Tensor:
    """Logits with values added to those of some tokens, all at once."""
    ids = torch.tensor(list(values), device=logits.device)
    added = torch.tensor(list(values.values()), dtype=logits.dtype, device=logits.device)
    return logits.index_add(0, ids, added)


def warped(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """Temperature, then top_k, top_p, min_p and typical_p: (vocab_size,) -> (vocab_size,)."""
    logits = logits / params.temperature
    if params.top_k:
        logits = keep_top_k(logits, params.top_k)
    if params.top_p < 1:
        logits = keep_top_p(logits, params.top_p)
    if params.min_p > 0:
        logits = keep_min_p(logits, params.min_p)
    if params.typical_p < 1:
        logits = keep_typical(logits, params.typical_p)
    return logits


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


def keep_top_k(logits: torch.Tensor, k: int) -> torch.Tensor:
    """Keep the k most probable tokens, and those tied with the last of them."""
    last = logits.topk(min(k, len(logits))).values[-1]
    return logits.masked_fill(logits < last, -math.inf)


def keep_top_p(logits: torch.Tensor, p: float) -> torch.Tensor:
    """Keep the smallest set of most probable tokens whose probabilities add up to p; at least one.

    Of tokens that are equally probable, those with smaller ids come first.
    """
    probs = torch.softmax(logits, -1)
    ordered = probs.topk(min(HEAD, len(probs))).values  # sorting all takes ten times as long
    kept = int((ordered.cumsum(-1) - ordered <= p).sum())  # the sum before each is at most p
    if kept == len(ordered) < len(probs):
        ordered = probs.sort(descending=True).values
        kept = int((ordered.cumsum(-1) - ordered <= p).sum())
    last = ordered[kept - 1]
    equal, most = probs == last, kept - (ordered[:kept] > last).sum()
    left_out = equal & (equal.cumsum(-1) > most)
    return logits.masked_fill((probs < last) | left_out, -math.inf)


def keep_min_p(logits: torch.Tensor, p: float) -> torch.Tensor:
    """Keep the tokens at least p times as probable as the most probable one."""
    probs = torch.softmax(logits, -1)
    return logits.masked_fill(probs < p * probs.max(), -math.inf)


def keep_typical(logits: torch.Tensor, p: float) -> torch.Tensor:
    """Keep the tokens whose -log p is closest to the entropy, until they add up to p.

    Source: locally typical sampling, arXiv 2202.00666.
    """
    logprobs = torch.log_softmax(logits, -1)
    probs = logprobs.exp()
    entropy = -(logprobs * probs).nansum()
    distance = (-logprobs - entropy).abs()
    ordered, ids = distance.sort(stable=True)
    last = (probs[ids].cumsum(-1) < p).sum().clamp(max=len(ids) - 1)
    return logits.masked_fill(distance > ordered.take(last), -math.inf)


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
