"""Models that see on the CPU kernels: their text models, and the attention of Llama 3.2's encoder.

In Llama 3.2 Vision, the layers between two of cross-attention are one module. Those compute with
packed weights, too, and attend to keys and values that aren't in the cache's blocks.
"""

import math
from ctypes import byref
from typing import Any, cast

import torch
from fairscale.nn.model_parallel.mappings import reduce_from_model_parallel_region
from torch import nn

from llama.backends.cpu import kernels, layers, networks
from llama.backends.cpu.kernels import address
from llama.backends.cpu.layers import NativeLayers, NativeNorm, NativeOutput
from llama.backends.cpu.packing import LANES, Packed, arena_for, weight_of
from llama.backends.cpu.workspace import Workspace
from llama.families.vision import CrossAttention, VisionTransformer
from llama.families.vision_encoder import ImageAttention, Tokens, VisionEncoder
from llama.model import Transformer


class NativeVisionTransformer(layers.NativeTransformer, VisionTransformer):
    embed = VisionTransformer.embed


class NativeLinear(NativeOutput):
    """A linear layer of a block, by its name; its result is of the model's dtype."""

    def __init__(self, weight: Packed, work: Workspace, name: str):
        super().__init__(weight, work)
        self._reduce = name in ("wo", "w2")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.product(x)
        return (reduce_from_model_parallel_region(out) if self._reduce else out).to(x.dtype)


class NativeCrossAttention(CrossAttention):
    """Attention to images whose sums, too, are in an order that doesn't depend on the pass."""

    def look(self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        (tokens, heads, head_dim), (kv_heads, S, _) = q.shape, keys.shape
        if keys.stride() != values.stride() or keys.stride()[1:] != (head_dim, 1):
            keys, values = keys.contiguous(), values.contiguous()
        pairs = q.dtype == torch.bfloat16 and kernels.library().multiplies_bf16()
        # For exp2 in place of exp.
        queries = (q.float() * (1 / math.log(2) / math.sqrt(head_dim))).contiguous()
        queries = queries.bfloat16() if pairs else queries
        begins = torch.tensor([0, tokens], dtype=torch.int32)
        owners = torch.zeros(tokens, dtype=torch.int32)
        positions = torch.full((tokens,), S - 1)
        few = tokens < layers.MANY
        partial = torch.empty(tokens * heads * -(-S // layers.CHUNK) * (head_dim + 2) * few)
        out = torch.empty(tokens, heads * head_dim)
        shape = kernels.Shape(0, heads, kv_heads, head_dim, 0, 0.0, 1.0)
        batch = kernels.Batch(
            1, few, tokens, address(begins), address(owners), address(positions), None,
            address(keys), address(values), None, None, 0, 0, keys.stride(0) // head_dim, None, 0,
        )  # fmt: skip
        inputs = kernels.Inputs(floats=address(out), cols=heads * head_dim, height=1)
        kernels.library().look(
            q.dtype == torch.bfloat16, byref(shape), byref(batch), address(queries),
            address(partial), byref(inputs), torch.get_num_threads(),
        )  # fmt: skip
        return out.to(q.dtype)


class NativeImageAttention(ImageAttention):
    """The image encoder's attention by the kernels, in bf16."""

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tokens: Tokens
    ) -> torch.Tensor:
        q, k, v = (part[0].contiguous() for part in (q, k, v))
        out, times, (N, width) = torch.empty_like(q), tokens.times.float().log2(), q.shape
        for begin, end, keys in ((0, tokens.real, N), (tokens.real, N, tokens.real)):
            all_of_them = kernels.All(
                address(q[begin:]), address(k), address(v), address(times), address(out[begin:]),
                end - begin, keys, self.n_local_heads, width // self.n_local_heads,
            )  # fmt: skip
            kernels.library().attend_to_all(byref(all_of_them), torch.get_num_threads())
        return out[None]


def swap_encoder(encoder: VisionEncoder) -> None:
    """Let the encoder, whose weights don't learn, attend by the kernels, if these multiply bf16."""
    for block in (*encoder.transformer.resblocks, *encoder.global_transformer.resblocks):
        attention: Any = block.attn
        width, dtype = len(attention.wq.weight), attention.wq.weight.dtype
        tiles = dtype == torch.bfloat16 and width // attention.n_local_heads % LANES == 0
        if tiles and kernels.library().attends_to_all():
            attention.__class__ = NativeImageAttention


def swap(model: Transformer) -> Transformer:
    """`layers.swap`, for any model that it supports.

    Raises:
        ValueError: what `check` raises.
    """
    if not isinstance(model, VisionTransformer):
        return layers.swap(model)
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
        block.attention.__class__ = NativeCrossAttention
        for linear, name in zip(networks.linears_of(block), kernels.MATRICES, strict=True):
            owner = block.attention if hasattr(block.attention, name) else block.feed_forward
            setattr(owner, name, NativeLinear(arena.pack(weight_of(linear)), work, name))
        block.attention_norm = NativeNorm(block.attention_norm)
        block.ffn_norm = NativeNorm(block.ffn_norm)
    layers.swap_ends(model, work, arena)
    swap_encoder(cast(Any, model.vision_model.vision_encoder))
    model.__class__ = NativeVisionTransformer
    return model
