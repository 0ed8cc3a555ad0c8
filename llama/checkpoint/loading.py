"""Weights into a model: this rank's part of each, whatever the format and the number of ranks.

On the CPU a weight whose bytes are what is asked for stays in the mapped file, of which all
processes share one copy; any other is read straight into its place, so that loading never holds
more than the model and a part of one tensor.
"""

import hashlib
import warnings
from typing import Any, Callable, Dict, Optional

import torch
from torch import nn

from llama.checkpoint.shapes import check_shapes, chunks, local_shape, weight_shapes
from llama.checkpoint.source import DTYPES, Checkpoint, InMemory
from llama.families.registry import family_of
from llama.layers import parallel
from llama.model import ModelArgs, Transformer


def read_shard(
    checkpoint: Checkpoint,
    name: str,
    rank: int,
    world: int,
    *,
    dtype: Optional[torch.dtype] = None,
    device: Optional[torch.device] = None,
) -> torch.Tensor:
    """The part of a weight that one of `world` ranks holds, padded with zeros where it must be.

    Raises:
        ValueError: a number of ranks that doesn't divide the heads.
    """
    args, shape = checkpoint.args, weight_shapes(checkpoint.args)[name]
    local = local_shape(args, name, rank, world)
    axis, ranges = parallel.shard_axis(name), [(0, shape[0])]
    if axis is None:
        axis = 0
    else:
        ranges = parallel.shard_ranges(
            name, shape[axis], rank, world, args.n_heads, args.n_kv_heads
        )
    begin, end = ranges[0]
    in_place = end - begin == local[axis] and checkpoint.stored_as(name) in DTYPES
    in_place = in_place and (device is None or device.type == "cpu")
    if in_place and dtype in (None, DTYPES[checkpoint.stored_as(name)]):
        return checkpoint.read(name, axis, begin, end)  # the mapped file itself, where it can be
    if ranges == [(0, shape[axis])]:
        axis, ranges = 0, [(0, shape[0])]  # all of it: by rows, a chunk at a time
    out, done = None, 0
    for begin, end in ranges:
        for start, stop in chunks(shape, axis, begin, end, args.head_dim):
            data = checkpoint.read(name, axis, start, stop)
            if out is None:
                out = torch.empty(local, dtype=dtype or data.dtype, device=device)
            out.narrow(axis, done, stop - start).copy_(data)
            done += stop - start
    if out is None:  # nothing but padding
        return torch.zeros(local, dtype=dtype, device=device)
    out.narrow(axis, done, local[axis] - done).zero_()
    return out


def load(
    checkpoint: Checkpoint,
    model: Transformer,
    *,
    dtype: Optional[torch.dtype] = None,
    device: Optional[torch.device] = None,
    replace: Callable[[str], Optional[nn.Module]] = lambda name: None,
) -> Transformer:
    """Fill a model (built on the meta device) with this rank's part of the weights, strictly.

    Warns of weights that hold NaN or infinity, which would spoil every output.

    Args:
        replace: asked with each weight's name for a module to stand in place of the one that
            would hold it; None fills that.

    Raises:
        ValueError: weights that are missing, too many or of a wrong shape.
    """
    check_shapes(checkpoint)
    rank, world, replaced = parallel.rank(), parallel.world_size(), set()
    for name in weight_shapes(checkpoint.args):
        owner, _, attribute = name.rpartition(".")
        if (stand_in := replace(name)) is not None:
            model.set_submodule(owner, stand_in)
            replaced.add(name)
            continue
        weight = read_shard(checkpoint, name, rank, world, dtype=dtype, device=device)
        module, old = model.get_submodule(owner), model.get_parameter(name)
        if weight.shape != old.shape:
            raise AssertionError(f"{name}: the plan says {weight.shape}, the model {old.shape}")
        # A sum is NaN or infinite if any value is, and costs a fraction of looking at each.
        if not weight.sum().isfinite() and not weight.isfinite().all():
            warnings.warn(f"{checkpoint.path}: {name} holds NaN or infinity", stacklevel=2)
        setattr(module, attribute, nn.Parameter(weight, requires_grad=old.requires_grad))
    if checkpoint.args.tied_embeddings and "tok_embeddings.weight" not in replaced:
        model.output.weight = model.tok_embeddings.weight
    return model


def gather(model: Transformer) -> InMemory:
    """The weights of all ranks, whole, in the CPU memory of rank 0; the others get none of them.

    The inverse of `load`. Adapters that are attached (`llama.training.lora`) aren't in them: merge
    first.

    Raises:
        ValueError: quantized, offloaded or compiled layers.
    """
    args, weights = model.params, {}
    for name, shape in weight_shapes(args).items():
        try:
            part = parallel.unsharded(model.get_parameter(name).detach())
        except AttributeError:
            raise ValueError(
                f"{name} isn't there as a dense tensor: build without quantize, compile, offload"
            ) from None
        axis = parallel.shard_axis(name) or 0
        whole = parallel.whole(name, part, shape[axis], args.n_heads, args.n_kv_heads)
        if parallel.is_rank_zero():
            weights[name] = whole.cpu()
    return InMemory(args, weights)


def fingerprint(checkpoint: Checkpoint, args: Optional[ModelArgs] = None) -> str:
    """A hash of a model's shape and of a row of each weight: the same in every file format.

    Args:
        args: the shape as it is built, whose max_seq_len may decide on RoPE.
    """
    args, shapes = args or checkpoint.args, weight_shapes(checkpoint.args)
    about: Dict[str, Any] = {
        **shapes, "heads": args.n_heads, "norm_eps": f"{args.norm_eps:.4g}",
        **{
            name: f"{value:.4g}" if isinstance(value := getattr(args, name), float) else value
            for name in sorted(family_of(args).own_fields)
        },
    }  # fmt: skip
    frequencies = family_of(args).network.frequencies(args)
    digest = hashlib.sha256(repr([about, frequencies.tolist()]).encode())
    for name, shape in shapes.items():
        whole_head = checkpoint.read(name, 0, 0, min(args.head_dim, shape[0]))
        digest.update(bytes(whole_head[:1].float().contiguous().numpy()))
    return digest.hexdigest()[:16]
