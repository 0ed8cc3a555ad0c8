"""config.json and params.json of SmolLM3, Granite 3, Mistral, Llama with biases, stretched RoPE.

Source: transformers' configurations of these models.
"""

import math
from dataclasses import fields
from typing import Any, Dict, Mapping, Tuple

from llama.families.variants import VariantArgs
from llama.model import ModelArgs

# What transformers takes where a config doesn't say.
DEFAULTS: Dict[str, Dict[str, Any]] = {
    "mistral": {"sliding_window": 4096, "num_key_value_heads": 8},
    "smollm3": {
        "no_rope_layer_interval": 4, "num_key_value_heads": 4, "tie_word_embeddings": True,
        "rope_theta": 2000000.0, "max_position_embeddings": 32768,
    },
    "granite": {"attention_multiplier": 1.0},
}  # fmt: skip
MULTIPLIERS = (
    "embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling",
)  # fmt: skip


def claims(config: Mapping[str, Any]) -> bool:
    """Whether a config.json asks for something that Llama itself doesn't compute."""
    kind = _kind(config)
    if kind not in ("llama", "mistral"):
        return kind in ("smollm3", "granite")
    try:
        return bool(read_config(dict(config)))
    except ValueError:
        return True  # of which the reader tells


def _kind(config: Mapping[str, Any]) -> str:
    named = config.get("architectures")
    architecture = str(named[0]) if isinstance(named, list) and named else "Llama"
    architecture = architecture.partition("For")[0].lower()
    kind = str(config.get("model_type") or architecture)
    return architecture if kind == "llama" else kind


def read_config(config: Dict[str, Any]) -> Dict[str, Any]:
    """Pops what this file understands of a config.json; returns fields of `VariantArgs`, those
    that differ from Llama.

    Raises:
        ValueError: a value that can't be honoured, by its key.
    """
    kind = _kind(config)
    config |= DEFAULTS.get(kind, {}) | config
    found: Dict[str, Any] = {}
    for key in ("attention_bias", "mlp_bias"):
        if not isinstance(value := config.pop(key, None), bool | None):
            raise ValueError(f"{key}={value!r} isn't true or false")
        found[key] = bool(value)
    window = config.pop("sliding_window", None)
    if kind == "smollm3" and config.pop("use_sliding_window", None):
        raise ValueError("use_sliding_window=True, which isn't computed for SmolLM3")
    if window is not None and kind != "smollm3":  # there it has no effect without the other key
        found["sliding_window"] = int(number("sliding_window", window, int))
    layer_types = config.pop("layer_types", None)
    fits = "sliding_attention" if "sliding_window" in found else "full_attention"
    kinds = layer_types if isinstance(layer_types, list) else [layer_types]
    if layer_types is not None and any(one != fits for one in kinds):
        raise ValueError(f"layer_types={str(layer_types)[:80]}: layers of one kind are computed")
    found["no_rope_layers"] = _no_rope(config) if kind == "smollm3" else ()
    if kind == "granite":
        for key in MULTIPLIERS:
            if (value := config.pop(key, None)) is not None:
                found[key] = number(key, value)
    found |= _read_rope(config)
    usual = VariantArgs()
    return {key: value for key, value in found.items() if getattr(usual, key) != value}


def number(key: str, value: Any, *kinds: type) -> float:
    if type(value) not in (kinds or (int, float)) or not 0 < value < 1 << 31:
        raise ValueError(f"{key}={value!r} isn't a positive number")
    return float(value)


def _no_rope(config: Dict[str, Any]) -> Tuple[int, ...]:
    every, layers = config.pop("no_rope_layer_interval", 4), config.pop("no_rope_layers", None)
    n = int(number("num_hidden_layers", config.get("num_hidden_layers"), int))
    if layers is None:
        step = int(number("no_rope_layer_interval", every, int))
        return tuple(range(step - 1, n, step))
    if not isinstance(layers, list) or len(layers) < n or {*map(repr, layers)} - {"0", "1"}:
        raise ValueError(f"no_rope_layers={str(layers)[:80]} isn't 1 or 0 for each of {n} layers")
    return tuple(i for i in range(n) if not layers[i])


def _read_rope(config: Dict[str, Any]) -> Dict[str, Any]:
    """YaRN and dynamic RoPE; the settings of any other type are left where they are."""
    key = "rope_parameters" if config.get("rope_parameters") else "rope_scaling"
    rope = config.get(key)
    if not isinstance(rope, dict):
        return {}
    kind = rope.get("rope_type") or rope.get("type")
    if kind not in ("yarn", "dynamic"):
        return {}
    rope = {name: value for name, value in rope.items() if value is not None}
    theta = {name: rope.pop(name) for name in ("rope_theta",) if name in rope}
    config[key] = {"rope_type": "default", **theta}
    both = config.get("rope_scaling") if key == "rope_parameters" else None
    if isinstance(both, dict) and both.items() <= {**rope, **theta}.items():
        del config["rope_scaling"]  # the same
    for name in ("rope_type", "type", "finetuned"):  # the last says nothing of the computation
        rope.pop(name, None)
    context = config.get("max_position_embeddings", 2048)
    before = rope.pop("original_max_position_embeddings", context)
    found: Dict[str, Any] = {
        "rope_original_max_seq_len": int(number("original_max_position_embeddings", before, int))
    }

    def take(name: str, default: float) -> float:
        return number(f"RoPE's {name}", rope.pop(name, default))

    if kind == "dynamic":
        found["rope_original_max_seq_len"] = int(number("max_position_embeddings", context, int))
        found["dynamic_factor"] = take("factor", 0)
    else:
        if "factor" not in rope:
            rope["factor"] = number("max_position_embeddings", context) / before
        factor = take("factor", 0)
        scaled = {name: take(name, 0.0) for name in ("mscale", "mscale_all_dim") if name in rope}
        scales = [1 + 0.1 * one * math.log(max(factor, 1)) for one in (*scaled.values(), 1.0)]
        attention = scales[0] / scales[1] if len(scaled) == 2 else scales[-1]
        truncate = rope.pop("truncate", True)
        if not isinstance(truncate, bool):
            raise ValueError(f"RoPE's truncate={truncate!r} isn't true or false")
        found |= {
            "yarn_factor": factor,
            "yarn_beta_fast": take("beta_fast", 32.0),
            "yarn_beta_slow": take("beta_slow", 1.0),
            "yarn_truncate": truncate,
            "yarn_attention_factor": take("attention_factor", attention),
        }
    if rope:
        raise ValueError(f"RoPE of the type {kind!r} has unknown settings: {', '.join(rope)}")
    return found


def write_config(args: VariantArgs) -> Dict[str, Any]:
    """The keys of config.json for what differs from Llama, and the architecture that has them.

    Raises:
        ValueError: differences that no architecture of transformers has together.
    """
    biases = {"attention_bias": args.attention_bias, "mlp_bias": args.mlp_bias}
    usual, keys = VariantArgs(), dict[str, Dict[str, Any]]()
    found: Dict[str, Any]
    if args.no_rope_layers:
        rotated = [int(i not in args.no_rope_layers) for i in range(args.n_layers)]
        keys["SmolLM3"] = {"no_rope_layers": rotated, "pad_token_id": None, **biases}
    if any(getattr(args, key) != getattr(usual, key) for key in MULTIPLIERS):
        keys["Granite"] = {key: getattr(args, key) for key in MULTIPLIERS} | biases
        keys["Granite"]["attention_multiplier"] = args.attention_multiplier or args.head_dim**-0.5
    if args.sliding_window:
        keys["Mistral"] = {"sliding_window": args.sliding_window}
    if len(keys) > 1 or ("Mistral" in keys and any(biases.values())):
        raise ValueError(f"transformers has no model that is {' and '.join(keys)}, with {biases}")
    [(name, found)] = keys.items() or [("Llama", biases)]
    found |= {"architectures": [f"{name}ForCausalLM"], "model_type": name.lower()}
    rope: Dict[str, Any] = {}
    if args.yarn_factor != 1.0 or args.yarn_attention_factor != 1.0:
        rope = {
            "rope_type": "yarn",
            "factor": args.yarn_factor,
            "beta_fast": args.yarn_beta_fast,
            "beta_slow": args.yarn_beta_slow,
            "truncate": args.yarn_truncate,
            "attention_factor": args.yarn_attention_factor,
            "original_max_position_embeddings": args.rope_original_max_seq_len,
        }
    if args.dynamic_factor != 1.0:
        rope = {"rope_type": "dynamic", "factor": args.dynamic_factor}
        found["max_position_embeddings"] = args.rope_original_max_seq_len
    if rope:
        found["rope_parameters"] = {"rope_theta": args.rope_theta, **rope}
    return found


def write_params(args: VariantArgs) -> Dict[str, Any]:
    """The keys of params.json for what differs from Llama."""
    usual = VariantArgs()
    own = {f.name for f in fields(VariantArgs)} - {f.name for f in fields(ModelArgs)}
    names = {*own, "rope_original_max_seq_len"}
    found = {name: getattr(args, name) for name in sorted(names)}
    return {name: value for name, value in found.items() if value != getattr(usual, name)}
