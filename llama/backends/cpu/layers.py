"""Replacements for a Transformer's layers that call the CPU kernels.

They have the same weights, cache and meaning as `model.py`'s. A token's result is the same to the
bit, whatever is computed with it: other rows, other tokens of its row, on any number of threads.
"""

from ctypes import byref, c_float
from itertools import accumulate
from typing import Any, List, Optional, Sequence, Tuple

import torch
import torch.distributed as dist
from fairscale.nn.model_parallel.initialize import get_model_parallel_group
from fairscale.nn.model_parallel.mappings import (
    gather_from_model_parallel_region,
    reduce_from_model_parallel_region,
)
from torch import nn

from llama.backends.cpu import kernels
from llama.backends.cpu.kernels import ADD, ATTENTION, FEED_FORWARD, address
from llama.backends.cpu.low_rank import NativeAdapters, PassAdapters
from llama.backends.cpu.networks import Mixture, attending, bias_of, check, linears_of, mixture_of
from llama.backends.cpu.packing import Arena, Packed, arena_for, weight_of
from llama.backends.cpu.workspace import Workspace
from llama.families.llama4 import Llama4Transformer
from llama.families.variants import VariantArgs, VariantTransformer
from llama.layers import parallel
from llama.layers.cache import Int8KVCache
from llama.layers.paged import PagedRows
from llama.model import ModelArgs, RMSNorm, Step, Transformer, TransformerBlock, rms_norm

TOKENS = 512  # computed together, which bounds the memory of activations
CHUNK = 512  # as in attention.h
MANY = 8  # tokens of a row whose queries share what they read of the cache


def swap(model: Transformer) -> Transformer:
    """Replace a loaded model's layers by those that call the kernels. For inference only.

    Raises:
        ValueError: what `check` raises.
    """
    args, weight = model.params, model.norm.weight
    check(args, weight.device, weight.dtype)
    model.requires_grad_(False)
    work = Workspace(weight.dtype)
    linears = [linear for block in model.layers for linear in linears_of(block)]  # type: ignore[arg-type]
    arena = arena_for([weight_of(linear) for linear in (*linears, model.output)])
    del linears  # each weight is freed once it is packed
    model.layers = nn.ModuleList([NativeLayers(model.layers, args, work, arena)])  # type: ignore[arg-type]
    swap_ends(model, work, arena)
    of_families = {VariantTransformer: NativeVariant, Llama4Transformer: NativeLlama4}
    model.__class__ = of_families.get(type(model), NativeTransformer)
    return model


def swap_ends(model: Transformer, work: Workspace, arena: Arena) -> None:
    """Replace what comes before and after the layers."""
    model.norm = NativeNorm(model.norm)  # type: ignore[assignment]
    output = arena.pack(weight_of(model.output))
    if model.params.tied_embeddings:
        model.tok_embeddings = NativeEmbedding(output, model.norm.weight.dtype)  # type: ignore[assignment]
    model.output = NativeOutput(output, work)  # type: ignore[assignment]


class NativeTransformer(Transformer):
    """A Transformer whose layers call the kernels, which are causal and take no mask."""

    def hidden_of_rows(self, new: Sequence[Sequence[int]], cache: PagedRows) -> torch.Tensor:
        """Like `hidden` for rows of any number of new tokens each, without padding.

        new: the token ids that continue each row of the cache.

        Returns:
            Hidden states of all tokens, row after row, (tokens, dim).
        """
        # The kernels take rows of few tokens first, and read an adapter once for neighbours.
        order = sorted(
            range(len(new)), key=lambda row: (len(new[row]) >= MANY, cache.adapters[row])
        )
        cache.extend_each([len(ids) for ids in new])
        sorted_already = order == [*range(len(new))]
        ordered = cache if sorted_already else cache.select(order)
        ids = torch.tensor([id for row in order for id in new[row]])
        starts = [n - c for n, c in zip(ordered.lengths, ordered.counts, strict=True)]
        ends = zip(starts, ordered.lengths, strict=True)
        places = torch.tensor([place for start, end in ends for place in range(start, end)])
        angles = places[None, :, None, None].float() * self.freqs
        freqs_cis = torch.polar(torch.ones_like(angles), angles)
        step = Step(places[None], freqs_cis, None, ordered)
        h = self.norm(self.run_layers(self.embed(ids[None]), step))[0]
        if sorted_already:
            return h
        parts = h.split(ordered.counts)
        back = sorted(range(len(order)), key=order.__getitem__)
        return torch.cat([parts[i] for i in back])

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.tok_embeddings(tokens)

    def attention_bias(
        self, mask: Optional[torch.Tensor], places: torch.Tensor, S: int, dtype: torch.dtype
    ) -> Optional[torch.Tensor]:
        if mask is not None:
            raise ValueError("compiled layers take no custom mask: build with compile=False")
        return None


class NativeVariant(NativeTransformer, VariantTransformer):
    """The same for the variants, what differs in them computed by the kernels."""


class NativeLlama4(NativeTransformer, Llama4Transformer):
    """The same for Llama 4, whose chunks the kernels know."""

    def run_layers(self, h: torch.Tensor, step: Step) -> torch.Tensor:
        return Transformer.run_layers(self, self.with_images(h, step), step)


class NativeEmbedding(nn.Module):
    """The embedding that is also the output layer's weight, of which each rank has some rows."""

    def __init__(self, weight: Packed, dtype: torch.dtype):
        super().__init__()
        self._weight, self._dtype = weight, dtype

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        if parallel.world_size() == 1:
            return self._weight.take_rows(tokens, self._dtype)
        own = tokens - parallel.rank() * self._weight.rows
        outside = (own < 0) | (own >= self._weight.rows)
        h = self._weight.take_rows(own.masked_fill(outside, 0), self._dtype)
        return reduce_from_model_parallel_region(h.masked_fill(outside[..., None], 0))


class NativeNorm(nn.Module):
    """RMSNorm, fused."""

    def __init__(self, norm: RMSNorm):
        super().__init__()
        self.eps, self.weight = norm.eps, norm.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.dtype != self.weight.dtype or x.shape[-1] != len(self.weight):
            return rms_norm(x, self.weight, self.eps)
        x, dim = x.contiguous(), x.shape[-1]
        out = torch.empty_like(x)
        kernels.library().norm(
            x.dtype == torch.bfloat16, address(x), address(self.weight), address(out),
            x.numel() // dim, dim, c_float(self.eps), torch.get_num_threads(),
        )  # fmt: skip
        return out


class NativeOutput(nn.Module):
    """The output layer; its result is fp32 regardless of the model's dtype."""

    def __init__(self, weight: Packed, work: Workspace):
        super().__init__()
        self._weight, self._work = weight, work

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.product(x)
        return out if parallel.world_size() == 1 else gather_from_model_parallel_region(out)

    def product(self, x: torch.Tensor) -> torch.Tensor:
        if x.dtype != self._work.dtype or x.shape[-1] != self._weight.cols:
            raise ValueError(
                f"hidden states of {x.dtype}, {x.shape[-1]} wide, for a layer of "
                f"{self._work.dtype}, {self._weight.cols} wide: convert them"
            )
        x = x.contiguous()
        out = torch.empty(*x.shape[:-1], self._weight.rows)
        flat, into = x.view(-1, x.shape[-1]), out.view(-1, self._weight.rows)
        with self._work.lock:
            for some, result in zip(flat.split(TOKENS), into.split(TOKENS), strict=True):
                inputs, _ = self._work.inputs("x", len(some), some.shape[1], {self._weight.kind})
                kernels.library().linear(
                    x.dtype == torch.bfloat16, byref(self._weight.struct), address(some),
                    len(some), address(result), byref(inputs), torch.get_num_threads(),
                )  # fmt: skip
        return out


class NativeLayers(nn.Module):
    """Blocks of a Transformer that follow each other, all or those from `first` on."""

    def __init__(
        self,
        blocks: List[TransformerBlock],
        args: ModelArgs,
        work: Workspace,
        arena: Arena,
        first: int = 0,
    ):
        super().__init__()
        self._first = first
        self._work, attention = work, blocks[0].attention
        self._heads = attention.n_local_heads, attention.n_local_kv_heads, attention.head_dim
        self.norms = nn.ModuleList(norm for b in blocks for norm in (b.attention_norm, b.ffn_norm))
        self._residual = args.residual_multiplier if isinstance(args, VariantArgs) else 1.0
        self._packed: List[List[Packed]] = []
        self._biases: List[List[Optional[torch.Tensor]]] = []
        self._experts: List[Optional[Mixture]] = []
        for block in blocks:
            linears = linears_of(block)
            self._biases.append([bias_of(linear) for linear in linears[: len(kernels.MATRICES)]])
            self._packed.append([arena.pack(weight_of(linear)) for linear in linears])
            self._experts.append(mixture_of(block.feed_forward, self._packed[-1]))
            del linears
            block.attention = block.feed_forward = None  # type: ignore[assignment]  # one copy
        self._kinds = {weight.kind for packed in self._packed for weight in packed}
        self._dim = args.dim
        self._hidden_dim = max(packed[4].rows for packed in self._packed)  # w1's
        widths = (args.dim, attention.n_local_heads * args.head_dim, args.dim, self._hidden_dim)
        self.adapters = NativeAdapters(len(blocks), widths, blocks[0].attention_norm.weight.dtype)
        self._scratch_for: Tuple[Any, Any, Any] = (None, None, None)
        self._shape = kernels.Shape(
            args.dim, *self._heads, self._hidden_dim, args.norm_eps, self._residual
        )
        self._layers = (kernels.Layer * len(blocks))(
            *(
                kernels.Layer(
                    block.attention_norm.weight.data_ptr(),
                    block.ffn_norm.weight.data_ptr(),
                    *(weight.struct for weight in packed[: len(kernels.MATRICES)]),
                    tuple(None if bias is None else bias.data_ptr() for bias in biases),
                    attending(args, i),
                    None if experts is None else experts.address,
                )
                for i, (block, packed, biases, experts) in enumerate(
                    zip(blocks, self._packed, self._biases, self._experts, strict=True)
                )
            )
        )

    def forward(self, x: torch.Tensor, step: Step) -> torch.Tensor:
        """All blocks in turn; a query attends to the keys at positions up to its own.

        Raises:
            ValueError: embeddings of another shape or dtype than the model's, or a cache of another
                dtype.
        """
        dtype = self.norms[0].weight.dtype
        if x.dtype != dtype or x.shape[-1] != self._dim:
            raise ValueError(
                f"embeddings of {x.dtype}, {x.shape[-1]} wide, for a model of {dtype}, "
                f"{self._dim} wide: convert them"
            )
        with self._work.lock:
            return self._forward(x, step)

    def _forward(self, x: torch.Tensor, step: Step) -> torch.Tensor:
        B, T, _ = x.shape
        places = self._places(x, step)
        if isinstance(step.cache, PagedRows):  # one row of all rows' tokens, one after another
            cache = step.cache
            batch, _kept = self._batch(cache.counts, step, places, cache.tables)
            adapters = self.adapters.of_pass(cache.adapters, cache.counts, self._work)
            h = x.clone(memory_format=torch.contiguous_format)
            self._run(h, batch, max(cache.lengths), 0, len(self._packed), adapters)
            return h
        length = max(1, TOKENS // B)
        hs = [part.clone(memory_format=torch.contiguous_format) for part in x.split(length, 1)]
        steps = [
            step._replace(positions=positions, freqs_cis=freqs_cis)
            for positions, freqs_cis in zip(
                step.positions.split(length, 1), step.freqs_cis.split(length, 1), strict=True
            )
        ]
        batches = [
            self._batch([h.shape[1]] * B, part, places) for h, part in zip(hs, steps, strict=True)
        ]
        longest = T if step.cache is None else max(step.cache.lengths)
        if len(hs) == 1:
            self._run(hs[0], batches[0][0], longest, 0, len(self._packed))
            return hs[0]
        for layer in range(len(self._packed)):
            for h, (batch, *_) in zip(hs, batches, strict=True):
                self._run(h, batch, longest, layer, 1)
        return torch.cat(hs, 1)

    def _places(self, x: torch.Tensor, step: Step) -> List[int]:
        """Where keys and values are kept: four addresses and three strides."""
        (B, T, _), cache = x.shape, step.cache
        _, kv_heads, head_dim = self._heads
        k_scale = v_scale = 0
        if isinstance(cache, PagedRows):
            cache = cache.pool
        if cache is None:  # a buffer for one layer's keys and values, which all layers reuse
            kv = self._work.take("kv", 2 * B * kv_heads * T * head_dim, x.dtype)
            k, v = kv.view(2, 1, B, kv_heads, T, head_dim).expand(-1, len(self._packed), *[-1] * 4)
        else:
            k, v = cache.k[self._first :], cache.v[self._first :]
            if isinstance(cache, Int8KVCache):
                k_scale, v_scale = (
                    scale[self._first :].data_ptr() for scale in (cache.k_scale, cache.v_scale)
                )
            elif k.dtype != x.dtype:
                raise ValueError(f"a cache of {k.dtype} for a model of {x.dtype}: use new_cache")
        strides = [k.stride(axis) // head_dim for axis in (0, 1, 2)]
        return [k.data_ptr(), v.data_ptr(), k_scale, v_scale, *strides]

    def _batch(
        self,
        counts: Sequence[int],
        step: Step,
        places: List[int],
        tables: Optional[torch.Tensor] = None,
    ) -> Tuple[kernels.Batch, List[torch.Tensor]]:
        """The struct, and the tensors that it points to; counts: new tokens of each row."""
        rows, tokens = len(counts), sum(counts)
        owners = torch.arange(rows, dtype=torch.int32).repeat_interleave(torch.tensor(counts))
        begins = torch.tensor([0, *accumulate(counts)], dtype=torch.int32)
        alike = step.positions.numel() < tokens
        parts = (step.positions, step.freqs_cis)
        positions, freqs_cis = (
            (part.expand(rows, *part.shape[1:]) if alike else part).contiguous() for part in parts
        )
        kept = [owners, begins, positions, freqs_cis]
        blocks, width = (None, 0) if tables is None else (tables.data_ptr(), tables.shape[1])
        batch = kernels.Batch(
            rows, sum(n < MANY for n in counts), tokens, begins.data_ptr(), owners.data_ptr(),
            positions.data_ptr(), freqs_cis.data_ptr(), *places, blocks, width,
        )  # fmt: skip
        return batch, kept

    def _scratch(self, M: int, chunks: int, floats: bool) -> kernels.Scratch:
        """Buffers for the intermediate results of a pass of M tokens."""
        if self._scratch_for[0] == (M, chunks, floats):
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
        }
        tensors = {name: self._work.take(name, n) for name, n in sizes.items()}
        n = max((one.n for one in self._experts if one), default=0)
        chosen = M * max((one.top_k for one in self._experts if one), default=0)
        of_experts = {
            "normalized": self._work.take("normalized", M * self._dim if n else 0),
            "expert": self._work.take("expert", M * self._dim if n else 0),
            "scores": self._work.take("scores", M * n),
            "begins": self._work.take("begins", n + 1, torch.int32),
            "routed": self._work.take("routed", chosen, torch.int32),
            "weights": self._work.take("weights", chosen),
            "chosen": self._work.take("chosen", chosen, torch.int32),
        }
        widths = {"x": self._dim, "heads": heads * head_dim, "y": self._hidden_dim}
        inputs = [self._work.inputs(name, M, n, self._kinds, floats) for name, n in widths.items()]
        scratch = kernels.Scratch(
            *(tensor.data_ptr() for tensor in tensors.values()),
            *(struct for struct, _ in inputs),
            *(tensor.data_ptr() for tensor in of_experts.values()),
        )
        # With all that it points to: others may take larger buffers of these names meanwhile.
        kept = [tensors, of_experts, *(buffers for _, buffers in inputs)]
        self._scratch_for = (M, chunks, floats), scratch, kept
        return scratch

    def _run(
        self,
        h: torch.Tensor,
        batch: kernels.Batch,
        longest: int,
        first: int,
        n: int,
        adapters: Optional[PassAdapters] = None,
    ) -> None:
        """Layers first to first + n, in place."""
        chunks = -(-longest // CHUNK) if batch.few else 0
        scratch = self._scratch(batch.tokens, chunks, adapters is not None)
        of_rows = None if adapters is None else byref(adapters.struct)

        def step(layer: int, count: int, parts: int) -> None:
            kernels.library().step(
                h.dtype == torch.bfloat16, byref(self._shape), self._layers, layer, count,
                byref(batch), address(h), byref(scratch), of_rows, parts,
                torch.get_num_threads(),
            )  # fmt: skip

        if parallel.world_size() == 1:
            step(first, n, ATTENTION | FEED_FORWARD | ADD)
            return
        total = self._scratch_for[2][0]["sum"]
        for layer in range(first, first + n):
            for part in (ATTENTION, FEED_FORWARD):
                step(layer, 1, part)
                dist.all_reduce(total, group=get_model_parallel_group())
                h.add_(total.view(h.shape), alpha=self._residual)
