"""The Llama network, from token ids to logits.

A decoder-only transformer. Attention lets each token read from itself and the tokens before it;
the feed-forward network works on each token alone; both add to a residual stream `h`:

    h = tok_embeddings(tokens)
    for layer in layers:
        h = h + attention(attention_norm(h))
        h = h + feed_forward(ffn_norm(h))
    logits = output(norm(h))

Weights carry Meta's names: the checkpoint is the specification. The class of a linear layer says
how its weight is sharded over the ranks of a tensor-parallel group (one rank holds it whole):

    ColumnParallelLinear    each rank computes some of the outputs     (wq, wk, wv, w1, w3, output)
    RowParallelLinear       each rank reads some of the inputs, and
                            an all-reduce sums the ranks' outputs      (wo, w2)
    VocabParallelEmbedding  each rank holds the rows of some token ids

Shapes: B rows (the sequences of a batch), T new tokens of each, S keys: those cached and the new.
Papers: Llama, arXiv 2302.13971; Llama 2 (grouped-query attention), 2307.09288; Llama 3, 2407.21783.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, Callable, List, NamedTuple, Optional, Sequence, Type

import torch
import torch.nn.functional as F
from fairscale.nn.model_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
)
from torch import nn

from llama.layers import parallel
from llama.layers.cache import KVCache, ungrouped
from llama.layers.ids import check_token_tensor


@dataclass(frozen=True)
class ModelArgs:
    """The shape of a model. Names and defaults are those of Meta's params.json.

    Raises:
        ValueError: a number of heads that isn't a multiple of n_kv_heads, or doesn't divide dim.
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
    # Llama 3.1 and later slow RoPE down, for contexts longer than that of pre-training.
    use_scaled_rope: bool = False
    rope_scaling_factor: float = 8.0  # 3.1: 8; 3.2 1B and 3B: 32
    rope_low_freq_factor: float = 1.0
    rope_high_freq_factor: float = 4.0
    rope_original_max_seq_len: int = 8192
    rope_linear_factor: float = 1.0  # positions divided by this (arXiv 2306.15595); not Meta's
    # Not in params.json. None: derived from the fields above, as Meta's code does.
    head_dim: int = None  # type: ignore[assignment]
    hidden_dim: int = None  # type: ignore[assignment]
    tied_embeddings: bool = False  # the output layer shares the embedding's weight

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
        hidden = int(2 * 4 * self.dim / 3)  # 3 matrices of it have as many weights as 2 of 4 · dim
        if self.ffn_dim_multiplier is not None:
            hidden = int(self.ffn_dim_multiplier * hidden)
        derive("hidden_dim", self.multiple_of * -(-hidden // self.multiple_of))


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x²) + eps) · weight, normalized in fp32. arXiv 1910.07467."""
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
    """RoPE's angular frequencies, in radians per position: (head_dim / 2,), fp32.

    Pair i of a head's dimensions rotates by theta^(-2i / head_dim) (RoFormer, arXiv 2104.09864).
    Llama 3.1 slows down the pairs with long wavelengths: above original_max_seq_len /
    low_freq_factor by scaling_factor, below original_max_seq_len / high_freq_factor not at all, in
    between by a blend that is linear in 1 / wavelength (Meta's llama-models, `apply_scaling`).
    """
    exponents = torch.arange(0, args.head_dim, 2).float() / args.head_dim
    freqs = 1.0 / args.rope_theta**exponents / args.rope_linear_factor
    if not args.use_scaled_rope:
        return freqs
    low, high = args.rope_low_freq_factor, args.rope_high_freq_factor
    wavelen = 2 * math.pi / freqs
    blend = (args.rope_original_max_seq_len / wavelen - low) / (high - low)
    blend = blend.clamp(0, 1)
    return (1 - blend) * (freqs / args.rope_scaling_factor) + blend * freqs


def apply_rotary_emb(x: torch.Tensor, freqs_cis: torch.Tensor) -> torch.Tensor:
    """RoPE: rotate each pair (x0, x1), as the complex number x0 + i·x1, by its angle, in fp32.

    x: (B, T, n_heads, head_dim); freqs_cis = e^(i·angle): (1 or B, T, 1, head_dim / 2). The dot
    product of a rotated query and a rotated key depends on the distance between them alone.
    """
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * freqs_cis).flatten(-2).type_as(x)


# The identity as init_method: fairscale's default fills weights with noise before they are loaded.
_Column = partial(ColumnParallelLinear, bias=False, gather_output=False, init_method=lambda w: w)
_Row = partial(RowParallelLinear, bias=False, input_is_parallel=True, init_method=lambda w: w)
_Embedding = partial(VocabParallelEmbedding, init_method=lambda w: w)


class Step(NamedTuple):
    """One forward pass: what all layers share. A leading 1 stands for all rows alike."""

    positions: torch.Tensor  # (1 or B, T), of the tokens in their rows
    freqs_cis: torch.Tensor  # (1 or B, T, 1, head_dim / 2), RoPE's rotations
    mask: Optional[torch.Tensor]  # (1 or B, 1, T, S), added to the scores; None: plain causal
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

        kv_dim = self.n_local_kv_heads * world * args.head_dim  # some twice if world > n_kv_heads
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
        """softmax(q kᵀ / sqrt(head_dim) + mask) v, over the cached keys and values and the new.

        xq, xk, xv: (B, T, heads, head_dim), rotated. Returns (B, T, n_local_heads · head_dim).
        """
        B, T, _, _ = xq.shape
        if step.cache is None:
            keys, values = xk.transpose(1, 2), xv.transpose(1, 2)
        else:
            keys, values = step.cache.update(self.layer_id, step.positions, xk, xv)
        # keys, values: (B, n_local_kv_heads, S, head_dim)

        if T == 1:
            # One token sees all keys: its queries that share a key/value head form one matrix.
            xq = xq.view(B, self.n_local_kv_heads, -1, self.head_dim)
            out = F.scaled_dot_product_attention(xq, keys, values, attn_mask=step.mask)
        else:
            if step.mask is not None:
                keys, values = (ungrouped(part, self.n_local_heads) for part in (keys, values))
            out = F.scaled_dot_product_attention(
                xq.transpose(1, 2),  # (B, n_local_heads, T, head_dim)
                keys,
                values,
                attn_mask=step.mask,
                is_causal=step.mask is None,
                enable_gqa=keys.shape[1] != self.n_local_heads,
            ).transpose(1, 2)
        return out.reshape(B, T, -1)


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) · w3 x), computed for each token on its own. arXiv 2002.05202."""

    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        hidden_dim = parallel.padded(hidden_dim, parallel.world_size())  # with zeros, which add 0
        self.w1 = _Column(dim, hidden_dim)
        self.w2 = _Row(hidden_dim, dim)
        self.w3 = _Column(dim, hidden_dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class TransformerBlock(nn.Module):
    """One layer: attention and feed-forward, each on normalized input (pre-norm), each added."""

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
    """The whole network. Weights are uninitialized: `checkpoint.load` fills them.

    device and dtype are those of the weights; on "meta" they take no memory until loaded.

    Raises:
        ValueError: the number of ranks doesn't divide the number of heads.
    """

    # What other families of networks replace, `llama.families`:
    block: Callable[[int, Any], nn.Module] = TransformerBlock
    frequencies = staticmethod(rope_frequencies)
    takes_positions = True  # other than those of a row, for sequences packed into one

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
        self.params, self.vocab_size, self.n_layers = params, params.vocab_size, params.n_layers

        def place(module):  # at once: fairscale allocates on the CPU, in fp32
            return module.to(device=device, dtype=dtype)

        padded_vocab = parallel.padded(params.vocab_size, world)
        self.tok_embeddings = place(_Embedding(padded_vocab, params.dim))
        layers = (place(self.block(i, params)) for i in range(params.n_layers))
        self.layers = nn.ModuleList(layers)
        self.norm = place(RMSNorm(params.dim, eps=params.norm_eps))
        self.output = place(_Column(params.dim, padded_vocab, gather_output=True))
        if params.tied_embeddings:
            self.output.weight = self.tok_embeddings.weight
        self.freqs = self.frequencies(params)  # no buffer, or model.to(bfloat16) would round it

    def new_cache(
        self, rows: int, max_len: Optional[int] = None, cache_type: Type[KVCache] = KVCache
    ) -> KVCache:
        """An empty cache for this rank's key/value heads; max_len defaults to max_seq_len."""
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
        """Logits of the token after each one: (B, T) ids -> (B, T, vocab_size), fp32.

        Without a cache: a causal, differentiable forward. With one: the tokens continue what it
        holds, from position start_pos on (an int, or one per row), and are stored in it. Rows of
        unequal lengths are padded on the right, where no token of the row attends to the padding;
        `cache.truncate` to the true lengths drops it afterwards.

        Args:
            tokens: ids, or embeddings (B, T, dim) in their place, for soft prompts.
            positions: RoPE's, (T,) or (B, T), by default start_pos, start_pos + 1, ...; sequences
                packed into one row each begin at 0.
            mask: True where a token attends to a key, (T, S) or (B, 1, T, S). By default it attends
                to itself and to all before it.

        Raises:
            ValueError: ids outside of the vocabulary; positions beyond the cache's max_len, or with
                a gap before them; a mask of another shape, with a token that attends to nothing, or
                for a backend that takes none.
        """
        if not tokens.is_floating_point():
            check_token_tensor(tokens, self.vocab_size)
        return self.logits(self.hidden(tokens, start_pos, cache, positions=positions, mask=mask))

    def hidden(
        self,
        tokens: torch.Tensor,
        start_pos: int | Sequence[int] | torch.Tensor = 0,
        cache: Optional[KVCache] = None,
        *,
        positions: Optional[torch.Tensor] = None,
        mask: Optional[torch.Tensor] = None,
    ) -> torch.Tensor:
        """`forward` without the output layer: (B, T, dim). `logits` projects those one needs."""
        B, T = tokens.shape[:2]
        if not B * T:
            raise ValueError(f"tokens of shape {tuple(tokens.shape)}: (B, T), at least one of each")
        starts = _one_per_row(start_pos, B)
        if cache is not None:
            cache.extend(starts, T)
        elif any(starts):
            raise ValueError(f"start_pos {start_pos} needs a cache that holds what comes before")
        alike = len(set(starts)) == 1
        first = starts[0] if alike else torch.tensor(starts, device=tokens.device)[:, None]
        places = first + torch.arange(T, device=tokens.device).view(1, T)  # (1 or B, T)
        turns = places if positions is None else positions.view(-1, T)

        h = tokens if tokens.is_floating_point() else self.tok_embeddings(tokens)
        self.freqs = self.freqs.to(h.device)
        angles = turns[..., None, None].float() * self.freqs  # (1 or B, T, 1, head_dim / 2)
        freqs_cis = torch.polar(torch.ones_like(angles), angles)

        S = max(starts) + T
        mask = None if mask is None else _checked(mask, B, T, S)
        step = Step(places, freqs_cis, self.attention_bias(mask, places, S, h.dtype), cache)
        return self.norm(self.run_layers(h, step))

    def run_layers(self, h: torch.Tensor, step: Step) -> torch.Tensor:
        for layer in self.layers:
            h = layer(h, step)
        return h

    def attention_bias(
        self, mask: Optional[torch.Tensor], places: torch.Tensor, S: int, dtype: torch.dtype
    ) -> Optional[torch.Tensor]:
        """What is added to the attention scores: 0 or -inf, (1 or B, 1, T, S).

        One rule masks the future, padding and truncated entries: a query attends to the keys at
        positions up to its own. None needs no mask: plain causal attention from position 0 on, or
        one token that attends to every key.
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
    """The caller's mask as (1 or B, 1, T, S)."""
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
