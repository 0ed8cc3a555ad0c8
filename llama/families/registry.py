"""The families of networks that there are: one is found by a shape, or by what a file says."""

from contextlib import nullcontext
from typing import Any, Collection, Dict, Mapping, Optional, Tuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from llama.families import variant_config
from llama.families.family import Family
from llama.families.llama4_files import LLAMA4
from llama.families.variant_files import VARIANT
from llama.families.vision_files import LLAMA_VISION
from llama.model import ModelArgs, Transformer

LLAMA = Family(
    name="llama",
    # Llama itself, and architectures that are Llama when their config says nothing else.
    architectures=frozenset({"LlamaForCausalLM", "LLaMAForCausalLM", "MistralForCausalLM"}),
    claims=lambda config: True,
    read_config=variant_config.read_config,  # of which nothing differs
    gguf=frozenset({"llama"}),
)
# The first that claims a config.json has it.
FAMILIES: Tuple[Family, ...] = (LLAMA_VISION, LLAMA4, VARIANT, LLAMA)


def family_of(args: ModelArgs) -> Family:
    """The family of a shape."""
    return next(family for family in FAMILIES if family.args is type(args))


class _OnMeta(TorchDispatchMode):
    """What is made within takes no memory.

    fairscale allocates each weight in fp32 on the CPU before it can be moved. It is never written
    to, but the heap keeps gigabytes of it, which count against the limits of the process.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Optional[Dict[str, Any]] = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten.cat.out:  # a rank's part of a weight: there is nothing to copy,
            return kwargs["out"]  # and meta's own imports dynamo first, see below
        device = {"device": "meta"} if func is torch.ops.aten.empty.memory_format else {}
        return func(*args, **{**kwargs, **device})

    @classmethod
    def _should_skip_dynamo(cls) -> bool:  # or it would be imported first, which takes a second
        return False


def build(args: ModelArgs, **options: Any) -> Transformer:
    """A network of a shape, without weights; the options are those of `Transformer`."""
    meta = torch.device(options.get("device") or "cpu").type == "meta"
    with _OnMeta() if meta else nullcontext():
        return family_of(args).network(args, **options)


def of_config(config: Mapping[str, Any]) -> Family:
    """The family of a config.json."""
    return next(family for family in FAMILIES if family.claims(config))


def of_params(params: Mapping[str, Any]) -> Family:
    """The family of a params.json: the one that knows a key that Llama's shape doesn't have."""
    return next((family for family in FAMILIES if family.own_fields & params.keys()), LLAMA)


def of_gguf(
    architecture: str, metadata: Mapping[str, Any], names: Collection[str]
) -> Optional[Family]:
    """The family of a GGUF file, see `Family.claims_gguf`."""
    for family in FAMILIES:
        claims = family.claims_gguf
        if claims(architecture, metadata, names) if claims else architecture in family.gguf:
            return family
    return None
