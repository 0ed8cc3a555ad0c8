"""Models that see on the CPU kernels: their text models; image encoders stay as they are.

In Llama 3.2 Vision, the layers between two of cross-attention are one module. Those compute with
packed weights, too, and attend by torch, to keys and values that aren't in the cache's blocks.
"""

from typing import Any, cast

import torch
from fairscale.nn.model_parallel.mappings import reduce_from_model_parallel_region
from torch import nn

from llama.backends.cpu import kernels, layers, networks
from llama.backends.cpu.layers import NativeLayers, NativeNorm, NativeOutput
from llama.backends.cpu.packing import Packed, arena_for, weight_of
from llama.backends.cpu.workspace import Workspace
from llama.families.llama4_fusion import EarlyFusion
from llama.families.vision import VisionTransformer
from llama.model import Step, Transformer


class NativeVisionTransformer(layers.NativeTransformer, VisionTransformer):
    embed = VisionTransformer.embed


class NativeEarlyFusion(layers.NativeTransformer, EarlyFusion):
    def run_layers(self, h: torch.Tensor, step: Step) -> torch.Tensor:
        return super().run_layers(self.with_images(h, step), step)


class NativeLinear(NativeOutput):
    """A linear layer of a block, by its name; its result is of the model's dtype."""

    def __init__(self, weight: Packed, work: Workspace, name: str):
        super().__init__(weight, work)
        self._reduce = name in ("wo", "w2")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.product(x)
        return (reduce_from_model_parallel_region(out) if self._reduce else out).to(x.dtype)


def swap(model: Transformer) -> Transformer:
    """`layers.swap`, for any model that it supports.

    Raises:
        ValueError: what `check` raises.
    """
    if not isinstance(model, VisionTransformer):
        reads = isinstance(model, EarlyFusion) and model.params.vision_layers is not None
        layers.swap(model)
        model.__class__ = NativeEarlyFusion if reads else model.__class__
        return model
    args, weight = model.params, model.norm.weight
    networks.check(args, weight.device, weight.dtype)
    model.requires_grad_(False)
    work = Workspace(weight.dtype)
    blocks, reading = [*model.layers], [*model.cross_attention_layers]
    linears = [
        linear for block in (*blocks, *reading) for linear in networks.linears_of(cast(Any, block))
    ]
    arena = arena_for([weight_of(linear) for linear in (*linears, model.output)])
    del linears  # each weight is freed once it is packed
    begins = sorted({0, *model.before})
    model.before = {begins.index(layer): i for layer, i in model.before.items()}
    model.layers = nn.ModuleList(
        NativeLayers(cast(Any, blocks[begin:end]), args, work, arena, begin)
        for begin, end in zip(begins, [*begins[1:], len(blocks)], strict=True)
    )
    for block in cast(Any, reading):
        for linear, name in zip(networks.linears_of(block), kernels.MATRICES, strict=True):
            owner = block.attention if hasattr(block.attention, name) else block.feed_forward
            setattr(owner, name, NativeLinear(arena.pack(weight_of(linear)), work, name))
        block.attention_norm = NativeNorm(block.attention_norm)
        block.ffn_norm = NativeNorm(block.ffn_norm)
    layers.swap_ends(model, work, arena)
    model.__class__ = NativeVisionTransformer
    return model
