"""Estimates of the memory that a model needs, from its shape alone, and what is available."""

import math
import os
from pathlib import Path
from typing import Iterator, NamedTuple, Optional

import psutil
import torch

from llama.backends.quantized import bytes_per_value, is_quantizable
from llama.checkpoint import Checkpoint, local_shape, weight_shapes
from llama.families.registry import family_of
from llama.layers import parallel
from llama.layers.cache import PASS
from llama.model import ModelArgs

try:
    import resource
except ImportError:  # Windows has no such limits
    resource = None  # type: ignore[assignment]

CGROUPS, OWN_CGROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")  # Linux


class Estimate(NamedTuple):
    """Bytes on one rank."""

    weights: int
    cache: int  # with max_batch_size rows of max_seq_len tokens

    @property
    def total(self) -> int:
        return self.weights + self.cache

    def __str__(self) -> str:
        return f"weights {size(self.weights)} + cache {size(self.cache)}"


def estimate(
    args: ModelArgs,
    world: int,
    dtype: torch.dtype,
    quantize: Optional[str] = None,
    kv_cache: Optional[str] = None,
    source: Optional[Checkpoint] = None,
) -> Estimate:
    """The memory that a model of this shape needs on each of `world` ranks.

    Args:
        quantize: one of `quantized.KINDS`; None: dense.
        source: whose weights keep their block types, where quantize says so.
    """

    def per_value(name: str) -> float:
        if quantize is None or not is_quantizable(name):
            return dtype.itemsize
        return bytes_per_value(name, quantize, dtype, source, world)

    heads = len(parallel.kv_heads(0, world, args.n_heads, args.n_kv_heads))
    row = args.head_dim * dtype.itemsize if kv_cache is None else args.head_dim + 4  # and a scale
    per_token = 2 * args.n_layers * heads * row
    return Estimate(
        weights=sum(
            int(math.prod(local_shape(args, name, 0, world)) * per_value(name))
            for name in weight_shapes(args)
        ),
        cache=per_token * args.max_batch_size * args.max_seq_len
        + heads * args.head_dim * dtype.itemsize * family_of(args).cached_per_head(args),
    )


def working(args: ModelArgs, world: int, dtype: torch.dtype) -> int:
    """A rough upper bound of a rank's memory besides weights and cache, in bytes.

    Activations of a pass, a mask, logits, and 64 MB for the allocator and threads.
    """
    tokens = min(PASS, args.max_batch_size * args.max_seq_len)
    q_dim = args.n_heads * args.head_dim // world
    of_token = 4 * (6 * args.dim + 4 * q_dim) + 3 * args.hidden_dim // world * dtype.itemsize
    mask = args.max_seq_len * (1 + dtype.itemsize)
    scored = min(64 * args.max_batch_size, tokens)  # positions of which there are logits
    # Where ranks share columns, these are dequantized in one piece (see `shapes.chunks`).
    columns = args.dim * args.hidden_dim // world * 4 if world > 1 else 0
    columns += family_of(args).encoder_values(args) * dtype.itemsize
    return tokens * (of_token + mask) + scored * args.vocab_size * 8 + columns + (1 << 26)


def sharers(device: torch.device) -> int:
    """Number of ranks that share the device's memory."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if device.type == "cpu" else 1


def available_to_each(device: torch.device) -> int:
    """Bytes of memory for each rank, the same on all: their caches are of one size."""
    mine = torch.tensor([available(device) // sharers(device)], device=device)
    return min(map(int, parallel.all_gather(mine)))


def available(device: torch.device) -> int:
    """Bytes of a device's memory still available to all its `sharers` together.

    It respects the limits of containers and other control groups, and those of the process
    (`ulimit -v` and `-d`), which apply to each of the sharers.
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused  # which torch's allocator holds
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    free = min([psutil.virtual_memory().available, *_left_in_cgroups()])
    info = psutil.Process().memory_info()
    for name, used in (
        ("RLIMIT_AS", info.vms),
        ("RLIMIT_DATA", getattr(info, "data", 0)),  # Linux; private mappings included
    ):
        most = resource.getrlimit(getattr(resource, name))[0] if resource else -1
        if most != -1:  # RLIM_INFINITY
            free = min(free, (most - used) * sharers(device))
    return max(free, 0)


def _left_in_cgroups() -> Iterator[int]:
    """Bytes left by the memory limits of this process's control groups and their parents.

    See admin-guide/cgroup-v2.rst and cgroup-v1/memory.rst in the kernel's documentation. In a
    container the group may be mounted as the root under another name, so the root is read too.
    """
    for line in OWN_CGROUPS.read_text().splitlines() if OWN_CGROUPS.exists() else []:
        _, controllers, name = line.split(":", 2)
        if controllers == "":
            root, limit, used = CGROUPS, "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            root, limit = CGROUPS / "memory", "memory.limit_in_bytes"
            used = "memory.usage_in_bytes"
        else:
            continue
        group = root / name.lstrip("/")
        for place in [group, *group.parents][: len(group.parts) - len(root.parts) + 1]:
            try:
                most, held = ((place / file).read_text().strip() for file in (limit, used))
                rows = (place / "memory.stat").read_text().splitlines()
            except OSError:  # no limit here, or a group outside of this container
                continue
            stat = {key: int(value) for key, value in map(str.split, rows)}
            # Cached file pages are reclaimed on demand.
            files = sum(
                stat.get(f"total_{kind}", stat.get(kind, 0))
                for kind in ("active_file", "inactive_file")
            )
            if most.isdigit():  # else "max"
                yield int(most) - (int(held) - files)


def preflight(
    args: ModelArgs,
    world: int,
    dtype: torch.dtype,
    device: torch.device,
    quantize: Optional[str] = None,
    kv_cache: Optional[str] = None,
    prefix_cache: int = 0,
    offload: Optional[str] = None,
    source: Optional[Checkpoint] = None,
) -> str:
    """Compare needed and available memory, the prefix cache included; returns a line to print.

    Raises:
        ValueError: it doesn't fit, and offload is None.
    """
    need, have = estimate(args, world, dtype, quantize, kv_cache, source), available(device)
    blocks = "stored blocks" if quantize == "stored" else quantize
    held = " and ".join(filter(None, (blocks, str(dtype)[6:])))
    line = (
        f"{need} ({args.max_batch_size} rows of {args.max_seq_len} tokens) as {held}"
        + (f" + prefixes {size(prefix_cache)}" if prefix_cache else "")
        + (f" on each of {world} ranks" if world > 1 else "")
        + f"; {size(have)} available on {device}"
    )
    around = prefix_cache + (working(args, world, dtype) if device.type != "cpu" else 0)
    if (need.total + around) * sharers(device) <= have:
        return line
    if offload is None:
        raise ValueError(
            f"this can't fit: {line}. Ways out: a smaller max_seq_len or max_batch_size, "
            "a smaller dtype, quantize, kv_cache, fewer prefix_cache_mb, more ranks "
            '(torchrun --nproc_per_node) on more devices, or, slowly, offload="auto"'
        )
    return f"{line}: not all of it fits"


def size(n: int) -> str:
    """A human-readable number of bytes."""
    return f"{n / 1e9:.2f} GB" if n >= 1e8 else f"{n / 1e6:.2f} MB"
