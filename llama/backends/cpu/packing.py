"""Weights in the layout that the CPU kernels read: rows interleaved by 16 (blocks.h)."""

import math
import mmap
from ctypes import byref
from typing import List, Sequence, Tuple

import torch
from torch import nn

from llama.backends.cpu import kernels
from llama.backends.cpu.kernels import address
from llama.backends.quantized import Blocks, QuantizedLinear
from llama.checkpoint.source import dtype_name

LANES, ALIGNMENT = 16, 64


def weight_of(linear: nn.Module) -> torch.Tensor | Blocks:
    """A linear layer's weight, dense or quantized."""
    return linear.blocks if isinstance(linear, QuantizedLinear) else linear.weight  # type: ignore[return-value]


class Packed:
    """A weight (rows, cols), packed.

    Attributes:
        data: its bytes, which `struct` points to.
    """

    def __init__(self, weight: torch.Tensor | Blocks, data: torch.Tensor):
        raw, self.kind = _raw(weight)
        raw = raw.contiguous()
        self.rows, self.cols = weight.shape
        self.data = data
        number = kernels.KINDS.index(self.kind)
        kernels.library().pack_rows(
            number, address(raw), self.rows, self.cols, address(data), torch.get_num_threads()
        )
        self.struct = kernels.Weight(data.data_ptr(), number, self.rows, self.cols)

    def take_rows(self, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Rows (...,) of the weight, dequantized: (..., cols)."""
        ids = ids.to(torch.int64).contiguous()  # as the kernels read them
        out = torch.empty(*ids.shape, self.cols, dtype=dtype)
        kernels.library().rows(
            dtype == torch.bfloat16, byref(self.struct), address(ids), ids.numel(), address(out),
            torch.get_num_threads(),
        )  # fmt: skip
        return out


def _raw(weight: torch.Tensor | Blocks) -> Tuple[torch.Tensor, str]:
    """Its bytes and its block type."""
    if isinstance(weight, Blocks):
        return weight.data, weight.kind
    return weight.detach(), dtype_name(weight.dtype)


def interleave(weight: torch.Tensor) -> torch.Tensor:
    """A dense weight (rows, cols), multiples of 16 and 2, in the layout of `Packed`."""
    rows, cols = weight.shape
    together = 4 // weight.dtype.itemsize  # pairs of bf16
    units = weight.view(rows // LANES, LANES, cols // together, together)
    return units.transpose(1, 2).contiguous()


class Arena:
    """Memory for all packed weights of a model, in huge pages where the system gives them.

    One area rather than many, since a huge page of 2 MB is as large as many a weight. Its pages
    are taken as they are written to.

    Args:
        sizes: bytes of each weight once it is packed, in the order in which they will be packed.
    """

    def __init__(self, sizes: Sequence[int]):
        sizes = [math.ceil(size / ALIGNMENT) * ALIGNMENT for size in sizes]
        huge = 1 << 21
        if hasattr(mmap, "MADV_HUGEPAGE"):
            area = mmap.mmap(-1, sum(sizes) + huge, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            area.madvise(mmap.MADV_HUGEPAGE)
            whole = torch.frombuffer(area, dtype=torch.uint8)  # keeps the mapping
            whole = whole[-whole.data_ptr() % huge :]
        else:
            whole = torch.empty(sum(sizes) + ALIGNMENT, dtype=torch.uint8)
            whole = whole[-whole.data_ptr() % ALIGNMENT :]
        self._parts: List[torch.Tensor] = list(whole[: sum(sizes)].split(sizes))

    def take(self) -> torch.Tensor:
        """Memory for the next of the weights that the arena was made for."""
        return self._parts.pop(0)

    def pack(self, weight: torch.Tensor | Blocks) -> Packed:
        """Pack the next of the weights that `arena_for` has made it for."""
        return Packed(weight, self.take())


def arena_for(weights: Sequence[torch.Tensor | Blocks]) -> Arena:
    """An arena for these weights; the kernels are compiled for all of their types at once."""
    raws = [_raw(weight) for weight in weights]
    kernels.add_types({kind for _, kind in raws})
    groups = ((raw, math.ceil(len(raw) / LANES)) for raw, _ in raws)
    return Arena([raw.nbytes // len(raw) * (n * LANES) for raw, n in groups])
