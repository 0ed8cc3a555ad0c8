"""The state of a run on disk, by torch.distributed.checkpoint: any number of ranks reads it.

Each rank writes what it holds, as chunks of whole tensors: rows or columns by tensor parallelism,
rows of those by FSDP2. On reading, a rank asks for its own chunks, whatever they were cut into.
"""

from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.tensor import DTensor

from llama.checkpoint import weight_shapes
from llama.layers import parallel
from llama.model import ModelArgs
from llama.training import devices


class Chunk(NamedTuple):
    """A box of a whole tensor that this rank holds."""

    offsets: torch.Size  # in the whole tensor
    tensor: torch.Tensor  # a view of this rank's memory
    first: bool  # of the ranks, and places of a rank, that hold the same head

    @property
    def box(self) -> ChunkStorageMetadata:
        return ChunkStorageMetadata(self.offsets, self.tensor.shape)


class Whole(NamedTuple):
    """What this rank holds of a tensor."""

    shape: torch.Size  # of all of it
    chunks: List[Chunk]


def whole(
    part: torch.Tensor,
    weight: Optional[str],
    args: ModelArgs,
    held: Optional[torch.Tensor] = None,
) -> Whole:
    """Where a rank's part of a tensor lies in all of it; padding is nowhere.

    Args:
        weight: like which it is split over the ranks that share a model; None: not split.
        held: what this rank holds of another tensor, divided as `part` is; None: of `part`.
    """
    local = devices.local(part.detach()) if held is None else held
    row, shape = 0, list(part.shape)
    if isinstance(part, DTensor):
        row = devices.copy() * -(-shape[0] // devices.copies())
    axis, spans = 0, [(0, 0, shape[0], True)]
    if weight is not None:
        axis = parallel.shard_axis(weight) or 0
        shape[axis] = weight_shapes(args)[weight][axis]
        spans = _spans(weight, shape[axis], args)
    chunks, others = [], [0] * (local.ndim - 1)
    for at, begin, length, first in spans:
        if axis:
            offsets, tensor = [row, begin], local.narrow(1, at, length)
        else:
            low = max(at, row)
            tensor = local[low - row : max(0, at + length - row)]
            offsets = [begin + low - at, *others]
        if tensor.numel():
            chunks.append(Chunk(torch.Size(offsets), tensor, first))
    return Whole(torch.Size(shape), chunks)


def _spans(weight: str, size: int, args: ModelArgs) -> List[Tuple[int, int, int, bool]]:
    """(place in the rank's part, place in the whole, length, `Chunk.first`), by heads for KV."""
    rank, world, heads = parallel.rank(), parallel.world_size(), (args.n_heads, args.n_kv_heads)
    if not weight.endswith(parallel.KV):
        [(begin, end)] = parallel.shard_ranges(weight, size, rank, world, *heads)
        return [(0, begin, end - begin, True)]
    mine, step = parallel.kv_heads(rank, world, *heads), size // args.n_kv_heads
    before = [head for r in range(rank) for head in parallel.kv_heads(r, world, *heads)]
    return [
        (i * step, head * step, step, head not in before + mine[:i]) for i, head in enumerate(mine)
    ]


def write(path: Path, wholes: Dict[str, Whole]) -> None:
    """Write tensors into a directory, from all ranks.

    Raises:
        OSError: a file can't be written.
    """
    try:
        dcp.save(dict(wholes), checkpoint_id=path, planner=_Writing(False, False))
    except CheckpointException as found:  # torch's writer doesn't say why
        [error, *_] = (error for error, _ in found.failures.values())
        if not isinstance(error, (OSError, RuntimeError)):
            raise
        raise OSError(f"{path} can't be written: is the disk full? ({error})") from None


def read(path: Path, wholes: Dict[str, Whole]) -> None:
    """Read them into the memory of their chunks, on all ranks.

    Raises:
        ValueError: one isn't there, or of another shape; damaged files.
    """
    try:
        dcp.load(dict(wholes), checkpoint_id=path, planner=_Reading())
    except CheckpointException as found:  # whose text is a traceback of each rank
        [error, *_] = (error for error, _ in found.failures.values())
        raise ValueError(
            f"{path} can't be read, begin anew with force: {type(error).__name__}: {error}"
        ) from None


class _Writing(dcp.DefaultSavePlanner):
    def create_local_plan(self) -> SavePlan:
        self.found: Dict[MetadataIndex, torch.Tensor] = {}
        items = []
        for name, (shape, chunks) in self.state_dict.items():
            for chunk in chunks:
                if chunk.first:
                    index = MetadataIndex(name, chunk.offsets)
                    kind = TensorProperties.create_from_tensor(chunk.tensor)
                    about = TensorWriteData(chunk.box, kind, shape)
                    items.append(WriteItem(index, WriteItemType.SHARD, tensor_data=about))
                    self.found[index] = chunk.tensor
        self.plan = SavePlan(items)
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> torch.Tensor:
        return self.found[index]


class _Reading(dcp.DefaultLoadPlanner):
    def set_up_planner(
        self,
        state_dict: Dict[str, Any],
        metadata: Optional[Metadata] = None,
        is_coordinator: bool = False,
    ) -> None:
        self.state_dict, self.metadata, self.is_coordinator = state_dict, metadata, is_coordinator

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        items = []
        for name, (shape, chunks) in self.state_dict.items():
            stored: Any = self.metadata.state_dict_metadata.get(name)
            if stored is None or stored.size != shape:
                raise ValueError(f"the state holds no {name} of shape {tuple(shape)}")
            items += create_read_items_for_chunk_list(name, stored, [chunk.box for chunk in chunks])
        return LoadPlan(items)

    def lookup_tensor(self, index: MetadataIndex) -> torch.Tensor:
        return self.state_dict[index.fqn].chunks[index.index].tensor
