"""Llama 4 in files: names, shapes and settings of each format."""

import re
from dataclasses import replace
from math import gcd
from typing import Any, Dict, List, Optional, Sequence, Tuple

from llama.families import llama4_vision_files as vision
from llama.families.family import Family, Fused, Shape, llama_shapes, whole
from llama.families.llama4 import Llama4Args, Llama4Transformer
from llama.families.names import GGUF, HF, Names


def shapes(args: Llama4Args) -> Dict[str, Shape]:
    """Meta's name and whole shape of every weight. Each expert's matrices are weights of their own,
    a row for each output; files hold those of all experts as one tensor, see `fused`."""
    found: Dict[str, Shape] = {}
    for name, shape in llama_shapes(args).items():
        layer, network, matrix = name.partition(".feed_forward.")
        if not network or not args.has_experts(int(layer.split(".")[1])):
            found[name] = shape
            continue
        assert args.num_experts is not None and args.expert_dim is not None
        if matrix == "w1.weight":
            found[f"{layer}{network}router.weight"] = (args.num_experts, args.dim)
        inner = (args.expert_dim, args.dim)
        for expert in ("shared_expert", *(f"experts.{e}" for e in range(args.num_experts))):
            found[f"{layer}{network}{expert}.{matrix}"] = inner[:: -1 if matrix[1] == "2" else 1]
    return found | vision.shapes(args)


# What each format calls the tensors of all experts, and whose matrices one of them holds.
EXPERTS: Dict[str, Dict[str, Tuple[str, ...]]] = {
    "meta": {"moe_w_in_eD_F": ("w1",), "moe_w_swiglu_eD_F": ("w3",), "moe_w_out_eF_D": ("w2",)},
    "hf": {"gate_up_proj": ("w1", "w3"), "down_proj": ("w2",)},
    "gguf": {"gate": ("w1",), "up": ("w3",), "down": ("w2",)},
}
EXPERTS_AT = {
    "meta": "layers.{}.feed_forward.experts.{}",
    "hf": "model.layers.{}.feed_forward.experts.{}",
    "gguf": "blk.{}.ffn_{}_exps.weight",
}
# What the released files in Meta's format call weights otherwise, or hold as one.
RELEASED = {
    "attention.wqkv.layer_norm_weight": ("attention_norm",),
    "attention.wqkv.weight": ("attention.wq", "attention.wk", "attention.wv"),
    "feed_forward.norm.weight": ("ffn_norm",),
    "feed_forward.mlp.layer_norm_weight": ("ffn_norm",),
    "feed_forward.mlp.fc1_weight": ("feed_forward.w1", "feed_forward.w3"),
    "feed_forward.mlp.fc2_weight": ("feed_forward.w2",),
    "feed_forward.w_in_shared_FD.weight": ("feed_forward.shared_expert.w1",),
    "feed_forward.w_swiglu_FD.weight": ("feed_forward.shared_expert.w3",),
    "feed_forward.w_out_shared_DF.weight": ("feed_forward.shared_expert.w2",),
}


def fused(args: Llama4Args, form: str) -> Dict[str, Fused]:
    """What a format ("meta", "hf", "gguf") holds as one tensor, by its name there, and what else
    is "released" in Meta's format."""
    found: Dict[str, Fused] = {}
    for i in range(args.n_layers):
        network = f"layers.{i}.feed_forward"
        if form == "released":
            for theirs, ours in RELEASED.items():
                parts = tuple((f"layers.{i}.{stem}.weight",) for stem in ours)
                found[f"layers.{i}.{theirs}"] = Fused(parts)
        elif args.has_experts(i):
            for theirs, matrices in EXPERTS[form].items():
                found[EXPERTS_AT[form].format(i, theirs)] = Fused(
                    tuple(
                        tuple(f"{network}.experts.{e}.{m}.weight" for m in matrices)
                        for e in range(args.num_experts or 0)
                    ),
                    transposed=form != "gguf",
                    stacked=form != "meta",
                )
            if form == "meta":
                router = Fused(((f"{network}.router.weight",),), transposed=True)
                found[f"{network}.router_DE"] = router
    if form != "hf" or args.vision_layers is None:
        return found
    # As they are written; those that are read have lost the prefix (see `HFNames`).
    names = HFNames(HF.layers, HF_STEMS)
    together = {one for how in found.values() for group in how.groups for one in group}
    found |= {f"language_model.{name}": how for name, how in found.items()}
    for one in shapes(args).keys() - together:
        if not one.startswith(vision.PREFIXES):
            found[f"language_model.{names.theirs(one)}"] = Fused(((one,),))
    return found | vision.hf_fused(args)


class HFNames(Names):
    """Those of Llama4ForCausalLM. In the model with vision they begin with "language_model."; in
    quantized ones each expert's matrices may be weights of their own."""

    def meta(self, name: str) -> str:
        name = name.removeprefix("language_model.")
        expert = re.fullmatch(r"model\.(layers.+\.experts\.\d+)\.(gate|down|up)_proj\.weight", name)
        if expert is None:
            return super().meta(name)
        return f"{expert[1]}.{ {'gate': 'w1', 'down': 'w2', 'up': 'w3'}[expert[2]] }.weight"


def stems(layer: str, shared: str, router: str) -> Dict[str, str]:
    """Names of networks in another format, with places for gate, down and up, to Meta's."""
    found = {router: "feed_forward.router"}
    for theirs, ours in (("gate", "w1"), ("down", "w2"), ("up", "w3")):
        found[layer.format(theirs)] = f"feed_forward.{ours}"
        found[shared.format(theirs)] = f"feed_forward.shared_expert.{ours}"
    return found


HF_STEMS = {theirs: ours for theirs, ours in HF.to_meta.items() if "mlp" not in theirs} | stems(
    "feed_forward.{}_proj", "feed_forward.shared_expert.{}_proj", "feed_forward.router"
)
GGUF_STEMS = GGUF.to_meta | stems("ffn_{}", "ffn_{}_shexp", "ffn_gate_inp")


# --- config.json ---------------------------------------------------------------------------------

# What transformers takes where config.json doesn't say (Llama4TextConfig).
DEFAULTS: Dict[str, Any] = {
    "vocab_size": 202048, "hidden_size": 5120, "intermediate_size": 8192,
    "intermediate_size_mlp": 16384, "num_hidden_layers": 48, "num_attention_heads": 40,
    "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "num_experts_per_tok": 1,
    "num_local_experts": 16, "interleave_moe_layer_step": 1, "use_qk_norm": True,
    "no_rope_layer_interval": 4, "attention_chunk_size": 8192, "attn_temperature_tuning": True,
    "floor_scale": 8192, "attn_scale": 0.1,
}  # fmt: skip
# Of training, of images, and what has been looked at.
LEFT_OUT = {
    "output_router_logits", "router_aux_loss_coef", "router_jitter_noise", "for_llm_compressor",
    "cache_implementation", "vision_config", "boi_token_index", "eoi_token_index",
    "image_token_index", "boi_token_id", "eoi_token_id", "image_token_id", "model_type",
    "text_config",
}  # fmt: skip


def every(layers: Sequence[Any], n_layers: int, what: str) -> Optional[int]:
    """n, where these are every n-th of the layers; None where there are none.

    Raises:
        ValueError: others.
    """
    if not layers:
        return None
    n = layers[0] + 1 if type(layers[0]) is int and layers[0] >= 0 else n_layers + 1
    if len(layers) != n_layers // n or any(at != n * k - 1 for k, at in enumerate(layers, 1)):
        raise ValueError(f"{what} in the layers {str([*layers])[:80]}: not in every n-th one")
    return n


def read_config(config: Dict[str, Any]) -> Dict[str, Any]:
    """See `Family.read_config`."""
    text = config.get("text_config") or {}
    if not isinstance(text, dict):
        raise ValueError(f"text_config={text!r:.80} isn't an object")
    given, sight = {**config, **text}, vision.read_config(config)
    config.clear()
    config |= DEFAULTS | {key: given[key] for key in given.keys() - LEFT_OUT}
    take = config.pop

    def number(key: str, least: int = 1) -> int:
        return whole(key, take(key), least)

    n_layers = config["num_hidden_layers"] = number("num_hidden_layers")
    expert_dim = number("intermediate_size")
    config["intermediate_size"] = number("intermediate_size_mlp")

    def layers(key: str, kind: type = int) -> List[Any]:
        """A list, by default empty."""
        found = take(key, None) or []
        if not isinstance(found, list) or not all(isinstance(one, kind) for one in found):
            raise ValueError(f"{key}={found!r:.80} isn't a list of {kind.__name__}")
        return found

    step, interval = take("interleave_moe_layer_step"), take("no_rope_layer_interval")
    none = config.get("moe_layers") == []
    step = every(layers("moe_layers"), n_layers, "moe_layers: experts") or step
    if rope := layers("no_rope_layers"):  # 1 where there is RoPE
        interval = every(
            [i for i, has in enumerate(rope) if not has], len(rope), "no_rope_layers: 0"
        )
    experts, chunk = number("num_local_experts", 0) or None, take("attention_chunk_size")
    experts = None if none or not step else experts
    fields = {
        "num_experts": experts,
        "top_k": number("num_experts_per_tok"),
        "interleave_moe_layer_step": step or 1,
        "expert_dim": expert_dim if experts else None,
        "nope_layer_interval": interval,
        "attention_chunk_size": chunk,
        "use_qk_norm": take("use_qk_norm"),
        "attn_temperature_tuning": bool(take("attn_temperature_tuning")),
        "floor_scale": take("floor_scale"),
        "attn_scale": take("attn_scale"),
    }
    if kinds := layers("layer_types", str):
        if set(kinds) == {"full_attention"}:
            fields["attention_chunk_size"] = None
        elif kinds != [
            "full_attention" if interval and (i + 1) % interval == 0 else "chunked_attention"
            for i in range(len(kinds))
        ]:
            raise ValueError("layer_types: chunks of attention aren't those of layers with RoPE")
    return fields | sight


def write_config(args: Llama4Args) -> Dict[str, Any]:
    """See `Family.write_config`."""
    layers = range(args.n_layers)
    whole = {"layer_types": ["full_attention"] * args.n_layers}  # it wants a size even so
    return {
        "architectures": ["Llama4ForCausalLM"],
        "model_type": "llama4_text",
        "intermediate_size": args.expert_dim or args.hidden_dim,
        "intermediate_size_mlp": args.hidden_dim,
        "num_local_experts": args.num_experts or 0,
        "num_experts_per_tok": args.top_k,
        "interleave_moe_layer_step": args.interleave_moe_layer_step,
        "moe_layers": [i for i in layers if args.has_experts(i)],
        "no_rope_layers": [int(args.has_rope(i)) for i in layers],
        "use_qk_norm": args.use_qk_norm,
        "attention_chunk_size": args.attention_chunk_size or args.max_seq_len,
        "attn_temperature_tuning": args.attn_temperature_tuning,
        "floor_scale": int(args.floor_scale),
        "attn_scale": args.attn_scale,
        **(whole if args.attention_chunk_size is None else {}),
    }


# --- params.json ---------------------------------------------------------------------------------


def expert_dim(params: Dict[str, Any], moe: Dict[str, Any]) -> int:
    """An expert's width, by Meta's formula.

    Raises:
        ValueError: a number that is none, or a width below 1.
    """
    given = {**params, **moe}

    def number(key: str, default: float = 0.0) -> float:
        value = given.get(key)
        value = default if value is None else value
        if type(value) not in (int, float) or not 0 < value < 1 << 31:
            raise ValueError(f"{key}={value!r:.80} isn't a positive number")
        return value

    width = int(2 * int(number("ffn_exp") * number("dim")) / 3)
    width = int(number("ffn_dim_multiplier", 1.0) * width)
    if moe.get("auto_scale_F", True):  # as many weights at work as in a network without experts
        width = int(width / (number("capacity_factor", 1.0) + 1))
    if width < 1:
        raise ValueError(f"ffn_exp={given['ffn_exp']} gives experts without width")
    return width + -width % int(number("multiple_of", 256))


def read_params(params: Dict[str, Any]) -> Dict[str, Any]:
    """See `Family.read_params`."""
    ours = {key: value for key, value in params.items() if value is not None}
    ours |= vision.read_params(ours.pop("vision_args", None))
    moe = ours.pop("moe_args", {})
    if ours.get("use_scaled_rope"):  # released with Llama 4 Scout's own values left out
        ours = {"rope_scaling_factor": 16.0, "rope_high_freq_factor": 1.0} | ours
    if moe:
        if not isinstance(moe, dict):
            raise ValueError(f"moe_args={moe!r:.80} isn't an object")
        ours["expert_dim"] = expert_dim(params, moe)
        ours["num_experts"] = moe.get("num_experts")
        for key in ("top_k", "interleave_moe_layer_step"):
            ours[key] = moe.get(key, 1)
    ours.pop("ffn_exp", None)
    return ours


def write_params(args: Llama4Args) -> Dict[str, Any]:
    """See `Family.write_params`.

    Raises:
        ValueError: a width of experts that Meta's formula doesn't give.
    """
    own = (
        "nope_layer_interval", "attention_chunk_size", "use_qk_norm", "attn_temperature_tuning",
        "floor_scale", "attn_scale",
    )  # fmt: skip
    params = {key: getattr(args, key) for key in own} | vision.write_params(args)
    if args.num_experts is None or args.expert_dim is None:
        return params
    unit, base = gcd(args.hidden_dim, args.expert_dim), int(8 * args.dim / 3)
    params |= {"multiple_of": unit, "ffn_dim_multiplier": args.hidden_dim / base}
    middle = (args.expert_dim - unit / 2) / params["ffn_dim_multiplier"]  # it is rounded up
    params |= {"ffn_exp": 1.5 * middle / args.dim}
    params["moe_args"] = {
        "num_experts": args.num_experts,
        "top_k": args.top_k,
        "interleave_moe_layer_step": args.interleave_moe_layer_step,
        "auto_scale_F": False,
    }
    if expert_dim({"dim": args.dim, **params}, params["moe_args"]) != args.expert_dim:
        raise ValueError(f"params.json can't say that experts are {args.expert_dim} wide")
    return params


# --- GGUF ----------------------------------------------------------------------------------------

# What llama.cpp computes with, whatever the file says.
LLAMA_CPP = {
    "attention_chunk_size": 8192, "nope_layer_interval": 4, "attn_temperature_tuning": True,
    "floor_scale": 8192.0, "attn_scale": 0.1,
}  # fmt: skip
GGUF_KEYS = {
    "expert_count": "num_experts",
    "expert_used_count": "top_k",
    "interleave_moe_layer_step": "interleave_moe_layer_step",
    "expert_feed_forward_length": "expert_dim",
}


def read_gguf(metadata: Dict[str, Any]) -> Dict[str, Any]:
    """See `Family.read_gguf`."""
    fields = {ours: metadata.pop(key) for key, ours in GGUF_KEYS.items() if key in metadata}
    fields["use_qk_norm"] = fields.get("num_experts") != 128  # Maverick has none
    if metadata.pop("attention.sliding_window", None) == 0:  # no chunks, and RoPE everywhere
        return fields
    return fields | LLAMA_CPP


def write_gguf(args: Llama4Args) -> Dict[str, Any]:
    """See `Family.write_gguf`.

    Raises:
        ValueError: a shape with which llama.cpp would compute something else; images.
    """
    if args.vision_layers is not None:
        raise ValueError("a GGUF file holds the text model alone: write `text_args` of the shape")
    told = {key: getattr(args, field) for key, field in GGUF_KEYS.items()}
    if None in told.values():
        raise ValueError("llama.cpp reads no Llama 4 without experts")
    meant = read_gguf(dict(told))
    for field, value in meant.items():
        if getattr(args, field) != value:
            raise ValueError(
                f"{field}={getattr(args, field)}: llama.cpp, which GGUF is for, has {value}"
            )
    return told


LLAMA4 = Family(
    name="llama4",
    args=Llama4Args,
    network=Llama4Transformer,
    shapes=shapes,
    architectures=frozenset({"Llama4ForCausalLM", "Llama4ForConditionalGeneration"}),
    claims=lambda config: config.get("model_type") in ("llama4", "llama4_text"),
    read_config=read_config,
    write_config=write_config,
    nest_config=vision.nest_config,
    processor=vision.processor,
    read_params=read_params,
    write_params=write_params,
    hf_names=HFNames(HF.layers, HF_STEMS),
    rotated=(),
    gguf=frozenset({"llama4"}),
    gguf_names=Names(GGUF.layers, GGUF_STEMS),
    read_gguf=read_gguf,
    write_gguf=write_gguf,
    fused=fused,
    text_args=lambda args: replace(args, vision_layers=None),
    left_out=lambda fields: () if fields.get("vision_layers") else vision.PREFIXES,
    # Of images that are kept, and of a pass: what blocks leave, queries, keys and values, and more.
    chunks=lambda args: args.chunks,
    encoder_values=lambda args: 0 if args.vision_layers is None
    else args.image_cache * args.dim + args.most_tiles * args.vision_width * 16
    * (args.vision_chunk_size // args.vision_patch_size) ** 2,
)  # fmt: skip
