"""The Llama network, from token ids to logits.

Weights carry Meta's names, so a checkpoint is the specification. The linear layers are fairscale's
model-parallel ones; one word tells how a weight is split over the ranks of a group:

    ColumnParallelLinear    each rank computes some of the outputs     (wq, wk, wv, w1, w3, output)
    RowParallelLinear       each rank sums over some of the inputs,
                            then all ranks add up their sums           (wo, w2)
    VocabParallelEmbedding  each rank knows some of the words

Shapes: B rows, T new tokens, S tokens that attention sees (cached and new).
Papers: Llama, arXiv 2302.13971; Llama 2 (grouped-query attention), 2307.09288; Llama 3, 2407.21783.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import List, NamedTuple, Optional, Sequence, Type

import torch
import torch.nn.functional as F
from fairscale.nn.model_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
)
from torch import nn

from llama.layers import parallel
from llama.layers.cache import KVCache
from llama.layers.ids import check_token_tensor


@dataclass(frozen=True)
class ModelArgs:
    """The shape of a model. Names and defaults are those of Meta's params.json.

    Raises:
        ValueError: head counts that don't divide.
    """

    dim: int = 4096
    n_layers: int = 32
    n_heads: int = 32
    n_kv_heads: int = None  # type: ignore[assignment]  # None: n_heads
    vocab_size: int = -1
    multiple_of: int = 256  # the feed-forward width is rounded up to a multiple of this
    ffn_dim_multiplier: Optional[float] = None
    norm_eps: float = 1e-5
    rope_theta: float = 500000.0
    # Llama 3.1 and later stretch RoPE to contexts longer than they were pre-trained on.
    use_scaled_rope: bool = False
    rope_scaling_factor: float = 8.0  # 3.1: 8; 3.2 1B and 3B: 32
    rope_low_freq_factor: float = 1.0
    rope_high_freq_factor: float = 4.0
    rope_original_max_seq_len: int = 8192
    rope_linear_factor: float = 1.0  # positions divided by this (arXiv 2306.15595); not Meta's
    # Where the shape doesn't follow from the fields above. None: derived as Meta does.
    head_dim: int = None  # type: ignore[assignment]
    hidden_dim: int = None  # type: ignore[assignment]
    tied_embeddings: bool = False  # the output layer is the embedding

    max_batch_size: int = 32
    max_seq_len: int = 2048

    def __post_init__(self) -> None:
        def derive(field: str, value: int) -> None:
            if getattr(self, field) is None:
                object.__setattr__(self, field, value)

        def check_multiple(whole: str, part: str) -> None:
            a, b = getattr(self, whole), getattr(self, part)
            if b < 1 or a < b or a % b:
                raise ValueError(f"{whole}={a} isn't a multiple of {part}={b}")

        derive("n_kv_heads", self.n_heads)
        check_multiple("n_heads", "n_kv_heads")
        if self.head_dim is None:
            check_multiple("dim", "n_heads")
        derive("head_dim", self.dim // self.n_heads)
        hidden = int(2 * 4 * self.dim / 3)  # so that SwiGLU's three matrices cost what two would
        if self.ffn_dim_multiplier is not None:
            hidden = int(self.ffn_dim_multiplier * hidden)
        derive("hidden_dim", self.multiple_of * -(-hidden // self.multiple_of))


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """y = x / sqrt(mean(x²) + eps) · weight, the norm in fp32. arXiv 1910.07467."""
    x32 = x.float()
    normed = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)
    return normed.type_as(x) * weight


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.weight, self.eps)


def rope_frequencies(args: ModelArgs) -> torch.Tensor:
    """Angle in radians by which one position turns each pair of dimensions: (head_dim / 2,), fp32.

    Pair i turns by theta^(-2i / head_dim) (RoFormer, arXiv 2104.09864). Llama 3.1 slows down the
    pairs whose wavelength is long against the context of pre-training: beyond
    original / low_freq_factor by the whole factor, below original / high_freq_factor not at all,
    in between by a linear blend in 1 / wavelength (Meta's llama-models, `apply_scaling`).
    """
    head_dim = args.head_dim
    freqs = 1.0 / (args.rope_theta ** (torch.arange(0, head_dim, 2).float() / head_dim))
    freqs = freqs / args.rope_linear_factor
    if not args.use_scaled_rope:
        return freqs
    low, high = args.rope_low_freq_factor, args.rope_high_freq_factor
    wavelen = 2 * math.pi / freqs
    blend = (args.rope_original_max_seq_len / wavelen - low) / (high - low)
    slow = freqs / args.rope_scaling_factor
    return torch.where(
        blend <= 0, slow, torch.where(blend >= 1, freqs, (1 - blend) * slow + blend * freqs)
    )


def apply_rotary_emb(x: torch.Tensor, freqs_cis: torch.Tensor) -> torch.Tensor:
    """Turn each pair of dimensions (x0, x1), read as x0 + i·x1, by its position's angle, in fp32.

    x: (B, T, n_heads, head_dim); freqs_cis = e^(i·angle): (1 or B, T, 1, head_dim / 2).
    """
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * freqs_cis).flatten(-2).type_as(x)


# Without the identity as init_method fairscale would draw random numbers that loading overwrites.
_Column = partial(ColumnParallelLinear, bias=False, gather_output=False, init_method=lambda w: w)
_Row = partial(RowParallelLinear, bias=False, input_is_parallel=True, init_method=lambda w: w)


class Step(NamedTuple):
    """What one forward pass has in common for all layers."""

    positions: torch.Tensor  # (1 or B, T): where the tokens stand in their rows
    freqs_cis: torch.Tensor  # (1 or B, T, 1, head_dim / 2): by what RoPE rotates them
    mask: Optional[torch.Tensor]  # (1 or B, 1, T, S), added to the scores; None: causal, from 0 on
    cache: Optional[KVCache]


class Attention(nn.Module):
    """Grouped-query attention: n_heads queries share n_kv_heads keys and values (2305.13245)."""

    def __init__(self, layer_id: int, args: ModelArgs):
        super().__init__()
        self.layer_id = layer_id
        world = parallel.world_size()
        self.head_dim = args.head_dim
        self.n_local_heads = args.n_heads // world
        self.n_local_kv_heads = len(parallel.kv_heads(0, world, args.n_heads, args.n_kv_heads))

        kv_dim = self.n_local_kv_heads * world * args.head_dim  # replicated if world > n_kv_heads
        self.wq = _Column(args.dim, args.n_heads * args.head_dim)
        self.wk = _Column(args.dim, kv_dim)
        self.wv = _Column(args.dim, kv_dim)
        self.wo = _Row(args.n_heads * args.head_dim, args.dim)

    def forward(self, x: torch.Tensor, step: Step) -> torch.Tensor:
        B, T, _ = x.shape
        xq = self.wq(x).view(B, T, self.n_local_heads, self.head_dim)
        xk = self.wk(x).view(B, T, self.n_local_kv_heads, self.head_dim)
        xv = self.wv(x).view(B, T, self.n_local_kv_heads, self.head_dim)

        xq = apply_rotary_emb(xq, step.freqs_cis)
        xk = apply_rotary_emb(xk, step.freqs_cis)

        return self.wo(self.attend(xq, xk, xv, step))

    def attend(
        self, xq: torch.Tensor, xk: torch.Tensor, xv: torch.Tensor, step: Step
    ) -> torch.Tensor:
        """softmax(q kᵀ / sqrt(head_dim)) v; the new keys and values are stored in the cache.

        xq, xk, xv: (B, T, heads, head_dim), rotated. Returns (B, T, n_local_heads · head_dim).
        """
        B, T, _, _ = xq.shape
        if step.cache is None:
            keys, values = xk.transpose(1, 2), xv.transpose(1, 2)
        else:
            keys, values = step.cache.update(self.layer_id, step.positions, xk, xv)
        # keys, values: (B, n_local_kv_heads, S, head_dim)

        if T == 1:
            # The queries that share a key/value head become the rows of one small matrix.
            xq = xq.view(B, self.n_local_kv_heads, -1, self.head_dim)
            out = F.scaled_dot_product_attention(xq, keys, values, attn_mask=step.mask)
        else:
            out = F.scaled_dot_product_attention(
                xq.transpose(1, 2),  # (B, n_local_heads, T, head_dim)
                keys,
                values,
                attn_mask=step.mask,
                is_causal=step.mask is None,
                enable_gqa=self.n_local_kv_heads != self.n_local_heads,
            ).transpose(1, 2)
        return out.reshape(B, T, -1)


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) · w3 x). arXiv 2002.05202."""

    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        hidden_dim = parallel.padded(hidden_dim, parallel.world_size())  # zeros change nothing
        self.w1 = _Column(dim, hidden_dim)
        self.w2 = _Row(hidden_dim, dim)
        self.w3 = _Column(dim, hidden_dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class TransformerBlock(nn.Module):
    def __init__(self, layer_id: int, args: ModelArgs):
        super().__init__()
        self.attention = Attention(layer_id, args)
        self.feed_forward = FeedForward(args.dim, args.hidden_dim)
        self.attention_norm = RMSNorm(args.dim, eps=args.norm_eps)
        self.ffn_norm = RMSNorm(args.dim, eps=args.norm_eps)

    def forward(self, x: torch.Tensor, step: Step) -> torch.Tensor:
        h = x + self.attention(self.attention_norm(x), step)
        return h + self.feed_forward(self.ffn_norm(h))


class Transformer(nn.Module):
    """The whole network. Weights are uninitialised: `checkpoint.load` fills them.

    Args:
        params: the shape.
        device, dtype: of the weights. "meta" allocates nothing that lasts, for loading.

    Raises:
        ValueError: a number of ranks that doesn't divide the heads.
    """

    def __init__(
        self,
        params: ModelArgs,
        device: Optional[str | torch.device] = None,
        dtype: Optional[torch.dtype] = None,
    ):
        super().__init__()
        parallel.ensure_initialized(device)
        world = parallel.world_size()
        parallel.check_world(world, params.n_heads)
        self.params = params
        self.vocab_size = params.vocab_size
        self.n_layers = params.n_layers

        # fairscale allocates fp32 on the CPU whatever one asks for; moving each block at once
        # keeps that down to one block.
        def place(module):
            return module.to(device=device, dtype=dtype)

        padded_vocab = parallel.padded(params.vocab_size, world)
        self.tok_embeddings = place(
            VocabParallelEmbedding(padded_vocab, params.dim, init_method=lambda w: w)
        )
        self.layers = nn.ModuleList(
            place(TransformerBlock(i, params)) for i in range(params.n_layers)
        )
        self.norm = place(RMSNorm(params.dim, eps=params.norm_eps))
        self.output = place(_Column(params.dim, padded_vocab, gather_output=True))
        if params.tied_embeddings:
            self.output.weight = self.tok_embeddings.weight
        self.freqs = rope_frequencies(params)  # no buffer: model.to(bfloat16) must not round it

    def new_cache(
        self, rows: int, max_len: Optional[int] = None, cache_type: Type[KVCache] = KVCache
    ) -> KVCache:
        """An empty cache for this rank's key/value heads, of max_seq_len positions by default."""
        args, world = self.params, parallel.world_size()
        return cache_type(
            args.n_layers,
            rows,
            args.max_seq_len if max_len is None else max_len,
            len(parallel.kv_heads(0, world, args.n_heads, args.n_kv_heads)),
            args.head_dim,
            dtype=self.norm.weight.dtype,
            device=self.norm.weight.device,
        )

    def forward(
        self,
        tokens: torch.Tensor,
        start_pos: int | Sequence[int] | torch.Tensor = 0,
        cache: Optional[KVCache] = None,
        *,
        positions: Optional[torch.Tensor] = None,
        mask: Optional[torch.Tensor] = None,
    ) -> torch.Tensor:
        """Logits of every given token: (B, T) ids -> (B, T, vocab_size), fp32.

        Without a cache a plain differentiable causal forward. With one, the tokens stand at
        positions start_pos, start_pos + 1, ... (an int, or one per row) and see what the cache
        holds before them. Rows of different lengths are padded on the right: a token never sees
        what comes after it, so padding needs no mask, only `cache.truncate` to the true lengths.

        Args:
            tokens: ids, or embeddings (B, T, dim) in their place, for soft prompts.
            positions: (T,) or (B, T), by which RoPE turns; for sequences packed into a row they
                begin again. By default where the tokens stand.
            mask: True where a token sees a key, (T, S) or (B, 1, T, S), in place of the rule that
                it sees all up to itself.

        Raises:
            ValueError: ids outside of the vocabulary; positions that the cache has no room for or
                that would leave a gap; a mask of another shape, with a token that sees nothing, or
                for layers that take none.
        """
        if not tokens.is_floating_point():
            check_token_tensor(tokens, self.vocab_size)
        h = self.hidden(tokens, start_pos, cache, positions=positions, mask=mask)
        return self.logits(h)

    def hidden(
        self,
        tokens: torch.Tensor,
        start_pos: int | Sequence[int] | torch.Tensor = 0,
        cache: Optional[KVCache] = None,
        *,
        positions: Optional[torch.Tensor] = None,
        mask: Optional[torch.Tensor] = None,
    ) -> torch.Tensor:
        """`forward` up to the last norm: (B, T, dim), for projecting only the rows one needs."""
        B, T = tokens.shape[:2]
        if not B * T:
            raise ValueError(f"tokens of shape {tuple(tokens.shape)}: (B, T), at least one of each")
        starts = _one_per_row(start_pos, B)
        if cache is not None:
            cache.extend(starts, T)
        elif any(starts):
            raise ValueError(f"start_pos {start_pos} needs a cache that holds what comes before")
        alike = len(set(starts)) == 1
        first = torch.tensor(starts[:1] if alike else starts, device=tokens.device)
        places = first[:, None] + torch.arange(T, device=tokens.device)  # (1 or B, T)
        turns = places if positions is None else positions.view(-1, T)

        h = tokens if tokens.is_floating_point() else self.tok_embeddings(tokens)
        self.freqs = self.freqs.to(h.device)
        angles = turns[..., None, None].float() * self.freqs  # (1 or B, T, 1, head_dim / 2)
        freqs_cis = torch.polar(torch.ones_like(angles), angles)

        S = max(starts) + T
        mask = None if mask is None else _checked(mask, B, T, S)
        step = Step(places, freqs_cis, self.attention_bias(mask, places, S, h.dtype), cache)
        for layer in self.layers:
            h = layer(h, step)
        return self.norm(h)

    def attention_bias(
        self, mask: Optional[torch.Tensor], places: torch.Tensor, S: int, dtype: torch.dtype
    ) -> Optional[torch.Tensor]:
        """What is added to the scores of a pass: 0 or -inf, (1 or B, 1, T, S); None: plain causal.

        One rule hides the future, the padding and what a row has forgotten: a query sees the keys
        whose position is not beyond its own. None leaves it to the attention kernel: causal from
        position 0 on, or one token that sees everything.
        """
        alike, T = len(places) == 1, places.shape[1]
        if mask is not None:
            hidden = ~mask
        elif S == T or (alike and T == 1):
            return None
        else:
            hidden = torch.arange(S, device=places.device) > places[:, None, :, None]
        return torch.zeros_like(hidden, dtype=dtype).masked_fill_(hidden, -math.inf)

    def logits(self, h: torch.Tensor) -> torch.Tensor:
        """Project hidden states (..., dim) to the vocabulary: (..., vocab_size), fp32."""
        return self.output(h)[..., : self.vocab_size].float()


def _checked(mask: torch.Tensor, B: int, T: int, S: int) -> torch.Tensor:
    """A caller's mask as (1 or B, 1, T, S)."""
    shapes = [(T, S), (1, 1, T, S), (B, 1, T, S)]
    if mask.dtype != torch.bool or mask.shape not in shapes:
        raise ValueError(
            f"a mask of {mask.dtype} {tuple(mask.shape)}: bool, of shape {shapes[0]} or "
            f"{shapes[2]}, True where a token sees a key"
        )
    if not mask.any(-1).all():
        raise ValueError("the mask has a token that sees nothing: let it see itself")
    return mask.view(-1, 1, T, S)


def _one_per_row(start_pos: int | Sequence[int] | torch.Tensor, rows: int) -> List[int]:
    if isinstance(start_pos, torch.Tensor):
        start_pos = start_pos.tolist()
    starts = [start_pos] * rows if isinstance(start_pos, int) else list(start_pos)
    if len(starts) != rows or min(starts) < 0:
        raise ValueError(f"start_pos {start_pos}: one position >= 0 for each of {rows} rows")
    return starts
