"""Meta's format: params.json and consolidated.00.pth ... consolidated.NN.pth, one file per rank.

Format: the directories that llama.com hands out; what splits how is in `parallel.SHARD_AXIS`.
"""

import dataclasses
import zlib
from pathlib import Path
from typing import Dict, List, Optional, Tuple

import torch

from llama.checkpoint.fused import Part, cut, fused_shape, join, plan, stored_as
from llama.checkpoint.loading import read_shard
from llama.checkpoint.pth import index_pth, mend_checksums
from llama.checkpoint.schemes import Scheme, assemble, meta_fp8
from llama.checkpoint.schemes.meta_int4 import MetaInt4
from llama.checkpoint.schemes.weight import QuantizedWeight
from llama.checkpoint.shapes import checked_args, local_shape, weight_shapes
from llama.checkpoint.source import Checkpoint, Shape, Stored, find_tokenizer
from llama.checkpoint.writing import Progress, bytes_of, dtype_of, no_progress, write_tensor
from llama.families.family import Family
from llama.families.registry import family_of, of_params
from llama.layers import parallel
from llama.model import ModelArgs
from llama.text.files import beside, read_object, write_json
from llama.text.vocabulary import writing as writing_vocabulary
from llama.tokenizer import Tokenizer

# Keys that Meta's own files hold and that say nothing about the network.
IGNORED_PARAMS = {"max_seq_len", "max_batch_size", "model_parallel_size"}

QUANTIZATION = ("quantization_args", "lora_args")  # see `read_scheme`

# params.json of Llama 3.2 says only that RoPE is scaled; these two, which their
# (dim, n_layers) identify, by 32 and not by the 8 of all others (their config.json say so).
SCALED_BY_32 = [(2048, 16), (3072, 28)]


def read_params(path: Path) -> Tuple[Family, dict]:
    """The family that a params.json describes, and its shape's fields; vocab_size may be -1.

    Raises:
        ValueError: not JSON, or a key that this model knows nothing of.
    """
    params = {key: value for key, value in read_object(path).items() if key not in QUANTIZATION}
    family = of_params(params)
    try:
        params = family.read_params(params)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    known = {field.name for field in dataclasses.fields(family.args)}
    unknown = params.keys() - known - IGNORED_PARAMS
    if unknown:
        raise ValueError(
            f"{path} has keys that this model has no meaning for: {', '.join(sorted(unknown))}. "
            "Ignoring one could silently change the output; is this a text-only Llama?"
        )
    params = {key: value for key, value in params.items() if key not in IGNORED_PARAMS}
    params.setdefault("rope_theta", 10000.0)  # Llama 1 and 2 don't name it
    if params.get("use_scaled_rope") and "rope_scaling_factor" not in params:
        by_32 = (params.get("dim"), params.get("n_layers")) in SCALED_BY_32
        params["rope_scaling_factor"] = 32.0 if by_32 else 8.0
    return family, params


def read_scheme(path: Path) -> Optional[Scheme]:
    """How the weights beside params.json are quantized; None: they aren't.

    Raises:
        ValueError: a scheme that can't be read.
    """
    config, lora = (read_object(path).get(key) for key in QUANTIZATION)
    if config is None and lora is None:
        return None
    try:
        return MetaInt4(config, lora)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _scalar(stored: Part) -> Part:
    """A single value, of which releases of Llama 3.2 Vision differ in the number of dimensions."""
    if isinstance(stored, Stored) and set(stored.shape) <= {1}:
        return stored._replace(shape=(1,))
    return stored


def trained_context(args: ModelArgs) -> int:
    """The context that a released model was trained for, which params.json doesn't say.

    Inferred from what changed with it: Llama 1 2048, Llama 2 4096, Code Llama 16384, Llama 3 8192,
    3.1 and later 131072 (the model cards). Nothing computes with it; other formats' files state it.
    """
    if args.use_scaled_rope:
        return 131072
    by_theta = {500000.0: 8192, 1000000.0: 16384}
    llama_1_or_2 = 2048 if args.norm_eps == 1e-6 else 4096
    return by_theta.get(args.rope_theta, llama_1_or_2)


def check_kv_heads(args: ModelArgs, world: int) -> None:
    """Raises ValueError if ranks hold key/value heads in part, for which there is no layout."""
    held = len(parallel.kv_heads(0, world, args.n_heads, args.n_kv_heads))
    if held > 1 and held * world != args.n_kv_heads:
        raise ValueError(
            f"{args.n_heads} heads on {world} ranks straddle {args.n_kv_heads} key/value heads, "
            "which Meta's format can't express: convert with a model_parallel_size dividing both"
        )


class MetaCheckpoint:
    """A directory in Meta's format, with any number of shards."""

    def __init__(self, path: Path):
        self.path = Path(path)
        self._files = sorted(self.path.glob("consolidated.*.pth"))
        if (single := self.path / "consolidated.pth").exists() and not self._files:
            self._files = [single]  # as Llama 3.2 11B Vision comes
        names = [f"consolidated.{i:02d}.pth" for i in range(len(self._files))]
        if not self._files or [file.name for file in self._files] not in (names, [single.name]):
            found = ", ".join(file.name for file in self._files) or "none"
            raise ValueError(
                f"{self.path}: expected consolidated.00.pth and so on without a gap, "
                f"found {found}; fetch what is missing"
            )
        family, params = read_params(self.path / "params.json")
        scheme = read_scheme(self.path / "params.json")
        has_codes = scheme is not None or any(self.path.glob("fp8_scales_*.pt"))
        indexed = [index_pth(file, codes=has_codes) for file in self._files]
        self.quantized: Dict[str, QuantizedWeight] = {}
        if scheme is not None:
            if len(self._files) > 1:
                raise ValueError(f"{self.path}: quantized weights in more than one file")
            plain, self.quantized = assemble(scheme, indexed[0])
            indexed = [plain]
        else:
            self.quantized = meta_fp8.take(self.path, indexed)
        self._shards: List[Dict[str, Part]] = [
            {family.meta_names.meta(name): _scalar(stored) for name, stored in shard.items()}
            for shard in indexed
        ]
        params.setdefault("tied_embeddings", self._is_tied())
        if params["tied_embeddings"]:
            for shard in self._shards:
                shard.pop("output.weight", None)
        if params.get("vocab_size", -1) == -1:
            params["vocab_size"] = self._count_words(params.get("dim", ModelArgs.dim))
        args = checked_args(self.path / "params.json", params, len(self._shards[0]), family)
        check_kv_heads(args, len(self._shards))
        self.args = dataclasses.replace(args, max_seq_len=trained_context(args))
        fused = family.fused(args, "meta") | family.fused(args, "released")
        unused = family.left_out(params)
        used = [
            {name: stored for name, stored in shard.items() if not name.startswith(unused)}
            for shard in self._shards
        ]
        self.left_out = len(self._shards[0]) - len(used[0])  # weights the network doesn't use
        self._shards = [cut(shard, fused, weight_shapes(args)) for shard in used]
        self.tokenizer_path: Optional[Path] = find_tokenizer(self.path)
        for file, shard in zip(self._files, self._shards, strict=True):
            if shard.keys() != self._shards[0].keys():
                name = min(shard.keys() ^ self._shards[0].keys())
                raise ValueError(f"{file} and {self._files[0].name} disagree whether {name} exists")

    def _is_tied(self) -> bool:
        """Whether the output layer is left out, or lies where the embedding lies."""
        return "output.weight" not in self.quantized and all(
            shard.get("output.weight") in (None, shard.get("tok_embeddings.weight"))
            for shard in self._shards
        )

    def _count_words(self, dim: int) -> int:
        """Llama 1 leaves the vocabulary's size to the tokenizer; the embedding knows it too."""
        name = "tok_embeddings.weight"
        shape = self.quantized[name].shape if name in self.quantized else self._first(name).shape
        if len(shape) != 2:
            raise ValueError(f"{self._files[0]}: tok_embeddings.weight has the shape {shape}")
        return shape[0] * len(self._files) if shape[1] == dim else shape[0]

    def _first(self, name: str) -> Part:
        if name not in self._shards[0]:
            raise ValueError(f"{self._files[0]} lacks {name}")
        return self._shards[0][name]

    def shapes(self) -> Dict[str, Shape]:
        expected = weight_shapes(self.args)
        shapes = {name: weight.shape for name, weight in self.quantized.items()}
        for name in self._shards[0]:
            shape = self._first(name).shape
            for file, shard in zip(self._files, self._shards, strict=True):
                if shard[name].shape != shape:
                    raise ValueError(
                        f"{file}: {name} has the shape {shard[name].shape} "
                        f"and {self._files[0].name} has {shape}"
                    )
            whole = expected.get(name)
            fits = whole is not None and self._layout(name, shape, whole) is not None
            shapes[name] = whole if fits and whole is not None else shape
        return shapes

    def _layout(
        self, name: str, shape: Shape, whole: Shape
    ) -> Optional[Tuple[int, List[Tuple[int, int]]]]:
        """How a weight is spread over the shards: the axis, and each shard's range along it.

        The axis is inferred from the shapes, since Llama 1 and 2 split the embedding along dim and
        Llama 3 along the vocabulary. None if the shapes can't belong together.
        """
        n = len(self._files)
        if shape == whole:
            return 0, [(0, whole[0])] * n  # whole in each shard
        if len(shape) != len(whole):
            return None
        for axis in range(len(whole)):
            others_equal = shape[:axis] + shape[axis + 1 :] == whole[:axis] + whole[axis + 1 :]
            if others_equal and shape[axis] * n == whole[axis]:
                step = shape[axis]
                return axis, [(i * step, (i + 1) * step) for i in range(n)]
        if name.endswith(parallel.KV):
            # more shards than key/value heads: neighbours hold the same head
            args = self.args
            if args.n_heads % n == 0 and shape[1:] == whole[1:]:
                heads = [parallel.kv_heads(i, n, args.n_heads, args.n_kv_heads) for i in range(n)]
                if all(len(held) == 1 for held in heads) and shape[0] == args.head_dim:
                    d = args.head_dim
                    return 0, [(held[0] * d, (held[0] + 1) * d) for held in heads]
        return None

    def stored_as(self, name: str) -> str:
        return stored_as(self.quantized.get(name) or self._first(name))

    def read(self, name: str, axis: int, start: int, stop: int) -> torch.Tensor:
        if name in self.quantized:
            return self.quantized[name].read(axis, start, stop)
        stored = self._first(name)
        layout = self._layout(name, stored.shape, weight_shapes(self.args)[name])
        if layout is None:
            raise AssertionError(f"{name} was read without check_shapes")
        split_axis, ranges = layout
        if axis != split_axis:  # every shard has a part of what is asked for
            parts = [shard[name].read(axis, start, stop) for shard in self._shards]
            return torch.cat(parts, split_axis)
        parts = []
        while start < stop:
            shard = next(i for i, (low, high) in enumerate(ranges) if low <= start < high)
            low, high = ranges[shard]
            end = min(stop, high)
            parts.append(self._shards[shard][name].read(axis, start - low, end - low))
            start = end
        return parts[0] if len(parts) == 1 else torch.cat(parts, axis)

    def read_blocks(self, name: str, axis: int, start: int, stop: int) -> torch.Tensor:
        """The same of a quantized weight, as blocks: see `QuantizedWeight.read_blocks`."""
        return self.quantized[name].read_blocks(axis, start, stop)


def params_of(args: ModelArgs) -> dict:
    """What params.json says of a shape, so that Meta's own code derives the same one from it."""
    base = int(2 * 4 * args.dim / 3)
    names = [
        "dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of",
        "ffn_dim_multiplier", "norm_eps", "rope_theta", "use_scaled_rope",
    ]  # fmt: skip
    if args.use_scaled_rope:
        names += [
            "rope_scaling_factor", "rope_low_freq_factor", "rope_high_freq_factor",
            "rope_original_max_seq_len",
        ]  # fmt: skip
    params = {name: getattr(args, name) for name in names}
    derived = dataclasses.replace(args, hidden_dim=None).hidden_dim  # type: ignore[arg-type]
    if derived != args.hidden_dim:
        # Meta's formula reaches any width when it is rounded up to a multiple of itself.
        params["multiple_of"] = args.hidden_dim
        params["ffn_dim_multiplier"] = args.hidden_dim / base
    if args.rope_linear_factor != 1.0:
        params["rope_linear_factor"] = args.rope_linear_factor
    if args.head_dim * args.n_heads != args.dim:
        params["head_dim"] = args.head_dim
    params |= family_of(args).write_params(args)
    return {key: value for key, value in params.items() if value is not None}


def write(
    source: Checkpoint,
    path: str | Path,
    model_parallel_size: int = 1,
    dtype: Optional[torch.dtype] = None,
    *,
    tokenizer: Optional[Tokenizer] = None,
    force: bool = False,
    progress: Progress = no_progress,
) -> Path:
    """Write a checkpoint in Meta's format, split for a model-parallel size; returns the directory.

    Args:
        dtype: of the weights; None keeps what they are stored in (fp32 where quantized).
        tokenizer: written beside the weights: as tokenizer.model if Llama 3's rule gives its
            special tokens and it has no chat template, else as tokenizer.json.
        force: overwrite what is there, once the new directory is complete.

    Raises:
        FileExistsError: the directory exists, without `force`.
        ValueError: sizes that don't divide (Meta's format can't express padding).
    """
    path, args, world = Path(path), source.args, model_parallel_size
    for what in ("n_heads", "hidden_dim", "vocab_size"):
        if world < 1 or getattr(args, what) % world:
            raise ValueError(
                f"model_parallel_size {world} doesn't divide {what}={getattr(args, what)}"
            )
    for name, shape in weight_shapes(args).items():
        axis = parallel.shard_axis(name)
        uneven = axis is not None and not name.endswith(parallel.KV) and shape[axis] % world
        if uneven:
            raise ValueError(f"model_parallel_size {world} doesn't divide {name}, {shape}")
    check_kv_heads(args, world)
    with beside(path, force) as partial:
        partial.mkdir()
        for rank in range(world):
            _write_shard(
                source, partial / f"consolidated.{rank:02d}.pth", rank, world, dtype, progress
            )
        write_json(partial / "params.json", params_of(args))
        if tokenizer is not None:
            writing_vocabulary.write_tokenizer(tokenizer.vocabulary, partial)
    return path


def _write_shard(
    source: Checkpoint,
    file: Path,
    rank: int,
    world: int,
    dtype: Optional[torch.dtype],
    progress: Progress,
) -> None:
    """One consolidated.NN.pth, without ever holding more than one of its tensors.

    torch.save first lays out the file with the room for its tensors left empty; memory that is
    only allocated costs nothing. Then each tensor goes to its place.
    """
    args = source.args
    fused = family_of(args).fused(args, "meta")
    parts = plan(weight_shapes(args), fused)

    def shape(name: str) -> Shape:
        return local_shape(args, name, rank, world)

    def read(name: str) -> torch.Tensor:
        return read_shard(source, name, rank, world, dtype=dtype)

    empty = {
        name: torch.empty(
            fused_shape(fused[name], shape) if name in fused else shape(name),
            dtype=dtype or dtype_of(source, of[0]),
        )
        for name, of in parts.items()
    }
    if source.args.tied_embeddings:  # Meta's own loader wants both names; the bytes are there once
        empty["output.weight"] = empty["tok_embeddings.weight"]
    in_file = family_of(source.args).meta_names.theirs
    try:
        with torch.serialization.skip_data():
            torch.save({in_file(name): tensor for name, tensor in empty.items()}, file)
    except RuntimeError as error:  # of torch's writer, which doesn't say why
        raise OSError(f"{file} can't be written: is the disk full? ({error})") from None
    del empty
    checksums = {}
    places = index_pth(file)
    with file.open("r+b") as out:
        for name in parts:
            place, checksum = places[in_file(name)], 0
            out.seek(place.offset)
            for tensor in join(fused[name], read) if name in fused else [read(name)]:
                write_tensor(out, tensor, progress)
                checksum = zlib.crc32(bytes_of(tensor), checksum)
            checksums[place.offset] = checksum
    mend_checksums(file, checksums)
