"""Metadata of GGUF files of SmolLM3, Granite 3, and Llama with biases or YaRN.

Source: github.com/ggml-org/llama.cpp, src/llama-model.cpp.
"""

import math
from typing import Any, Collection, Dict, Mapping

import numpy as np

from llama.families.names import GGUF, WithBiases
from llama.families.variant_config import number, write_params
from llama.families.variants import BIASED, VariantArgs

ARCHITECTURES = frozenset({"smollm3", "granite"})  # and some of "llama"
# Metadata of a GGUF file; and YaRN's, of which llama.cpp derives the attention factor.
GGUF_KEYS = {
    "embedding_multiplier": "embedding_scale",
    "residual_multiplier": "residual_scale",
    "attention_multiplier": "attention.scale",
    "logits_scaling": "logit_scale",
}
YARN_KEYS = {
    "yarn_factor": "rope.scaling.factor",
    "yarn_beta_fast": "rope.scaling.yarn_beta_fast",
    "yarn_beta_slow": "rope.scaling.yarn_beta_slow",
}
CONTEXT = "rope.scaling.original_context_length"


def read_gguf(metadata: Dict[str, Any]) -> Dict[str, Any]:
    """Fields of `VariantArgs` that differ from Llama's, by a GGUF file's metadata.

    Raises:
        ValueError: a value that can't be honoured, by its key.
    """
    architecture = metadata.get("general.architecture")

    def decimal(key: str, default: float) -> float:
        return float(str(np.float32(number(key, metadata.get(key, default)))))

    found: Dict[str, Any] = {}
    if architecture == "granite":
        found = {ours: decimal(key, 1.0) for ours, key in GGUF_KEYS.items() if key in metadata}
    if architecture == "smollm3":  # llama.cpp leaves RoPE out of every fourth layer
        layers = int(number("block_count", metadata.get("block_count"), int))
        found["no_rope_layers"] = tuple(range(3, layers, 4))
    if metadata.get("rope.scaling.type") == "yarn":
        metadata["rope.scaling.type"] = "none"  # besides
        context = metadata.get(CONTEXT, metadata.get("context_length"))
        found |= {ours: decimal(key, getattr(VariantArgs, ours)) for ours, key in YARN_KEYS.items()}
        factor = found["yarn_factor"]
        scale = decimal("rope.scaling.attn_factor", 1.0) * (1 + 0.1 * math.log(max(factor, 1)))
        found |= {
            "yarn_attention_factor": scale,
            "rope_original_max_seq_len": int(number(CONTEXT, context, int)),
        }
        known = {CONTEXT, *YARN_KEYS.values()}
        known |= {f"rope.scaling.{key}" for key in ("type", "attn_factor", "finetuned")}
        unknown = [k for k in metadata if k.startswith("rope.scaling.") and k not in known]
        if unknown:
            raise ValueError(f"YaRN with {unknown[0]}, which isn't computed")
    usual = VariantArgs()
    return {name: value for name, value in found.items() if getattr(usual, name) != value}


def read_names(names: Collection[str]) -> Dict[str, Any]:
    """Whether there are biases."""
    present = {name.split(".")[-2] for name in names if name.endswith(".bias")}
    return {field: True for field, matrices in BIASED.items() if present & {*matrices}}


def claims_gguf(architecture: str, metadata: Mapping[str, Any], names: Collection[str]) -> bool:
    """Whether a GGUF file is of one of these models."""
    if architecture not in ("llama", *ARCHITECTURES):
        return False
    try:
        ours = [WithBiases(GGUF).meta(name) for name in names]
        differs = {**read_gguf(dict(metadata)), **read_names(ours)}
    except ValueError:
        return True
    return architecture != "llama" or bool(differs)


def architecture_of(args: VariantArgs) -> str:
    """llama.cpp's architecture that computes what differs from Llama."""
    scaled = GGUF_KEYS.keys() & write_params(args).keys()
    return "smollm3" if args.no_rope_layers else "granite" if scaled else "llama"


def write_gguf(args: VariantArgs) -> Dict[str, Any]:
    """What a GGUF file says of what differs from Llama, by the names of GGUFWriter's methods.

    Raises:
        ValueError: what llama.cpp has no architecture for.
    """
    import gguf  # it takes 0.2 s

    fourths, differing = tuple(range(3, args.n_layers, 4)), write_params(args)
    unusual = (
        "a sliding window" if args.sliding_window
        else "dynamic RoPE" if args.dynamic_factor != 1.0
        else "no_rope_layers other than each fourth" if args.no_rope_layers not in ((), fourths)
        else "YaRN without truncate" if not args.yarn_truncate
        else ""
    )  # fmt: skip
    if unusual or (args.no_rope_layers and GGUF_KEYS.keys() & differing.keys()):
        what = unusual or "multipliers and no_rope_layers"
        raise ValueError(f"GGUF has no architecture with {what}: write another format")
    scales = {key: differing[ours] for ours, key in GGUF_KEYS.items() if ours in differing}
    found: Dict[str, Any] = {key.replace(".", "_"): value for key, value in scales.items()}
    if args.yarn_factor == args.yarn_attention_factor == 1.0:
        return found
    usual = 1 + 0.1 * math.log(max(args.yarn_factor, 1))
    found |= {
        "rope_scaling_type": gguf.RopeScalingType.YARN,
        "rope_scaling_factor": args.yarn_factor,
        "rope_scaling_orig_ctx_len": args.rope_original_max_seq_len,
        "rope_scaling_yarn_beta_fast": args.yarn_beta_fast,
        "rope_scaling_yarn_beta_slow": args.yarn_beta_slow,
    }
    if not math.isclose(args.yarn_attention_factor, usual, rel_tol=1e-6):
        found["rope_scaling_attn_factors"] = args.yarn_attention_factor / usual
    return found
