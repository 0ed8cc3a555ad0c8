"""Many devices: which ranks share a copy of the model, and which learn from other examples.

The ranks form a grid, data x model. Those of a row share one copy of the model by tensor
parallelism (`model_parallel_size` of them); the copies learn from different examples of a step, and
their gradients are added up: by DDP, where each copy is whole, or by FSDP2, where each holds an
equal part of all weights, gradients and moments of the optimizer, and a block's weights are
gathered when they are used.
"""

from typing import Any, List, Sequence, TypeVar

import torch
import torch.distributed as dist
from fairscale.nn.model_parallel import initialize as fs_init
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from llama.model import Transformer

Row = TypeVar("Row")


def copies() -> int:
    """Number of copies of the model, which learn from different examples."""
    return fs_init.get_data_parallel_world_size()


def copy() -> int:
    """The number of the copy that this rank has a part of, from 0."""
    return fs_init.get_data_parallel_rank()


def group() -> dist.ProcessGroup:
    """The ranks that have the same part of the model, each of another copy."""
    return fs_init.get_data_parallel_group()


def mesh(device: torch.device) -> DeviceMesh:
    """The grid of all ranks, (data, model), of the groups there are."""
    groups = [group(), fs_init.get_model_parallel_group()]
    ranks = torch.arange(dist.get_world_size()).view(copies(), -1)
    return DeviceMesh.from_group(groups, device.type, ranks, mesh_dim_names=("data", "model"))


def shard(model: Transformer, device: torch.device) -> None:
    """Divide the parameters over the copies by FSDP2, a block at a time.

    The model may be on the meta device, to be filled afterwards.
    """
    data = mesh(device)["data"]
    for block in model.layers:
        fully_shard(block, mesh=data)
    fully_shard(model, mesh=data)
    register_fsdp_forward_method(model, "hidden")  # which losses call, instead of the model


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's rows of a tensor that the copies divide; any other as it is. Shares memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def share(rows: Sequence[Row]) -> List[Row]:
    """This copy's share of the rows of a pass, which may be none. All shares make up the rows."""
    return list(rows[copy() :: copies()])


def add_up(tensor: torch.Tensor) -> torch.Tensor:
    """The sum over the copies, in place; returns it."""
    if copies() > 1:
        dist.all_reduce(tensor, group=group())
    return tensor


def agreed(value: Any) -> Any:
    """Rank 0's picklable value, on every rank of every copy."""
    box = [value]
    if dist.get_world_size() > 1:
        dist.broadcast_object_list(box, 0)
    return box[0]


def wait() -> None:
    """Wait for all ranks of all copies."""
    if dist.get_world_size() > 1:
        dist.barrier()
