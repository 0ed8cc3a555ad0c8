"""Prompts into a cache, whole: those of similar lengths together, on top of what it has of them."""

from typing import Iterator, List, Sequence, Tuple

import torch

from llama.engine.projection import logprobs_of
from llama.layers.cache import PASS, KVCache
from llama.layers.ids import padded
from llama.model import Transformer


def prefill(
    model: Transformer, prompts: Sequence[Sequence[int]], cache: KVCache, score: bool = False
) -> Tuple[torch.Tensor, List[List[float]]]:
    """Fill the first rows of a cache with prompts, beyond the `lengths` that it has of each.

    At least one token of each is new. They are padded on the right; best ordered by what is new.

    Returns:
        The hidden state of each one's last token, (B, dim), and the score of each token (its
        log-probability after those before it; 0.0 for the first) if asked for: of whole prompts.
    """
    device, dtype = model.norm.weight.device, model.norm.weight.dtype
    known = cache.lengths[: len(prompts)]
    cache.reserve(max(map(len, prompts)))
    last, scores = [], []
    for start, stop in similar(known, [len(prompt) for prompt in prompts]):
        part, begins = cache.part(start, stop), known[start:stop]
        new = [list(prompts[i][known[i] :]) for i in range(start, stop)]
        rows, width = stop - start, max(map(len, new))
        tokens = padded(new, device)
        ends = torch.tensor([len(ids) for ids in new], device=device) - 1
        each = torch.arange(rows, device=device)
        of_last = torch.empty(rows, model.params.dim, dtype=dtype, device=device)
        of_next = torch.zeros(tokens.shape, device=device)
        step = max(PASS // rows, 1)
        for begin in range(0, width, step):
            h = model.hidden(
                tokens[:, begin : begin + step], [known + begin for known in begins], part
            )
            # Selected without indices that depend on values, for which a GPU would be waited for.
            here = (ends >= begin) & (ends < begin + step)
            found = h[each, (ends - begin).clamp(0, h.shape[1] - 1)]
            of_last = torch.where(here[:, None], found, of_last)
            if score:
                following = tokens[:, begin + 1 : begin + 1 + step]
                states = h[:, : following.shape[1]].flatten(0, 1)
                logprobs, _ = logprobs_of(model, states, following.flatten())
                of_next[:, begin + 1 : begin + 1 + step] = logprobs.view(following.shape)
        last.append(of_last)
        if score:
            scores += [row[: len(ids)] for row, ids in zip(of_next.tolist(), new, strict=True)]
    cache.lengths[: len(prompts)] = [len(prompt) for prompt in prompts]
    return torch.cat(last), scores


def similar(known: Sequence[int], lengths: Sequence[int]) -> Iterator[Tuple[int, int]]:
    """Cut rows into runs (start, stop), in each of which padding is at most a quarter of what is
    new, and no row is padded to more than the longest of all.

    Up to 256 tokens a pass costs about the same with padding as without.
    """
    start = 0
    for stop in range(1, len(lengths) + 1):
        if stop < len(lengths):
            new = [lengths[i] - known[i] for i in range(start, stop + 1)]
            padded = len(new) * max(new)
            fits = max(known[start : stop + 1]) + max(new) <= max(lengths)
            if fits and padded <= max(256, 1.25 * sum(new)):
                continue
        yield start, stop
        start = stop
