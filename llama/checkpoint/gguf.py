"""GGUF, llama.cpp's format: weights of many quantization types and the vocabulary, in one file or,
as large models come, in parts.

Names and metadata keys: github.com/ggml-org/ggml, docs/gguf.md. Its converter has already permuted
q and k into the interleaved rotary layout that Meta's weights have, so they are taken as they are.
"""

import dataclasses
import math
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, Dict, NamedTuple, Optional, Tuple

import numpy as np
import torch

from llama.checkpoint import ggml, keeping
from llama.checkpoint.fused import fused_shape, plan
from llama.checkpoint.keeping import KEEP, NEAREST
from llama.checkpoint.mapped import check_length, read_slice
from llama.checkpoint.mixtures import MIXTURES, kind_of
from llama.checkpoint.shapes import checked_args, chunks, weight_shapes
from llama.checkpoint.source import DTYPES, Checkpoint, Shape
from llama.checkpoint.writing import Progress, bytes_of, dtype_of, no_progress
from llama.families.registry import FAMILIES, family_of, of_gguf
from llama.model import ModelArgs, rope_frequencies
from llama.text.files import beside
from llama.text.gguf_header import part_names, read_header
from llama.text.vocabulary import writing as writing_vocabulary
from llama.tokenizer import Tokenizer

# What can be written, and what llama.cpp calls a file that is mostly so.
WRITABLE = {
    "F32": "ALL_F32",
    "F16": "MOSTLY_F16",
    "BF16": "MOSTLY_BF16",
    "Q8_0": "MOSTLY_Q8_0",
    "Q4_0": "MOSTLY_Q4_0",
    "Q4_1": "MOSTLY_Q4_1",
    **{mixture: f"MOSTLY_{mixture}" for mixture in MIXTURES},
}

ROPE_FACTORS = "rope_freqs.weight"  # what scaled RoPE divides each frequency by

# Llama 3.1's other values, from which the factors follow. llama.cpp neither writes nor reads them:
# it has the factors. They are written here where they differ from Llama 3.1's.
ROPE_BOUNDS = {
    "rope_original_max_seq_len": "rope.scaling.original_context_length",
    "rope_low_freq_factor": "rope.scaling.low_freq_factor",
    "rope_high_freq_factor": "rope.scaling.high_freq_factor",
}

PLAIN = {kind: DTYPES[kind] for kind in ("F32", "F16", "BF16")}  # not quantized


class Tensor(NamedTuple):
    """A tensor in a file, row-major."""

    file: Path
    shape: Shape
    type: int  # gguf.GGMLQuantizationType
    offset: int  # of its first byte


def read_parts(path: Path) -> Tuple[Path, Dict[str, Any], Dict[str, Tensor]]:
    """The first file of a model, its metadata, and the tensors in it and in its other parts.

    Raises:
        FileNotFoundError: a part is missing.
        ValueError: a damaged file, or parts that don't belong together.
    """
    count, files = read_header(path).metadata.get("split.count", 1), [path]
    if count not in (0, 1):
        files = [path.with_name(name) for name in part_names(path.name)]
        if len(files) != count:
            raise ValueError(
                f"{path} is one of {count} parts: give them the names that llama-gguf-split does, "
                "NAME-00001-of-00003.gguf and so on"
            )
    found: Dict[str, Tensor] = {}
    for file in reversed(files):  # the first, which has the vocabulary too, is read last
        if not file.exists():
            raise FileNotFoundError(f"{file} is missing, one of {count} parts: fetch it, too")
        metadata, tensors = read_header(file)
        if twice := found.keys() & tensors:
            raise ValueError(f"{file} and another part hold {min(twice)}: not of one model")
        found = {name: Tensor(file, *info) for name, info in tensors.items()} | found
    expected = metadata.get("split.tensors.count", len(found))
    if count not in (0, 1) and expected != len(found):
        raise ValueError(
            f"{files[0]} and its other parts hold {len(found)} tensors, not {expected}: not of one "
            "model, or damaged"
        )
    return files[0], metadata, found


class GGUFCheckpoint:
    """A .gguf file, in one or several parts, of an architecture that a family has."""

    def __init__(self, path: Path):
        self.path, values, tensors = read_parts(Path(path))
        has_vocabulary = "tokenizer.ggml.model" in values
        self.tokenizer_path: Optional[Path] = self.path if has_vocabulary else None
        architecture = str(values.get("general.architecture"))
        prefix = f"{architecture}."
        metadata = {key.removeprefix(prefix): value for key, value in values.items()}
        family = of_gguf(architecture, metadata, tensors)
        if family is None:
            known = ", ".join(sorted(name for one in FAMILIES for name in one.gguf))
            raise ValueError(
                f"{self.path} is of the architecture {architecture!r}, and known are {known}"
            )
        self._family, names = family, family.gguf_names
        self._tensors = {names.meta(name): info for name, info in tensors.items()}
        self.args = self._args(metadata, prefix)
        self._cut()
        self._tensors.pop(ROPE_FACTORS, None)
        self._check_end()

    def _args(self, metadata: Dict[str, Any], prefix: str) -> ModelArgs:
        def require(key: str) -> Any:
            if key not in metadata:
                raise ValueError(f"{self.path} lacks the metadata key {prefix}{key}")
            return metadata[key]

        try:
            own = self._family.read_gguf(metadata) | self._family.read_names(self._tensors)
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}") from None
        if metadata.get("expert_count", 0):
            raise ValueError(f"{self.path} is a mixture of experts, which this model isn't")
        # Without a type it is linear; the other key is that of older files.
        linear = metadata.get("rope.scaling.factor", metadata.get("rope.scale_linear", 1.0))
        scaling = metadata.get("rope.scaling.type", "linear")
        if scaling not in ("none", "linear"):
            raise ValueError(f"{self.path} scales RoPE by the method {scaling!r}, not supported")
        for name in ("tok_embeddings.weight", "layers.0.attention.wq.weight"):
            if name not in self._tensors:
                raise ValueError(f"{self.path} lacks {name}")

        def decimal(value: Any) -> Any:
            # stored as fp32; the shortest decimal that means the same is what was once typed
            return float(str(np.float32(value))) if isinstance(value, float) else value

        fields = dict(
            dim=require("embedding_length"),
            n_layers=require("block_count"),
            n_heads=require("attention.head_count"),
            n_kv_heads=metadata.get("attention.head_count_kv"),
            head_dim=metadata.get("attention.key_length"),
            hidden_dim=require("feed_forward_length"),
            vocab_size=(self._tensors["tok_embeddings.weight"].shape or (0,))[0],
            norm_eps=decimal(require("attention.layer_norm_rms_epsilon")),
            rope_theta=decimal(metadata.get("rope.freq_base", 10000.0)),
            rope_linear_factor=decimal(linear) if scaling == "linear" else 1.0,
            max_seq_len=metadata.get("context_length", 2048),
            tied_embeddings="output.weight" not in self._tensors,
        )
        args = checked_args(self.path, fields | own, len(self._tensors), self._family)
        for key in ("attention.value_length", "rope.dimension_count"):
            if metadata.get(key, args.head_dim) != args.head_dim:
                raise ValueError(
                    f"{self.path}: {key}={metadata[key]}, but heads are {args.head_dim} wide"
                )
        if ROPE_FACTORS not in self._tensors:
            return args
        said = {ours: metadata[key] for ours, key in ROPE_BOUNDS.items() if key in metadata}
        for name, value in said.items():
            if not isinstance(value, (int, float)) or not 0 < value < 1 << 31:
                raise ValueError(f"{self.path}: {ROPE_BOUNDS[name]}={value!r} isn't positive")
        return self._scaled_rope(args, {name: decimal(value) for name, value in said.items()})

    def _check_end(self) -> None:
        """Raises ValueError for a file that ends before its tensors do, as of half a download."""
        ends: Dict[Path, int] = {}
        for name, info in self._tensors.items():
            with suppress(ValueError):  # a type or a shape that is named when it is read
                end = info.offset + ggml.stored_bytes(info.shape, self.stored_as(name))
                ends[info.file] = max(ends.get(info.file, 0), end)
        for file, end in ends.items():
            check_length(file, end)

    def _cut(self) -> None:
        """Matrices that a tensor holds become weights of their own."""
        for name, how in self._family.fused(self.args, "gguf").items():
            info = self._tensors.get(name)
            if info is None or len(info.shape) != 3 or info.shape[0] != len(how.groups):
                continue  # `check_shapes` names it
            size = ggml.stored_bytes(info.shape[1:], self.stored_as(name))
            del self._tensors[name]
            for i, [one] in enumerate(how.groups):
                place = info.offset + i * size
                self._tensors[one] = info._replace(shape=info.shape[1:], offset=place)

    def _scaled_rope(self, args: ModelArgs, bounds: Dict[str, Any]) -> ModelArgs:
        """The values behind the stored factors: the largest is the factor; checked against all."""
        if self._tensors[ROPE_FACTORS].shape != (args.head_dim // 2,):
            raise ValueError(f"{self.path}: {ROPE_FACTORS} isn't a factor per pair of dimensions")
        stored = self.read(ROPE_FACTORS, 0, 0, args.head_dim // 2)
        scaled = dataclasses.replace(
            args, use_scaled_rope=True, rope_scaling_factor=float(stored.max()), **bounds
        )
        if not torch.allclose(rope_frequencies(args) / stored, rope_frequencies(scaled), rtol=1e-4):
            raise ValueError(
                f"{self.path}: {ROPE_FACTORS} isn't Llama 3.1's scaling of RoPE for a context "
                f"of {scaled.rope_original_max_seq_len}"
            )
        return scaled

    def shapes(self) -> Dict[str, Shape]:
        return {name: info.shape for name, info in self._tensors.items()}

    def stored_as(self, name: str) -> str:
        info = self._tensors[name]
        try:
            kind = ggml.type_name(info.type)
        except ValueError:
            raise ValueError(
                f"{self.path}: {name} has the unknown quantization type {info.type}"
            ) from None
        if info.shape and info.shape[-1] % ggml.block(kind)[0]:
            raise ValueError(f"{self.path}: {name} of shape {info.shape} can't be {kind}")
        return kind

    def read(self, name: str, axis: int, start: int, stop: int) -> torch.Tensor:
        info, kind = self._tensors[name], self.stored_as(name)
        if kind in PLAIN:
            return read_slice(info.file, info.offset, info.shape, PLAIN[kind], axis, start, stop)
        # Quantized in blocks along the last axis: the rows, or of each row the blocks, asked for.
        values, skip = ggml.block(kind)[0], 0
        if axis == 1:
            skip = start % values
            raw = self.read_blocks(name, axis, start - skip, -(-stop // values) * values)
        else:
            raw = self.read_blocks(name, axis, start, stop)
        try:
            whole = ggml.dequantize(raw, kind)
        except NotImplementedError:
            raise ValueError(
                f"{self.path}: {name} is quantized as {kind}, which can't be read: "
                "requantize the model, to Q8_0 for instance"
            ) from None
        return whole if axis == 0 else whole[:, skip : skip + stop - start]

    def read_blocks(self, name: str, axis: int, start: int, stop: int) -> torch.Tensor:
        """The bytes of [start, stop) of a quantized weight, (rows, bytes of a row).

        Along axis 1 start and stop are whole blocks.
        """
        info = self._tensors[name]
        values, size = ggml.block(self.stored_as(name))
        shape = (math.prod(info.shape[:-1]), info.shape[-1] // values * size)
        if axis == 1:
            start, stop = start // values * size, stop // values * size
        return read_slice(info.file, info.offset, shape, torch.uint8, axis, start, stop)


def write(
    source: Checkpoint,
    path: str | Path,
    kind: str = "f32",
    *,
    name: Optional[str] = None,
    tokenizer: Optional[Tokenizer] = None,
    force: bool = False,
    progress: Progress = no_progress,
) -> Path:
    """Write a .gguf file that llama.cpp loads; returns its path.

    Args:
        kind: f32, f16, bf16, q8_0, q4_0, q4_1, or one of llama.cpp's mixtures: q4_k_s, q4_k_m,
            q5_k_s, q5_k_m, q6_k. Norms are always fp32. As llama.cpp's tools do, rows that don't
            divide into a K-quant's blocks of 256 values are written as q5_0, q5_1 or q8_0, and
            those that don't divide into 32 as f16. keep: as stored; nearest: in the types nearest
            to those stored, see `keeping`.
        name: what the file says the model is called; by default its own name.
        tokenizer: whose vocabulary and template are written into the file.
        force: overwrite what is there, once the new file is complete.

    Raises:
        FileExistsError: the file exists, without `force`.
        ValueError: an unknown kind; a weight that it can't hold.
    """
    if kind.upper() not in (*WRITABLE, KEEP, NEAREST):
        known = ", ".join((*WRITABLE, KEEP, NEAREST)).lower()
        raise ValueError(f"{kind!r} can't be written; choose one of {known}")
    import gguf  # it takes 0.2 s, which only those who use the format should wait

    wanted, args, path = kind.upper(), source.args, Path(path)
    shapes = weight_shapes(args)
    if wanted in (KEEP, NEAREST):
        kinds = keeping.kinds(source, wanted)
        most, _ = Counter(kinds[name] for name in shapes if "norm" not in name).most_common(1)[0]
        file_type = getattr(gguf.LlamaFileType, f"MOSTLY_{most}", gguf.LlamaFileType.ALL_F32)
    else:
        kinds = {name: kind_of(name, shape, args, wanted) for name, shape in shapes.items()}
        file_type = gguf.LlamaFileType[WRITABLE[wanted]]

    family = family_of(args)
    own, fused = family.write_gguf(args), family.fused(args, "gguf")
    if not family.gguf:
        raise ValueError(f"{source.path} is a {family.name}, which isn't written as GGUF")
    named = family.gguf_architecture
    with beside(path, force) as partial:
        writer = gguf.GGUFWriter(partial, named(args) if named else min(family.gguf))
        writer.add_name(name or path.stem)
        writer.add_file_type(file_type)
        numbers = {
            "block_count": args.n_layers,
            "context_length": args.max_seq_len,
            "embedding_length": args.dim,
            "feed_forward_length": args.hidden_dim,
            "head_count": args.n_heads,
            "head_count_kv": args.n_kv_heads,
            "key_length": args.head_dim,
            "value_length": args.head_dim,
            "rope_dimension_count": args.head_dim,
            "rope_freq_base": args.rope_theta,
            "layer_norm_rms_eps": args.norm_eps,
            "vocab_size": args.vocab_size,
        }
        for key, number in (numbers | own).items():
            getattr(writer, f"add_{key}")(number)
        if args.rope_linear_factor != 1.0:
            writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(args.rope_linear_factor)
        if args.use_scaled_rope:
            for field, key in ROPE_BOUNDS.items():
                if (value := getattr(args, field)) != getattr(family.args, field):
                    add = writer.add_uint32 if isinstance(value, int) else writer.add_float32
                    add(f"{writer.arch}.{key}", value)
        if any(kind not in PLAIN for kind in kinds.values()):
            writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        if tokenizer is not None:
            writing_vocabulary.write_gguf(tokenizer.vocabulary, writer, args.vocab_size)

        if args.use_scaled_rope:
            plain = rope_frequencies(dataclasses.replace(args, use_scaled_rope=False))
            factors = (plain / rope_frequencies(args)).numpy()
            writer.add_tensor_info(
                ROPE_FACTORS, factors.shape, factors.dtype, factors.nbytes, raw_dtype=None
            )
        parts = plan(shapes, fused)
        for name, of in parts.items():
            target = gguf.GGMLQuantizationType[kinds[of[0]]]
            whole = fused_shape(fused[name], shapes.__getitem__) if name in fused else shapes[name]
            row = gguf.quant_shape_to_byte_shape(whole, target)
            theirs = name if name in fused else family.gguf_names.theirs(name)
            writer.add_tensor_info(
                theirs, row, np.dtype(np.uint8), math.prod(row), raw_dtype=target
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        out: Any = writer.fout[0]  # type: ignore[index]
        alignment = writer.data_alignment

        def align() -> None:
            out.write(b"\0" * (-out.tell() % alignment))

        align()
        if args.use_scaled_rope:
            out.write(factors.tobytes())
            align()
        for of in parts.values():
            for name in of:
                _write_weight(out, source, name, kinds[name], wanted in (KEEP, NEAREST), progress)
            align()
        writer.close()
    return path


def _write_weight(
    out: BinaryIO, source: Checkpoint, name: str, kind: str, kept: bool, progress: Progress
) -> None:
    shape, size = weight_shapes(source.args)[name], dtype_of(source, name).itemsize
    for start, stop in chunks(shape, 0, 0, shape[0], source.args.head_dim):
        try:
            if kept:
                raw = bytes_of(keeping.encode(source, name, kind, start, stop))
            else:
                raw = _encoded(source.read(name, 0, start, stop), kind)
        except ValueError as error:
            raise ValueError(f"{source.path}: {name}: {error}") from None
        out.write(raw)
        progress((stop - start) * math.prod(shape[1:]) * size)  # of what was read


def as_stored(values: torch.Tensor, kind: str) -> torch.Tensor:
    """What is read back of values once they have been stored as a dtype or quantization type."""
    if kind in PLAIN:
        return values.to(PLAIN[kind])
    raw = torch.frombuffer(bytearray(_encoded(values, kind)), dtype=torch.uint8)
    return ggml.dequantize(raw.view(len(values), -1), kind)


def _encoded(values: torch.Tensor, kind: str) -> memoryview:
    return bytes_of(values.to(PLAIN[kind]) if kind in PLAIN else ggml.quantize(values, kind))
