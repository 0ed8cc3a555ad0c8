"""From logits to a token: pure functions of one row's logits, in fp32, in a fixed order.

    guidance, logit_bias, repetition_penalty, presence and frequency penalty, no_repeat_ngram_size,
    banned_tokens, a processor of one's own; then, unless the temperature is 0,
    temperature, top_k, top_p, min_p, typical_p, and the draw

This is the order of transformers' `generate` (what it doesn't have stands with its like). A token
that is ruled out has the logit -inf.
"""

import math
from collections import Counter
from typing import Callable, List, Optional, Sequence

import torch

from llama.engine.params import SamplingParams

HEAD = 1024  # tokens among which top_p mostly falls


class Numbers:
    """A row's random numbers, uniform in [0, 1): the n-th is for the answer's n-th token.

    It is the same whoever asks for it, and however often: a draft model that draws with the number
    with which the model itself will draw mostly draws the same.
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


def draw(
    logits: torch.Tensor,
    params: SamplingParams,
    prompt: Sequence[int],
    answer: Sequence[int],
    numbers: Numbers,
    allow: Optional[Callable[[torch.Tensor], torch.Tensor]] = None,
) -> int:
    """The next token of a row with these logits (vocab_size,).

    Args:
        allow: makes -inf of the logits of tokens that can't come. Where params rule out all that
            could, it alone counts.
    """
    own, logits = logits.float(), constrained(logits, params, prompt, answer)
    if allow is not None:
        logits = allow(logits)
        if logits.max() == -math.inf:
            logits = allow(own)
    if params.temperature == 0:
        return int(logits.argmax())
    return draw_from(torch.softmax(warped(logits, params), -1), numbers[len(answer)])


def draw_from(probs: torch.Tensor, number: torch.Tensor) -> int:
    """A token of a distribution (vocab_size,): where a random number falls in the running sum.

    So a row uses up one number per token, whatever the vocabulary and the other rows.
    """
    running = probs.double().cumsum(-1)
    # Strictly beyond the number, where no token of probability 0 can be.
    return int(torch.searchsorted(running, number * running[-1], right=True))


def constrained(
    logits: torch.Tensor, params: SamplingParams, prompt: Sequence[int], answer: Sequence[int]
) -> torch.Tensor:
    """What depends on the tokens so far and on single ids: (vocab_size,) -> (vocab_size,)."""
    logits = logits.float()
    if params.logit_bias:
        logits = logits.clone()
        ids = torch.tensor(list(params.logit_bias), device=logits.device)
        logits[ids] += torch.tensor(list(params.logit_bias.values()), device=logits.device)
    if params.repetition_penalty != 1:
        logits = penalize_repetition(logits, params.repetition_penalty, [*prompt, *answer])
    if answer and (params.presence_penalty or params.frequency_penalty):
        logits = logits.clone()
        for token, count in Counter(answer).items():
            logits[token] -= params.presence_penalty + count * params.frequency_penalty
    banned = list(params.banned_tokens)
    if params.no_repeat_ngram_size:
        banned += would_repeat([*prompt, *answer], params.no_repeat_ngram_size)
    if banned:
        logits = logits.clone()
        logits[torch.tensor(banned, device=logits.device)] = -math.inf
    if params.logits_processor is not None:
        logits = params.logits_processor([*prompt, *answer], logits)
    return logits


def warped(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """Temperature, and what leaves the less probable tokens out: (vocab_size,) each."""
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
    """Logits of tokens that were there before are divided by the penalty; negative ones, times."""
    if not ids:
        return logits
    seen = torch.tensor(sorted(set(ids)), device=logits.device)
    old = logits[seen]
    return logits.index_put((seen,), torch.where(old < 0, old * penalty, old / penalty))


def would_repeat(ids: Sequence[int], n: int) -> List[int]:
    """The tokens that would complete a run of n that is there already."""
    start = list(ids[len(ids) - n + 1 :]) if n > 1 else []
    if len(ids) < n:
        return []
    return [ids[i + n - 1] for i in range(len(ids) - n + 1) if list(ids[i : i + n - 1]) == start]


def keep_top_k(logits: torch.Tensor, k: int) -> torch.Tensor:
    """The k most probable tokens, and what ties with the last of them."""
    last = logits.topk(min(k, len(logits))).values[-1]
    return logits.masked_fill(logits < last, -math.inf)


def keep_top_p(logits: torch.Tensor, p: float) -> torch.Tensor:
    """The smallest set of most probable tokens that together reach p; at least one.

    Of tokens as probable as the last of them, those with the smaller ids.
    """
    probs = torch.softmax(logits, -1)
    ordered = probs.topk(min(HEAD, len(probs))).values  # sorting all would take ten times as long
    kept = int((ordered.cumsum(-1) - ordered <= p).sum())  # those more probable don't exceed p
    if kept == len(ordered) < len(probs):
        ordered = probs.sort(descending=True).values
        kept = int((ordered.cumsum(-1) - ordered <= p).sum())
    last = ordered[kept - 1]
    equal = (probs == last).nonzero()[:, 0]
    left_out = equal[kept - int((ordered[:kept] > last).sum()) :]
    return logits.masked_fill(probs < last, -math.inf).index_fill(0, left_out, -math.inf)


def keep_min_p(logits: torch.Tensor, p: float) -> torch.Tensor:
    """Tokens at least p times as probable as the most probable one."""
    probs = torch.softmax(logits, -1)
    return logits.masked_fill(probs < p * probs.max(), -math.inf)


def keep_typical(logits: torch.Tensor, p: float) -> torch.Tensor:
    """Those tokens that together reach p, whose information is nearest to the entropy."""
    logprobs = torch.log_softmax(logits, -1)
    probs = logprobs.exp()
    entropy = -(logprobs * probs).nansum()
    distance, ids = (-logprobs - entropy).abs().sort(stable=True)
    last = min(int((probs[ids].cumsum(-1) < p).sum()), len(ids) - 1)
    return logits.index_fill(0, ids[distance > distance[last]], -math.inf)


def sample_top_p(
    probs: torch.Tensor, p: float, generator: Optional[torch.Generator] = None
) -> torch.Tensor:
    """Meta's function of this name, draw for draw; generation itself uses `draw`.

    Args:
        probs: (..., vocab_size), summing to 1.

    Returns:
        Ids of shape (..., 1).
    """
    ordered, ids = torch.sort(probs, dim=-1, descending=True)
    before = ordered.cumsum(dim=-1) - ordered
    ordered = ordered.masked_fill(before > p, 0.0)  # multinomial doesn't ask for a sum of 1
    drawn = torch.multinomial(ordered, num_samples=1, generator=generator)
    return ids.gather(-1, drawn)
