"""A forward pass of rows with any number of new tokens each."""

from typing import Iterator, List, Sequence

import torch

from llama.layers.ids import padded
from llama.layers.low_rank import choose
from llama.layers.paged import PagedRows
from llama.model import Transformer

PADDED = 256  # tokens of a pass that cost about the same with padding as without


def hidden(model: Transformer, new: Sequence[Sequence[int]], cache: PagedRows) -> torch.Tensor:
    """The hidden states of all new tokens, row after row: (tokens, dim).

    Backends that have `hidden_of_rows` compute them without padding. For others, rows of similar
    numbers of tokens are padded and computed together.
    """
    if hasattr(model, "hidden_of_rows"):
        return model.hidden_of_rows(new, cache)  # type: ignore[operator]
    parts: List[torch.Tensor] = [torch.empty(0)] * len(new)
    groups = []
    for rows in similar([len(ids) for ids in new]):
        tokens = padded([list(new[row]) for row in rows], model.norm.weight.device)
        some = cache.select(rows)
        some.prepare(tokens.shape[1])
        groups.append((rows, tokens, some))
    for rows, tokens, some in groups:
        with choose(model, some.adapters):
            h = model.hidden(tokens, some.lengths, some)
        for row, of_row in zip(rows, h, strict=True):
            parts[row] = of_row[: len(new[row])]
    return torch.cat(parts)


def similar(counts: Sequence[int]) -> Iterator[List[int]]:
    """Groups of rows: in each, at most a quarter of the tokens is padding, or they are few."""
    order = sorted(range(len(counts)), key=counts.__getitem__)
    group: List[int] = []
    for row in order:
        more = [*group, row]
        if group and len(more) * counts[row] > max(PADDED, 1.25 * sum(counts[i] for i in more)):
            yield group
            more = [row]
        group = more
    if group:
        yield group
