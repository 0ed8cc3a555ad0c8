"""Weights of 8 or 4 bits: the matrices of a model in ggml's blocks instead of dense ones.

A weight that the file already has in such blocks is taken as it is, from the mapped file where it
can be; any other is rounded to them as it is loaded. So `llama convert SRC DST gguf --quant q8_0`
(or q4_1) saves what would otherwise be rounded at each start, and llama.cpp reads it too.

The layers here compute on any device by making a weight dense for as long as it is used: they save
memory, not time. On a CPU `llama.backends.cpu` computes with the blocks themselves.
"""

import warnings
from typing import Any, Dict, Literal, NamedTuple, Optional, Tuple

import torch
import torch.nn.functional as F
from fairscale.nn.model_parallel.mappings import (
    copy_to_model_parallel_region,
    gather_from_model_parallel_region,
    reduce_from_model_parallel_region,
)
from torch import nn

from llama import checkpoint
from llama.checkpoint import Checkpoint, ggml
from llama.layers import parallel
from llama.model import Transformer

Kind = Literal["int8", "int4"]

# The block types that each kind makes, and those of a file that it takes as they are.
KINDS: Dict[str, Tuple[str, Tuple[str, ...]]] = {
    "int8": ("Q8_0", ("Q8_0", "Q4_0", "Q4_1")),
    "int4": ("Q4_1", ("Q4_0", "Q4_1")),
}
# The embedding and the output, on which quality hangs most, get 8 bits in any case.
EDGES = ("tok_embeddings.weight", "output.weight")

ROWS = 1 << 14  # that are rounded at a time


class Blocks(NamedTuple):
    """A weight (rows, cols) in blocks: (rows, bytes of a row), of a kind of `checkpoint.ggml`."""

    data: torch.Tensor
    kind: str

    @property
    def shape(self) -> Tuple[int, int]:
        rows, row = self.data.shape
        return rows, row // ggml.BYTES[self.kind] * ggml.VALUES

    def finite(self) -> bool:
        """Whether all scales are numbers: a weight that wasn't one becomes its block's scale."""
        halves = self.data.view(torch.float16).view(-1, ggml.BYTES[self.kind] // 2)
        return bool(halves[:, 0].isfinite().all())

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        return ggml.dequantize(self.data, self.kind).to(dtype)


class QuantizedLinear(nn.Module):
    """y = x wᵀ, w in blocks; its ranks split it as fairscale's linears would (see model.py).

    Args:
        gather: put the ranks' outputs side by side.
        reduce: add them up.
    """

    def __init__(self, weight: Blocks, gather: bool = False, reduce: bool = False):
        super().__init__()
        self.register_buffer("data", weight.data)
        self.kind, self.gather, self.reduce = weight.kind, gather, reduce

    @property
    def blocks(self) -> Blocks:
        return Blocks(self.data, self.kind)  # type: ignore[arg-type]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.reduce:
            x = copy_to_model_parallel_region(x)  # so that its gradient is that of all ranks
        y = F.linear(x, self.blocks.dense(x.dtype))
        if self.gather:
            return gather_from_model_parallel_region(y)
        return reduce_from_model_parallel_region(y) if self.reduce else y


class QuantizedEmbedding(nn.Module):
    """The rows of a weight in blocks, of which each rank holds some."""

    def __init__(self, weight: Blocks, dtype: torch.dtype):
        super().__init__()
        self.register_buffer("data", weight.data)
        self.kind, self.dtype = weight.kind, dtype

    @property
    def blocks(self) -> Blocks:
        return Blocks(self.data, self.kind)  # type: ignore[arg-type]

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        rows = len(self.data)  # type: ignore[arg-type]
        local = tokens - parallel.rank() * rows
        known = (local >= 0) & (local < rows)
        found = self.data[local.where(known, 0).flatten()]  # type: ignore[index]
        values = ggml.dequantize(found, self.kind).to(self.dtype)
        values = values.view(*tokens.shape, -1) * known[..., None]
        return reduce_from_model_parallel_region(values)


def load(
    source: Checkpoint,
    model: Transformer,
    kind: Kind,
    *,
    dtype: torch.dtype,
    device: Optional[torch.device] = None,
) -> Transformer:
    """`checkpoint.load`, with the model's matrices in blocks.

    Args:
        kind: "int8" (Q8_0) or "int4" (Q4_1, and Q8_0 for the embedding and the output).
        dtype: of what isn't a matrix, and of activations.

    Raises:
        ValueError: an unknown kind, or a rank's part of a weight that isn't whole blocks; and what
            `checkpoint.load` raises.
    """
    tied = source.args.tied_embeddings

    def replace(name: str) -> Optional[nn.Module]:
        if "norm" in name:
            return None
        found = read(source, name, kind)
        found = found._replace(data=found.data.to(device))
        if name == "tok_embeddings.weight":
            if tied:
                model.output = QuantizedLinear(found, gather=True)
            return QuantizedEmbedding(found, dtype)
        row_parallel = parallel.shard_axis(name) == 1
        return QuantizedLinear(found, gather=name == "output.weight", reduce=row_parallel)

    return checkpoint.load(source, model, dtype=dtype, device=device, replace=replace)


def block_bytes(name: str, kind: Kind | str) -> int:
    """Bytes of the blocks that a weight is rounded to.

    Raises:
        ValueError: an unknown kind.
    """
    return ggml.BYTES[_types(name, kind)[0]]


def _types(name: str, kind: Kind | str) -> Tuple[str, Tuple[str, ...]]:
    if kind not in KINDS:
        raise ValueError(f"quantize={kind!r}: choose one of {', '.join(KINDS)}, or None")
    target, kept = KINDS[kind]
    return ("Q8_0", KINDS["int8"][1]) if name in EDGES else (target, kept)


def read(source: Checkpoint, name: str, kind: Kind) -> Blocks:
    """This rank's part of a weight, in blocks."""
    target, kept = _types(name, kind)
    rank, world = parallel.rank(), parallel.world_size()
    rows, cols = checkpoint.local_shape(source.args, name, rank, world)
    if cols % ggml.VALUES:
        raise ValueError(
            f"quantize={kind!r}: {name} is {cols} wide on each of {world} rank(s), and a block "
            f"holds {ggml.VALUES} values: use another number of ranks, or quantize=None"
        )
    stored = source.stored_as(name)
    data = _stored_blocks(source, name, rank, world, stored) if stored in kept else None
    if data is not None:
        missing = rows - data.shape[0], cols // ggml.VALUES * ggml.BYTES[stored] - data.shape[1]
        if any(missing):  # blocks of zeros, as in any padded weight
            data = F.pad(data, (0, missing[1], 0, missing[0]))
        found = Blocks(data, stored)
    else:
        dense = checkpoint.read_shard(source, name, rank, world)
        step = max(1, ROWS * ggml.VALUES // cols)
        parts = [ggml.quantize(part, target) for part in dense.split(step)]
        found = Blocks(torch.cat(parts), target)
    if not found.finite():
        warnings.warn(f"{source.path}: {name} holds NaN or infinity", stacklevel=2)
    return found


def _stored_blocks(
    source: Checkpoint, name: str, rank: int, world: int, stored: str
) -> Optional[torch.Tensor]:
    """What the file holds of this rank's part; None if that can't be cut between blocks."""
    args, shape = source.args, checkpoint.weight_shapes(source.args)[name]
    axis = parallel.shard_axis(name) or 0
    ranges = parallel.shard_ranges(name, shape[axis], rank, world, args.n_heads, args.n_kv_heads)
    if axis == 1 and any(start % ggml.VALUES or stop % ggml.VALUES for start, stop in ranges):
        return None
    gguf: Any = source  # no other format has blocks
    parts = [gguf.read_blocks(name, axis, start, stop) for start, stop in ranges]
    return parts[0] if len(parts) == 1 else torch.cat(parts)
