"""Layers of a Transformer that compute through the CPU's kernels, to put in place of its own.

Same weights, same cache, same meaning; `model.py` calls them as it calls its own. Steps of few
tokens go through the kernels whole. For many tokens the matrix products are oneDNN's (by way of
aten), which are bound by arithmetic, and the kernels do what stands between them.
"""

import threading
from ctypes import byref, c_float
from typing import Any, Dict, List, Optional, Tuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from fairscale.nn.model_parallel.initialize import get_model_parallel_group
from fairscale.nn.model_parallel.mappings import gather_from_model_parallel_region
from torch import nn

from llama.backends.cpu import kernels
from llama.backends.cpu.kernels import ADD, ATTENTION, FEED_FORWARD, address
from llama.backends.quantized import Blocks, QuantizedEmbedding, QuantizedLinear
from llama.layers import parallel
from llama.layers.cache import Int8KVCache
from llama.model import ModelArgs, RMSNorm, Step, Transformer, TransformerBlock

# Up to so many tokens the kernels' products are faster than aten's (measured: 96 tokens of bf16 in
# 43 ms and 51 ms, 48 of 4 bits in 44 ms and 45 ms).
FEW, FEW_OF_BLOCKS = 96, 40
CHUNK = 512  # keys that are summed up on their own; as in kernels.cpp
MAX_HEAD, MAX_GROUP = 256, 64  # and these
WIDTH = 32  # what the kernels' widths must be multiples of

DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16"}


def check(args: ModelArgs, device: torch.device, dtype: torch.dtype) -> None:
    """See to it that `swap` will do, kernels compiled, before a model is loaded for it.

    Raises:
        ValueError: a device, dtype or shape that the kernels aren't made for; no compiler.
    """
    for what, value, known in (
        ("device", device.type, ("cpu",)),
        ("dtype", dtype, tuple(DTYPES)),
    ):
        if value not in known:
            choices = " or ".join(map(str, known))
            raise ValueError(f"compile=True is for {what} {choices}, and not for {value}")
    world = parallel.world_size()
    widths = {
        "dim": args.dim,
        "head_dim": args.head_dim,
        "the heads of a rank": args.n_heads // world * args.head_dim,
        "hidden_dim of a rank": parallel.padded(args.hidden_dim, world) // world,
    }
    for name, width in widths.items():
        if width % WIDTH:
            raise ValueError(
                f"compile=True takes widths that are multiples of {WIDTH}, and {name} is {width}: "
                "build with compile=False, or on another number of ranks"
            )
    sizes = {"head_dim": (args.head_dim, MAX_HEAD)}
    sizes["n_heads / n_kv_heads"] = (args.n_heads // args.n_kv_heads, MAX_GROUP)
    for name, (size, most) in sizes.items():
        if size > most:
            raise ValueError(
                f"compile=True takes a {name} of at most {most}, and this is {size}: "
                "build with compile=False"
            )
    kernels.library()


def swap(model: Transformer) -> Transformer:
    """Put the kernels' layers in place of a loaded model's own. It is for inference from then on.

    Raises:
        ValueError: what `check` raises.
    """
    args, world, weight = model.params, parallel.world_size(), model.norm.weight
    check(args, weight.device, weight.dtype)
    model.requires_grad_(False)
    work = Workspace()
    layers = NativeLayers(list(model.layers), args, work)  # type: ignore[arg-type]
    model.layers = nn.ModuleList([layers])
    if world == 1:
        model.tok_embeddings = NativeEmbedding(model.tok_embeddings)  # type: ignore[assignment]
    model.norm = NativeNorm(model.norm)  # type: ignore[assignment]
    model.output = NativeOutput(model.output, work)
    model.__class__ = NativeTransformer
    return model


class NativeTransformer(Transformer):
    """A Transformer whose layers are the kernels', which need no mask and take none."""

    @property
    def exact_tokens(self) -> int:
        """Up to so many tokens in a pass, each one's result is bit-identical to that alone."""
        return self.layers[0].few_tokens  # type: ignore[return-value]

    def attention_bias(
        self, mask: Optional[torch.Tensor], places: torch.Tensor, S: int, dtype: torch.dtype
    ) -> Optional[torch.Tensor]:
        if mask is not None:
            raise ValueError("compiled layers take no mask of your own: build with compile=False")
        return None


class Workspace:
    """Memory that all layers share for what lives within one of them."""

    def __init__(self) -> None:
        self._buffers: Dict[str, torch.Tensor] = {}
        self.lock = threading.Lock()  # threads may share a model, but not this

    def take(self, name: str, n: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """n values, whose content is anything."""
        found = self._buffers.get(name)
        if found is None or found.numel() < n or found.dtype != dtype:
            self._buffers[name] = found = torch.empty(n, dtype=dtype)
        return found[:n]


class Matrix:
    """A linear layer's weight (rows, cols): as the kernels read it, and dense for aten."""

    def __init__(self, linear: nn.Module, work: Workspace):
        self._work = work
        self._weight: torch.Tensor | Blocks
        if isinstance(linear, QuantizedLinear):
            self._weight = linear.blocks
            data, kind = linear.blocks.data, linear.blocks.kind
        else:
            self._weight = data = linear.weight  # type: ignore[assignment]
            kind = DTYPES[data.dtype]
        self.rows, self.cols = self._weight.shape
        self.few = FEW if isinstance(self._weight, torch.Tensor) else FEW_OF_BLOCKS
        if not data.is_contiguous():
            raise AssertionError("a weight that doesn't lie row by row")
        self.struct = kernels.Weight(data.data_ptr(), kernels.KINDS[kind], self.rows, self.cols)

    def times(self, x: torch.Tensor) -> torch.Tensor:
        """(..., cols) -> (..., rows), by aten."""
        if isinstance(self._weight, torch.Tensor):
            return F.linear(x, self._weight)
        dense = self._work.take("dense", self.rows * self.cols, x.dtype)
        kernels.library().dequantize(
            x.dtype == torch.bfloat16, byref(self.struct), address(dense), torch.get_num_threads()
        )
        return F.linear(x, dense.view(self.rows, self.cols))


class NativeEmbedding(nn.Module):
    """The embedding, on one rank."""

    def __init__(self, embedding: nn.Module):
        super().__init__()
        self.embedding = embedding  # owns the weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        if not isinstance(self.embedding, QuantizedEmbedding):
            return F.embedding(tokens, self.embedding.weight)  # type: ignore[arg-type]
        blocks, dtype = self.embedding.blocks, self.embedding.dtype
        found = Blocks(blocks.data.index_select(0, tokens.flatten()), blocks.kind)
        out = torch.empty(*tokens.shape, blocks.shape[1], dtype=dtype)
        weight = kernels.Weight(found.data.data_ptr(), kernels.KINDS[found.kind], *found.shape)
        threads = min(torch.get_num_threads(), len(found.data))
        kernels.library().dequantize(dtype == torch.bfloat16, byref(weight), address(out), threads)
        return out


class NativeNorm(nn.Module):
    """RMSNorm in one pass."""

    def __init__(self, norm: RMSNorm):
        super().__init__()
        self.eps, self.weight = norm.eps, norm.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x, dim = x.contiguous(), x.shape[-1]
        out = torch.empty_like(x)
        kernels.library().norm(
            x.dtype == torch.bfloat16, address(x), address(self.weight), address(out),
            x.numel() // dim, dim, c_float(self.eps), torch.get_num_threads(),
        )  # fmt: skip
        return out


class NativeOutput(nn.Module):
    """The projection to the vocabulary; for few rows in fp32, whatever the model's dtype."""

    def __init__(self, linear: nn.Module, work: Workspace):
        super().__init__()
        self.linear = linear  # owns the weight
        self._matrix, self._work = Matrix(linear, work), work

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with self._work.lock:
            return self._forward(x)

    def _forward(self, x: torch.Tensor) -> torch.Tensor:
        matrix, tokens = self._matrix, x.numel() // x.shape[-1]
        if tokens > matrix.few:
            return gather_from_model_parallel_region(matrix.times(x))
        x = x.contiguous()
        out = torch.empty(*x.shape[:-1], matrix.rows)
        kernels.library().linear(
            x.dtype == torch.bfloat16, byref(matrix.struct), address(x), tokens, address(out),
            address(self._work.take("x", tokens * matrix.cols)), torch.get_num_threads(),
        )  # fmt: skip
        return out if parallel.world_size() == 1 else gather_from_model_parallel_region(out)


class NativeLayers(nn.Module):
    """All blocks of a Transformer.

    Attributes:
        few_tokens: up to so many in a pass, each token's output is the same to the bit whatever
            the others are.
    """

    def __init__(self, blocks: List[TransformerBlock], args: ModelArgs, work: Workspace):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)  # own the weights
        self._work = work
        self._norms = [
            (NativeNorm(block.attention_norm), NativeNorm(block.ffn_norm)) for block in blocks
        ]
        self._matrices: List[Dict[str, Matrix]] = []
        for block in blocks:
            linears = {
                **dict(block.attention.named_children()),
                **dict(block.feed_forward.named_children()),
            }
            self._matrices.append({name: Matrix(linears[name], work) for name in kernels.MATRICES})
        self.few_tokens = min(m.few for matrices in self._matrices for m in matrices.values())
        attention = blocks[0].attention
        self._heads = attention.n_local_heads, attention.n_local_kv_heads, attention.head_dim
        self._dim, self._hidden_dim = args.dim, self._matrices[0]["w1"].rows
        self._scratch_for: Tuple[Any, Any, Dict[str, torch.Tensor]] = (None, None, {})
        self._shape = kernels.Shape(args.dim, *self._heads, self._hidden_dim, args.norm_eps)
        self._layers = (kernels.Layer * len(blocks))(
            *(
                kernels.Layer(
                    block.attention_norm.weight.data_ptr(),
                    block.ffn_norm.weight.data_ptr(),
                    *(matrix.struct for matrix in matrices.values()),
                )
                for block, matrices in zip(blocks, self._matrices, strict=True)
            )
        )

    def forward(self, x: torch.Tensor, step: Step) -> torch.Tensor:
        """What the blocks do, one after the other: a query sees the keys up to its own position.

        Raises:
            ValueError: a cache of another dtype.
        """
        with self._work.lock:
            return self._forward(x, step)

    def _forward(self, x: torch.Tensor, step: Step) -> torch.Tensor:
        positions, freqs_cis, _, cache = step
        B, T, _ = x.shape
        _, kv_heads, head_dim = self._heads
        k_scale = v_scale = 0
        if cache is None:  # each layer's keys and values, for itself
            kv = self._work.take("kv", 2 * B * kv_heads * T * head_dim, x.dtype)
            k, v = kv.view(2, 1, B, kv_heads, T, head_dim).expand(-1, len(self.blocks), *[-1] * 4)
        else:
            k, v = cache.k, cache.v
            if isinstance(cache, Int8KVCache):
                k_scale, v_scale = cache.k_scale.data_ptr(), cache.v_scale.data_ptr()
            elif k.dtype != x.dtype:
                raise ValueError(f"a cache of {k.dtype} for a model of {x.dtype}: use new_cache")
        strides = [k.stride(axis) // head_dim for axis in (0, 1, 2)]
        batch = kernels.Batch(
            B, T, len(positions) == 1, positions.data_ptr(), freqs_cis.data_ptr(),
            k.data_ptr(), v.data_ptr(), k_scale, v_scale, *strides,
        )  # fmt: skip
        x = x.clone(memory_format=torch.contiguous_format)
        if self.few_tokens < B * T:
            for layer in range(len(self.blocks)):
                x = self._many(x, layer, batch)
            return x
        longest = T if cache is None else max(cache.lengths)
        return self._few(x, batch, longest)

    def _scratch(self, M: int, chunks: int) -> kernels.Scratch:
        """Where a step of M tokens keeps what lives within a layer."""
        if self._scratch_for[0] == (M, chunks):
            return self._scratch_for[1]
        heads, kv_heads, head_dim = self._heads
        sizes = {
            "q": M * heads * head_dim,
            "k": M * kv_heads * head_dim,
            "v": M * kv_heads * head_dim,
            "gate": M * self._hidden_dim,
            "up": M * self._hidden_dim,
            "sum": M * self._dim,
            "partial": M * heads * chunks * (head_dim + 2),
            "rotated": M * heads * head_dim,
            "x": M * max(self._dim, heads * head_dim),
            "y": M * self._hidden_dim,
        }
        tensors = {name: torch.empty(n) for name, n in sizes.items()}
        scratch = kernels.Scratch(*(tensor.data_ptr() for tensor in tensors.values()))
        self._scratch_for = (M, chunks), scratch, tensors
        return scratch

    def _few(self, h: torch.Tensor, batch: kernels.Batch, longest: int) -> torch.Tensor:
        scratch = self._scratch(batch.rows * batch.tokens, -(-longest // CHUNK))
        total = self._scratch_for[2]["sum"]

        def step(first: int, count: int, parts: int) -> None:
            kernels.library().step(
                h.dtype == torch.bfloat16, byref(self._shape), self._layers, first, count,
                byref(batch), address(h), byref(scratch), parts, torch.get_num_threads(),
            )  # fmt: skip

        if parallel.world_size() == 1:
            step(0, len(self.blocks), ATTENTION | FEED_FORWARD | ADD)
            return h
        for layer in range(len(self.blocks)):
            for part in (ATTENTION, FEED_FORWARD):
                step(layer, 1, part)
                dist.all_reduce(total, group=get_model_parallel_group())
                h.add_(total.view(h.shape))
        return h

    def _many(self, h: torch.Tensor, layer: int, batch: kernels.Batch) -> torch.Tensor:
        library, is_bf16 = kernels.library(), h.dtype == torch.bfloat16
        threads = torch.get_num_threads()
        matrices, (attention_norm, ffn_norm) = self._matrices[layer], self._norms[layer]

        x = attention_norm(h)
        q, k, v = (matrices[name].times(x) for name in ("wq", "wk", "wv"))
        out = torch.empty_like(q)
        library.attention(
            is_bf16, byref(self._shape), byref(batch), layer, address(q), address(k), address(v),
            address(self._work.take("rotated", q.numel())), address(out), threads,
        )  # fmt: skip
        h += self._sum(matrices["wo"].times(out))

        x = ffn_norm(h)
        gate, up = matrices["w1"].times(x), matrices["w3"].times(x)
        library.swiglu(is_bf16, address(gate), address(up), address(gate), gate.numel(), threads)
        h += self._sum(matrices["w2"].times(gate))
        return h

    def _sum(self, x: torch.Tensor) -> torch.Tensor:
        """Over the ranks."""
        if parallel.world_size() > 1:
            dist.all_reduce(x, group=get_model_parallel_group())
        return x
