"""ggml's quantization types: blocks of 32 neighbours in a row share a scale. Quantize, dequantize.

Five of them are done here with torch, on all cores and any device. K-quants are quantized in
`kquants`; what is left goes through the `gguf` package on the CPU, imported where it is needed,
since it takes 0.2 s. Every scale is fp16 and first.
Layouts: github.com/ggml-org/ggml, ggml-common.h.

    Q8_0    value = scale · q, q a signed byte
    Q4_0    value = scale · (q - 8), q four bits: value i in the low half of byte i, and value
            i + 16 in the high half
    Q4_1    value = scale · q + least, least being fp16 too
    Q5_0    value = scale · (q - 16), q five bits: the highest of each are 32 bits before the others
    Q5_1    value = scale · q + least
"""

import math
from typing import Collection, Dict, Tuple

import torch

from llama.checkpoint import floats, integers, kquants

VALUES = 32  # of a block
BYTES: Dict[str, int] = {"Q8_0": 34, "Q4_0": 18, "Q4_1": 20, "Q5_0": 22, "Q5_1": 24}

# Where in a block its fp16 scales (and minima) are.
SCALES: Dict[str, Tuple[int, ...]] = {
    "Q8_0": (0,), "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2),
    "Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,),
    "IQ4_NL": (0,), "IQ4_XS": (0,), "MXFP4": (),
}  # fmt: skip


def type_name(number: int) -> str:
    """The name of a type by its number in files: F32, Q4_0, ...; ValueError for an unknown one."""
    import gguf

    return gguf.GGMLQuantizationType(number).name


def types() -> Collection[str]:
    """The names of all types that files may have, of which few are computed here."""
    import gguf

    return gguf.GGMLQuantizationType.__members__


def block(kind: str) -> Tuple[int, int]:
    """How many values a block of a type has, and how many bytes; dtypes have blocks of one."""
    if kind in BYTES:
        return VALUES, BYTES[kind]
    if kind in integers.BYTES:
        return integers.BITS_VALUES[kind][1], integers.BYTES[kind]
    if kind in floats.BYTES:
        return floats.VALUES, floats.BYTES[kind]
    import gguf

    return gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]


def stored_bytes(shape: Tuple[int, ...], kind: str) -> int:
    """Bytes that a weight takes when it is stored as a dtype or quantization type."""
    values, size = block(kind)
    return math.prod(shape) // values * size


def is_finite(raw: torch.Tensor, kind: str) -> bool:
    """Whether all scales are finite: quantizing NaN or infinity gives such a scale."""
    if kind in integers.BYTES:
        return bool(integers.scales(raw, kind).isfinite().all())
    if kind in floats.BYTES:
        return bool(floats.scales(raw, kind).isfinite().all())
    blocks = raw.view(-1, block(kind)[1])
    return all(
        blocks[:, at : at + 2].contiguous().view(torch.float16).isfinite().all()
        for at in SCALES[kind]
    )


def dequantize(raw: torch.Tensor, kind: str) -> torch.Tensor:
    """(rows, bytes of a row) -> (rows, values of a row), fp32, to the bit as gguf.dequantize.

    Raises:
        NotImplementedError: a kind that the gguf package can't read either.
    """
    if kind in integers.BYTES:
        return integers.dequantize(raw, kind)
    if kind in floats.BYTES:
        return floats.dequantize(raw, kind)
    if kind not in BYTES:
        import gguf

        dense = gguf.dequantize(raw.cpu().numpy(), gguf.GGMLQuantizationType[kind])
        return torch.from_numpy(dense).to(raw.device)
    blocks = raw.view(-1, BYTES[kind])
    scale = blocks[:, :2].view(torch.float16).float()
    if kind == "Q8_0":
        return blocks[:, 2:].view(torch.int8).float().mul_(scale).view(len(raw), -1)
    values = _nibbles(blocks[:, -16:])
    if kind in ("Q5_0", "Q5_1"):
        high = blocks[:, -20:-16, None] >> torch.arange(8, dtype=torch.uint8, device=raw.device)
        values += high.bitwise_and_(1).flatten(1) * 16
    if kind in ("Q4_0", "Q5_0"):
        values.sub_(8 if kind == "Q4_0" else 16).mul_(scale)
    else:
        values.mul_(scale).add_(blocks[:, 2:4].view(torch.float16).float())
    return values.view(len(raw), -1)


def _nibbles(packed: torch.Tensor) -> torch.Tensor:
    out = torch.empty(len(packed), 2, packed.shape[1], device=packed.device)
    out[:, 0] = packed & 15
    out[:, 1] = packed >> 4
    return out.flatten(1)


def quantize(values: torch.Tensor, kind: str) -> torch.Tensor:
    """(rows, values of a row) -> (rows, bytes of a row), to the bit as gguf.quantize.

    K-quants, which that doesn't write, are bit-identical to llama.cpp's: see `kquants`.

    Raises:
        ValueError: rows that aren't whole blocks; for K-quants, values that aren't finite.
    """
    if kind in kquants.BYTES:
        return kquants.quantize(values, kind)
    rows, width = values.shape
    if width % VALUES:
        raise ValueError(f"{kind} takes rows of whole blocks of {VALUES} values, not of {width}")
    x = values.float().reshape(-1, VALUES)
    if kind == "Q8_0":
        scale = x.abs().amax(1, keepdim=True) / 127
        q = x * _inverse(scale)
        # Halves away from zero, as C does; torch rounds them to even.
        whole = q.abs().floor()
        whole += q.abs() - whole >= 0.5
        packed = whole.copysign_(q).to(torch.int8).view(torch.uint8)
        parts: Tuple[torch.Tensor, ...] = (scale,)
    elif kind in ("Q4_0", "Q5_0"):
        half = 8 if kind == "Q4_0" else 16
        extreme = x.gather(1, x.abs().argmax(1, keepdim=True))  # with its sign, it becomes -half
        scale = extreme / -half
        packed = _pack(x * _inverse(scale) + (half + 0.5), 2 * half - 1)
        parts = (scale,)
    else:
        most = 15 if kind == "Q4_1" else 31
        least, greatest = x.aminmax(dim=1, keepdim=True)
        scale = (greatest - least) / most
        packed = _pack((x - least) * _inverse(scale) + 0.5, most)
        parts = (scale, least)
    heads = [part.half().view(torch.uint8) for part in parts]
    return torch.cat([*heads, packed], 1).view(rows, -1)


def _inverse(scale: torch.Tensor) -> torch.Tensor:
    return torch.where(scale == 0, scale, 1 / scale)


def _pack(q: torch.Tensor, most: int) -> torch.Tensor:
    q = q.clamp_(0, most).to(torch.uint8)
    nibbles = q[:, :16] & 15 | q[:, 16:] << 4
    if most == 15:
        return nibbles
    places = torch.arange(8, dtype=torch.uint8, device=q.device)
    high = (q >> 4).view(-1, 4, 8) << places
    return torch.cat([high.sum(2, dtype=torch.uint8), nibbles], 1)
