"""Conversion of any format to any other, a few rows of a tensor at a time; what a checkpoint is."""

import copy
import math
import warnings
from pathlib import Path
from typing import Any, Dict, Mapping, NamedTuple, Optional

import torch
from tqdm import tqdm

from llama.checkpoint import ggml, gguf, huggingface, keeping, meta
from llama.checkpoint.opening import open as open_checkpoint
from llama.checkpoint.remote import local_path
from llama.checkpoint.schemes.weight import QuantizedWeight
from llama.checkpoint.shapes import check_shapes, chunks, weight_shapes
from llama.checkpoint.source import Checkpoint, Shape, dtype_name
from llama.checkpoint.writing import bytes_of, dtype_of
from llama.families.registry import family_of
from llama.text.files import beside, check_plain, read_object, write_json
from llama.tokenizer import Tokenizer

FORMATS = ("meta", "hf", "gguf")
FORMAT_NAMES: Dict[type, str] = {
    meta.MetaCheckpoint: "Meta", huggingface.HFCheckpoint: "Hugging Face",
    gguf.GGUFCheckpoint: "GGUF",
}  # fmt: skip


def _check_replaceable(path: Path) -> None:
    """Raises FileExistsError for a directory with something in it that is no checkpoint's."""
    check_plain(path)
    names = {file.name for file in path.iterdir()} if path.is_dir() else set()
    if names and not names & {"params.json", "config.json"}:
        raise FileExistsError(
            f"{path} is a directory that holds no checkpoint: not overwritten, even with force; "
            f"name a new one, or a file in it, such as {path / 'model.gguf'}"
        )


def convert(
    source: str | Path | Checkpoint,
    path: str | Path,
    to: str,
    *,
    model_parallel_size: int = 1,
    dtype: Optional[torch.dtype] = None,
    quant: Optional[str] = None,
    tokenizer_path: Optional[str | Path] = None,
    max_shard_bytes: int = 5 * 10**9,
    force: bool = False,
    verify: bool = False,
    quiet: bool = False,
) -> Path:
    """Write a checkpoint, its tokenizer and its chat template in another format.

    Args:
        to: "meta", "hf" or "gguf"; the last is a file, the others are directories.
        model_parallel_size: shards, for Meta's format.
        dtype: of the weights; None keeps what they are stored in (fp32 where quantized).
        quant: for GGUF, "q8_0", "q4_0", "q4_1", one of llama.cpp's mixtures, "q4_k_m" for
            instance, "keep" for the types as stored, or "nearest": see `gguf.write`.
        tokenizer_path: by default what is found with the source.
        max_shard_bytes: size of a .safetensors file, about.
        force: overwrite what is there, once the new checkpoint is complete.
        verify: read everything again from what was written, and compare, before it gets its name.
        quiet: no progress bar on stderr.

    Raises:
        FileExistsError: `path` exists, without `force`; or it is a directory of other things.
        ValueError: a format, size or option that don't go together; a source that `force` would
            overwrite; a difference on verifying.
    """
    if to not in FORMATS:
        raise ValueError(f"format {to!r}: choose one of {', '.join(FORMATS)}")
    if to != "meta" and model_parallel_size != 1:
        raise ValueError(f"model_parallel_size={model_parallel_size} is for Meta's format only")
    if quant is not None and (to != "gguf" or dtype is not None):
        raise ValueError(f"quant={quant!r} is for GGUF only, and takes the place of dtype")
    opened = open_checkpoint(local_path(source)) if isinstance(source, (str, Path)) else source
    check_shapes(opened)
    text = family_of(opened.args).text_args(opened.args)
    if to == "gguf" and text != opened.args:
        warnings.warn(
            f"{path}: GGUF holds the text model; what reads images is left out", stacklevel=2
        )
        opened = copy.copy(opened)
        opened.args = text
    tokenizer_path = tokenizer_path or opened.tokenizer_path
    tokenizer = None if tokenizer_path is None else Tokenizer(local_path(tokenizer_path))
    path = Path(path)
    here = opened.path.resolve()
    if path.exists() and path.resolve() in (here, *here.parents):
        raise ValueError(f"{path} holds the source itself: choose another name")
    if force:
        _check_replaceable(path)

    total = sum(
        math.prod(shape) * ((to != "gguf" and dtype) or dtype_of(opened, name)).itemsize
        for name, shape in weight_shapes(opened.args).items()
    )
    silent = True if quiet else None  # None: only where stderr is a terminal
    bar = tqdm(total=total, unit="B", unit_scale=True, desc=path.name, disable=silent, delay=0.5)
    with beside(path, force) as partial:
        with bar:
            common: Any = dict(tokenizer=tokenizer, progress=bar.update)
            if to == "meta":
                meta.write(opened, partial, model_parallel_size, dtype, **common)
            elif to == "hf":
                huggingface.write(opened, partial, dtype, max_shard_bytes=max_shard_bytes, **common)
                _keep_sampling(opened.path, partial)
            else:
                kind = quant or dtype_name(dtype or _widest(opened)).lower()
                gguf.write(opened, partial, kind, name=path.stem, **common)
        if verify:
            kept = (quant or "").upper() in (keeping.KEEP, keeping.NEAREST)
            check_equal(opened, open_checkpoint(partial), quiet, kept)
    return path


def _keep_sampling(source: Path, path: Path) -> None:
    """How the model is to be sampled by default, which the tokenizer doesn't know."""
    old, new = (directory / "generation_config.json" for directory in (source, path))
    if old.exists():
        write_json(new, read_object(old) | (read_object(new) if new.exists() else {}))


def _widest(source: Checkpoint) -> torch.dtype:
    """The dtype that holds all matrices of a checkpoint exactly."""
    shapes = weight_shapes(source.args)
    dtypes = {dtype_of(source, name) for name, shape in shapes.items() if len(shape) == 2}
    return dtypes.pop() if len(dtypes) == 1 else torch.float32


def check_equal(
    source: Checkpoint, written: Checkpoint, quiet: bool = False, kept: bool = False
) -> None:
    """Compare every weight of a checkpoint with what was written of it, a few rows at a time.

    Args:
        kept: it was written by `keeping`.

    Raises:
        ValueError: a difference beyond what the written dtype or quantization makes.
    """
    shapes = weight_shapes(source.args)
    if weight_shapes(written.args) != shapes:
        raise ValueError(f"{written.path} doesn't have the shape of {source.path}")
    form = "hf" if isinstance(written, huggingface.HFCheckpoint) else "meta"
    fused = family_of(source.args).fused(source.args, form).values()
    computed = {how.groups[0][0]: how for how in fused if how.to_theirs and how.to_ours}
    for name, shape in tqdm(shapes.items(), desc="verifying", disable=quiet or None):
        stored, how = written.stored_as(name), computed.get(name)
        for start, stop in chunks(shape, 0, 0, shape[0], source.args.head_dim):
            if kept:
                raw = keeping.encode(source, name, stored, start, stop)
                ours = keeping.decode(raw, stored).view(stop - start, *shape[1:])
            else:
                ours = gguf.as_stored(source.read(name, 0, start, stop), stored)
            if how and how.to_theirs and how.to_ours:  # what the format has no place for is gone
                ours = how.to_ours(how.to_theirs(ours))
            theirs = written.read(name, 0, start, stop)
            # by bytes: a NaN isn't equal to itself, and 0.0 is equal to -0.0
            if ours.dtype != theirs.dtype or bytes_of(ours) != bytes_of(theirs):
                raise ValueError(
                    f"what was written to {written.path.name} isn't {source.path}: {name} differs"
                )


class Description(NamedTuple):
    """What a checkpoint is."""

    format: str
    parameters: int
    bytes: Dict[str, int]  # by dtype or quantization type
    kept: Dict[str, str]  # of quantizations as others publish them, what they become in memory


def describe(source: Checkpoint) -> Description:
    """Look at a checkpoint's table of tensors, not at its weights."""
    shapes: Dict[str, Shape] = source.shapes()
    by_dtype: Dict[str, int] = {}
    kept: Dict[str, str] = {}
    quantized: Mapping[str, QuantizedWeight] = getattr(source, "quantized", {})
    for name, shape in shapes.items():
        if name in quantized:
            kind, nbytes = quantized[name].label, quantized[name].nbytes
            blocks = quantized[name].kind
            kept[kind] = f"blocks of {blocks} for the CPU kernels, else" if blocks else "always"
        else:
            kind = source.stored_as(name)
            nbytes = ggml.stored_bytes(shape, kind)
        by_dtype[kind] = by_dtype.get(kind, 0) + nbytes
    parameters = sum(math.prod(shape) for shape in shapes.values())
    return Description(FORMAT_NAMES[type(source)], parameters, by_dtype, kept)
