"""The families of networks that there are: one is found by a shape, or by what a file says."""

from typing import Any, Mapping, Tuple

from llama.families.family import Family
from llama.families.llama4_files import LLAMA4
from llama.families.vision_files import LLAMA_VISION
from llama.model import ModelArgs, Transformer

LLAMA = Family(
    name="llama",
    # Llama itself, and architectures that are Llama when their config says nothing else.
    architectures=frozenset({"LlamaForCausalLM", "LLaMAForCausalLM", "MistralForCausalLM"}),
    claims=lambda config: True,
    gguf=frozenset({"llama"}),
)
# The first that claims a config.json has it.
FAMILIES: Tuple[Family, ...] = (LLAMA_VISION, LLAMA4, LLAMA)


def family_of(args: ModelArgs) -> Family:
    """The family of a shape."""
    return next(family for family in FAMILIES if family.args is type(args))


def build(args: ModelArgs, **options: Any) -> Transformer:
    """A network of a shape, without weights; the options are those of `Transformer`."""
    return family_of(args).network(args, **options)


def of_config(config: Mapping[str, Any]) -> Family:
    """The family of a config.json."""
    return next(family for family in FAMILIES if family.claims(config))


def of_params(params: Mapping[str, Any]) -> Family:
    """The family of a params.json: the one that knows a key that Llama's shape doesn't have."""
    return next((family for family in FAMILIES if family.own_fields & params.keys()), LLAMA)
