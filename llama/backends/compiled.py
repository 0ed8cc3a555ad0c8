"""Transformer blocks compiled with torch.compile, for GPUs (for CPUs see `llama.backends.cpu`).

The parts before and after the cache are compiled, once for all layers. The cache and attention,
whose shapes change with every token, run uncompiled, so that a growing context causes no
recompilation. torch caches compiled code on disk. Weights with the same input are concatenated:
wq, wk, wv, and w1, w3.
"""

from functools import lru_cache
from typing import Any, Callable, List, Sequence, Tuple

import torch
import torch.distributed._functional_collectives as collectives
import torch.nn.functional as F
from fairscale.nn.model_parallel.initialize import get_model_parallel_group
from torch import nn

from llama.backends.quantized import Blocks, QuantizedLinear
from llama.checkpoint import ggml
from llama.layers import parallel
from llama.model import Step, Transformer, TransformerBlock, rms_norm

Matrix = torch.Tensor | Blocks


def swap(model: Transformer) -> Transformer:
    """Replace a loaded model's blocks by compiled ones, in place. For inference only."""
    model.requires_grad_(False)
    for i, block in enumerate(model.layers):
        model.layers[i] = CompiledBlock(block)  # type: ignore[arg-type]
    return model


@lru_cache
def _compiled() -> Tuple[Callable[..., Any], Callable[..., Any]]:
    return torch.compile(_before, dynamic=True), torch.compile(_after, dynamic=True)


def _linear(x: torch.Tensor, weights: Sequence[Matrix]) -> torch.Tensor:
    dense = [w.dense(x.dtype) if isinstance(w, Blocks) else w for w in weights]
    return torch.cat([F.linear(x, w) for w in dense], -1) if len(dense) > 1 else F.linear(x, *dense)


def _traceable(weights: Sequence[Matrix], dtype: torch.dtype) -> List[Matrix]:
    """Blocks that the gguf package dequantizes become dense: torch.compile can't trace it."""
    return [
        w.dense(dtype) if isinstance(w, Blocks) and w.kind not in ggml.BYTES else w for w in weights
    ]


def _rotate(x: torch.Tensor, cis: torch.Tensor) -> torch.Tensor:
    """`apply_rotary_emb` in real numbers, as complex ones can't be compiled. cis: (..., 2)."""
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    c, s = cis.unbind(-1)
    return torch.stack([a * c - b * s, a * s + b * c], -1).flatten(-2).type_as(x)


def _before(
    x: torch.Tensor,
    norm: torch.Tensor,
    eps: float,
    wqkv: Sequence[Matrix],
    cis: torch.Tensor,
    heads: Tuple[int, int, int],
) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(B, T, dim) -> q, k, v, rotated: (B, T, heads, head_dim)."""
    n_heads, n_kv_heads, head_dim = heads
    widths = [n * head_dim for n in (n_heads, n_kv_heads, n_kv_heads)]
    q, k, v = (
        part.unflatten(-1, (-1, head_dim))
        for part in _linear(rms_norm(x, norm, eps), wqkv).split(widths, -1)
    )
    return _rotate(q, cis), _rotate(k, cis), v


def _after(
    x: torch.Tensor,
    out: torch.Tensor,
    wo: Sequence[Matrix],
    norm: torch.Tensor,
    eps: float,
    w13: Sequence[Matrix],
    w2: Sequence[Matrix],
    group: Any,
) -> torch.Tensor:
    """The block's output, from its input and attention's output: (B, T, ...) -> (B, T, dim)."""

    def summed(y: torch.Tensor) -> torch.Tensor:
        return y if group is None else collectives.all_reduce(y, "sum", group)

    h = x + summed(_linear(out, wo))
    gate, up = _linear(rms_norm(h, norm, eps), w13).chunk(2, -1)
    return h + summed(_linear(F.silu(gate) * up, w2))


def _together(*linears: nn.Module) -> List[Matrix]:
    """The weights of layers with the same input. Dense ones are concatenated; the layers keep
    views."""
    if isinstance(linears[0], QuantizedLinear):
        return [linear.blocks for linear in linears]  # type: ignore[misc]
    weights: List[torch.Tensor] = [linear.weight for linear in linears]  # type: ignore[misc]
    if len(weights) == 1:
        return [weights[0].detach()]
    joined = torch.cat([weight.detach() for weight in weights])
    parts = joined.split([len(weight) for weight in weights])
    for linear, part in zip(linears, parts, strict=True):
        linear.weight = nn.Parameter(part, requires_grad=False)
    return [joined]


class CompiledBlock(nn.Module):
    """A TransformerBlock, compiled."""

    def __init__(self, block: TransformerBlock):
        super().__init__()
        self.block = block  # owns the weights
        attention, ffn = block.attention, block.feed_forward
        self._heads = attention.n_local_heads, attention.n_local_kv_heads, attention.head_dim
        self._wqkv = _together(attention.wq, attention.wk, attention.wv)
        self._wo, self._w2 = _together(attention.wo), _together(ffn.w2)
        self._w13 = _together(ffn.w1, ffn.w3)
        self._group = get_model_parallel_group() if parallel.world_size() > 1 else None

    def forward(self, x: torch.Tensor, step: Step) -> torch.Tensor:
        before, after = _compiled()
        first, second = self.block.attention_norm, self.block.ffn_norm
        cis = torch.view_as_real(step.freqs_cis)
        wqkv, wo, w13, w2 = (
            _traceable(weights, x.dtype) for weights in (self._wqkv, self._wo, self._w13, self._w2)
        )
        q, k, v = before(x, first.weight, first.eps, wqkv, cis, self._heads)
        out = self.block.attention.attend(q, k, v, step)
        return after(x, out, wo, second.weight, second.eps, w13, w2, self._group)
