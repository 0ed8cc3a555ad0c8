"""Llama 3.2 Vision in files: its weights' names and shapes, its configuration, both of two formats.

Formats: Meta's params.json and consolidated.NN.pth, where what isn't the encoder's is called
text_model.NAME; transformers' MllamaConfig and MllamaForConditionalGeneration, which counts layers
of both kinds together, has the 8 further embeddings after the vocabulary's, and tables of what is
added to tiles, for each of the shapes that a picture can have. A table leaves out what no picture
has, such as the third column of a second row.
"""

import math
import re
from dataclasses import fields
from functools import partial
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

import torch

from llama.families.family import (
    IGNORED,
    Family,
    Fused,
    Shape,
    block_shapes,
    llama_shapes,
    whole,
)
from llama.families.names import HF
from llama.families.vision import VisionTransformer
from llama.families.vision_encoder import EXTRA_IDS, VisionArgs
from llama.model import ModelArgs
from llama.vision.images import MEAN, STD

ENCODER = "vision_model.vision_encoder."


def shapes(args: VisionArgs) -> Dict[str, Shape]:
    """Meta's name, without text_model, and whole shape of every weight."""
    found = llama_shapes(args)
    cross = block_shapes(args) | {
        "attention.q_norm.weight": (args.head_dim,),
        "attention.k_norm.weight": (args.head_dim,),
        "gate_attn": (1,),
        "gate_ffwd": (1,),
    }
    for i in range(args.vision_num_cross_attention_layers):
        found |= {f"cross_attention_layers.{i}.{name}": shape for name, shape in cross.items()}
    found["learnable_embedding.weight"] = (EXTRA_IDS, args.dim)

    width, tiles, T = args.vision_width, args.vision_max_num_chunks, args.tokens_per_tile
    norm: Dict[str, Shape] = {"weight": (width,), "bias": (width,)}
    block: Dict[str, Shape] = {
        **{f"attn.{name}.weight": (width, width) for name in ("wq", "wk", "wv", "wo")},
        "mlp.c_fc.weight": (4 * width, width),
        "mlp.c_fc.bias": (4 * width,),
        "mlp.c_proj.weight": (width, 4 * width),
        "mlp.c_proj.bias": (width,),
        **{f"ln_{i}.{name}": shape for i in (1, 2) for name, shape in norm.items()},
    }
    encoder: Dict[str, Shape] = {
        "conv1._linear.weight": (width, 3 * args.vision_patch_size**2),
        "class_embedding": (width,),
        "positional_embedding": (T, width),
        "gated_positional_embedding": (tiles, tiles, T, width),
        "gated_positional_embedding_gate": (1,),
    }
    for where in ("pre", "post"):
        encoder |= {f"ln_{where}.{name}": shape for name, shape in norm.items()}
        encoder[f"{where}_tile_pos_embed.embedding"] = (tiles, tiles, 1, width)
        encoder[f"{where}_tile_pos_embed.gate"] = (1,)
    gates: Dict[str, Shape] = {"gate_attn": (1,), "gate_ffn": (1,)}
    for kind, n, of_block in (
        ("transformer", args.vision_layers, block),
        ("global_transformer", args.vision_global_layers, block | gates),
    ):
        for i in range(n):
            encoder |= {f"{kind}.resblocks.{i}.{name}": s for name, s in of_block.items()}
    found |= {ENCODER + name: shape for name, shape in encoder.items()}
    projected = width * (1 + len(args.vision_features))
    found["vision_model.vision_projection.weight"] = (args.dim, projected)
    found["vision_model.vision_projection.bias"] = (args.dim,)
    return found


class MetaNames(NamedTuple):
    """Those in Meta's files, see `names.Names`."""

    def meta(self, name: str) -> str:
        return name.removeprefix("text_model.")

    def theirs(self, name: str) -> str:
        return name if name.startswith("vision_model.") else f"text_model.{name}"


def write_params(args: VisionArgs) -> Dict[str, Any]:
    """The keys of params.json beyond Llama's; those with Meta's values only if Meta has them."""
    own = {f.name: f.default for f in fields(VisionArgs)[len(fields(ModelArgs)) :]}
    always = ("vision_chunk_size", "vision_max_num_chunks", "vision_num_cross_attention_layers")
    values = {name: getattr(args, name) for name in own}
    return {name: v for name, v in values.items() if name in always or v != own[name]}


# --- transformers' ----------------------------------------------------------------------------

# Fields of VisionArgs, and what vision_config calls them.
VISION = {
    "vision_chunk_size": "image_size",
    "vision_max_num_chunks": "max_num_tiles",
    "vision_patch_size": "patch_size",
    "vision_width": "hidden_size",
    "vision_heads": "attention_heads",
    "vision_layers": "num_hidden_layers",
    "vision_global_layers": "num_global_layers",
    "vision_features": "intermediate_layers_indices",
}


def grids(args: VisionArgs) -> List[Tuple[int, int]]:
    """The rows and columns of tiles that a picture can have, in transformers' order."""
    most = args.vision_max_num_chunks
    return [(h, w) for h in range(1, most + 1) for w in range(1, most // h + 1)]


def vision_config(args: VisionArgs) -> Dict[str, Any]:
    found = {theirs: getattr(args, ours) for ours, theirs in VISION.items()}
    return found | {
        "hidden_act": "gelu",
        "intermediate_layers_indices": list(args.vision_features),
        "intermediate_size": 4 * args.vision_width,
        "model_type": "mllama_vision_model",
        "norm_eps": 1e-5,
        "num_channels": 3,
        "supported_aspect_ratios": [[h, w] for h, w in grids(args)],
        "vision_output_dim": args.vision_width * (1 + len(args.vision_features)),
    }


def cross_layers(args: VisionArgs) -> List[int]:
    """The numbers of cross-attention layers, where all layers are counted together."""
    return [layer + i for i, layer in enumerate(args.cross_attention_before)]


# What image processors do of what they can.
PROCESSING = ("do_convert_rgb", "do_normalize", "do_pad", "do_rescale", "do_resize")


def read_config(config: Dict[str, Any]) -> Dict[str, Any]:
    """The fields of VisionArgs; what is left in the config is Llama's."""
    parts = [config.pop(key, None) for key in ("text_config", "vision_config")]
    if not all(isinstance(part, dict) for part in parts):
        raise ValueError("config.json lacks text_config or vision_config")
    text, vision = ({k: v for k, v in p.items() if k not in IGNORED} for p in parts)
    cross = text.pop("cross_attention_layers", None)
    n = text.get("num_hidden_layers")
    if not isinstance(cross, list) or type(n) is not int or not 0 < len(cross) < n <= 1 << 16:
        raise ValueError(
            f"text_config: cross_attention_layers={cross!r} of num_hidden_layers={n!r}"
        )
    text["num_hidden_layers"] = n - len(cross)
    own: Dict[str, Any] = {"vision_num_cross_attention_layers": len(cross)}
    own |= {ours: vision[theirs] for ours, theirs in VISION.items() if theirs in vision}
    for name, theirs in VISION.items():
        value = own.get(name, 1)
        if name != "vision_features":
            whole(f"vision_config: {theirs}", value)
        elif name in own and not (isinstance(value, list) and value):
            raise ValueError(f"vision_config: {theirs}={value!r:.80} isn't a list of layers")
    image = config.pop("image_token_index", text.get("vocab_size"))
    if image != text.get("vocab_size"):
        raise ValueError(
            f"image_token_index={image!r} isn't the id after vocab_size={text.get('vocab_size')!r}"
        )
    about = VisionArgs(n_layers=text["num_hidden_layers"], **own)
    if cross != cross_layers(about):
        raise ValueError(f"cross_attention_layers={cross}: computed are {cross_layers(about)}")
    known = vision_config(about)
    for key, value in vision.items():
        if value != known.get(key):
            raise ValueError(
                f"vision_config: {key}={str(value)[:80]}, which this model doesn't compute"
            )
    config.pop("model_type", None)
    config |= text
    return own


def nest_config(args: VisionArgs, config: Dict[str, Any]) -> Dict[str, Any]:
    """config.json, from Llama's keys.

    Raises:
        ValueError: heads that it can't express.
    """
    if args.head_dim * args.n_heads != args.dim:
        raise ValueError(
            f"transformers' Mllama has heads of dim / n_heads, and head_dim={args.head_dim} isn't "
            f"{args.dim} / {args.n_heads}: convert to Meta's format"
        )
    whole = {key: config.pop(key) for key in ("bos_token_id", "dtype", "eos_token_id")}
    del config["architectures"], config["head_dim"], config["attention_bias"], config["mlp_bias"]
    cross = cross_layers(args)
    config |= {
        "cross_attention_layers": cross,
        "model_type": "mllama_text_model",
        "num_hidden_layers": args.n_layers + len(cross),
        "pad_token_id": None,  # by default one that small vocabularies lack
    }
    return whole | {
        "architectures": ["MllamaForConditionalGeneration"],
        "image_token_index": args.vocab_size,
        "model_type": "mllama",
        "text_config": config,
        "vision_config": vision_config(args),
    }


def processor(args: VisionArgs) -> Dict[str, Any]:
    """preprocessor_config.json."""
    size = args.vision_chunk_size
    return {
        **dict.fromkeys(PROCESSING, True),
        "image_mean": list(MEAN),
        "image_processor_type": "MllamaImageProcessor",
        "image_std": list(STD),
        "max_image_tiles": args.vision_max_num_chunks,
        "processor_class": "MllamaProcessor",
        "resample": 2,  # bilinear
        "size": {"height": size, "width": size},
    }


class OnDisk(NamedTuple):
    """Names as transformers 4 writes them, from those of either version; see `names.Names`."""

    def meta(self, name: str) -> str:
        name = re.sub(r"^model\.language_model\.", "language_model.model.", name)
        name = re.sub(r"^lm_head\.", "language_model.lm_head.", name)
        return re.sub(r"^model\.(vision_model|multi_modal_projector)\.", r"\1.", name)

    def theirs(self, name: str) -> str:
        return name


def module_name(name: str) -> str:
    """The name since transformers 4.52, of one in files."""
    name = re.sub(r"^language_model\.model\.", "model.language_model.", name)
    return re.sub(r"^(vision_model|multi_modal_projector)\.", r"model.\1.", name)


# transformers' names in both Llamas' image encoders.
BLOCKS = {
    "attn.w([qkvo])": r"self_attn.\1_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "ln_1": "input_layernorm",
    "ln_2": "post_attention_layernorm",
    "ln_(pre|post)": r"layernorm_\1",
}
RENAMED = BLOCKS | {
    "conv1._linear": "patch_embedding",
    "(pre|post)_tile_pos_embed.gate": r"\1_tile_positional_embedding.gate",
    "gated_positional_embedding_gate": "gated_positional_embedding.gate",
    "positional_embedding": "gated_positional_embedding.embedding",
    "resblocks": "layers",
}
CROSS = {
    "gate_attn": "cross_attn_attn_gate",
    "gate_ffwd": "cross_attn_mlp_gate",
    "attention.q_norm.weight": "cross_attn.q_norm.weight",
    "attention.k_norm.weight": "cross_attn.k_norm.weight",
}


def fused(args: VisionArgs, form: str) -> Dict[str, Fused]:
    """transformers' tensors, and what of ours they hold; Meta's are ours."""
    if form != "hf":
        return {}
    cross = cross_layers(args)
    text = [i for i in range(args.n_layers + len(cross)) if i not in cross]
    found: Dict[str, Fused] = {}
    for name, shape in shapes(args).items():
        if name == "learnable_embedding.weight":
            continue  # with tok_embeddings
        parts: Tuple[Tuple[str, ...], ...] = ((name,),)
        theirs_shape: Optional[Shape] = None
        if name == "tok_embeddings.weight":
            parts = ((name,), ("learnable_embedding.weight",))
        if name.startswith("vision_model.vision_projection"):
            theirs = name.replace("vision_model.vision_projection", "multi_modal_projector")
        elif name.startswith(ENCODER):
            stem = name.removeprefix(ENCODER)
            table = stem.replace("_tile_pos_embed.", "_tile_positional_embedding.") + ".weight"
            if stem == "gated_positional_embedding":
                table = "gated_positional_embedding.tile_embedding.weight"
            if len(shape) == 4:
                width = args.vision_max_num_chunks * math.prod(shape[2:])
                found[f"vision_model.{table}"] = Fused(
                    parts, shape=(len(grids(args)) + 1, width),
                    to_theirs=partial(to_table, args), to_ours=partial(from_table, args, shape),
                )  # fmt: skip
                continue
            for ours, other in RENAMED.items():
                stem = re.sub(rf"(?:^|(?<=\.)){ours}(?=\.|$)", other, stem)
            if stem.startswith("patch_embedding"):
                theirs_shape = (shape[0], 3, args.vision_patch_size, args.vision_patch_size)
            theirs = f"vision_model.{stem}"
        elif name.startswith("cross_attention_layers."):
            _, i, stem = name.split(".", 2)
            theirs = CROSS.get(stem) or HF.theirs(f"layers.0.{stem}").removeprefix(
                "model.layers.0."
            )
            theirs = theirs.replace("self_attn", "cross_attn")
            theirs = f"language_model.model.layers.{cross[int(i)]}.{theirs}"
        else:
            theirs = f"language_model.{HF.theirs(name)}"
            if name.startswith("layers."):
                i = name.split(".")[1]
                theirs = theirs.replace(f"layers.{i}.", f"layers.{text[int(i)]}.", 1)
        found[theirs] = Fused(parts, shape=theirs_shape)
    return found


def to_table(args: VisionArgs, tiles: torch.Tensor) -> torch.Tensor:
    """Of each row and column, (tiles, tiles, ...), to a row for each grid; the first is of none."""
    most = args.vision_max_num_chunks
    found = tiles.new_zeros(len(grids(args)) + 1, most, *tiles.shape[2:])
    for i, (h, w) in enumerate(grids(args), 1):
        found[i, : h * w] = tiles[:h, :w].flatten(0, 1)
    return found.flatten(1)


def from_table(args: VisionArgs, shape: Shape, table: torch.Tensor) -> torch.Tensor:
    """The inverse of `to_table`, with zeros where no grid has a tile."""
    found = table.new_zeros(shape)
    for i, (h, w) in enumerate(grids(args), 1):
        rows = table[i].view(args.vision_max_num_chunks, *shape[2:])
        found[:h, :w] = rows[: h * w].unflatten(0, (h, w))
    return found


LLAMA_VISION = Family(
    name="llama-vision",
    extra_ids=EXTRA_IDS,
    args=VisionArgs,
    network=VisionTransformer,
    shapes=shapes,
    architectures=frozenset({"MllamaForConditionalGeneration"}),
    claims=lambda config: (
        config.get("model_type") == "mllama"
        or config.get("architectures") == ["MllamaForConditionalGeneration"]
    ),
    read_config=read_config,
    nest_config=nest_config,
    processor=processor,
    write_params=write_params,
    meta_names=MetaNames(),
    hf_names=OnDisk(),
    module_name=module_name,
    fused=fused,
    cached_per_head=lambda args: 2 * args.vision_num_cross_attention_layers * args.image_cache,
    # Of 4 tiles: what blocks leave, features, and queries, keys and values as they are and padded.
    encoder_values=lambda args: args.vision_max_num_chunks * args.tokens_per_tile
    * args.vision_width * (12 + 2 * len(args.vision_features)),
)  # fmt: skip
