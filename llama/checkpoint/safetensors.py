"""Hugging Face's weights: names, the order of rows in q and k, and the .safetensors file.

Format: github.com/huggingface/safetensors. The weights differ from Meta's in names, and in q and k,
whose rows stand in another order because transformers rotates the halves of a head where Meta
rotates neighbouring pairs.
"""

import json
import math
import struct
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Dict, List, Mapping, Tuple

import torch

from llama.checkpoint.fused import fused_shape, join, plan
from llama.checkpoint.shapes import weight_shapes
from llama.checkpoint.source import CODES, DTYPES, Checkpoint, Shape, Stored, dtype_name
from llama.checkpoint.writing import Progress, read_whole, rows, write_tensor
from llama.families.names import unwrapped
from llama.families.registry import family_of
from llama.text.files import unique_keys

MAX_HEADER = 100_000_000  # the format's own bound: weights must not be taken for text


def interleave(weight: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Rows of q or k, whole heads of them, from transformers' order to Meta's.

    Within a head, row j of the first half and row j of the second become neighbours.
    """
    halves = weight.view(-1, 2, head_dim // 2, *weight.shape[1:])
    return halves.transpose(1, 2).reshape(weight.shape)


def split_halves(weight: torch.Tensor, head_dim: int) -> torch.Tensor:
    """The inverse of `interleave`: from Meta's order to transformers'."""
    pairs = weight.view(-1, head_dim // 2, 2, *weight.shape[1:])
    return pairs.transpose(1, 2).reshape(weight.shape)


def index_safetensors(path: Path, *, codes: bool = False) -> Dict[str, Stored]:
    """Where each tensor of a .safetensors file lies: 8 bytes of length, a JSON header, data.

    Args:
        codes: it may hold more than floats, see `source.CODES`.

    Raises:
        ValueError: a header that isn't one, or tensors that don't fill the file exactly.
    """
    size, dtypes = path.stat().st_size, {**DTYPES, **(CODES if codes else {})}
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if length > min(size - 8, MAX_HEADER):
            raise ValueError(
                f"{path} is cut off or no .safetensors file: it has {size} bytes "
                f"and its header says {length}; fetch it again"
            )
        raw = file.read(length)

    try:
        header = json.loads(raw, object_pairs_hook=unique_keys("it holds {} twice"))
        header.pop("__metadata__", None)
        stored, ends = {}, [0]
        for name, info in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            begin, end = info["data_offsets"]
            dtype, shape = dtypes.get(info["dtype"]), tuple(info["shape"])
            if dtype is None:
                raise ValueError(f"{name} has the dtype {info['dtype']}: not a float; unsupported")
            count = 1
            for dimension in shape:
                if type(dimension) is not int or dimension < 0:
                    raise ValueError(f"{name} has the shape {shape}")
                count *= dimension
            whole = type(begin) is int and type(end) is int
            if not whole or begin != ends[-1] or end - begin != count * dtype.itemsize:
                raise ValueError(
                    f"{name} of shape {shape} and dtype {info['dtype']} can't lie in "
                    f"bytes {begin} to {end}"
                )
            ends.append(end)
            stored[name] = Stored(path, 8 + length + begin, shape, dtype)
        if ends[-1] != size - 8 - length:
            raise ValueError(f"its tensors end at {ends[-1]} of {size - 8 - length} bytes")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    return unwrapped(stored)


def write_safetensors(
    source: Checkpoint,
    path: Path,
    names: List[str],
    dtypes: Dict[str, torch.dtype],
    progress: Progress,
    extra: Mapping[str, torch.Tensor] = MappingProxyType({}),
    body: str = "model.",
) -> None:
    """Write weights by their Hugging Face names, in its order of rows, a few at a time.

    `names` may be those of fused tensors. `extra` weights, which have such names already, follow
    as they are. `body` begins the names that begin with "model." in other classes.
    """
    family = family_of(source.args)
    fused, shapes = family.fused(source.args, "hf"), weight_shapes(source.args)
    parts = plan(shapes, fused)
    tensors = [
        (name, fused_shape(fused[name], shapes.__getitem__), dtypes[parts[name][0]])
        if name in fused
        else (under(body, family.hf_names.theirs(name)), shapes[name], dtypes[name])
        for name in names
    ]
    tensors += [(name, tuple(weight.shape), weight.dtype) for name, weight in extra.items()]
    with path.open("wb") as file:
        file.write(_header(tensors))
        for name, (_, _, dtype) in zip(names, tensors, strict=False):
            how = fused.get(name)
            if how is not None and not how.as_rows:
                for part in join(how, partial(read_whole, source)):
                    write_tensor(file, part.to(dtype), progress)
                continue
            for one in parts[name]:
                for part in rows(source, one, dtype):
                    if family.is_rotated(one):
                        part = split_halves(part.contiguous(), source.args.head_dim)
                    write_tensor(file, part, progress)
        for weight in extra.values():
            write_tensor(file, weight, progress)


def under(body: str, name: str) -> str:
    """A Hugging Face name as it is in a class that calls its body so."""
    return body + name.removeprefix("model.") if name.startswith("model.") else name


def _header(tensors: List[Tuple[str, Shape, torch.dtype]]) -> bytes:
    """What comes before the data of tensors that follow each other in this order."""
    header: Dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape, dtype in tensors:
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": dtype_name(dtype), "shape": shape, "data_offsets": [begin, end]}
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)  # so that the data is aligned
    return struct.pack("<Q", len(raw)) + raw
