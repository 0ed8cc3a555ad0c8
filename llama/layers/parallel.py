"""Tensor parallelism: process groups, with or without a launcher, and how weights are sharded.

The network (`model.py`) uses fairscale's model-parallel layers. This module initializes the groups
that they need, computes which part of a weight a rank holds, and broadcasts rank 0's decisions.
"""

import atexit
import datetime
import math
import os
import re
import sys
from typing import Any, Callable, List, Optional, Tuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from fairscale.nn.model_parallel import initialize as fs_init

from llama.layers.heartbeats import Heartbeats


def pick_device(device: Optional[str | torch.device] = None) -> torch.device:
    """This process's device: the given one, else the first available of CUDA, MPS and CPU.

    Under a launcher, the GPU of its local rank. MPS is for a single process.

    Raises:
        ValueError: a GPU that this machine doesn't have.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if device is None:
        if torch.cuda.is_available():
            device = "cuda"
        elif torch.backends.mps.is_available() and int(os.environ.get("WORLD_SIZE", 1)) == 1:
            device = "mps"
        else:
            device = "cpu"
    device = torch.device(device)
    if device.type == "cuda":
        if device.index is None:
            device = torch.device("cuda", local_rank)
        if device.index >= torch.cuda.device_count():
            raise ValueError(
                f"{device} was requested and this machine has {torch.cuda.device_count()} GPUs: "
                "start at most one process per GPU, or pass device='cpu'"
            )
        torch.cuda.set_device(device)
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError("mps was requested and this machine has none: pass device='cpu'")
    return device


_DTYPES = {
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
    "fp16": torch.float16,
    "float16": torch.float16,
    "fp32": torch.float32,
    "float32": torch.float32,
}


def pick_dtype(dtype: Optional[str | torch.dtype], device: torch.device) -> torch.dtype:
    """The given dtype, else bf16 where the hardware supports it, else fp32.

    Raises:
        ValueError: a name that isn't one of bf16, fp16 and fp32 or their long forms.
    """
    if isinstance(dtype, str):
        if dtype not in _DTYPES:
            raise ValueError(f"dtype {dtype!r}: choose one of {', '.join(_DTYPES)}")
        return _DTYPES[dtype]
    if dtype is not None:
        return dtype
    if device.type == "cuda":
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu":
        has_bf16 = any(map(torch.cpu.get_capabilities().get, ("avx512_bf16", "amx_bf16", "bf16")))
    else:
        has_bf16 = False
    return torch.bfloat16 if has_bf16 else torch.float32


def initialize(
    model_parallel_size: Optional[int] = None,
    device: Optional[str | torch.device] = None,
    timeout: float = 60.0,
    wait: float = 1800.0,
) -> torch.device:
    """Initialize the process group and fairscale's model-parallel groups; return the device.

    Works in a plain Python process or notebook (one rank, no environment variables) and under
    torchrun. The backend is NCCL for CUDA, gloo otherwise (bf16 included). Further calls have no
    effect; a process can't change its model-parallel size.

    Args:
        model_parallel_size: ranks that share one copy of the model; all of them by default.
        timeout: seconds without a sign of life of another rank after which this process ends.
        wait: seconds that a collective waits for ranks that are alive.

    Raises:
        ValueError: a size that the number of processes doesn't allow.
        ConnectionError: the ranks don't reach each other.
    """
    device = pick_device(device)
    patience = datetime.timedelta(seconds=wait)
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" and dist.is_nccl_available() else "gloo"
        store: dist.Store = dist.HashStore()
        rank, world, heartbeats = 0, 1, None
        if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
            store, rank, world = next(dist.rendezvous("env://", timeout=patience))
            # torchrun keeps its store when it restarts ranks: what the last ones left there is old.
            store = dist.PrefixStore(f"start {store.add(f'starts of {rank}', 1)}", store)
        if world > 1:
            place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            heartbeats = Heartbeats(store, place, rank, world, timeout)
        atexit.register(_shut_down, heartbeats)
        try:
            dist.init_process_group(
                backend, store=store, rank=rank, world_size=world, timeout=patience
            )
        except RuntimeError as error:
            raise ConnectionError(
                f"the ranks can't connect to each other: {str(error).splitlines()[0]}; on several "
                f"machines, {backend.upper()}_SOCKET_IFNAME names the interface between them"
            ) from error
    world = dist.get_world_size()
    size = world if model_parallel_size is None else model_parallel_size
    if size < 1 or world % size:
        raise ValueError(
            f"model_parallel_size={size} doesn't divide the number of processes, {world}: "
            f"start with `torchrun --nproc_per_node {max(size, 1)}`"
        )
    if fs_init.model_parallel_is_initialized():
        if fs_init.get_model_parallel_world_size() != size:
            raise ValueError(
                f"model_parallel_size={size}, but this process already runs at "
                f"{fs_init.get_model_parallel_world_size()}: use that, or a new process"
            )
    else:
        # fairscale print()s its groups. Shadow the name in its module alone: stdout is the user's.
        fs_init.print = lambda *_: None  # type: ignore[attr-defined]
        try:
            fs_init.initialize_model_parallel(size)
        finally:
            del fs_init.print  # type: ignore[attr-defined]
        # new_group() ignores the timeout of the default group.
        for group in (fs_init.get_model_parallel_group(), fs_init.get_data_parallel_group()):
            dist.distributed_c10d._set_pg_timeout(patience, group)
    return device


def ensure_initialized(device: Optional[str | torch.device] = None) -> None:
    """Initialize the groups if they aren't yet: for models that are built without `Llama.build`."""
    if not (dist.is_initialized() and fs_init.model_parallel_is_initialized()):
        initialize(device="cpu" if device is None else device)


def _shut_down(heartbeats: Optional[Heartbeats]) -> None:
    """Destroy the groups before the interpreter exits, and say why, if other ranks are the reason.

    Otherwise the process occasionally aborts ("terminate called without an active exception"),
    which torchrun reports as a failed job.
    """
    if heartbeats is not None:
        error = getattr(sys, "last_value", None)  # which has ended the program
        if error and (reason := heartbeats.explain(error)):
            print(reason, file=sys.stderr, flush=True)
        heartbeats.stop()
    fs_init.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def world_size() -> int:
    """Number of ranks that share one copy of the model."""
    return fs_init.get_model_parallel_world_size()


def rank() -> int:
    """This process's rank among those that share one copy of the model."""
    return fs_init.get_model_parallel_rank()


def is_rank_zero() -> bool:
    """Whether this is the one process that prints and reads stdin."""
    return not dist.is_initialized() or dist.get_rank() == 0


def broadcast(tensor: torch.Tensor) -> torch.Tensor:
    """Overwrite `tensor` with rank 0's, in place; returns it."""
    if world_size() > 1:
        dist.broadcast(
            tensor, fs_init.get_model_parallel_src_rank(), fs_init.get_model_parallel_group()
        )
    return tensor


def broadcast_object(obj: Any) -> Any:
    """Rank 0's picklable object, on every rank (for example a line of user input)."""
    box = [obj]
    if world_size() > 1:
        dist.broadcast_object_list(
            box, fs_init.get_model_parallel_src_rank(), fs_init.get_model_parallel_group()
        )
    return box[0]


def on_rank_zero(work: Callable[[], Any]) -> Any:
    """What rank 0 gets from work, or the ValueError or OSError that it raises, on all ranks."""
    found: Any = None
    if rank() == 0:
        try:
            found = work()
        except (ValueError, OSError) as error:
            found = error
    found = broadcast_object(found)
    if isinstance(found, Exception):
        raise found
    return found


def barrier() -> None:
    """Wait for all ranks."""
    if world_size() > 1:
        dist.barrier(fs_init.get_model_parallel_group())


def share_lists(lists: List[List[int]], most: int) -> List[List[int]]:
    """Rank 0's lists of ids (0 or more), each of at most `most`, on every rank.

    The other ranks pass as many lists; their content is ignored.
    """
    if world_size() == 1:
        return lists
    cuda = dist.get_backend(fs_init.get_model_parallel_group()) == "nccl"
    table = torch.tensor([[*ids, *[-1] * (most - len(ids))] for ids in lists])
    shared = broadcast(table.to("cuda" if cuda else "cpu")).tolist()
    return [[token for token in ids if token >= 0] for ids in shared]


def all_gather(tensor: torch.Tensor) -> List[torch.Tensor]:
    """Each rank's tensor, all of one shape, on every rank."""
    if world_size() == 1:
        return [tensor]
    found = [torch.empty_like(tensor) for _ in range(world_size())]
    dist.all_gather(found, tensor.contiguous(), fs_init.get_model_parallel_group())
    return found


def unsharded(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor that FSDP2 divides over copies of the model, gathered; any other as it is."""
    full = getattr(tensor, "full_tensor", None)
    return tensor if full is None else full()


# The axis along which a weight is sharded: column-parallel ones by output rows, row-parallel ones
# by input columns, the embedding by token ids. All others (the norms) are replicated.
SHARD_AXIS = {
    "tok_embeddings.weight": 0,
    "attention.wq.weight": 0,
    "attention.wk.weight": 0,
    "attention.wv.weight": 0,
    "attention.wo.weight": 1,
    "feed_forward.w1.weight": 0,
    "feed_forward.w2.weight": 1,
    "feed_forward.w3.weight": 0,
    "output.weight": 0,
    # Of Llama 3.2 Vision:
    "learnable_embedding.weight": 0,
    "attn.wq.weight": 0,
    "attn.wk.weight": 0,
    "attn.wv.weight": 0,
    "attn.wo.weight": 1,
    "mlp.c_fc.weight": 0,
    "mlp.c_fc.bias": 0,
    "mlp.c_proj.weight": 1,
    "vision_model.vision_encoder.conv1._linear.weight": 0,
    "vision_model.vision_projection.weight": 0,
    "vision_model.vision_projection.bias": 0,
    # Of Llama 4's image encoder; the biases of wo and c_proj are added after the sum over ranks:
    "attn.wq.bias": 0,
    "attn.wk.bias": 0,
    "attn.wv.bias": 0,
    "vision_embeddings.vision_encoder.conv1._linear.weight": 0,
    "vision_embeddings.vision_adapter.mlp.c_fc.weight": 0,
    "vision_embeddings.vision_adapter.mlp.c_proj.weight": 1,
    "vision_projection.weight": 0,
    # of some families; wo's and w2's are added after the sum over ranks
    "attention.wq.bias": 0,
    "attention.wk.bias": 0,
    "attention.wv.bias": 0,
    "feed_forward.w1.bias": 0,
    "feed_forward.w3.bias": 0,
}


# sharded by whole heads
KV = ("attention.wk.weight", "attention.wv.weight", "attention.wk.bias", "attention.wv.bias")


def check_world(world: int, n_heads: int) -> None:
    """Raises ValueError if the number of ranks doesn't divide the number of heads."""
    if world < 1 or n_heads % world:
        raise ValueError(
            f"{world} ranks can't share {n_heads} heads: use a number that divides {n_heads}"
        )


def shard_axis(name: str) -> Optional[int]:
    """The axis along which a weight (Meta's name) is sharded, or None. An expert's is that of a
    feed-forward network."""
    stem = re.sub(r"^.*(layers|resblocks)\.\d+\.", "", name)
    return SHARD_AXIS.get(re.sub(r"\.(shared_expert|experts\.\d+)\.", ".", stem))


def padded(size: int, world: int) -> int:
    """`size` rounded up to a multiple of `world`: the last ranks' shards are padded with zeros."""
    return -(-size // world) * world


def kv_heads(rank: int, world: int, n_heads: int, n_kv_heads: int) -> List[int]:
    """The key/value heads that a rank holds.

    A rank has `n_heads / world` consecutive query heads, and each `n_heads / n_kv_heads`
    consecutive query heads share a key/value head. The rank's query heads are taken in runs of the
    greatest common divisor of both numbers: all of a run share one key/value head. If
    world <= n_kv_heads, heads are split over the ranks, otherwise replicated.
    """
    local, group = n_heads // world, n_heads // n_kv_heads
    run = math.gcd(local, group)
    return [head // group for head in range(rank * local, (rank + 1) * local, run)]


def shard_ranges(
    name: str, size: int, rank: int, world: int, n_heads: int, n_kv_heads: int
) -> List[Tuple[int, int]]:
    """The ranges of the sharded axis, of `size` in the whole weight, that a rank holds, in order.

    Ranges end at `size`; the rest of a shard, up to `padded(size, world) / world`, is zeros.
    """
    if name.endswith(KV):
        head_dim = size // n_kv_heads
        ranges: List[Tuple[int, int]] = []
        for head in kv_heads(rank, world, n_heads, n_kv_heads):
            begin, end = head * head_dim, (head + 1) * head_dim
            if ranges and ranges[-1][1] == begin:
                begin = ranges.pop()[0]
            ranges.append((begin, end))
        return ranges
    step = padded(size, world) // world
    return [(min(rank * step, size), min((rank + 1) * step, size))]


def whole(name: str, part: torch.Tensor, size: int, n_heads: int, n_kv_heads: int) -> torch.Tensor:
    """The whole weight, of `size` on its sharded axis, gathered from all ranks, on every rank."""
    axis, world = shard_axis(name), world_size()
    if axis is None or world == 1:
        return part
    found = part.new_empty(*part.shape[:axis], size, *part.shape[axis + 1 :])
    for rank, theirs in enumerate(all_gather(part)):
        done = 0
        for begin, end in shard_ranges(name, size, rank, world, n_heads, n_kv_heads):
            found.narrow(axis, begin, end - begin).copy_(theirs.narrow(axis, done, end - begin))
            done += end - begin
    return found


def part(name: str, weight: torch.Tensor, n_heads: int, n_kv_heads: int) -> torch.Tensor:
    """This rank's shard of a whole weight, padded with zeros: the inverse of `whole`."""
    axis, world = shard_axis(name), world_size()
    if axis is None or world == 1:
        return weight
    size = weight.shape[axis]
    ranges = shard_ranges(name, size, rank(), world, n_heads, n_kv_heads)
    mine = torch.cat([weight.narrow(axis, begin, end - begin) for begin, end in ranges], axis)
    short = 0 if name.endswith(KV) else padded(size, world) // world - mine.shape[axis]
    return F.pad(mine, (*[0, 0] * (mine.ndim - 1 - axis), 0, short))


def add_replicas(part: torch.Tensor, n_heads: int, n_kv_heads: int) -> torch.Tensor:
    """Sum a shard (rows of key/value heads) over the ranks that hold the same heads.

    For gradients: each rank has those of its own queries.
    """
    world = world_size()
    heads = [kv_heads(rank, world, n_heads, n_kv_heads) for rank in range(world)]
    mine, theirs = heads[rank()], [head for held in heads for head in held]
    if len(theirs) == n_kv_heads:
        return part
    by_head = torch.cat(all_gather(part)).unflatten(0, (len(theirs), -1))
    total = part.new_zeros(n_kv_heads, *by_head.shape[1:])
    total.index_add_(0, torch.tensor(theirs, device=part.device), by_head)
    return total[mine].flatten(0, 1)
