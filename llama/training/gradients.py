"""What is learned, how it is split over ranks, and its gradients: replicas summed, clipped."""

import math
from typing import List, NamedTuple, Optional, Tuple

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from llama.layers import parallel
from llama.model import Transformer
from llama.training import devices


class Trained(NamedTuple):
    """A parameter that is learned."""

    name: str
    parameter: nn.Parameter
    shard_of: Optional[str]  # the weight like which it is split over ranks; None: not split


def origin(name: str) -> Tuple[str, str]:
    """The weight that a parameter is or adapts, and which half of an adapter it is: A, B or ""."""
    weight, _, half = name.replace(".base.", ".").partition(".lora_")
    return (weight + ".weight", half[:1]) if half else (weight, "")


def shard_of(name: str) -> Optional[str]:
    """The weight like which the ranks that share a model split a parameter; None: not split."""
    weight, half = origin(name)
    axis = parallel.shard_axis(weight)
    # Of W + B A, B is split as W's outputs are, and A as its inputs.
    return weight if axis is not None and (not half or half == "BA"[axis]) else None


def trained(model: Transformer) -> List[Trained]:
    """The parameters that require gradients, of weights or of adapters."""
    named = model.named_parameters()
    return [Trained(name, p, shard_of(name)) for name, p in named if p.requires_grad]


def sum_replicas(model: Transformer) -> None:
    """After a backward pass: add up the gradients of key/value heads that several ranks share.

    Does nothing unless there are more ranks than key/value heads.
    """
    args = model.params
    for _, parameter, weight in trained(model):
        grad = parameter.grad
        if grad is None or not (weight or "").endswith(parallel.KV):
            continue
        found = parallel.add_replicas(parallel.unsharded(grad), args.n_heads, args.n_kv_heads)
        if isinstance(grad, DTensor):  # each copy keeps its rows: nothing is sent
            found = distribute_tensor(found, grad.device_mesh, grad.placements, src_data_rank=None)
        parameter.grad = found


@torch.no_grad()
def clip_gradients(model: Transformer, most: float) -> float:
    """Clip the gradient of all weights, over all ranks, to a norm; returns the norm it had.

    A value that several ranks hold counts once.
    """
    args, world = model.params, parallel.world_size()
    heads = len(parallel.kv_heads(0, world, args.n_heads, args.n_kv_heads))
    squares = torch.zeros((), device=model.norm.weight.device)
    gradients, spread = [], False
    for _, parameter, weight in trained(model):
        if parameter.grad is None:
            continue
        holders = world if weight is None else 1.0
        if (weight or "").endswith(parallel.KV):
            holders = world * heads / args.n_kv_heads
        spread, gradient = isinstance(parameter.grad, DTensor), devices.local(parameter.grad)
        squares += gradient.float().square().sum() / holders
        gradients.append(gradient)
    if spread:  # by FSDP2, all of them
        devices.add_up(squares)
    norm = math.sqrt(sum(map(float, parallel.all_gather(squares))))
    if norm > most:
        for gradient in gradients:
            gradient.mul_(most / norm)
    return norm
