"""Llama 4's image encoder in files: names, shapes and settings of each format."""

import re
from typing import Any, Dict, Mapping

from llama.families.family import IGNORED, Fused, Shape, whole
from llama.families.llama4_vision import ROPE_THETA, TILING, ImageArgs
from llama.families.vision_files import BLOCKS, PROCESSING

ENCODER = "vision_embeddings.vision_encoder."
# How transformers calls parts of the encoder, and how the rest, where names begin.
STEMS = BLOCKS | {
    "transformer.resblocks": "model.layers",
    "conv1._linear": "patch_embedding.linear",
}
BEGINNINGS = {
    ENCODER: "vision_model.",
    "vision_embeddings.vision_adapter.": "vision_model.vision_adapter.",
    "vision_projection.": "multi_modal_projector.linear_1.",
}
PREFIXES = ("vision_model.", "multi_modal_projector.", "vision_embeddings.", "vision_projection.")


def shapes(args: ImageArgs) -> Dict[str, Shape]:
    """Meta's name and whole shape of every weight that reads images."""
    if args.vision_layers is None:
        return {}
    width, output = args.vision_width, args.vision_output
    side, joined = args.vision_chunk_size // args.vision_patch_size, args.vision_shuffle**2 * width
    norm: Dict[str, Shape] = {"weight": (width,), "bias": (width,)}
    block: Dict[str, Shape] = {
        "mlp.c_fc.weight": (4 * width, width),
        "mlp.c_fc.bias": (4 * width,),
        "mlp.c_proj.weight": (width, 4 * width),
        "mlp.c_proj.bias": (width,),
    }
    for name in ("wq", "wk", "wv", "wo"):
        block |= {f"attn.{name}.weight": (width, width), f"attn.{name}.bias": (width,)}
    for name in ("ln_1", "ln_2"):
        block |= {f"{name}.{part}": shape for part, shape in norm.items()}
    found: Dict[str, Shape] = {
        f"{ENCODER}conv1._linear.weight": (width, 3 * args.vision_patch_size**2),
        f"{ENCODER}class_embedding": (width,),
        f"{ENCODER}positional_embedding_vlm": (side * side + 1, width),
    }
    for name in ("ln_pre", "ln_post"):
        found |= {f"{ENCODER}{name}.{part}": shape for part, shape in norm.items()}
    for i in range(args.vision_layers):
        found |= {f"{ENCODER}transformer.resblocks.{i}.{name}": s for name, s in block.items()}
    found["vision_embeddings.vision_adapter.mlp.c_fc.weight"] = (output, joined)
    found["vision_embeddings.vision_adapter.mlp.c_proj.weight"] = (output, output)
    found["vision_projection.weight"] = (args.dim, output)
    return found


def hf_name(name: str) -> str:
    """transformers' name of one of these."""
    begin = next(begin for begin in BEGINNINGS if name.startswith(begin))
    stem = name.removeprefix(begin)
    for ours, theirs in STEMS.items():
        stem = re.sub(rf"(?:^|(?<=\.)){ours}(?=\.|$)", theirs, stem)
    return BEGINNINGS[begin] + stem


def hf_fused(args: ImageArgs) -> Dict[str, Fused]:
    """Its tensors, each of which is one of ours."""
    return {hf_name(name): Fused(((name,),)) for name in shapes(args)}


# --- config.json ---------------------------------------------------------------------------------

# Fields of ImageArgs, what vision_config calls them, and what transformers takes where it's silent.
VISION = {
    "vision_layers": ("num_hidden_layers", 34),
    "vision_width": ("hidden_size", 768),
    "vision_heads": ("num_attention_heads", 16),
    "vision_output": ("vision_output_dim", 7680),
    "vision_chunk_size": ("image_size", 448),
    "vision_patch_size": ("patch_size", 14),
}
DEFAULTS = {"intermediate_size": 5632, "projector_input_dim": 4096, "projector_output_dim": 4096}


def vision_config(args: ImageArgs) -> Dict[str, Any]:
    """What the encoder's part of config.json says."""
    return {theirs: getattr(args, ours) for ours, (theirs, _) in VISION.items()} | {
        "hidden_act": "gelu",
        # The encoder's feed-forward networks have this width, and the adapter's input.
        "intermediate_size": args.vision_shuffle**2 * args.vision_width,
        "model_type": "llama4_vision_model",
        "multi_modal_projector_bias": False,
        "norm_eps": 1e-5,
        "num_channels": 3,
        "pixel_shuffle_ratio": 1 / args.vision_shuffle,
        "projector_input_dim": args.vision_output,
        "projector_output_dim": args.vision_output,
        "rope_parameters": {"rope_theta": ROPE_THETA, "rope_type": "default"},
    }


TRAINING = {"attention_dropout", "projector_dropout", "vision_feature_select_strategy"}


def read_config(config: Mapping[str, Any]) -> Dict[str, Any]:
    """Fields of ImageArgs from a whole config.json; none if it describes text alone.

    Raises:
        ValueError: an encoder that isn't Llama 4's.
    """
    vision = config.get("vision_config")
    if vision is None or config.get("architectures") == ["Llama4ForCausalLM"]:
        return {}
    if not isinstance(vision, dict):
        raise ValueError(f"vision_config={vision!r:.80} isn't an object")
    given = {k: v for k, v in vision.items() if k not in IGNORED | TRAINING and v is not None}
    fields = {ours: given.get(theirs, value) for ours, (theirs, value) in VISION.items()}
    for name, value in fields.items():
        whole(f"vision_config: {VISION[name][0]}", value)
    for key in ("image_token_index", "image_token_id"):
        if type(token := config.get(key)) is int:
            fields["vision_token"] = whole(key, token)
    known = vision_config(ImageArgs(**fields)) | {"rope_theta": ROPE_THETA}
    known["vision_feature_layer"] = -1
    for key, value in (DEFAULTS | given).items():
        if value != known.get(key):
            raise ValueError(
                f"vision_config: {key}={str(value)[:80]}, which this model doesn't compute"
            )
    return fields


def nest_config(args: ImageArgs, config: Dict[str, Any]) -> Dict[str, Any]:
    """config.json of a model with an encoder, from the text's."""
    if args.vision_layers is None:
        return config
    whole = {key: config[key] for key in ("bos_token_id", "dtype", "eos_token_id")}
    del config["architectures"]
    return whole | {
        "architectures": ["Llama4ForConditionalGeneration"],
        "image_token_index": args.vision_token,
        "model_type": "llama4",
        "text_config": {**config, "pad_token_id": None},  # by default one that small ones lack
        "vision_config": vision_config(args),
    }


def processor(args: ImageArgs) -> Dict[str, Any]:
    """preprocessor_config.json, if there is an encoder."""
    if args.vision_layers is None:
        return {}
    size = args.vision_chunk_size
    return {
        **{name: True for name in PROCESSING if name != "do_pad"},
        "image_mean": [TILING["mean"]] * 3,
        "image_processor_type": "Llama4ImageProcessorFast",
        "image_std": [TILING["std"]] * 3,
        "max_patches": TILING["max_tiles"],
        "processor_class": "Llama4Processor",
        "resample": 2,  # bilinear
        "resize_to_max_canvas": False,
        "size": {"height": size, "width": size},
    }


# --- params.json ---------------------------------------------------------------------------------


def write_params(args: ImageArgs) -> Dict[str, Any]:
    """vision_args, if there is an encoder, and the token's id where it isn't Meta's."""
    if args.vision_layers is None:
        return {}
    size, patch = args.vision_chunk_size, args.vision_patch_size
    vision = {
        "image_size": {"height": size, "width": size},
        "patch_size": {"height": patch, "width": patch},
        "dim": args.vision_width,
        "n_layers": args.vision_layers,
        "n_heads": args.vision_heads,
        "mlp_ratio": 4.0,
        "output_dim": args.vision_output,
        "pixel_shuffle_ratio": 1 / args.vision_shuffle,
    }
    own = {} if args.vision_token == ImageArgs.vision_token else {"vision_token": args.vision_token}
    return {"vision_args": vision, **own}


def read_params(vision: Any) -> Dict[str, Any]:
    """Fields of ImageArgs from vision_args, or none.

    Raises:
        ValueError: an encoder that isn't Llama 4's.
    """
    if vision is None:
        return {}
    try:
        fields = {
            "vision_chunk_size": vision["image_size"]["height"],
            "vision_patch_size": vision["patch_size"]["height"],
            "vision_width": vision["dim"],
            "vision_layers": vision["n_layers"],
            "vision_heads": vision["n_heads"],
            "vision_output": vision["output_dim"],
            "vision_shuffle": round(1 / vision["pixel_shuffle_ratio"]),
        }
        for name, value in fields.items():
            whole(name, value)
        about = ImageArgs(**fields)
        if write_params(about)["vision_args"] != vision:
            raise ValueError(f"computed is {write_params(about)['vision_args']}")
    except (ArithmeticError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"vision_args={vision!r:.300} aren't those of Llama 4: {error!r}"
        ) from None
    return fields
