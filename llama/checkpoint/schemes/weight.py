"""A weight that a file holds as several tensors: integers or codes, scales, zero points, ..."""

import math
from typing import Mapping, Optional

import torch

from llama.checkpoint import ggml
from llama.checkpoint.shapes import chunks
from llama.checkpoint.source import DTYPES, Shape, Stored

FLOATS = tuple(DTYPES.values())
Parts = Mapping[str, Stored]  # tensors by what follows the module's name: "qweight", "scales", ...


class QuantizedWeight:
    """One weight (rows, cols), read by slices like a `Stored` tensor. Schemes derive from it.

    Attributes:
        shape: whole, rows being output features.
        label: what it is stored as, for people: "AWQ 4 bit, groups of 128".
        kind: the block type that holds it exactly (see `ggml.block`); None: it becomes dense.
        nbytes: of its tensors in the files.
    """

    def __init__(self, shape: Shape, label: str, kind: Optional[str], parts: Parts):
        self.shape, self.label, self.kind = shape, label, kind
        self.nbytes = sum(math.prod(part.shape) * part.dtype.itemsize for part in parts.values())

    @property
    def stored_as(self) -> str:
        """The block type that it can be read as, else the label."""
        return self.kind or self.label

    def dense(self, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop), (stop - start, cols), dequantized."""
        raise NotImplementedError

    def blocks(self, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) as blocks of `kind`, (stop - start, bytes of a row); uint8."""
        raise NotImplementedError

    def read(self, axis: int, start: int, stop: int) -> torch.Tensor:
        """[start, stop) along an axis, dequantized."""
        if axis == 0:
            return self.dense(start, stop)
        pieces = chunks(self.shape, 0, 0, self.shape[0])
        return torch.cat([self.dense(*rows)[:, start:stop] for rows in pieces])

    def read_blocks(self, axis: int, start: int, stop: int) -> torch.Tensor:
        """The same as blocks; along axis 1 start and stop are whole blocks."""
        if axis == 0:
            return self.blocks(start, stop)
        assert self.kind is not None
        values, size = ggml.block(self.kind)
        pieces, (start, stop) = (
            chunks(self.shape, 0, 0, self.shape[0]),
            (start // values, stop // values),
        )
        return torch.cat([self.blocks(*rows)[:, start * size : stop * size] for rows in pieces])


def only(parts: Parts, *known: str) -> None:
    """Check that a weight has no other tensors.

    Raises:
        ValueError: it has one.
    """
    if unknown := sorted(parts.keys() - {*known}):
        raise ValueError(f"has tensors that this scheme has no meaning for: {', '.join(unknown)}")


def whole(part: Stored) -> torch.Tensor:
    """All of a tensor, mapped from the file."""
    return part.read(0, 0, part.shape[0]) if part.shape else part.read(0, 0, 1)


def need(parts: Parts, name: str, shape: Optional[Shape] = None, *dtypes: torch.dtype) -> Stored:
    """One of a weight's tensors, checked.

    Raises:
        ValueError: it is missing, or of another shape or dtype.
    """
    if name not in parts:
        raise ValueError(f"lacks {name}; it has {', '.join(sorted(parts))}")
    part = parts[name]
    if shape is not None and part.shape != shape:
        raise ValueError(f"{name} has the shape {part.shape}, and {shape} follows from the others")
    if dtypes and part.dtype not in dtypes:
        raise ValueError(f"{name} has the dtype {part.dtype}, not {' or '.join(map(str, dtypes))}")
    return part
