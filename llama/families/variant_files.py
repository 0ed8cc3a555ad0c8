"""The variants of Llama as files hold them: names, shapes, and what else readers need to know."""

from typing import Dict

from llama.families import variant_config, variant_gguf
from llama.families.family import Family, Shape, llama_shapes
from llama.families.names import GGUF, HF, WithBiases
from llama.families.variants import BIASED, VariantArgs, VariantTransformer


def shapes(args: VariantArgs) -> Dict[str, Shape]:
    """Meta's names and whole shapes of all weights, a bias after the matrix that it belongs to."""
    with_bias = {one for field, names in BIASED.items() if getattr(args, field) for one in names}
    found: Dict[str, Shape] = {}
    for name, shape in llama_shapes(args).items():
        found[name] = shape
        if name.split(".")[-2] in with_bias:
            found[name.removesuffix("weight") + "bias"] = shape[:1]
    return found


VARIANT = Family(
    name="variant of Llama",
    args=VariantArgs,
    network=VariantTransformer,
    shapes=shapes,
    architectures=frozenset(
        f"{name}ForCausalLM" for name in ("Llama", "LLaMA", "Mistral", "SmolLM3", "Granite")
    ),
    claims=variant_config.claims,
    read_config=variant_config.read_config,
    write_config=variant_config.write_config,
    write_params=variant_config.write_params,
    hf_names=WithBiases(HF),
    rotated=tuple(f"attention.{m}.{kind}" for m in ("wq", "wk") for kind in ("weight", "bias")),
    gguf=variant_gguf.ARCHITECTURES,
    gguf_names=WithBiases(GGUF),
    claims_gguf=variant_gguf.claims_gguf,
    read_gguf=variant_gguf.read_gguf,
    read_names=variant_gguf.read_names,
    gguf_architecture=variant_gguf.architecture_of,
    write_gguf=variant_gguf.write_gguf,
)
