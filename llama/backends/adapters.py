"""Adds LoRA adapters to a loaded model, for `llama.layers.low_rank` to choose one for each row."""

from typing import Dict

from llama.backends.cpu.layers import NativeLayers
from llama.checkpoint.adapter import Adapter, Pair, shards
from llama.families.variants import VariantBlock
from llama.families.vision import VisionTransformer
from llama.layers import parallel
from llama.layers.low_rank import LowRankLinear, chosen, names
from llama.model import Transformer, TransformerBlock


def add(model: Transformer, name: str, adapter: Adapter) -> None:
    """Add an adapter under a name. It changes no row that doesn't choose it.

    Raises:
        ValueError: an empty name or one that is taken, layers that take no adapters, or an adapter
            of another model. Nothing is added then.
    """
    if not name or name in names(model):
        raise ValueError(f"an adapter {name!r}: give it a name that none of the others has")
    of_text = all(weight.startswith("layers.") for weight in adapter.pairs)
    if isinstance(model, VisionTransformer) or not of_text:
        raise ValueError(
            "what reads images takes no adapters beside its weights, for some requests alone: "
            "build with adapter_dir, for one adapter of all rows"
        )
    pairs, first = shards(adapter, model.params), model.layers[0]
    if isinstance(first, NativeLayers):
        first.adapters.add(pairs)
    elif all(type(block) in (TransformerBlock, VariantBlock) for block in model.layers):
        _add_to_plain(model, len(names(model)) + 1, pairs)
    else:
        raise ValueError(
            "plain layers of Llama 4, and layers compiled for GPUs or offloaded take no adapters: "
            "build with adapter_dir, for one adapter of all rows, or on a CPU with its kernels; "
            "other models take them with compile=False and without offload, too"
        )
    model._adapter_names = [*names(model), name]  # type: ignore[assignment]


def _add_to_plain(model: Transformer, number: int, pairs: Dict[str, Pair]) -> None:
    weight = model.norm.weight
    layers = {name: model.get_submodule(name.removesuffix(".weight")) for name in pairs}
    for name, layer in layers.items():
        if hasattr(layer, "lora_A"):
            raise ValueError(f"{name} has an adapter of llama.training.lora: merge it or detach it")
    for name, (A, B, scale) in pairs.items():
        layer = layers[name]
        if not isinstance(layer, LowRankLinear):
            splits_outputs = parallel.shard_axis(name) == 0
            layer = LowRankLinear(layer, chosen(model), splits_outputs)
            model.set_submodule(name.removesuffix(".weight"), layer)
        layer.add(number, A.to(weight), (B * scale).to(weight))
