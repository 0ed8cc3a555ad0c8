"""The examples of a forward pass as rows: each in one of its own, or short ones one after another.

In a packed row, no token attends to another example's, and each example begins at position 0. So
packing changes how much padding is computed, and no loss.
"""

from typing import Any, Dict, List, NamedTuple, Sequence

import torch

from llama.families.registry import family_of
from llama.model import ModelArgs
from llama.training.data import Example, batch
from llama.training.losses import IGNORED


class Span(NamedTuple):
    """Where an example lies."""

    row: int
    begin: int
    end: int


class Pass(NamedTuple):
    """What a forward pass computes."""

    tokens: torch.Tensor  # (B, T)
    labels: torch.Tensor  # (B, T)
    options: Dict[str, Any]  # `positions` and `mask` of the model
    spans: List[Span]  # of the examples, in their order


def check_packable(args: ModelArgs) -> None:
    """Check that a model of this shape takes positions that begin anew within a row.

    Raises:
        ValueError: it doesn't.
    """
    network = family_of(args).network
    if not network.takes_positions:
        raise ValueError(
            f"pack: {network.__name__} counts positions from the beginning of a row, so examples "
            "can't share one. Train it without --pack (pack=False)"
        )


def plain(rows: Sequence[Example], device: torch.device) -> Pass:
    """Each example in a row of its own."""
    spans = [Span(i, 0, len(row.tokens)) for i, row in enumerate(rows)]
    return Pass(*batch(rows, device), {}, spans)


def packed(rows: Sequence[Example], device: torch.device) -> Pass:
    """The examples in rows as long as the longest of them, first-fit decreasing."""
    most = max(len(row.tokens) for row in rows)
    bins: List[List[int]] = []
    room: List[int] = []
    for i in sorted(range(len(rows)), key=lambda i: -len(rows[i].tokens)):
        length = len(rows[i].tokens)
        at = next((n for n, left in enumerate(room) if left >= length), len(bins))
        if at == len(bins):
            bins.append([])
            room.append(most)
        bins[at].append(i)
        room[at] -= length
    if len(bins) == len(rows):  # nothing fits together: causal attention needs no mask
        return plain(rows, device)

    joined, spans = [], [Span(0, 0, 0)] * len(rows)
    owner = torch.full((len(bins), most), -1)
    positions = torch.zeros(len(bins), most, dtype=torch.long)
    for n, members in enumerate(bins):
        tokens: List[int] = []
        labels: List[int] = []
        for i in members:
            begin, end = len(tokens), len(tokens) + len(rows[i].tokens)
            spans[i] = Span(n, begin, end)
            tokens += rows[i].tokens
            labels += [IGNORED, *rows[i].labels[1:]]  # nothing comes before an example's first
            owner[n, begin:end] = i
            positions[n, begin:end] = torch.arange(end - begin)
        joined.append(Example(tokens, labels))
    owner = owner.to(device)
    same = owner[:, None, :, None] == owner[:, None, None, :]  # (B, 1, T, T)
    options = {"positions": positions.to(device), "mask": same.tril()}
    return Pass(*batch(joined, device), options, spans)
