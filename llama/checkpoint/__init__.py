"""Checkpoints of any kind, opened and read slice by slice, whatever the number of ranks.

A format's reader knows what its files say (`args`), which weights there are, by Meta's names, and
how to read a range of one of them along one axis. Everything else is here and the same for all
formats: which ranges this rank needs, strictness, dtype, padding. On the CPU a weight whose bytes
are what is asked for stays in the mapped file, of which all processes share one copy; any other is
read straight into its place, so loading never holds more than the model and a part of one tensor.
"""

import dataclasses
import hashlib
import warnings
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, Callable, Dict, Iterator, Mapping, NamedTuple, Optional, Protocol, Tuple

import torch
from torch import nn

from llama.layers import parallel
from llama.model import ModelArgs, Transformer, rope_frequencies

# Rows are read in blocks of about this many elements: what conversion needs in extra memory.
# Smaller than most weights, so that malloc keeps blocks and weights apart: mixed, they leave holes
# between the weights that nothing fits into.
BLOCK = 1 << 19

Shape = Tuple[int, ...]

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


def dtype_name(dtype: torch.dtype) -> str:
    """The short name that safetensors and GGUF have for a dtype."""
    return next((name for name, known in DTYPES.items() if known == dtype), str(dtype)[6:])


class Stored(NamedTuple):
    """Where a tensor lies in a file, row-major."""

    offset: int  # of its first byte
    shape: Shape
    dtype: torch.dtype


class Checkpoint(Protocol):
    """What a reader offers. Names are Meta's; shapes are those of whole, unsharded weights."""

    path: Path
    args: ModelArgs
    tokenizer_path: Optional[Path]  # a tokenizer that comes with the weights

    def shapes(self) -> Dict[str, Shape]:
        """Every weight in the files."""

    def stored_as(self, name: str) -> str:
        """The dtype or quantization type in the file: BF16, Q4_0, ..."""

    def read(self, name: str, axis: int, start: int, stop: int) -> torch.Tensor:
        """[start, stop) of a weight along an axis, in the file's dtype (dequantized: fp32).

        The result may be a view of the mapped file, copied on write.
        """


def open(path: str | Path) -> Checkpoint:
    """Open a directory in Meta's or Hugging Face's format, a .gguf file, or one's directory.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: something there that isn't a checkpoint, or a broken one.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(
            f"no checkpoint at {path}: ./download.sh smollm2 fetches a small one, "
            "./download.sh alone asks for Meta's"
        )
    # Each format is imported where it is met: they import this module, and not each is cheap.
    if (path / "params.json").exists():
        from llama.checkpoint.meta import MetaCheckpoint

        return MetaCheckpoint(path)
    if (path / "config.json").exists():
        from llama.checkpoint.huggingface import HFCheckpoint

        return HFCheckpoint(path)
    from llama.checkpoint.gguf import GGUFCheckpoint

    if path.is_file():
        return GGUFCheckpoint(path)
    ggufs = sorted(path.glob("*.gguf"))
    if len(ggufs) == 1:
        return GGUFCheckpoint(ggufs[0])
    if ggufs:
        names = ", ".join(file.name for file in ggufs)
        raise ValueError(f"{path} holds several checkpoints, name one of them: {names}")
    raise ValueError(
        f"{path} holds no checkpoint: expected params.json with consolidated.*.pth, config.json "
        "with *.safetensors, or a .gguf file"
    )


def foreign_name(name: str, stems: Mapping[str, str], layers: str) -> str:
    """A weight's name in another format, from Meta's, its stems and its prefix of layers."""
    stem, prefix = name.removesuffix(".weight"), ""
    if stem.startswith("layers."):
        _, i, stem = stem.split(".", 2)
        prefix = f"{layers}.{i}."
    return f"{prefix}{stems[stem]}.weight"


def find_tokenizer(directory: Path) -> Optional[Path]:
    """The tokenizer that lies beside weights: tokenizer.json, which says most, or Meta's."""
    places = (directory / name for name in ("tokenizer.json", "tokenizer.model"))
    return next((path for path in places if path.exists()), None)


def checked_args(path: Path, fields: Mapping[str, Any], n_tensors: int) -> ModelArgs:
    """The shape that a file describes, by the fields of ModelArgs, whose values may be anything.

    Raises:
        ValueError: a value of another type, one out of range, or more layers than tensors.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(ModelArgs)}
    for name, value in fields.items():
        default = defaults[name]
        if value is None and default is None:
            continue
        kind: type = int if default is None else type(default)
        kind = float if name == "ffn_dim_multiplier" else kind
        fits = type(value) is kind or (kind is float and type(value) is int)
        if not fits or (kind is not bool and not 0 < value < 1 << 31):
            what = "true or false" if kind is bool else f"a positive {kind.__name__}"
            raise ValueError(f"{path}: {name}={str(value)[:80]} isn't {what}")
    try:
        args = ModelArgs(**fields)
        if args.head_dim % 2:
            raise ValueError(f"RoPE turns pairs of dimensions, and head_dim={args.head_dim} is odd")
        if args.n_layers > n_tensors:  # else naming what is missing could take forever
            raise ValueError(f"{args.n_layers} layers can't be made of {n_tensors} tensors")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return args


@lru_cache
def weight_shapes(args: ModelArgs) -> Mapping[str, Shape]:
    """Meta's name and whole shape of every weight that a model of this shape has."""
    q_dim, kv_dim = args.n_heads * args.head_dim, args.n_kv_heads * args.head_dim
    block: Dict[str, Shape] = {
        "attention.wq.weight": (q_dim, args.dim),
        "attention.wk.weight": (kv_dim, args.dim),
        "attention.wv.weight": (kv_dim, args.dim),
        "attention.wo.weight": (args.dim, q_dim),
        "feed_forward.w1.weight": (args.hidden_dim, args.dim),
        "feed_forward.w2.weight": (args.dim, args.hidden_dim),
        "feed_forward.w3.weight": (args.hidden_dim, args.dim),
        "attention_norm.weight": (args.dim,),
        "ffn_norm.weight": (args.dim,),
    }
    shapes: Dict[str, Shape] = {"tok_embeddings.weight": (args.vocab_size, args.dim)}
    for i in range(args.n_layers):
        shapes.update({f"layers.{i}.{name}": shape for name, shape in block.items()})
    shapes["norm.weight"] = (args.dim,)
    if not args.tied_embeddings:
        shapes["output.weight"] = (args.vocab_size, args.dim)
    return MappingProxyType(shapes)


def check_shapes(checkpoint: Checkpoint) -> None:
    """Compare what the files hold with what the shape of the model asks for.

    Raises:
        ValueError: names that are missing or too many, or a wrong shape.
    """
    expected, found = weight_shapes(checkpoint.args), checkpoint.shapes()
    missing, extra = expected.keys() - found.keys(), found.keys() - expected.keys()
    for what, names in (("lacks", missing), ("holds what a Llama has no place for:", extra)):
        if names:
            some = ", ".join(sorted(names)[:5]) + (", ..." if len(names) > 5 else "")
            raise ValueError(f"{checkpoint.path} {what} {some} ({len(names)} in all)")
    for name, shape in expected.items():
        if found[name] != shape:
            raise ValueError(
                f"{checkpoint.path}: {name} has the shape {found[name]}, "
                f"and its configuration asks for {shape}"
            )


def fingerprint(checkpoint: Checkpoint) -> str:
    """Tells models apart, and not the formats that they are in: a hash of some of each weight."""
    args, shapes = checkpoint.args, weight_shapes(checkpoint.args)
    about = {**shapes, "heads": args.n_heads, "norm_eps": f"{args.norm_eps:.4g}"}
    digest = hashlib.sha256(repr([about, rope_frequencies(args).tolist()]).encode())
    for name, shape in shapes.items():
        whole_head = checkpoint.read(name, 0, 0, min(args.head_dim, shape[0]))
        digest.update(bytes(whole_head[:1].float().contiguous().numpy()))
    return digest.hexdigest()[:16]


def blocks(
    shape: Shape, axis: int, start: int, stop: int, head_dim: int = 1
) -> Iterator[Tuple[int, int]]:
    """[start, stop) of axis 0 in pieces of about BLOCK elements; of another axis, in one piece.

    Pieces are whole heads, within which some formats have the rows in another order.
    """
    step = BLOCK // max(1, shape[-1]) // head_dim * head_dim if axis == 0 else stop - start
    step = max(step, head_dim)
    for begin in range(start, stop, step):
        yield begin, min(begin + step, stop)


def local_shape(args: ModelArgs, name: str, rank: int, world: int) -> Shape:
    """Shape of the part of a weight that one of `world` ranks holds.

    Raises:
        ValueError: a number of ranks that doesn't divide the heads.
    """
    shape = weight_shapes(args)[name]
    parallel.check_world(world, args.n_heads)
    axis = parallel.shard_axis(name)
    if axis is None:
        return shape
    length = parallel.padded(shape[axis], world) // world
    if name.endswith(parallel.KV):  # whole heads, possibly replicated
        heads = parallel.kv_heads(rank, world, args.n_heads, args.n_kv_heads)
        length = len(heads) * args.head_dim
    return shape[:axis] + (length,) + shape[axis + 1 :]


def read_shard(
    checkpoint: Checkpoint,
    name: str,
    rank: int,
    world: int,
    *,
    dtype: Optional[torch.dtype] = None,
    device: Optional[torch.device] = None,
) -> torch.Tensor:
    """The part of a weight that one of `world` ranks holds, padded with zeros where it must be.

    Raises:
        ValueError: a number of ranks that doesn't divide the heads.
    """
    args, shape = checkpoint.args, weight_shapes(checkpoint.args)[name]
    local = local_shape(args, name, rank, world)
    axis, ranges = parallel.shard_axis(name), [(0, shape[0])]
    if axis is None:
        axis = 0
    else:
        ranges = parallel.shard_ranges(
            name, shape[axis], rank, world, args.n_heads, args.n_kv_heads
        )
    begin, end = ranges[0]
    in_place = end - begin == local[axis] and checkpoint.stored_as(name) in DTYPES
    in_place = in_place and (device is None or device.type == "cpu")
    if in_place and dtype in (None, DTYPES[checkpoint.stored_as(name)]):
        return checkpoint.read(name, axis, begin, end)  # the mapped file itself, where it can be
    if ranges == [(0, shape[axis])]:
        axis, ranges = 0, [(0, shape[0])]  # all of it: by rows, in blocks
    out, done = None, 0
    for begin, end in ranges:
        for start, stop in blocks(shape, axis, begin, end, args.head_dim):
            data = checkpoint.read(name, axis, start, stop)
            if out is None:
                out = torch.empty(local, dtype=dtype or data.dtype, device=device)
            out.narrow(axis, done, stop - start).copy_(data)
            done += stop - start
    if out is None:  # nothing but padding
        return torch.zeros(local, dtype=dtype, device=device)
    out.narrow(axis, done, local[axis] - done).zero_()
    return out


def load(
    checkpoint: Checkpoint,
    model: Transformer,
    *,
    dtype: Optional[torch.dtype] = None,
    device: Optional[torch.device] = None,
    replace: Callable[[str], Optional[nn.Module]] = lambda name: None,
) -> Transformer:
    """Fill a model (built on the meta device) with this rank's part of the weights, strictly.

    Warns of weights that are NaN or infinite, of which no answer can come.

    Args:
        replace: asked with each weight's name for a module to stand in place of the one that
            would hold it; None fills that.

    Raises:
        ValueError: weights that are missing, too many or of a wrong shape.
    """
    check_shapes(checkpoint)
    rank, world, replaced = parallel.rank(), parallel.world_size(), set()
    for name in weight_shapes(checkpoint.args):
        owner, _, attribute = name.rpartition(".")
        if (stand_in := replace(name)) is not None:
            model.set_submodule(owner, stand_in)
            replaced.add(name)
            continue
        weight = read_shard(checkpoint, name, rank, world, dtype=dtype, device=device)
        module, old = model.get_submodule(owner), model.get_parameter(name)
        if weight.shape != old.shape:
            raise AssertionError(f"{name}: the plan says {weight.shape}, the model {old.shape}")
        # A sum is NaN or infinite if any value is, and costs a fraction of looking at each.
        if not weight.sum().isfinite() and not weight.isfinite().all():
            warnings.warn(f"{checkpoint.path}: {name} holds NaN or infinity", stacklevel=2)
        setattr(module, attribute, nn.Parameter(weight, requires_grad=old.requires_grad))
    if checkpoint.args.tied_embeddings and "tok_embeddings.weight" not in replaced:
        model.output.weight = model.tok_embeddings.weight
    return model


@dataclasses.dataclass
class InMemory:
    """Weights that are already in memory, by Meta's names, whole: a checkpoint to read or write."""

    args: ModelArgs
    weights: Mapping[str, torch.Tensor]
    path: Path = Path("(memory)")
    tokenizer_path: Optional[Path] = None

    def shapes(self) -> Dict[str, Shape]:
        return {name: tuple(weight.shape) for name, weight in self.weights.items()}

    def stored_as(self, name: str) -> str:
        return dtype_name(self.weights[name].dtype)

    def read(self, name: str, axis: int, start: int, stop: int) -> torch.Tensor:
        return self.weights[name].detach().narrow(axis, start, stop - start)


def gather(model: Transformer) -> InMemory:
    """The weights of all ranks, whole, in the CPU memory of rank 0; the others get none of them.

    The inverse of `load`. Adapters that are attached (`llama.training.lora`) aren't in them: merge
    first.

    Raises:
        ValueError: weights in blocks, or compiled layers.
    """
    args, weights = model.params, {}
    for name, shape in weight_shapes(args).items():
        try:
            part = model.get_parameter(name).detach()
        except AttributeError:
            raise ValueError(
                f"{name} isn't there as it is written: build without quantize, compile, offload"
            ) from None
        axis = parallel.shard_axis(name) or 0
        whole = parallel.whole(name, part, shape[axis], args.n_heads, args.n_kv_heads)
        if parallel.rank() == 0:
            weights[name] = whole.cpu()
    return InMemory(args, weights)
