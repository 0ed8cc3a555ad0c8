"""Does it fit? An estimate from the shape alone, before anything is loaded."""

import math
import os
from pathlib import Path
from typing import NamedTuple, Optional

import psutil
import torch

from llama.checkpoint import local_shape, weight_shapes
from llama.checkpoint.ggml import VALUES
from llama.model import ModelArgs
from llama.parallel import kv_heads
from llama.quantize import block_bytes


class Estimate(NamedTuple):
    """Bytes on one rank."""

    weights: int
    cache: int  # with max_batch_size rows of max_seq_len tokens

    @property
    def total(self) -> int:
        return self.weights + self.cache


def estimate(
    args: ModelArgs,
    world: int,
    dtype: torch.dtype,
    quantize: Optional[str] = None,
    kv_cache: Optional[str] = None,
) -> Estimate:
    """What a model of this shape needs on each of `world` ranks."""

    def per_value(name: str) -> float:
        if quantize is None or "norm" in name:
            return dtype.itemsize
        return block_bytes(name, quantize) / VALUES

    heads = len(kv_heads(0, world, args.n_heads, args.n_kv_heads))
    row = args.head_dim * dtype.itemsize if kv_cache is None else args.head_dim + 4  # and a scale
    per_token = 2 * args.n_layers * heads * row
    return Estimate(
        weights=sum(
            int(math.prod(local_shape(args, name, 0, world)) * per_value(name))
            for name in weight_shapes(args)
        ),
        cache=per_token * args.max_batch_size * args.max_seq_len,
    )


def available(device: torch.device) -> int:
    """Bytes that this process could still take on a device, container limits included."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    free = psutil.virtual_memory().available
    limit = Path("/sys/fs/cgroup/memory.max")  # Linux, cgroup v2
    if limit.exists() and (text := limit.read_text().strip()).isdigit():
        free = min(free, int(text) - psutil.Process().memory_info().rss)
    return free


def preflight(
    args: ModelArgs,
    world: int,
    dtype: torch.dtype,
    device: torch.device,
    quantize: Optional[str] = None,
    kv_cache: Optional[str] = None,
    prefix_cache: int = 0,
) -> str:
    """Compare what is needed with what there is, the bytes for prefixes included; a line to print.

    Raises:
        ValueError: it can't fit.
    """
    need, have = estimate(args, world, dtype, quantize, kv_cache), available(device)
    sharers = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if device.type == "cpu" else 1
    held = " and ".join(filter(None, (quantize, str(dtype)[6:])))
    line = (
        f"weights {size(need.weights)} + cache {size(need.cache)} "
        f"({args.max_batch_size} rows of {args.max_seq_len} tokens) as {held}"
        + (f" + prefixes {size(prefix_cache)}" if prefix_cache else "")
        + (f" on each of {world} ranks" if world > 1 else "")
        + f"; {size(have)} available on {device}"
    )
    if (need.total + prefix_cache) * sharers > have:
        raise ValueError(
            f"this can't fit: {line}. Ways out: a smaller max_seq_len or max_batch_size, "
            "a smaller dtype, quantize, kv_cache, fewer prefix_cache_mb, or more ranks "
            "(torchrun --nproc_per_node) on more devices"
        )
    return line


def size(n: int) -> str:
    """Bytes for people."""
    return f"{n / 1e9:.2f} GB" if n >= 1e8 else f"{n / 1e6:.2f} MB"
