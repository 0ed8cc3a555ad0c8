"""Tensors of files that hold several weights: cut apart, and put together (`families.Fused`)."""

import math
from dataclasses import dataclass
from typing import Callable, Dict, Iterable, Iterator, List, Mapping

import torch

from llama.checkpoint.schemes.weight import QuantizedWeight
from llama.checkpoint.source import Converted, Derived, Shape, Stored, dtype_name
from llama.families.family import Fused


@dataclass(frozen=True)
class Transposed(Converted):
    """Columns of a stored matrix, as the rows of another."""

    first: int
    last: int

    @property
    def shape(self) -> Shape:
        return self.last - self.first, self.stored.shape[0]

    def read(self, axis: int, start: int, stop: int) -> torch.Tensor:
        # Whole rows of the file, which is mapped: reading columns would seek in each row.
        if axis == 0:
            rows = self.stored.read(0, 0, self.stored.shape[0])
            return rows[:, self.first + start : self.first + stop].T
        return self.stored.read(0, start, stop)[:, self.first : self.last].T


Part = Stored | Transposed | Derived | QuantizedWeight


def stored_as(part: Part) -> str:
    """See `Checkpoint.stored_as`."""
    return part.stored_as if isinstance(part, QuantizedWeight) else dtype_name(part.dtype)


def cut(
    stored: Dict[str, Part], fused: Mapping[str, Fused], shapes: Mapping[str, Shape]
) -> Dict[str, Part]:
    """The weights in a file's tensors. One that can't be cut stays as it is.

    Args:
        shapes: of whole weights; a shard's matrices have rows and columns in the same proportions.
    """
    found = dict(stored)
    for name, how in fused.items():
        whole, first = found.get(name), how.groups[0][0]
        if isinstance(whole, QuantizedWeight) and len(how.groups) == 1 and how.as_rows:
            found[first] = found.pop(name)
        if not isinstance(whole, Stored):
            continue
        if len(how.groups) == 1 and not how.transposed:  # another name, shape or encoding
            if first not in found and how.shape in (None, whole.shape):
                del found[name]
                if how.to_ours is not None:
                    found[first] = Derived(whole, how.to_ours, shapes[first])
                else:
                    shape = whole.shape if how.shape is None else shapes[first]
                    found[first] = whole._replace(shape=shape)
            continue
        matrix = how.transposed or len(shapes[first]) == 2
        if len(whole.shape) != 2 + how.stacked or not matrix or not math.prod(whole.shape):
            continue
        rows, cols = math.prod(whole.shape[:-1]), whole.shape[-1]
        heights = [shapes[group[0]][1 if how.transposed else 0] for group in how.groups]
        parts: Dict[str, Part] = {}
        done = 0
        for group, height in zip(how.groups, heights, strict=True):
            n, width = rows * height // sum(heights), cols // len(group)
            offset = whole.offset + done * cols * whole.dtype.itemsize
            part = Stored(whole.file, offset, (n, cols), whole.dtype)
            done += n
            for i, one in enumerate(group):
                columns = Transposed(part, i * width, (i + 1) * width)
                parts[one] = columns if how.transposed else part
        if done == rows and not parts.keys() & found.keys():
            del found[name]
            found |= parts
    return found


def plan(names: Iterable[str], fused: Mapping[str, Fused]) -> Dict[str, List[str]]:
    """What is written in place of weights: fused tensors with their parts, at the first of them,
    and weights alone."""
    owner = {one: name for name, how in fused.items() for group in how.groups for one in group}
    found: Dict[str, List[str]] = {}
    for name in names:
        found.setdefault(owner.get(name, name), []).append(name)
    return found


def fused_shape(how: Fused, shape: Callable[[str], Shape]) -> Shape:
    """The shape of a tensor whose parts have these."""
    if how.shape is not None or (how.groups == ((how.groups[0][0],),) and not how.transposed):
        return shape(how.groups[0][0]) if how.shape is None else how.shape
    turned = [[shape(one)[:: -1 if how.transposed else 1] for one in group] for group in how.groups]
    rows, cols = [group[0][0] for group in turned], sum(one[1] for one in turned[0])
    return (len(rows), rows[0], cols) if how.stacked else (sum(rows), cols)


def join(how: Fused, read: Callable[[str], torch.Tensor]) -> Iterator[torch.Tensor]:
    """The rows of a tensor, a group at a time."""
    if how.to_theirs is not None:
        yield how.to_theirs(read(how.groups[0][0]))
        return
    for group in how.groups:
        yield torch.cat([read(one).T if how.transposed else read(one) for one in group], 1)
