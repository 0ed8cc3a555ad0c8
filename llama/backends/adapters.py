"""Adds LoRA adapters to a loaded model, for `llama.layers.low_rank` to choose one for each row."""

from llama.backends.cpu.layers import NativeLayers
from llama.checkpoint.adapter import Adapter, shards
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
    pairs = shards(adapter, model.params)
    first, number, weight = model.layers[0], len(names(model)) + 1, model.norm.weight
    if isinstance(first, NativeLayers):
        first.adapters.add(pairs)
    elif all(type(block) is TransformerBlock for block in model.layers):
        for weight_name, (A, B, scale) in pairs.items():
            path = weight_name.removesuffix(".weight")
            layer = model.get_submodule(path)
            if not isinstance(layer, LowRankLinear):
                splits_outputs = parallel.shard_axis(weight_name) == 0
                layer = LowRankLinear(layer, chosen(model), splits_outputs)
                model.set_submodule(path, layer)
            layer.add(number, A.to(weight), (B * scale).to(weight))
    else:
        raise ValueError(
            "layers that are compiled for GPUs or offloaded take no adapters: build with "
            "compile=False and without offload, or with adapter_dir, for one adapter of all rows"
        )
    model._adapter_names = [*names(model), name]  # type: ignore[assignment]
