"""LoRA adapters of a loaded model: several at once, switched, merged, trained, written.

    attach(model, read_adapter("poet", model.params), "poet")
    use(model, "poet")          # or another name, or None for the base model

y = W x + scale · B (A x) (arXiv 2106.09685); W is unchanged. `Llama.build(..., adapter_dir=...)`
instead merges an adapter into the weights on loading, for quantized and compiled models too.
"""

import math
from typing import Any, Dict, Iterable, Iterator, List, Optional, Tuple

import torch
import torch.nn.functional as F
from fairscale.nn.model_parallel.mappings import (
    copy_to_model_parallel_region,
    gather_from_model_parallel_region,
    reduce_from_model_parallel_region,
)
from torch import nn
from torch.autograd.function import once_differentiable

from llama.checkpoint import weight_shapes
from llama.checkpoint.adapter import Adapter, Pair, shards
from llama.layers import parallel
from llama.layers.revision import changed
from llama.model import Transformer, TransformerBlock
from llama.training.dropout import Dropout

# The matrices of a block: Meta's names, and Hugging Face's.
MATRICES = {
    "wq": "q_proj", "wk": "k_proj", "wv": "v_proj", "wo": "o_proj",
    "w1": "gate_proj", "w2": "down_proj", "w3": "up_proj",
}  # fmt: skip


class LoRALinear(nn.Module):
    """A linear layer with LoRA adapters, of which at most one is active.

    Of a column-parallel layer, a rank has its rows of B and all of A; of a row-parallel layer, its
    columns of A and all of B.

    Attributes:
        base: the layer itself. Its name in the model gets ".base" appended.
        active: the name of the active adapter, or None.
        dropout: in a pass of training, what is dropped of the adapter's inputs.
    """

    def __init__(self, base: nn.Module, weight_name: str):
        super().__init__()
        self.base, self.weight_name = base, weight_name
        self.splits_outputs = parallel.shard_axis(weight_name) == 0
        self.lora_A, self.lora_B = nn.ParameterDict(), nn.ParameterDict()
        self.scale: Dict[str, float] = {}
        self.active: Optional[str] = None
        self.dropout: Optional[Dropout] = None

    @property
    def weight(self) -> torch.Tensor:
        return self.base.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Optional[torch.Tensor]:
        return self.base.bias  # type: ignore[return-value]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.base(x)
        if self.active is None or self.active not in self.scale:
            return y
        A, B = self.lora_A[self.active], self.lora_B[self.active]
        if self.dropout is not None:
            x = self.dropout(x, self.weight_name, self.splits_outputs)
        z = F.linear(x, A.type_as(x))
        if self.splits_outputs:
            z = copy_to_model_parallel_region(z)
        else:
            z = reduce_from_model_parallel_region(z)
        if getattr(self.base, "gather_output", False):
            added = F.linear(self.scale[self.active] * z, B.type_as(x))
            return y + gather_from_model_parallel_region(added)
        return _Added.apply(y, (self.scale[self.active] * z).type_as(y), B.type_as(y))


class _Added(torch.autograd.Function):
    """y (..., out) + z (..., r) Bᵀ, in y's memory: at a small rank, writing to a new tensor of this
    size takes longer than the product."""

    @staticmethod
    def forward(ctx: Any, y: torch.Tensor, z: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
        ctx.mark_dirty(y)
        ctx.save_for_backward(z, B)
        y.view(-1, y.shape[-1]).addmm_(z.flatten(0, -2), B.T)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Tuple[torch.Tensor, ...]:
        z, B = ctx.saved_tensors
        return grad, grad @ B, grad.flatten(0, -2).T @ z.flatten(0, -2)


def attach(model: Transformer, adapter: Adapter, name: str = "default") -> None:
    """Add an adapter under a name, and activate it.

    Raises:
        ValueError: a name that is taken or invalid, layers that take no adapter, or an adapter of
            another model. Nothing is added then.
    """
    if name in names(model):
        raise ValueError(f"an adapter {name!r} is there already: detach it, or name this otherwise")
    if not all(isinstance(block, TransformerBlock) for block in model.layers):
        raise ValueError(
            "compiled layers take no adapter afterwards: build with compile=False, or with "
            "adapter_dir, which puts it into the weights"
        )
    if not name or "." in name or hasattr(nn.ParameterDict(), name):
        raise ValueError(f"{name!r} can't name an adapter: letters and digits, and no dots")
    for weight_name, (A, B, scale) in shards(adapter, model.params).items():
        path = weight_name.removesuffix(".weight")
        layer = model.get_submodule(path)
        if not isinstance(layer, LoRALinear):
            layer = LoRALinear(layer, weight_name)
            model.set_submodule(path, layer)
        device, layer.scale[name] = model.norm.weight.device, scale
        layer.lora_A[name] = nn.Parameter(A.to(device, copy=True))
        layer.lora_B[name] = nn.Parameter(B.to(device, copy=True))
    use(model, name)


def use(model: Transformer, name: Optional[str]) -> None:
    """Activate the adapter of this name; None deactivates all.

    Cached prefixes are invalidated (`llama.engine.prefixes`).

    Raises:
        ValueError: no adapter of this name.
    """
    known = names(model)
    if name is not None and name not in known:
        raise ValueError(f"no adapter {name!r}: there is {', '.join(known) or 'none'}")
    changed(model)
    for layer in layers(model):
        layer.active = name


def detach(model: Transformer, name: str) -> None:
    """Remove an adapter. Without any, the model has its original layers again.

    Raises:
        ValueError: no adapter of this name.
    """
    if name not in names(model):
        use(model, name)  # raises, with the names there are
    changed(model)
    for layer in list(layers(model)):
        if name in layer.scale:
            del layer.lora_A[name], layer.lora_B[name], layer.scale[name]
        layer.active = None if layer.active == name else layer.active
        if not layer.scale:
            model.set_submodule(layer.weight_name.removesuffix(".weight"), layer.base)


@torch.no_grad()
def merge(model: Transformer, name: str) -> None:
    """Merge an adapter into the weights, computed in fp32 and rounded once, and remove it.

    Raises:
        ValueError: no adapter of this name, or quantized or offloaded weights.
    """
    chosen = [layer for layer in layers(model) if name in layer.scale]
    for layer in chosen:
        weight = getattr(layer.base, "weight", None)
        if not isinstance(weight, nn.Parameter) or weight.is_meta:
            raise ValueError(
                "weights that are quantized, or not in memory, take no adapter afterwards: build "
                "with adapter_dir, which adds it as they are read"
            )
    for layer in chosen:
        A, B = layer.lora_A[name].float(), layer.lora_B[name].float()
        weight = layer.weight
        weight.copy_(torch.addmm(weight.float(), B, A, alpha=layer.scale[name]))
    detach(model, name)


def fresh(
    model: Transformer,
    rank: int,
    alpha: float,
    matrices: Iterable[str] = tuple(MATRICES),
    seed: int = 1,
) -> Adapter:
    """A new adapter to train, initialized as by PEFT: A uniform, B zeros, so it adds nothing yet.

    Args:
        matrices: those of a block to add it to, by Meta's or Hugging Face's names; not of experts,
            nor what only images need.

    Raises:
        ValueError: a rank below 1, an alpha by which nothing is learned, or matrices that are
            unknown or only in experts.
    """
    matrices = matrix_names(matrices)
    if rank < 1:
        raise ValueError(f"lora rank {rank} must be at least 1")
    if not alpha or not math.isfinite(alpha):
        raise ValueError(f"lora alpha {alpha} must be a number other than 0: it multiplies B A")
    generator, pairs = torch.Generator().manual_seed(seed), {}
    for name, shape in weight_shapes(model.params).items():
        of_block = name.startswith("layers.") and "expert" not in name
        if of_block and name.split(".")[-2] in matrices and len(shape) == 2:
            out, inner = shape
            bound = 1 / math.sqrt(inner)  # kaiming_uniform with a = sqrt(5)
            A = (2 * torch.rand(rank, inner, generator=generator) - 1) * bound
            pairs[name] = Pair(A, torch.zeros(out, rank), alpha / rank)
    if not pairs:
        raise ValueError(f"this model has no {', '.join(matrices)} outside of its experts")
    return Adapter(pairs)


def matrix_names(names: Iterable[str]) -> List[str]:
    """Meta's names of a block's matrices, given by Meta's or Hugging Face's names; each once.

    Raises:
        ValueError: an unknown name, or none at all.
    """
    known = {theirs: ours for ours, theirs in MATRICES.items()} | {ours: ours for ours in MATRICES}
    given = [name.strip() for name in names]
    unknown = [name for name in given if name not in known]
    if unknown or not given:
        raise ValueError(
            f"lora matrices {', '.join(map(repr, unknown)) or 'none'}: choose some of "
            f"{', '.join(MATRICES)} or, by Hugging Face's names, {', '.join(MATRICES.values())}"
        )
    return list(dict.fromkeys(known[name] for name in given))


def adapter_of(model: Transformer, name: str) -> Adapter:
    """The adapter of this name, unsharded, on every rank.

    Raises:
        ValueError: no adapter of this name.
    """
    if name not in names(model):
        use(model, name)
    args, pairs = model.params, {}
    for layer in layers(model):
        if name in layer.scale:
            out, inner = weight_shapes(args)[layer.weight_name]
            A, B = (parallel.unsharded(p[name].detach()) for p in (layer.lora_A, layer.lora_B))
            heads = args.n_heads, args.n_kv_heads
            if layer.splits_outputs:
                B = parallel.whole(layer.weight_name, B, out, *heads)
            else:
                A = parallel.whole(layer.weight_name, A, inner, *heads)
            pairs[layer.weight_name] = Pair(A.cpu(), B.cpu(), layer.scale[name])
    return Adapter(pairs)


def drop(model: Transformer, dropout: Optional[Dropout]) -> None:
    """What is dropped of the adapters' inputs from now on."""
    for layer in layers(model):
        layer.dropout = dropout


def layers(model: Transformer) -> Iterator[LoRALinear]:
    """The layers that have adapters."""
    return (module for module in model.modules() if isinstance(module, LoRALinear))


def names(model: Transformer) -> Tuple[str, ...]:
    """The names of a model's adapters."""
    return tuple(sorted({name for layer in layers(model) for name in layer.scale}))
