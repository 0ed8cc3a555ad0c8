"""Networks that differ from Llama's by a line each: SmolLM3, Granite 3, Mistral's window, biases,
and two more ways to stretch RoPE.

Each is a field of `VariantArgs`; with all defaults it is Llama. Sources: transformers' `smollm3`,
`granite`, `mistral` and `modeling_rope_utils`.
"""

import math
from dataclasses import dataclass, replace
from typing import Optional, Tuple

import torch
from torch import nn

from llama.model import (
    Attention,
    FeedForward,
    ModelArgs,
    Step,
    Transformer,
    TransformerBlock,
    rope_frequencies,
)

# The matrices that have biases, by the field of `VariantArgs` that says so.
BIASED = {"attention_bias": ("wq", "wk", "wv", "wo"), "mlp_bias": ("w1", "w2", "w3")}


@dataclass(frozen=True)
class VariantArgs(ModelArgs):
    """The shape of a model with one of these differences.

    Raises:
        ValueError: layers that don't exist, differences that no model combines, and what
            `ModelArgs` raises.
    """

    no_rope_layers: Tuple[int, ...] = ()  # from 0: their queries and keys aren't rotated (SmolLM3)
    attention_bias: bool = False  # wq, wk, wv and wo each add a vector
    mlp_bias: bool = False  # w1, w2 and w3
    sliding_window: int = 0  # a token attends to so many, itself included; 0: to all (Mistral)
    # Granite's: of embeddings, of what attention and feed-forward add, of q kᵀ; logits are divided.
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    attention_multiplier: float = 0.0  # 0: 1 / sqrt(head_dim)
    logits_scaling: float = 1.0
    # YaRN (arXiv 2309.00071); the context before is rope_original_max_seq_len.
    yarn_factor: float = 1.0
    yarn_beta_fast: float = 32.0
    yarn_beta_slow: float = 1.0
    yarn_truncate: bool = True
    yarn_attention_factor: float = 1.0  # of rotated queries and of keys
    dynamic_factor: float = 1.0  # "dynamic NTK"; its context is rope_original_max_seq_len, too

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.no_rope_layers, (list, tuple)):
            raise ValueError(f"no_rope_layers={self.no_rope_layers!r} isn't a list of layers")
        object.__setattr__(self, "no_rope_layers", tuple(self.no_rope_layers))
        wrong = [i for i in self.no_rope_layers if type(i) is not int or i < 0]
        if wrong:
            raise ValueError(f"no_rope_layers has {wrong[0]!r}, which is no layer")
        if self.no_rope_layers and self.attention_multiplier:
            raise ValueError("no_rope_layers and attention_multiplier don't go together")
        stretched = (self.yarn_factor, self.dynamic_factor) != (1.0, 1.0)
        if stretched and (self.head_dim < 4 or self.rope_theta <= 1 or self.use_scaled_rope):
            raise ValueError(
                f"YaRN and dynamic RoPE need head_dim={self.head_dim} of 4 or more, "
                f"rope_theta={self.rope_theta} above 1, and no other scaling"
            )


def frequencies(args: VariantArgs) -> torch.Tensor:
    """RoPE's angular frequencies, (head_dim / 2,), fp32.

    Dynamic RoPE raises theta with the length reached. transformers does so as a sequence grows, so
    that keys in its cache keep the angles of a shorter one and a result depends on how a prompt was
    split. Here the length is max_seq_len throughout: up to the trained context nothing changes, and
    beyond it logits are transformers' for a sequence of max_seq_len tokens computed at once.
    """
    if args.dynamic_factor != 1.0:
        longer = max(1.0, args.max_seq_len / args.rope_original_max_seq_len)
        stretch = args.dynamic_factor * longer - (args.dynamic_factor - 1)
        theta = args.rope_theta * stretch ** (args.head_dim / (args.head_dim - 2))
        return rope_frequencies(replace(args, rope_theta=theta))
    freqs = rope_frequencies(args)
    if args.yarn_factor == 1.0:
        return freqs

    def pair(turns: float) -> float:  # which dimensions turn so often in the context before
        length = args.rope_original_max_seq_len / (2 * math.pi * turns)
        return args.head_dim * math.log(length) / (2 * math.log(args.rope_theta))

    low, high = pair(args.yarn_beta_fast), pair(args.yarn_beta_slow)
    if args.yarn_truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, args.head_dim - 1)
    high += 0.001 * (low == high)
    slow = ((torch.arange(args.head_dim // 2) - low) / (high - low)).clamp(0, 1)
    return freqs / args.yarn_factor * slow + freqs * (1 - slow)


def rotation_scale(args: VariantArgs) -> float:
    """What queries and keys are multiplied by as they are rotated.

    It brings the scores q kᵀ / sqrt(head_dim) to YaRN's or Granite's size.
    """
    scale = args.attention_multiplier * math.sqrt(args.head_dim) or 1.0
    return args.yarn_attention_factor * math.sqrt(scale)


def add_biases(*linears: nn.Module) -> None:
    """Give fairscale's layers a bias: of a rank's outputs, or added after the sum over ranks."""
    for linear in linears:
        weight: torch.Tensor = linear.weight  # type: ignore[assignment]
        linear.bias = nn.Parameter(weight.new_zeros(len(weight)))


class VariantAttention(Attention):
    def __init__(self, layer_id: int, args: VariantArgs):
        super().__init__(layer_id, args)
        self.no_rope_layers, self.multiplier = args.no_rope_layers, args.residual_multiplier
        if args.attention_bias:
            add_biases(self.wq, self.wk, self.wv, self.wo)

    def forward(self, x: torch.Tensor, step: Step) -> torch.Tensor:
        if self.layer_id in self.no_rope_layers:
            step = step._replace(freqs_cis=torch.ones_like(step.freqs_cis))
        return self.multiplier * super().forward(x, step)


class VariantFeedForward(FeedForward):
    def __init__(self, args: VariantArgs):
        super().__init__(args.dim, args.hidden_dim)
        self.multiplier = args.residual_multiplier
        if args.mlp_bias:
            add_biases(self.w1, self.w2, self.w3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.multiplier * super().forward(x)


class VariantBlock(TransformerBlock):
    def __init__(self, layer_id: int, args: VariantArgs):
        super().__init__(layer_id, args)
        self.attention = VariantAttention(layer_id, args)
        self.feed_forward = VariantFeedForward(args)


class VariantTransformer(Transformer):
    """A Transformer with the differences that its `VariantArgs` say."""

    block = VariantBlock
    params: VariantArgs

    frequencies = staticmethod(frequencies)  # type: ignore[assignment]

    def run_layers(self, h: torch.Tensor, step: Step) -> torch.Tensor:
        step = step._replace(freqs_cis=step.freqs_cis * rotation_scale(self.params))
        return super().run_layers(h * self.params.embedding_multiplier, step)

    def attention_bias(
        self, mask: Optional[torch.Tensor], places: torch.Tensor, S: int, dtype: torch.dtype
    ) -> Optional[torch.Tensor]:
        window = self.params.sliding_window
        if not 0 < window < S:
            return super().attention_bias(mask, places, S, dtype)
        keys, queries = torch.arange(S, device=places.device), places[:, None, :, None]
        seen = (keys <= queries) if mask is None else mask
        seen = seen & (keys > queries - window)
        return torch.zeros_like(seen, dtype=dtype).masked_fill_(~seen, -math.inf)

    def logits(self, h: torch.Tensor) -> torch.Tensor:
        return super().logits(h) / self.params.logits_scaling
