"""Weights of integers: value = scale · (q - zero), with a scale for each group of a row."""

from typing import NamedTuple, Optional

import torch

from llama.checkpoint import integers
from llama.checkpoint.schemes.weight import Parts, QuantizedWeight
from llama.checkpoint.source import Shape, Stored


class Codes(NamedTuple):
    """Some rows; q and zero are unsigned, of 4 or 8 bits."""

    q: torch.Tensor  # (rows, cols), uint8
    scale: torch.Tensor  # (rows, groups), a float
    zero: torch.Tensor  # (rows, groups), uint8


class IntegerWeight(QuantizedWeight):
    """A weight of integers. Schemes derive from it and say where its parts are, in `codes`.

    Args:
        method: the scheme, for the label.
        bits: 4 or 8.
        group: neighbours in a row that share a scale.
        order: the group of each column, where they aren't neighbours. Such weights become dense.
    """

    def __init__(
        self,
        shape: Shape,
        method: str,
        parts: Parts,
        *,
        bits: int,
        group: int,
        order: Optional[torch.Tensor] = None,
    ):
        if bits not in (4, 8):
            raise ValueError(f"has {bits} bits; read here are 4 and 8")
        rows, cols = shape
        if rows < 1 or cols < 1 or group < 1 or cols % group:
            raise ValueError(f"of shape {shape} can't be in groups of {group}")
        neighbours = torch.arange(cols) // group
        kind, label = integers.kind_for(bits, group, cols), f"{method} {bits} bit, "
        label += f"groups of {group}" if group < cols else "a scale for each row"
        if order is not None and not torch.equal(order, neighbours):
            kind, label = None, label + ", activation order"
            if int(order.min()) < 0 or int(order.max()) * group >= cols:
                raise ValueError(f"has groups {int(order.min())} to {int(order.max())} in g_idx")
            neighbours = order
        super().__init__(shape, label, kind, parts)
        self.group, self._group_of = group, neighbours

    def codes(self, start: int, stop: int) -> Codes:
        """Rows [start, stop)."""
        raise NotImplementedError

    def dense(self, start: int, stop: int) -> torch.Tensor:
        q, scale, zero = self.codes(start, stop)
        each = self._group_of
        return q.float().sub_(zero.float()[:, each]).mul_(scale.float()[:, each])

    def blocks(self, start: int, stop: int) -> torch.Tensor:
        assert self.kind is not None
        q, scale, zero = self.codes(start, stop)
        each = self._group_of[:: integers.BITS_VALUES[self.kind][1]]
        return integers.pack(q, scale[:, each], zero[:, each], self.kind)


def unpacked(words: torch.Tensor, bits: int) -> torch.Tensor:
    """(..., n) int32 -> (..., n · 32 / bits) uint8: the lowest bits of a word come first."""
    found = words.contiguous().flatten().view(torch.uint8).view(*words.shape[:-1], -1)
    return torch.stack([found & 15, found >> 4], -1).flatten(-2) if bits == 4 else found


def columns(part: Stored, start: int, stop: int) -> torch.Tensor:
    """Columns [start, stop) of a matrix, mapped from the file."""
    return part.read(0, 0, part.shape[0])[:, start:stop]
