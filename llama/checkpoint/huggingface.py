"""Hugging Face's format: config.json and *.safetensors (or pytorch_model*.bin), read and written.

Formats: transformers' LlamaConfig and LlamaForCausalLM; the weights are in `safetensors.py`.
"""

import math
import re
from pathlib import Path
from types import MappingProxyType
from typing import AbstractSet, Any, Callable, Dict, List, Mapping, Optional, Set, Tuple

import torch

from llama.checkpoint.fused import Part, cut, plan, stored_as
from llama.checkpoint.pth import index_pth
from llama.checkpoint.safetensors import index_safetensors, interleave, write_safetensors
from llama.checkpoint.schemes import Scheme, assemble, open_scheme
from llama.checkpoint.schemes.weight import QuantizedWeight
from llama.checkpoint.shapes import checked_args, weight_shapes
from llama.checkpoint.source import Checkpoint, Shape, Stored, find_tokenizer
from llama.checkpoint.writing import Progress, dtype_of, no_progress
from llama.families.family import Family
from llama.families.registry import FAMILIES, family_of, of_config
from llama.model import ModelArgs
from llama.text.files import beside, read_object, write_json
from llama.text.vocabulary import writing as writing_vocabulary
from llama.tokenizer import Tokenizer

# Those with a head of another kind, and who reads them.
CLASSIFIER = "LlamaForSequenceClassification"
HEADS = {
    CLASSIFIER: "classification.SequenceClassifier",
    "LlamaForTokenClassification": "token_classification.TokenClassifier",
    "LlamaForQuestionAnswering": "token_classification.QuestionAnswerer",
}

# Keys of config.json that don't change what the network computes:
IGNORED = {
    "_name_or_path", "_attn_implementation_autoset", "architectures", "attention_dropout",
    "auto_map", "bos_token_id", "chunk_size_feed_forward", "dtype", "eos_token_id", "id2label",
    "initializer_range", "is_llama_config", "label2id", "max_window_layers", "num_labels",
    "output_attentions", "output_hidden_states", "pad_token_id", "pretraining_tp",
    "return_dict", "rope_interleaved", "tokenizer_class", "torch_dtype", "torchscript",
    "transformers_version", "transformers.js_config", "unk_token_id", "use_cache",
    "_commit_hash", "problem_type", "is_encoder_decoder", "resid_pdrop", "embd_pdrop",
    "quantization_config",  # see `read_scheme`
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
    config = read_object(path)
    family = of_config(config)
    known = family.architectures if known is None else known
    architectures = config.get("architectures") or ["LlamaForCausalLM"]
    if not isinstance(architectures, list) or not known >= set(map(str, architectures)):
        hint = ""
        reader = HEADS.get(str(architectures[0])) if isinstance(architectures, list) else None
        if reader:
            hint = f". It is a classifier: llama.training.{reader}.build reads it"
        readable = sorted({name for one in FAMILIES for name in one.architectures})
        raise ValueError(
            f"{path}: architectures={architectures}; read here: {', '.join(readable)}{hint}"
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


def _read_rope(path: Path, rope: Dict[str, Any]) -> Dict[str, Any]:
    """Both spellings: `rope_scaling` with `type` or `rope_type`, and `rope_parameters`."""
    kind = rope.pop("rope_type", None) or rope.pop("type", None) or "default"
    rope.pop("type", None)
    if not isinstance(kind, str) or kind not in ROPE:
        known = ", ".join([*ROPE, "yarn", "dynamic"])
        raise ValueError(f"{path}: rope_type={kind!r}; known are {known}")
    args: Dict[str, Any] = {"use_scaled_rope": kind == "llama3"}
    for theirs, ours in {"rope_theta": "rope_theta", **ROPE[kind]}.items():
        value = rope.pop(theirs, None)
        if type(value) not in (int, float) or not 0 < value < 1 << 31:
            raise ValueError(f"{path}: RoPE of the type {kind!r} with {theirs}={value!r}")
        whole = ours == "rope_original_max_seq_len" and value == int(value)
        args[ours] = int(value) if whole else float(value)
    rope.pop("partial_rotary_factor", None) if rope.get("partial_rotary_factor") == 1.0 else None
    if rope:
        raise ValueError(f"{path}: RoPE has unknown settings: {', '.join(sorted(rope))}")
    return args


def read_scheme(path: Path) -> Optional[Scheme]:
    """How the weights beside config.json are quantized; None: they aren't.

    Raises:
        ValueError: a scheme that can't be read.
    """
    config = read_object(path).get("quantization_config")
    try:
        return None if config is None else open_scheme(config)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def index_tensors(file: Path, *, codes: bool = False) -> Dict[str, Stored]:
    """Where each tensor of a .safetensors or .bin file lies.

    Args:
        codes: it may hold more than floats, see `source.CODES`.

    Raises:
        ValueError: a damaged file.
    """
    index = index_safetensors if file.suffix == ".safetensors" else index_pth
    return index(file, codes=codes)


class HFCheckpoint:
    """A directory in Hugging Face's format, of an architecture that is known."""

    def __init__(self, path: Path, known: Optional[AbstractSet[str]] = None):
        self.path = Path(path)
        family, fields = read_config(self.path / "config.json", known)
        scheme = read_scheme(self.path / "config.json")
        ours = family.hf_names.meta
        tensors: Dict[str, Stored] = {}
        self.left_out = 0  # weights that the network doesn't use
        for file in self._files():
            for name, stored in index_tensors(file, codes=scheme is not None).items():
                if name.startswith("transformer."):  # in LlamaForQuestionAnswering
                    name = name.replace("transformer.", "model.", 1)
                if name.startswith(family.left_out):
                    self.left_out += 1
                    continue
                if re.fullmatch(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq", name):
                    continue  # what follows from rope_theta; old files have it
                if name in tensors:
                    other = tensors[name].file.name
                    raise ValueError(f"{ours(name)} is both in {other} and in {file}")
                tensors[name] = stored
        plain, quantized = assemble(scheme, tensors)
        found: Dict[str, Part] = {ours(name): part for name, part in (plain | quantized).items()}
        self.args = checked_args(self.path / "config.json", fields, len(found), family)
        self._stored = cut(found, family.fused(self.args, "hf"), weight_shapes(self.args))
        self.quantized = {
            name: weight
            for name, weight in self._stored.items()
            if isinstance(weight, QuantizedWeight)
        }
        if self.args.tied_embeddings:
            self._stored.pop("output.weight", None)  # as transformers does
        self.tokenizer_path: Optional[Path] = find_tokenizer(self.path)

    def _files(self) -> List[Path]:
        """The files with weights, by the index where there is one."""
        for stem, suffix in (("model", "safetensors"), ("pytorch_model", "bin")):
            index = self.path / f"{stem}.{suffix}.index.json"
            single = self.path / f"{stem}.{suffix}"
            if index.exists():
                weight_map = read_object(index).get("weight_map")
                if not isinstance(weight_map, dict) or not weight_map:
                    raise ValueError(f"{index} has no weight_map")
                return self._indexed(index, suffix, {str(name) for name in weight_map.values()})
            if single.is_file():
                return [single]
        raise ValueError(f"{self.path} has no model.safetensors, pytorch_model.bin or their index")

    def _indexed(self, index: Path, suffix: str, names: Set[str]) -> List[Path]:
        """The files that an index names, all of which must be there, and no others."""
        for name in sorted(names):
            if Path(name).name != name or not name.endswith("." + suffix):
                raise ValueError(
                    f"{index}: weight_map has {name!r}, not a .{suffix} file beside it"
                )
            if not (self.path / name).exists():
                raise ValueError(f"{index} names {name}, which is missing; fetch it")
        stem = min(names).split("-")[0]
        extra = {f.name for f in self.path.glob(f"{stem}-*-of-*.{suffix}")} - names
        if extra:
            raise ValueError(f"{index} doesn't know {min(extra)}: two checkpoints in one place?")
        return [self.path / name for name in sorted(names)]

    def shapes(self) -> Dict[str, Shape]:
        return {name: stored.shape for name, stored in self._stored.items()}

    def stored_as(self, name: str) -> str:
        return stored_as(self._stored[name])

    def read(self, name: str, axis: int, start: int, stop: int) -> torch.Tensor:
        return self._in_order(name, self._stored[name].read, axis, start, stop)

    def read_blocks(self, name: str, axis: int, start: int, stop: int) -> torch.Tensor:
        """The same of a quantized weight, as blocks, (rows, bytes of a row).

        Along axis 1 start and stop are whole blocks.
        """
        return self._in_order(name, self.quantized[name].read_blocks, axis, start, stop)

    def _in_order(
        self, name: str, read: Callable[[int, int, int], torch.Tensor], *of: int
    ) -> torch.Tensor:
        """What `read` returns, rows in Meta's order."""
        axis, start, stop = of
        if not family_of(self.args).is_rotated(name):
            return read(axis, start, stop)
        d = self.args.head_dim
        if axis != 0:
            return interleave(read(axis, start, stop), d)
        first, last = start // d * d, -(-stop // d) * d  # rows change places within a head
        return interleave(read(0, first, last), d)[start - first : stop - first]


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
    return family_of(args).nest_config(args, config)


def write(
    source: Checkpoint,
    path: str | Path,
    dtype: Optional[torch.dtype] = None,
    *,
    tokenizer: Optional[Tokenizer] = None,
    max_shard_bytes: int = 5 * 10**9,
    force: bool = False,
    progress: Progress = no_progress,
    head: Mapping[str, torch.Tensor] = MappingProxyType({}),
    settings: Mapping[str, Any] = MappingProxyType({}),
) -> Path:
    """Write a directory that transformers' from_pretrained loads; returns it.

    Args:
        dtype: of the weights; None keeps what they are stored in (fp32 where quantized).
        tokenizer: whose files are written beside the weights.
        max_shard_bytes: size beyond which another .safetensors file is begun.
        force: overwrite what is there, once the new directory is complete.
        head: weights beyond those of the shape, by Hugging Face's names, as they are.
        settings: keys of config.json that take the place of what follows from the shape.

    Raises:
        FileExistsError: the directory exists, without `force`.
    """
    path, args = Path(path), source.args
    shapes = weight_shapes(args)
    dtypes = {name: dtype or dtype_of(source, name) for name in shapes}
    parts = plan(shapes, family_of(args).fused(args, "hf"))
    sizes = {
        name: sum(math.prod(shapes[one]) * dtypes[one].itemsize for one in of)
        for name, of in parts.items()
    }
    shards: List[List[str]] = [[]]
    for name, size in sizes.items():
        if shards[-1] and sum(sizes[one] for one in shards[-1]) + size > max_shard_bytes:
            shards.append([])
        shards[-1].append(name)
    with beside(path, force) as partial:
        partial.mkdir()
        files = ["model.safetensors"]
        if len(shards) > 1:
            n = len(shards)
            files = [f"model-{i:05d}-of-{n:05d}.safetensors" for i in range(1, n + 1)]
        for file, shard in zip(files, shards, strict=True):
            extra = head if file == files[-1] else {}
            write_safetensors(source, partial / file, shard, dtypes, progress, extra)
        if len(shards) > 1:
            weight_map = {
                family_of(args).hf_names.theirs(name) if name in shapes else name: file
                for file, shard in zip(files, shards, strict=True)
                for name in shard
            } | dict.fromkeys(head, files[-1])
            total = sum([*sizes.values(), *(weight.nbytes for weight in head.values())])
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            write_json(partial / "model.safetensors.index.json", index)
        bos_id: Optional[int] = None
        eos: List[int] = []
        if tokenizer is not None:
            bos_id, eos = tokenizer.bos_id, sorted(tokenizer.stop_tokens)
            writing_vocabulary.write_for_hugging_face(tokenizer.vocabulary, partial)
        config = config_of(args, next(iter(dtypes.values())), bos_id, eos)
        write_json(partial / "config.json", {**config, **settings})
    return path
