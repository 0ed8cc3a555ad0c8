"""LoRA adapters in PEFT's layout: adapter_config.json and adapter_model.safetensors.

An adapter adds scale · B A to some of a model's matrices (arXiv 2106.09685). `Merged` is a
checkpoint with one added as its slices are read, so that whatever reads checkpoints, on any number
of ranks, quantized or converted, takes adapters too.
Format: github.com/huggingface/peft, `LoraConfig` and `get_peft_model_state_dict`.
"""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional

import torch

from llama.checkpoint.huggingface import index_tensors
from llama.checkpoint.safetensors import interleave, split_halves, write_safetensors
from llama.checkpoint.shapes import weight_shapes
from llama.checkpoint.source import DTYPES, Checkpoint, InMemory, Shape
from llama.checkpoint.writing import no_progress
from llama.families.registry import family_of
from llama.layers import parallel
from llama.model import ModelArgs
from llama.text.files import beside, read_object, write_json

PREFIX = "base_model.model."
TAKE = r"(layers|resblocks)\.\d+\.|vision_(projection|adapter)"  # what takes an adapter
HEAD, HEADS = f"{PREFIX}score.weight", ["classifier", "score"]  # PEFT's names for SEQ_CLS

# Settings that say how an adapter was trained, or that are read below.
IGNORED = {
    "auto_mapping", "alpha_pattern", "base_model_name_or_path", "corda_config",
    "ensure_weight_tying", "eva_config", "exclude_modules", "inference_mode", "layers_pattern",
    "layers_to_transform",
    "loftq_config", "lora_alpha", "lora_dropout", "lora_ga_config", "megatron_config",
    "megatron_core", "peft_version", "qalora_group_size", "r", "rank_pattern", "revision",
    "runtime_config", "target_modules", "task_type",
}  # fmt: skip
# Those that have to have one of these values. Any other must be off: it would change the output.
REQUIRED: Dict[str, tuple] = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "use_rslora": (True, False, None),
    # What others begin with is taken out of the model's own weights.
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva"),
}


class Pair(NamedTuple):
    """What is added to one weight W (out, in): W + scale · B A."""

    A: torch.Tensor  # (r, in)
    B: torch.Tensor  # (out, r), its rows in Meta's order
    scale: float  # alpha / r


@dataclass(frozen=True)
class Adapter:
    """Pairs by Meta's name of the weight, for a model of one shape."""

    pairs: Dict[str, Pair]
    path: Path = Path("(memory)")
    head: Optional[torch.Tensor] = None  # of a classifier, (labels, dim), in its own's place


def read_adapter(path: str | Path, args: ModelArgs, *, classifier: bool = False) -> Adapter:
    """Open an adapter for a model of this shape.

    Args:
        classifier: it may hold a head, too, as PEFT writes it for the task SEQ_CLS.

    Raises:
        FileNotFoundError: no adapter there.
        ValueError: a broken one, one of another kind than plain LoRA, or for another model.
    """
    path = Path(path)
    file, config_file = path / "adapter_model.safetensors", path / "adapter_config.json"
    if not file.is_file() and (path / "adapter_model.bin").is_file():  # as PEFT once wrote it
        file = path / "adapter_model.bin"
    for needed in (config_file, file):
        if not needed.is_file():
            below = sorted(str(one.parent) for one in path.glob(f"*/{config_file.name}"))
            hint = f"; there are {', '.join(below)}: name one" if below else ""
            raise FileNotFoundError(f"no adapter at {path}: {needed.name} isn't there{hint}")
    config = read_object(config_file)
    for key in sorted(config, key=lambda key: key != "peft_type"):  # the others depend on it
        value = config[key]
        if classifier and key == "modules_to_save" and {*(value or ())} <= {*HEADS}:
            continue
        if key not in IGNORED and value not in REQUIRED.get(key, (None, False, [], {}, "")):
            raise ValueError(
                f"{config_file}: {key}={value!r}, which isn't computed here: plain LoRA is"
            )
    stored, shapes = index_tensors(file), weight_shapes(args)
    family, ours = family_of(args), {theirs: name for name, theirs in _stored(args).items()}
    halves: Dict[str, Dict[str, torch.Tensor]] = {}
    modules: Dict[str, str] = {}
    head = stored.pop(HEAD, None) if classifier else None
    for key, where in stored.items():
        match = re.fullmatch(re.escape(PREFIX) + r"(.+)\.lora_([AB])\.weight", key)
        name = family.hf_names.meta(match[1] + ".weight") if match else key
        name = ours.get(name, name)
        if match is None or len(shapes.get(name, ())) != 2 or not re.search(TAKE, name):
            raise ValueError(
                f"{file} holds {key}, which is no LoRA of a matrix of this model's blocks. Of what "
                "else an adapter changes, PEFT's merge_and_unload makes a checkpoint"
            )
        modules[name] = match[1]
        halves.setdefault(name, {})[match[2]] = where.read(0, 0, where.shape[0]).float()
    if not halves:
        raise ValueError(f"{file} holds no weights")
    pairs = {}
    for name, half in halves.items():
        out, inner = shapes[name]
        rank = len(half["A"]) if "A" in half else -1
        found = {key: tuple(one.shape) for key, one in half.items()}
        if found != {"A": (rank, inner), "B": (out, rank)}:
            raise ValueError(
                f"{file}: {name} of shape {(out, inner)} can't have a LoRA of the shapes {found}: "
                "an adapter of another model?"
            )
        B = interleave(half["B"], args.head_dim) if family.is_rotated(name) else half["B"]
        scale = _scale(config_file, config, modules[name], rank)
        pairs[name] = Pair(half["A"], B.contiguous(), scale)
    return Adapter(pairs, path, None if head is None else head.read(0, 0, head.shape[0]).float())


def shards(adapter: Adapter, args: ModelArgs) -> Dict[str, Pair]:
    """This rank's part of each pair: rows of B, or columns of A, as the weight is sharded.

    Raises:
        ValueError: an adapter of another model.
    """
    shapes, found = weight_shapes(args), {}
    for name, pair in adapter.pairs.items():
        A, B, _ = pair
        if shapes.get(name) != (len(B), A.shape[1]) or len(A) != B.shape[1]:
            raise ValueError(
                f"{name} takes no {tuple(B.shape)} x {tuple(A.shape)}: an adapter of another model?"
            )
        heads = args.n_heads, args.n_kv_heads
        if parallel.shard_axis(name) == 0:
            found[name] = pair._replace(B=parallel.part(name, B, *heads))
        else:
            found[name] = pair._replace(A=parallel.part(name, A, *heads))
    return found


def _stored(args: ModelArgs) -> Dict[str, str]:
    """Meta's names to those in Hugging Face's files, where these depend on the shape."""
    fused = family_of(args).fused(args, "hf")
    alone = {name: how for name, how in fused.items() if how.as_rows and len(how.groups) == 1}
    return {how.groups[0][0]: name for name, how in alone.items() if len(how.groups[0]) == 1}


def _scale(path: Path, config: Dict[str, Any], module: str, rank: int) -> float:
    """alpha / r, or alpha / sqrt(r) (rsLoRA, 2312.03732), by the patterns that a name matches."""

    def setting(key: str, pattern: str) -> Any:
        values = config.get(pattern) or {}
        if not isinstance(values, dict):
            raise ValueError(f"{path}: {pattern}={values!r} isn't an object of values by name")
        for name_pattern, value in values.items():
            try:
                if re.match(rf"(.*\.)?({name_pattern})$", module):  # as peft matches them
                    return value
            except re.error as error:
                raise ValueError(f"{path}: {pattern}: {name_pattern!r}: {error}") from None
        return config.get(key, 8)

    r, alpha = setting("r", "rank_pattern"), setting("lora_alpha", "alpha_pattern")
    if r != rank or type(alpha) not in (int, float) or not abs(alpha) < 1 << 31:
        raise ValueError(
            f"{path}: r={r!r} and lora_alpha={alpha!r} for {module} (by rank_pattern and "
            f"alpha_pattern, where they name it), whose rank is {rank}"
        )
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def write_adapter(
    adapter: Adapter, path: str | Path, args: ModelArgs, base: str = "", *, force: bool = False
) -> Path:
    """Write a directory that `peft.PeftModel.from_pretrained` loads; returns it.

    Args:
        base: the name of the model that it is for, by which PEFT's Auto classes load it; of
            hf://OWNER/NAME@REVISION, they know the parts.

    Raises:
        FileExistsError: the directory exists, without `force`.
    """
    ranks = {name: len(pair.A) for name, pair in adapter.pairs.items()}
    alphas = {name: pair.scale * ranks[name] for name, pair in adapter.pairs.items()}
    family, stored = family_of(args), _stored(args)
    in_files = {name: stored.get(name) or family.hf_names.theirs(name) for name in adapter.pairs}
    modules = {
        name: family.module_name(theirs).removesuffix(".weight")
        for name, theirs in in_files.items()
    }
    r, alpha = max(ranks.values()), max(alphas.values())
    on_hub = re.fullmatch(r"hf:/+([^/]+/[^/@]+)(?:@([^/]+))?/?", base)
    tensors = {}
    for name, (A, B, _) in adapter.pairs.items():
        B = split_halves(B.contiguous(), args.head_dim) if family.is_rotated(name) else B
        tensors[f"{PREFIX}{modules[name]}.lora_A.weight"] = A.detach()
        tensors[f"{PREFIX}{modules[name]}.lora_B.weight"] = B.detach()

    def others(values: Dict[str, Any], usual: Any) -> Dict[str, Any]:
        return {modules[name]: value for name, value in values.items() if value != usual}

    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": on_hub[1] if on_hub else base,
        "revision": on_hub[2] if on_hub else None,
        "r": r,
        "lora_alpha": alpha,
        "target_modules": _targets(list(modules.values()), 0 if stored else args.n_layers),
        "rank_pattern": others(ranks, r),
        "alpha_pattern": others(alphas, alpha),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    if adapter.head is not None:
        tensors[HEAD] = adapter.head.detach().cpu()
        config |= {"task_type": "SEQ_CLS", "modules_to_save": HEADS}
    with beside(path, force) as partial:
        partial.mkdir()
        file = partial / "adapter_model.safetensors"
        write_safetensors(InMemory(args, {}), file, [], {}, no_progress, tensors)
        write_json(partial / "adapter_config.json", config)
    return Path(path)


def _targets(modules: List[str], n_layers: int) -> List[str]:
    """What PEFT calls the modules: by their last name where all layers have the same ones, and
    nothing else has; n_layers is 0 if something may."""
    stems = sorted({module.rpartition(".")[2] for module in modules})
    return stems if len(modules) == len(stems) * n_layers else sorted(modules)


class Merged:
    """A checkpoint with an adapter added to it, slice by slice as it is read.

    A quantized weight becomes fp32; any other keeps its dtype, rounded once, after the sum in fp32.
    """

    def __init__(self, source: Checkpoint, adapter: Adapter):
        self.source, self.adapter = source, adapter
        self.path, self.args = source.path, source.args
        self.tokenizer_path: Optional[Path] = source.tokenizer_path

    def shapes(self) -> Dict[str, Shape]:
        return self.source.shapes()

    def stored_as(self, name: str) -> str:
        kind = self.source.stored_as(name)
        return kind if name not in self.adapter.pairs or kind in DTYPES else "F32"

    def read(self, name: str, axis: int, start: int, stop: int) -> torch.Tensor:
        weight = self.source.read(name, axis, start, stop)
        if name not in self.adapter.pairs:
            return weight
        A, B, scale = self.adapter.pairs[name]
        A, B = (A, B[start:stop]) if axis == 0 else (A[:, start:stop], B)
        return torch.addmm(weight.float(), B, A, alpha=scale).to(weight.dtype)

    def read_blocks(self, *of: Any) -> torch.Tensor:
        """The stored bytes of a quantized weight that the adapter leaves as it is."""
        source: Any = self.source
        return source.read_blocks(*of)
