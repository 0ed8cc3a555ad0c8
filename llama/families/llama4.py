"""Llama 4's network: mixtures of experts, attention in chunks, images among the text.

What differs from `model.py`:

    feed-forward   In every `interleave_moe_layer_step`-th layer, a router gives each token `top_k`
                   of `num_experts` networks. The sigmoid of its score multiplies the expert's
                   input. A shared expert computes all tokens. Ranks share each expert's hidden
                   width.
    RoPE layers    A token attends to those of its own chunk of `attention_chunk_size` positions.
                   Queries and keys are RMS-normalized after the rotation, without a weight.
    NoPE layers    Every `nope_layer_interval`-th has no RoPE, and attends to the whole context.
                   Queries grow with the logarithm of their position (arXiv 2501.19399).
    images         Their features take the place of embeddings; see `llama4_fusion`.

Source: meta-llama/llama-models, llama4/model.py and moe.py.
"""

from dataclasses import dataclass
from typing import Any, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from fairscale.nn.model_parallel.layers import RowParallelLinear
from fairscale.nn.model_parallel.mappings import reduce_from_model_parallel_region
from torch import nn

from llama.families.llama4_fusion import EarlyFusion
from llama.families.llama4_vision import ImageArgs
from llama.model import (
    Attention,
    FeedForward,
    RMSNorm,
    Step,
    TransformerBlock,
    apply_rotary_emb,
)


@dataclass(frozen=True)
class Llama4Args(ImageArgs):
    """The shape of a Llama 4. `hidden_dim` is the width of the layers without experts.

    Raises:
        ValueError: what `ImageArgs` raises; experts without a width, or fewer than `top_k`.
    """

    rope_scaling_factor: float = 16.0
    rope_high_freq_factor: float = 1.0
    num_experts: Optional[int] = None  # None: no layer has experts
    top_k: int = 1
    interleave_moe_layer_step: int = 1
    expert_dim: Optional[int] = None  # hidden width of an expert
    nope_layer_interval: Optional[int] = None  # None: RoPE in all layers
    attention_chunk_size: Optional[int] = None  # None: the whole context
    use_qk_norm: bool = False
    attn_temperature_tuning: bool = False
    floor_scale: float = 8192.0  # positions at which queries begin to grow
    attn_scale: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_experts is not None and not (
            self.expert_dim and self.top_k <= self.num_experts
        ):
            raise ValueError(
                f"num_experts={self.num_experts} of width expert_dim={self.expert_dim}: a token "
                f"takes top_k={self.top_k} of them"
            )

    def has_experts(self, layer: int) -> bool:
        return self.num_experts is not None and (layer + 1) % self.interleave_moe_layer_step == 0

    def has_rope(self, layer: int) -> bool:
        return self.nope_layer_interval is None or (layer + 1) % self.nope_layer_interval != 0

    @property
    def chunks(self) -> Tuple[int, Sequence[int]]:
        """Positions of a chunk, and the layers that attend within one; 0: none does."""
        layers = [layer for layer in range(self.n_layers) if self.has_rope(layer)]
        return self.attention_chunk_size or 0, layers


class ChunkedAttention(Attention):
    """Attention of a layer with RoPE or without."""

    def __init__(self, layer_id: int, args: Llama4Args):
        super().__init__(layer_id, args)
        self.args, self.has_rope = args, args.has_rope(layer_id)

    def forward(self, x: torch.Tensor, step: Step) -> torch.Tensor:
        B, T, _ = x.shape
        args = self.args
        xq = self.wq(x).view(B, T, self.n_local_heads, self.head_dim)
        xk = self.wk(x).view(B, T, self.n_local_kv_heads, self.head_dim)
        xv = self.wv(x).view(B, T, self.n_local_kv_heads, self.head_dim)
        if self.has_rope:
            xq = apply_rotary_emb(xq, step.freqs_cis)
            xk = apply_rotary_emb(xk, step.freqs_cis)
            if args.use_qk_norm:
                xq, xk = (
                    F.rms_norm(y.float(), y.shape[-1:], eps=args.norm_eps).type_as(y)
                    for y in (xq, xk)
                )
        elif args.attn_temperature_tuning:
            grown = torch.log1p(((step.positions + 1.0) / args.floor_scale).floor())
            xq = (xq * (1 + args.attn_scale * grown)[..., None, None]).type_as(xq)
        return self.wo(self.attend(xq, xk, xv, step))


class PartialRowLinear(RowParallelLinear):
    """A row-parallel layer whose outputs are left for the caller to sum over the ranks."""

    reduces = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight)


class Expert(FeedForward):
    """SwiGLU, whose outputs the ranks haven't summed."""

    def __init__(self, dim: int, hidden_dim: int):
        super().__init__(dim, hidden_dim)
        self.w2.__class__ = PartialRowLinear


class MixtureOfExperts(nn.Module):
    """A shared expert for all tokens, and for each token the experts that the router chooses.

    Weights of an expert that no token chose aren't read, except to learn: then its gradients are
    zeros, not None, for an optimizer and copies of the model that take those of all weights.
    """

    def __init__(self, args: Llama4Args):
        super().__init__()
        assert args.num_experts is not None and args.expert_dim is not None
        self.top_k = args.top_k
        self.router = nn.utils.skip_init(nn.Linear, args.dim, args.num_experts, bias=False)
        self.shared_expert = Expert(args.dim, args.expert_dim)
        self.experts = nn.ModuleList(
            Expert(args.dim, args.expert_dim) for _ in range(args.num_experts)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.flatten(0, -2)  # (tokens, dim)
        scores, chosen = self.router(flat).topk(self.top_k)  # (tokens, top_k)
        weights = scores.float().sigmoid().type_as(x)
        out = self.shared_expert(flat)
        learns = torch.is_grad_enabled() and any(p.requires_grad for p in self.experts.parameters())
        used = range(len(self.experts)) if learns else sorted(set(chosen.flatten().tolist()))
        for expert in used:
            tokens, nth = (chosen == expert).nonzero(as_tuple=True)
            routed = self.experts[expert](flat[tokens] * weights[tokens, nth, None])
            out = out.index_add(0, tokens, routed)
        return reduce_from_model_parallel_region(out).view(x.shape)


class Llama4Block(TransformerBlock):
    """One layer: attention, and a mixture of experts or a feed-forward network."""

    def __init__(self, layer_id: int, args: Llama4Args):
        nn.Module.__init__(self)
        self.attention = ChunkedAttention(layer_id, args)
        network: Any
        if args.has_experts(layer_id):
            network = MixtureOfExperts(args)
        else:
            network = FeedForward(args.dim, args.hidden_dim)
        self.feed_forward = network
        self.attention_norm = RMSNorm(args.dim, eps=args.norm_eps)
        self.ffn_norm = RMSNorm(args.dim, eps=args.norm_eps)


class Llama4Transformer(EarlyFusion):
    """The whole network. Chunks go by the position in a row: it takes no other `positions`."""

    block = Llama4Block  # type: ignore[assignment]
    takes_positions = False
    params: Llama4Args

    def hidden(self, tokens: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        if options.get("positions") is not None:
            raise ValueError("Llama 4 counts positions from the beginning of a row: pass none")
        return super().hidden(tokens, *args, **options)

    def run_layers(self, h: torch.Tensor, step: Step) -> torch.Tensor:
        h = self.with_images(h, step)
        local = step._replace(mask=self.chunk_bias(step, h))
        for i, layer in enumerate(self.layers):
            h = layer(h, local if self.params.has_rope(i) else step)
        return h

    def chunk_bias(self, step: Step, h: torch.Tensor) -> Optional[torch.Tensor]:
        """`attention_bias` of the layers with RoPE: -inf also for keys of earlier chunks."""
        size, T = self.params.attention_chunk_size, h.shape[1]
        S = T if step.cache is None else max(step.cache.lengths)
        if size is None or size >= S:
            return step.mask
        keys = torch.arange(S, device=h.device)
        queries = step.positions[:, None, :, None]
        hidden = keys // size != queries // size
        if step.mask is None:  # which else has the causal rule, or what the caller wants instead
            hidden |= keys > queries
        bias = torch.zeros_like(hidden, dtype=h.dtype).masked_fill_(hidden, -torch.inf)
        return bias if step.mask is None else bias + step.mask
