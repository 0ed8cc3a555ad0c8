"""The Llama network in flax.nnx: `llama/model.py` for JAX, from the same checkpoints and back.

    model = llama.backends.flax.from_checkpoint("checkpoints/SmolLM2-135M-Instruct", dtype="bf16")
    logits = model(tokens)  # (B, T) ids -> (B, T, vocab_size), differentiable

Names and the layout of weights, (out, in), are Meta's: `llama.backends.flax` reads and writes
them bit for bit. `flax_generation.py` generates with it. Needs JAX and Flax.

On several devices no code changes: weights and cache are placed on a mesh with the axes "data"
(rows of a batch) and "model" (heads, features, words: what `parallel.SHARD_AXIS` splits), and XLA
adds the communication (GSPMD, arXiv 2105.04663).

Shapes: B rows, T new tokens, S positions that attention sees (of the cache, or T without one).
"""

import math
from dataclasses import dataclass
from typing import Dict, List, NamedTuple, Optional, Tuple

from llama.layers import parallel
from llama.model import ModelArgs, rope_frequencies

try:
    import jax
    import jax.numpy as jnp
    import numpy as np
    from flax import nnx
    from jax.sharding import Mesh, NamedSharding, PartitionSpec
except ImportError as error:
    raise ImportError("this needs JAX and Flax: pip install 'llama-reference[jax]'") from error


@jax.tree_util.register_dataclass
@dataclass
class KVCache:
    """Keys and values of each layer: n_layers of (B, max_len, n_kv_heads, head_dim).

    Where a row's next tokens go is the caller's to know (`start_pos`). A token sees the positions
    up to its own, so what lies behind them, padding among it, is never seen until overwritten.
    """

    k: List[jax.Array]
    v: List[jax.Array]

    @property
    def max_len(self) -> int:
        return self.k[0].shape[1]

    def update(
        self, layer_id: int, places: jax.Array, k: jax.Array, v: jax.Array
    ) -> Tuple[jax.Array, jax.Array]:
        """Store new keys and values (B, T, n_kv_heads, head_dim) at `places`, (1 or B, T).

        Returns:
            All that the layer has: (B, max_len, n_kv_heads, head_dim).
        """
        rows = jnp.arange(len(k))[:, None]
        self.k[layer_id] = self.k[layer_id].at[rows, places].set(k)
        self.v[layer_id] = self.v[layer_id].at[rows, places].set(v)
        return self.k[layer_id], self.v[layer_id]


class Context(NamedTuple):
    """What one pass gives to every layer."""

    places: jax.Array  # (1 or B, T): positions of the tokens
    freqs_cis: jax.Array  # (1 or B, T, 1, head_dim / 2), see apply_rotary_emb
    mask: jax.Array  # (1 or B, 1, T, S): True where a token sees a key
    cache: Optional[KVCache]


class Linear(nnx.Module):
    """x · weightᵀ, without a bias."""

    def __init__(self, in_features: int, out_features: int, dtype: jnp.dtype):
        self.weight = nnx.Param(jax.ShapeDtypeStruct((out_features, in_features), dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        # In these two forms, and no other that we tried, XLA multiplies bf16 on a CPU without
        # making the weight fp32 first, which takes 15 times as long.
        weight = self.weight[...]
        if x.size == x.shape[-1]:
            return (x.reshape(-1) @ weight.T).reshape(*x.shape[:-1], -1)
        sums = jnp.einsum("...i,oi->...o", x, weight, preferred_element_type=jnp.float32)
        return sums.astype(x.dtype)


class RMSNorm(nnx.Module):
    """y = x / sqrt(mean(x²) + eps) · weight, the norm in fp32. arXiv 1910.07467."""

    def __init__(self, dim: int, eps: float, dtype: jnp.dtype):
        self.eps = eps
        self.weight = nnx.Param(jax.ShapeDtypeStruct((dim,), dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        x32 = x.astype(jnp.float32)
        normed = x32 * jax.lax.rsqrt(jnp.mean(x32**2, -1, keepdims=True) + self.eps)
        return normed.astype(x.dtype) * self.weight[...]


def apply_rotary_emb(x: jax.Array, freqs_cis: jax.Array) -> jax.Array:
    """Turn each pair of dimensions (x0, x1), read as x0 + i·x1, by its position's angle, in fp32.

    x: (B, T, n_heads, head_dim); freqs_cis = e^(i·angle): (1 or B, T, 1, head_dim / 2).
    """
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
    turned = jax.lax.complex(pairs[..., 0], pairs[..., 1]) * freqs_cis
    return jnp.stack([turned.real, turned.imag], -1).reshape(x.shape).astype(x.dtype)


class Attention(nnx.Module):
    """Grouped-query attention: n_heads queries share n_kv_heads keys and values (2305.13245)."""

    def __init__(self, layer_id: int, args: ModelArgs, dtype: jnp.dtype):
        self.layer_id = layer_id
        self.head_dim = args.head_dim
        self.wq = Linear(args.dim, args.n_heads * args.head_dim, dtype)
        self.wk = Linear(args.dim, args.n_kv_heads * args.head_dim, dtype)
        self.wv = Linear(args.dim, args.n_kv_heads * args.head_dim, dtype)
        self.wo = Linear(args.n_heads * args.head_dim, args.dim, dtype)

    def __call__(self, x: jax.Array, context: Context) -> jax.Array:
        B, T, _ = x.shape
        places, freqs_cis, mask, cache = context
        xq = apply_rotary_emb(self.wq(x).reshape(B, T, -1, self.head_dim), freqs_cis)
        xk = apply_rotary_emb(self.wk(x).reshape(B, T, -1, self.head_dim), freqs_cis)
        xv = self.wv(x).reshape(B, T, -1, self.head_dim)
        if cache is not None:
            xk, xv = cache.update(self.layer_id, places, xk, xv)
        # softmax(q kᵀ / sqrt(head_dim)) v, the softmax in fp32
        out = jax.nn.dot_product_attention(xq, xk, xv, mask=mask)
        return self.wo(out.reshape(B, T, -1))


class FeedForward(nnx.Module):
    """SwiGLU: w2(silu(w1 x) · w3 x). arXiv 2002.05202."""

    def __init__(self, dim: int, hidden_dim: int, dtype: jnp.dtype):
        self.w1 = Linear(dim, hidden_dim, dtype)
        self.w2 = Linear(hidden_dim, dim, dtype)
        self.w3 = Linear(dim, hidden_dim, dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.w2(jax.nn.silu(self.w1(x)) * self.w3(x))


class TransformerBlock(nnx.Module):
    def __init__(self, layer_id: int, args: ModelArgs, dtype: jnp.dtype):
        self.attention = Attention(layer_id, args, dtype)
        self.feed_forward = FeedForward(args.dim, args.hidden_dim, dtype)
        self.attention_norm = RMSNorm(args.dim, args.norm_eps, dtype)
        self.ffn_norm = RMSNorm(args.dim, args.norm_eps, dtype)

    def __call__(self, x: jax.Array, context: Context) -> jax.Array:
        h = x + self.attention(self.attention_norm(x), context)
        return h + self.feed_forward(self.ffn_norm(h))


class Transformer(nnx.Module):
    """The whole network. Weights are shapes without values, until a checkpoint is loaded."""

    def __init__(self, params: ModelArgs, dtype: jnp.dtype = jnp.float32):
        self.params = params
        self.tok_embeddings = Linear(params.dim, params.vocab_size, dtype)
        self.layers = nnx.List(TransformerBlock(i, params, dtype) for i in range(params.n_layers))
        self.norm = RMSNorm(params.dim, params.norm_eps, dtype)
        if not params.tied_embeddings:
            self.output = Linear(params.dim, params.vocab_size, dtype)

    @property
    def dtype(self) -> jnp.dtype:
        """What it computes in: that of the norms, which some files keep wider than the matrices."""
        kind = self.norm.weight.dtype
        no_fp16 = kind == jnp.float16 and jax.default_backend() == "cpu"  # XLA has none there
        return jnp.dtype(jnp.float32) if no_fp16 else kind

    def new_cache(self, rows: int, max_len: Optional[int] = None) -> KVCache:
        """An empty cache, of max_seq_len positions by default, on the mesh that the model is on."""
        args, where = self.params, placed_on(mesh_of(self), "data", None, "model", None)
        shape = (rows, max_len or args.max_seq_len, args.n_kv_heads, args.head_dim)
        k, v = (
            [jnp.zeros(shape, self.dtype, device=where) for _ in range(args.n_layers)]
            for _ in range(2)
        )
        return KVCache(k, v)

    def __call__(
        self, tokens: jax.Array, start_pos: int | jax.Array = 0, cache: Optional[KVCache] = None
    ) -> jax.Array:
        """Logits of every given token: (B, T) ids -> (B, T, vocab_size), fp32.

        Without a cache a plain differentiable causal forward. With one, the tokens stand at
        positions start_pos, start_pos + 1, ... (an int, or one per row), see what the cache holds
        before them, and are added to it in place: under `jax.jit`, return it. Rows of different
        lengths are padded on the right. An id outside of the vocabulary gives NaN, since compiled
        code can't raise.

        Raises:
            ValueError: positions that the cache has no room for, or that begin beyond 0 without a
                cache. A start_pos that is traced can't be looked at: its caller does that.
        """
        return self.logits(self.hidden(tokens, start_pos, cache))

    def hidden(
        self, tokens: jax.Array, start_pos: int | jax.Array = 0, cache: Optional[KVCache] = None
    ) -> jax.Array:
        """`__call__` up to the last norm: (B, T, dim), for projecting only the rows one needs."""
        T = tokens.shape[1]
        room = T if cache is None else cache.max_len
        if not isinstance(start_pos, jax.core.Tracer):
            first, last = int(np.min(start_pos)), int(np.max(start_pos))
            if first < 0 or last + T > room:
                raise ValueError(
                    f"start_pos {start_pos} with {T} tokens: positions 0 to {room - 1} are there, "
                    "pass a (longer) cache"
                )
        places = jnp.reshape(jnp.asarray(start_pos), (-1, 1)) + jnp.arange(T)  # (1 or B, T)
        freqs = jnp.asarray(rope_frequencies(self.params).numpy())
        freqs_cis = jnp.exp(1j * (places[..., None, None] * freqs))
        mask = jnp.arange(room) <= places[:, None, :, None]  # (1 or B, 1, T, S)

        h = jnp.take(self.tok_embeddings.weight[...], tokens, axis=0).astype(self.dtype)
        for layer in self.layers:
            h = layer(h, Context(places, freqs_cis, mask, cache))
        return self.norm(h)

    def logits(self, h: jax.Array) -> jax.Array:
        """Project hidden states (..., dim) to the vocabulary: (..., vocab_size), fp32."""
        output = self.tok_embeddings if self.params.tied_embeddings else self.output
        return output(h).astype(jnp.float32)


def weights(model: Transformer) -> Dict[str, nnx.Param]:
    """The model's parameters by Meta's names; `weights(model)[name][...]` is an array."""
    nodes = nnx.iter_graph(model)
    return {".".join(map(str, path)): node for path, node in nodes if isinstance(node, nnx.Param)}


def make_mesh(data: int, model: int) -> Mesh:
    """The first data · model devices: batches in `data` parts, the model's weights in `model`."""
    if data * model > jax.device_count():
        raise ValueError(
            f"a mesh of {data} x {model} devices, and JAX sees {jax.device_count()}: use fewer"
        )
    return Mesh(np.array(jax.devices()[: data * model]).reshape(data, model), ("data", "model"))


def partition_spec(name: str) -> PartitionSpec:
    """How a weight (Meta's name) lies on a mesh: `parallel.SHARD_AXIS` over "model", else whole."""
    axis = parallel.shard_axis(name)
    return PartitionSpec() if axis is None else PartitionSpec(*[None] * axis, "model")


def shard(model: Transformer, mesh: Mesh) -> Transformer:
    """Place a model's weights on a mesh, in place; everything else follows from where they are.

    Raises:
        ValueError: axes of other names, or devices that can't share the model evenly.
    """
    check_mesh(mesh, model.params)
    for name, param in weights(model).items():
        param.set_value(jax.device_put(param[...], placed_on(mesh, *partition_spec(name))))
    return model


def check_mesh(mesh: Optional[Mesh], args: ModelArgs) -> None:
    if mesh is None:
        return
    if set(mesh.shape) != {"data", "model"}:
        raise ValueError(f'a mesh with the axes {mesh.axis_names}: they must be "data" and "model"')
    world = mesh.shape["model"]
    sizes = {n: getattr(args, n) for n in ("n_heads", "n_kv_heads", "hidden_dim", "vocab_size")}
    wrong = [f"{name}={size}" for name, size in sizes.items() if size % world]
    if wrong:
        raise ValueError(
            f"{world} devices on the mesh's axis \"model\" can't share {', '.join(wrong)} evenly: "
            f'use a divisor of {math.gcd(*sizes.values())}, and more on the axis "data"'
        )


def mesh_of(model: Transformer) -> Optional[Mesh]:
    """The mesh that a model's weights are on, or None."""
    return getattr(model.norm.weight[...].sharding, "mesh", None)


def placed_on(mesh: Optional[Mesh], *axes: Optional[str]) -> Optional[NamedSharding]:
    """An array whose axes are split over these axes of a mesh."""
    return None if mesh is None else NamedSharding(mesh, PartitionSpec(*axes))
