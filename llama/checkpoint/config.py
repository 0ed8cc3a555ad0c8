"""config.json: the family and the shape that it describes, read and written.

Source: transformers' LlamaConfig; other families take what is theirs out of it, `llama.families`.
"""

import json
from pathlib import Path
from typing import AbstractSet, Any, Dict, List, Mapping, Optional, Tuple

import torch

from llama.checkpoint.schemes import APART, Scheme, config_apart, open_scheme
from llama.families.family import IGNORED as OF_ALL
from llama.families.family import Family
from llama.families.registry import FAMILIES, family_of, of_config
from llama.model import ModelArgs
from llama.text.files import read_object

# Those with a head of another kind, and who reads them.
CLASSIFIER = "LlamaForSequenceClassification"
HEADS = {
    CLASSIFIER: "classification.SequenceClassifier",
    "LlamaForTokenClassification": "token_classification.TokenClassifier",
    "LlamaForQuestionAnswering": "token_classification.QuestionAnswerer",
}

# Keys of config.json that don't change what the network computes. Those that old transformers wrote
# for generation are among them: the first config.json of Llama 2 has "max_length".
IGNORED = OF_ALL | {
    "_attn_implementation", "_commit_hash", "_flash_attn_2_enabled", "attention_dropout",
    "attn_implementation", "auto_map", "embd_pdrop", "gradient_checkpointing", "is_llama_config",
    "max_new_tokens", "max_sequence_length", "max_window_layers", "model_max_length",
    "neftune_noise_alpha", "num_labels", "pretraining_tp", "resid_pdrop", "rope_interleaved",
    "transformers.js_config", "unk_token_id", "unsloth_fixed", "unsloth_version",
    "use_flash_attention_2",
    "quantization_config", "quantization",  # see `read_scheme`
}  # fmt: skip
# Those that must have one of these values, because our model computes nothing else:
REQUIRED: Dict[str, Tuple[Any, ...]] = {
    "model_type": ("llama", "mistral", "smollm3", "granite"),
    "hidden_act": ("silu", "swish"),
    # What a family computes, it has taken out of the config.
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "sliding_window": (None,),
    "use_sliding_window": (False,),
    "attention_multiplier": (None, 1.0),
    "partial_rotary_factor": (1.0, 1),
    "is_decoder": (True, False),
    "add_cross_attention": (False,),
    "cross_attention_hidden_size": (None,),
    "layer_types": (None,),
    "num_local_experts": (None, 0),
    "pruned_heads": (None, {}),
}


# The fields of ModelArgs: the key of config.json, its type, and the default where it is left out.
FIELDS: Dict[str, Tuple[str, type, Any]] = {
    "n_heads": ("num_attention_heads", int, None),
    "dim": ("hidden_size", int, None),
    "n_layers": ("num_hidden_layers", int, None),
    "n_kv_heads": ("num_key_value_heads", int, None),  # by default as many as n_heads
    "hidden_dim": ("intermediate_size", int, None),
    "vocab_size": ("vocab_size", int, None),
    "norm_eps": ("rms_norm_eps", float, 1e-6),
    "tied_embeddings": ("tie_word_embeddings", bool, False),
    "max_seq_len": ("max_position_embeddings", int, 2048),
}
# The settings of each type of RoPE beside rope_theta, with the fields of ModelArgs.
ROPE: Dict[str, Dict[str, str]] = {
    "default": {},
    "linear": {"factor": "rope_linear_factor"},
    "llama3": {
        "factor": "rope_scaling_factor",
        "low_freq_factor": "rope_low_freq_factor",
        "high_freq_factor": "rope_high_freq_factor",
        "original_max_position_embeddings": "rope_original_max_seq_len",
    },
}


def read_config(
    path: Path, known: Optional[AbstractSet[str]] = None
) -> Tuple[Family, Dict[str, Any]]:
    """The family that a config.json describes, and the fields of its shape.

    Args:
        known: architectures, by default those of the family.

    Raises:
        ValueError: an architecture, or a key, that our model can't honour; it is named.
    """
    return parse_config(path, read_object(path), known)


def check_config(path: str, content: bytes, apart: Mapping[str, bytes]) -> None:
    """Check that a config.json can be read, before the weights beside it are fetched.

    Args:
        apart: what is in those of the files `APART` that are beside it.

    Raises:
        ValueError: an architecture, a key or a quantization that can't be read; it is named.
    """
    try:
        config = json.loads(content)
        quantization = {name: json.loads(one) for name, one in apart.items()}
    except ValueError as error:
        raise ValueError(f"{path} isn't JSON: {error}") from None
    if not isinstance(config, dict):
        return
    _scheme(path, config, quantization)
    named = config.get("architectures")
    if named and isinstance(named, list):  # else it says nothing of what it is
        known = {str(named[0])} if str(named[0]) in HEADS else None
        parse_config(path, config, known)


def parse_config(
    path: str | Path, config: Dict[str, Any], known: Optional[AbstractSet[str]] = None
) -> Tuple[Family, Dict[str, Any]]:
    """`read_config` of the content, which it takes apart; the path is for messages."""
    family = of_config(config)
    known = family.architectures if known is None else known
    architectures = config.get("architectures") or ["LlamaForCausalLM"]
    if not isinstance(architectures, list) or not known >= set(map(str, architectures)):
        hint = ""
        reader = HEADS.get(str(architectures[0])) if isinstance(architectures, list) else None
        if reader:
            hint = f". It is a classifier: llama.training.{reader}.build reads it"
        elif "Deberta" in str(architectures):
            hint = ". Prompt Guard is no Llama: transformers' text-classification pipeline runs it"
        readable = sorted({name for one in FAMILIES for name in one.architectures})
        raise ValueError(
            f"{path}: architectures={architectures} with model_type="
            f"{config.get('model_type')!r:.80}; read here: {', '.join(readable)}{hint}"
        )
    try:
        own = family.read_config(config)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None

    def take(key: str, kind: type, default: Any = None) -> Any:
        value: Any = config.pop(key, None)
        value = default if value is None else value
        if value is None:
            raise ValueError(f"{path} lacks {key}")
        kinds = (int, float) if kind is float else (kind,)
        if type(value) not in kinds or not (kind is bool or 0 < value < 1 << 31):
            raise ValueError(f"{path}: {key}={value!r} isn't a positive {kind.__name__}")
        return float(value) if kind is float else value

    if config.get("num_key_value_heads") is None:
        config["num_key_value_heads"] = config.get("num_attention_heads")
    args = {ours: take(*of) for ours, of in FIELDS.items()}
    if config.get("head_dim") is not None:
        args["head_dim"] = take("head_dim", int)
    config.pop("head_dim", None)
    new, old = (config.pop(key, None) or {} for key in ("rope_parameters", "rope_scaling"))
    if not isinstance(new, dict) or not isinstance(old, dict):
        raise ValueError(f"{path}: rope_parameters={new!r}, rope_scaling={old!r}: not settings")
    if new and any(new.get(key, value) != value for key, value in old.items()):
        raise ValueError(f"{path}: rope_parameters={new} contradicts rope_scaling={old}")
    theta = config.pop("rope_theta", None)
    args |= _read_rope(path, {"rope_theta": 10000.0 if theta is None else theta} | old | new)

    for key, allowed in REQUIRED.items():
        if key in config and (value := config.pop(key)) not in allowed:
            raise ValueError(f"{path}: {key}={value!r}, which this model doesn't compute")
    unknown = sorted(key for key in config.keys() - IGNORED if config[key] is not None)
    if unknown:
        raise ValueError(
            f"{path} has keys that this model has no meaning for: {', '.join(unknown)}. "
            "Ignoring one could silently change the output"
        )
    return family, args | own


def _read_rope(path: str | Path, rope: Dict[str, Any]) -> Dict[str, Any]:
    """Both spellings: `rope_scaling` with `type` or `rope_type`, and `rope_parameters`."""
    kind = rope.pop("rope_type", None) or rope.pop("type", None) or "default"
    rope.pop("type", None)
    if not isinstance(kind, str) or kind not in ROPE:
        known = ", ".join([*ROPE, "yarn", "dynamic"])
        raise ValueError(f"{path}: rope_type={kind!r}; known are {known}")
    args: Dict[str, Any] = {"use_scaled_rope": kind == "llama3"}
    for theirs, ours in {"rope_theta": "rope_theta", **ROPE[kind]}.items():
        value = rope.pop(theirs, None)
        if type(value) not in (int, float) or not 0 < value < 1 << 40:
            raise ValueError(f"{path}: RoPE of the type {kind!r} with {theirs}={value!r}")
        whole = ours == "rope_original_max_seq_len" and value == int(value)
        args[ours] = int(value) if whole else float(value)
    rope.pop("partial_rotary_factor", None) if rope.get("partial_rotary_factor") == 1.0 else None
    if rope:
        settings = ", ".join(sorted(rope))
        raise ValueError(f"{path}: rope_type={kind!r} has unknown settings: {settings}")
    return args


def read_scheme(path: Path) -> Optional[Scheme]:
    """How the weights beside config.json are quantized; None: they aren't.

    Raises:
        ValueError: a scheme that can't be read.
    """
    files = [file for file in map(path.with_name, APART) if file.exists()]
    return _scheme(path, read_object(path), {file.name: read_object(file) for file in files})


def _scheme(
    path: str | Path, config: Mapping[str, Any], apart: Mapping[str, Any]
) -> Optional[Scheme]:
    """apart: what is in the files `APART`."""
    quantization, source = config.get("quantization_config"), ""
    if isinstance(config.get("quantization"), dict):
        quantization = {"quant_method": "mlx", **config["quantization"]}  # as mlx_lm writes it
    for name, found in apart.items():
        if quantization is None and isinstance(found, dict):
            quantization, source = config_apart(name, found), f" (in {name})"
    try:
        return None if quantization is None else open_scheme(quantization)
    except ValueError as error:
        raise ValueError(f"{path}: {error}{source}") from None


def config_of(args: ModelArgs, dtype: torch.dtype, bos_id: Optional[int], eos: List[int]) -> dict:
    """config.json for a shape, as transformers writes it."""
    kind = "linear" if args.rope_linear_factor != 1.0 else "default"
    kind = "llama3" if args.use_scaled_rope else kind
    rope = {theirs: getattr(args, ours) for theirs, ours in ROPE[kind].items()}
    config = {theirs: getattr(args, ours) for ours, (theirs, _, _) in FIELDS.items()}
    config |= {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "bos_token_id": bos_id,
        "dtype": str(dtype)[6:],
        "eos_token_id": eos if len(eos) != 1 else eos[0],
        "head_dim": args.head_dim,
        "hidden_act": "silu",
        "mlp_bias": False,
        "model_type": "llama",
        "rope_parameters": {"rope_type": kind, "rope_theta": args.rope_theta, **rope},
        **family_of(args).write_config(args),
    }
    scaling = dict(config["rope_parameters"])  # transformers before 5 reads these two
    config["rope_theta"] = scaling.pop("rope_theta")
    config["rope_scaling"] = scaling if scaling["rope_type"] != "default" else None
    return family_of(args).nest_config(args, config)
