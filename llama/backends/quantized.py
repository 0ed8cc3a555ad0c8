"""Weight quantization to 8 or 4 bits, in ggml's blocks: 32 values with a common scale.

A weight that the file stores in such blocks is kept as it is, mapped from the file if possible; any
other is quantized as it is loaded. `llama convert SRC DST gguf --quant q8_0` (or q4_1) quantizes
once instead of at each start; llama.cpp reads the result too.

The layers here run on any device: they dequantize a weight for each use, which saves memory, not
time. On a CPU, `llama.backends.cpu` computes with the blocks directly.
"""

import warnings
from typing import Any, Dict, List, NamedTuple, Optional, Set, Tuple

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
from llama.checkpoint.mapped import own_memory
from llama.checkpoint.shapes import chunks
from llama.checkpoint.source import dtype_name
from llama.layers import parallel
from llama.model import Transformer

# For each kind, the block type that it quantizes to, and those that it keeps as stored. The kind
# "stored" keeps all, and leaves dense weights dense.
FOUR_BITS = (
    "Q4_0", "Q4_1", "Q4_K", "Q2_K", "Q3_K", "IQ4_NL", "IQ4_XS", "MXFP4", "I4_32", "I4_64", "I4_128",
    "NF4", "FP4", "E2M1",
)  # fmt: skip
ALL = (*FOUR_BITS, "Q5_0", "Q5_1", "Q5_K", "Q6_K", "Q8_0", "I8_32", "I8_128", "FP8")
KINDS: Dict[str, Tuple[str, Tuple[str, ...]]] = {
    "int8": ("Q8_0", ALL),
    "int4": ("Q4_1", FOUR_BITS),
}
# The embedding and the output layer affect quality most: they always get 8 bits.
EDGES = ("tok_embeddings.weight", "output.weight")


ROWS = 1 << 14  # quantized at a time, of 32 values each


class Blocks(NamedTuple):
    """A quantized weight (rows, cols): bytes (rows, bytes per row), and the ggml block type."""

    data: torch.Tensor
    kind: str

    @property
    def shape(self) -> Tuple[int, int]:
        (rows, row), (values, size) = self.data.shape, ggml.block(self.kind)
        return rows, row // size * values

    def finite(self) -> bool:
        return ggml.is_finite(self.data, self.kind)

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        return ggml.dequantize(self.data, self.kind).to(dtype)


class QuantizedLinear(nn.Module):
    """y = x wᵀ with a quantized w, sharded over ranks like fairscale's linear layers (model.py).

    Args:
        gather: concatenate the ranks' outputs.
        reduce: sum them.
    """

    def __init__(self, weight: Blocks, gather: bool = False, reduce: bool = False):
        super().__init__()
        self.register_buffer("data", weight.data)
        self.kind, self.gather, self.reduce = weight.kind, gather, reduce
        self.bias: Optional[nn.Parameter] = None  # some families have one

    @property
    def blocks(self) -> Blocks:
        return Blocks(self.data, self.kind)  # type: ignore[arg-type]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.reduce:
            x = copy_to_model_parallel_region(x)  # sums its gradient over the ranks
        y = F.linear(x, self.blocks.dense(x.dtype))
        y = reduce_from_model_parallel_region(y) if self.reduce else y
        y = y if self.bias is None else y + self.bias
        return gather_from_model_parallel_region(y) if self.gather else y


class QuantizedEmbedding(nn.Module):
    """A quantized embedding, of which each rank holds some rows."""

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
    kind: str,
    *,
    dtype: torch.dtype,
    device: Optional[torch.device] = None,
) -> Transformer:
    """`checkpoint.load` with quantized matrices.

    Args:
        kind: "int8" (Q8_0), "int4" (Q4_1, and Q8_0 for the embedding and the output), or "stored":
            those stay quantized that are stored so.
        dtype: of the norms and of activations.

    Raises:
        ValueError: an unknown kind, or a shard whose width isn't a multiple of the block size; and
            what `checkpoint.load` raises.
    """
    tied = source.args.tied_embeddings

    def replace(name: str) -> Optional[nn.Module]:
        found = read(source, name, kind) if is_quantizable(name) else None
        if found is None:
            return None
        found = found._replace(data=found.data.to(device))
        if name == "tok_embeddings.weight":
            if tied:
                model.output = QuantizedLinear(found, gather=True)
            return QuantizedEmbedding(found, dtype)
        owner = model.get_submodule(name.removesuffix(".weight"))
        row_parallel = parallel.shard_axis(name) == 1 and getattr(owner, "reduces", True)
        layer = QuantizedLinear(found, gather=name == "output.weight", reduce=row_parallel)
        layer.bias = getattr(owner, "bias", None)
        return layer

    return checkpoint.load(source, model, dtype=dtype, device=device, replace=replace)


def is_quantizable(name: str) -> bool:
    """Whether a weight is a matrix that may be quantized: not norms, routers of experts, biases,
    nor what reads images."""
    apart = name.startswith(("vision_", "learnable_embedding.")) or ".router." in name
    return name.endswith(".weight") and "norm" not in name and not apart


def has_blocks(source: Checkpoint) -> bool:
    """Whether a checkpoint stores some weight in a block type that can be kept."""
    return any(source.stored_as(name) in ALL for name in checkpoint.weight_shapes(source.args))


def bytes_per_value(
    name: str,
    kind: str,
    dtype: torch.dtype,
    source: Optional[Checkpoint] = None,
    world: int = 1,
) -> float:
    """Of a matrix that ranks load as this kind from a checkpoint, or from one of dense weights.

    Raises:
        ValueError: an unknown kind.
    """
    block = _type(name, kind, source, world)
    if block is None:
        return dtype.itemsize
    values, size = ggml.block(block)
    return size / values


def types(source: Checkpoint, kind: Optional[str], dtype: torch.dtype) -> Set[str]:
    """The types, of blocks or dense, that the matrices of layers and of the output will have."""
    tied, world = source.args.tied_embeddings, parallel.world_size()
    return {
        (kind and _type(name, kind, source, world)) or dtype_name(dtype)
        for name in checkpoint.weight_shapes(source.args)
        if is_quantizable(name) and (tied or name != "tok_embeddings.weight")
    }


def cut(source: Checkpoint, kind: Optional[str]) -> List[str]:
    """Weights that are stored as such a model keeps them, but in blocks that several ranks share:
    they are dense, or quantized anew."""
    if kind is None or parallel.world_size() == 1:
        return []
    return [
        name
        for name in filter(is_quantizable, checkpoint.weight_shapes(source.args))
        if (stored := source.stored_as(name)) in _types(name, kind)[1]
        and _ranges(source, name, 0, parallel.world_size(), stored) is None
    ]


def _type(name: str, kind: str, source: Optional[Checkpoint], world: int) -> Optional[str]:
    """The block type of a matrix that ranks load as this kind; None: dense."""
    target, kept = _types(name, kind)
    stored = source.stored_as(name) if source else None
    if source is None or stored is None or stored not in kept:
        return target
    return target if _ranges(source, name, 0, world, stored) is None else stored


def _types(name: str, kind: str) -> Tuple[Optional[str], Tuple[str, ...]]:
    if kind == "stored":
        return None, ALL
    if kind not in KINDS:
        raise ValueError(f"quantize={kind!r}: choose one of {', '.join(KINDS)}, dense, or None")
    return ("Q8_0", ALL) if name in EDGES else KINDS[kind]


def read(source: Checkpoint, name: str, kind: str) -> Optional[Blocks]:
    """This rank's shard of a weight, quantized; None if it is to be dense."""
    target, kept = _types(name, kind)
    rank, world = parallel.rank(), parallel.world_size()
    rows, cols = checkpoint.local_shape(source.args, name, rank, world)
    stored = source.stored_as(name)
    data = _stored_blocks(source, name, rank, world, stored) if stored in kept else None
    if data is not None:
        values, size = ggml.block(stored)
        missing = rows - data.shape[0], -(-cols // values) * size - data.shape[1]
        if any(missing):  # pad with blocks of zeros, like any sharded weight
            data = F.pad(data, (0, missing[1], 0, missing[0]))
        found = Blocks(data, stored)
    elif target is None:
        return None
    else:
        if cols % ggml.VALUES:
            raise ValueError(
                f"quantize={kind!r}: {name} is {cols} wide on each of {world} rank(s), and a block "
                f"holds {ggml.VALUES} values: use another number of ranks, or quantize='dense'"
            )
        dense = checkpoint.read_shard(source, name, rank, world)
        step = max(1, ROWS * ggml.VALUES // cols)
        parts = [ggml.quantize(part, target) for part in dense.split(step)]
        found = Blocks(torch.cat(parts), target)
    if not found.finite():
        warnings.warn(f"{source.path}: {name} holds NaN or infinity", stacklevel=2)
    return found


def _ranges(
    source: Checkpoint, name: str, rank: int, world: int, stored: str
) -> Optional[List[Tuple[int, int]]]:
    """The rows or columns of a rank's shard; None if its boundaries fall within stored blocks."""
    args, shape = source.args, checkpoint.weight_shapes(source.args)[name]
    axis, (values, _) = parallel.shard_axis(name) or 0, ggml.block(stored)
    ranges = parallel.shard_ranges(name, shape[axis], rank, world, args.n_heads, args.n_kv_heads)
    width = checkpoint.local_shape(args, name, rank, world)[1]
    inside = axis == 1 and any(start % values or stop % values for start, stop in ranges)
    return None if width % values or inside else ranges


def _stored_blocks(
    source: Checkpoint, name: str, rank: int, world: int, stored: str
) -> Optional[torch.Tensor]:
    """The blocks of this rank's shard in the file; None if its boundaries fall within blocks."""
    args, shape = source.args, checkpoint.weight_shapes(source.args)[name]
    axis, (values, size) = parallel.shard_axis(name) or 0, ggml.block(stored)
    ranges = _ranges(source, name, rank, world, stored)
    if ranges is None:
        return None
    width = checkpoint.local_shape(args, name, rank, world)[1]
    blocks: Any = source  # other formats have none
    if ranges == [(0, shape[axis])]:
        axis, ranges = 0, [(0, shape[0])]
    if axis == 0 and name in getattr(source, "quantized", {}):  # computed, a few rows at a time
        rows = sum(stop - start for start, stop in ranges)
        out, done = own_memory(rows, width // values * size), 0
        for begin, end in ranges:
            for start, stop in chunks(shape, 0, begin, end, args.head_dim):
                out[done : done + stop - start] = blocks.read_blocks(name, 0, start, stop)
                done += stop - start
        return out
    parts = [blocks.read_blocks(name, axis, start, stop) for start, stop in ranges]
    return parts[0] if len(parts) == 1 else torch.cat(parts)
