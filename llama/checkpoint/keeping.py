"""Weights written to GGUF in the types in which they are stored, or in the nearest that it has.

GGUF's own types are copied. Integers with zero points (`integers`) become Q4_0 or Q8_0 where these
hold them exactly: no zero point but the middle one, scales that fp16 holds. Else the nearest is
Q4_1, whose scale and least value are fp16, or Q8_0; of all else, Q8_0.
"""

import warnings
from typing import Any, Dict, List, NamedTuple

import torch

from llama.checkpoint import floats, ggml, integers
from llama.checkpoint.shapes import chunks, weight_shapes
from llama.checkpoint.source import DTYPES, Checkpoint

KEEP, NEAREST = "KEEP", "NEAREST"
PLAIN = ("F32", "F16", "BF16")  # GGUF's dtypes that are written


class _Kept(NamedTuple):
    """How a weight is written."""

    kind: str
    error: float  # the largest, relative to the largest value


def kinds(source: Checkpoint, wanted: str) -> Dict[str, str]:
    """The type that each weight is written in.

    Args:
        wanted: KEEP: as it is stored, exactly; NEAREST: it may be rounded, which is warned of.

    Raises:
        ValueError: KEEP, and a weight that no type holds exactly.
    """
    found = {name: _kept(source, name, wanted) for name in weight_shapes(source.args)}
    lost: Dict[str, List[str]] = {}
    for name, kept in found.items():
        if kept.error:
            quantized = getattr(source, "quantized", {})
            label = quantized[name].label if name in quantized else source.stored_as(name)
            lost.setdefault(f"{label} as {kept.kind}", []).append(name)
    lines = [
        f"{len(names)} weights ({names[0]}, ...), {what}, are off by up to "
        f"{max(found[name].error for name in names):.1e} of their largest value"
        for what, names in lost.items()
    ]
    if lines and wanted == KEEP:
        raise ValueError(
            f"{source.path}: GGUF has no type that holds it exactly; --quant nearest rounds: "
            + "; ".join(lines)
        )
    for line in lines:
        warnings.warn(f"{source.path}: {line}", stacklevel=2)
    return {name: kept.kind for name, kept in found.items()}


def encode(source: Checkpoint, name: str, kind: str, start: int, stop: int) -> torch.Tensor:
    """Rows [start, stop) of a weight as a type of GGUF, (rows, bytes of a row)."""
    stored, blocks = source.stored_as(name), source  # type: Any, Any
    if kind not in PLAIN:
        if stored == kind:
            return blocks.read_blocks(name, 0, start, stop)
        if stored in integers.BYTES:
            raw = blocks.read_blocks(name, 0, start, stop)
            if kind != "Q8_0" or integers.is_symmetric(raw, stored):
                return integers.to_ggml(raw, stored, kind)
    dense = source.read(name, 0, start, stop)
    if kind in PLAIN:
        return dense.to(DTYPES[kind]).reshape(len(dense), -1).view(torch.uint8)
    return ggml.quantize(dense, kind)


def decode(raw: torch.Tensor, kind: str) -> torch.Tensor:
    """What `encode`'s bytes mean."""
    return raw.view(DTYPES[kind]) if kind in PLAIN else ggml.dequantize(raw, kind)


def _kept(source: Checkpoint, name: str, wanted: str) -> _Kept:
    shape, stored = weight_shapes(source.args)[name], source.stored_as(name)
    pieces = [*chunks(shape, 0, 0, shape[0], source.args.head_dim)]
    own = stored in integers.BYTES or stored in floats.BYTES
    if len(shape) == 1 or stored in DTYPES:
        kind = "F32" if len(shape) == 1 or stored not in PLAIN else stored
    elif stored in integers.BYTES and integers.BITS_VALUES[stored][0] == 4:
        blocks: Any = source
        raws = (blocks.read_blocks(name, 0, *rows) for rows in pieces)
        kind = "Q4_0" if all(integers.is_symmetric(raw, stored) for raw in raws) else "Q4_1"
    elif own:
        kind = "Q8_0"
    elif stored in ggml.types():
        return _Kept(stored, 0.0)
    else:  # what is dense in memory too
        kind = "Q8_0" if wanted == NEAREST and shape[1] % ggml.VALUES == 0 else "F32"
    error = largest = 0.0
    for rows in pieces:
        dense = source.read(name, 0, *rows).float()
        off = decode(encode(source, name, kind, *rows), kind).float().view(dense.shape) - dense
        error = max(error, float(off.abs().max()))
        largest = max(largest, float(dense.abs().max()))
    return _Kept(kind, error / largest if largest else error)
