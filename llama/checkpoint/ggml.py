"""ggml's quantization types: blocks of 32 neighbours in a row share a scale. Quantize, dequantize.

Three of them are done here with torch, on all cores and any device; any other goes through the
`gguf` package on the CPU, which is imported where it is needed, since it takes 0.2 s.
Layouts: github.com/ggml-org/ggml, ggml-common.h. Every scale is fp16 and first.

    Q8_0    value = scale · q, q a signed byte
    Q4_0    value = scale · (q - 8), q four bits: value i in the low half of byte i, and value
            i + 16 in the high half
    Q4_1    value = scale · q + least, least being fp16 too
"""

import math
from typing import Dict, Tuple

import torch

VALUES = 32  # of a block
BYTES: Dict[str, int] = {"Q8_0": 34, "Q4_0": 18, "Q4_1": 20}

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


def block(kind: str) -> Tuple[int, int]:
    """How many values a block of a type has, and how many bytes; dtypes have blocks of one."""
    if kind in BYTES:
        return VALUES, BYTES[kind]
    import gguf

    return gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]


def stored_bytes(shape: Tuple[int, ...], kind: str) -> int:
    """Bytes that a weight takes when it is stored as a dtype or quantization type."""
    values, size = block(kind)
    return math.prod(shape) // values * size


def dequantize(raw: torch.Tensor, kind: str) -> torch.Tensor:
    """(rows, bytes of a row) -> (rows, values of a row), fp32, to the bit as gguf.dequantize.

    Raises:
        NotImplementedError: a kind that the gguf package can't read either.
    """
    if kind not in BYTES:
        import gguf

        dense = gguf.dequantize(raw.cpu().numpy(), gguf.GGMLQuantizationType[kind])
        return torch.from_numpy(dense).to(raw.device)
    blocks = raw.view(-1, BYTES[kind])
    scale = blocks[:, :2].view(torch.float16).float()
    if kind == "Q8_0":
        values = blocks[:, 2:].view(torch.int8).float().mul_(scale)
    elif kind == "Q4_0":
        values = _nibbles(blocks[:, 2:]).sub_(8).mul_(scale)
    else:
        least = blocks[:, 2:4].view(torch.float16).float()
        values = _nibbles(blocks[:, 4:]).mul_(scale).add_(least)
    return values.view(len(raw), -1)


def _nibbles(packed: torch.Tensor) -> torch.Tensor:
    out = torch.empty(len(packed), 2, packed.shape[1], device=packed.device)
    out[:, 0] = packed & 15
    out[:, 1] = packed >> 4
    return out.flatten(1)


def quantize(values: torch.Tensor, kind: str) -> torch.Tensor:
    """(rows, values of a row) -> (rows, bytes of a row), to the bit as gguf.quantize.

    Raises:
        ValueError: rows that aren't whole blocks.
    """
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
    elif kind == "Q4_0":
        extreme = x.gather(1, x.abs().argmax(1, keepdim=True))  # with its sign, it becomes -8
        scale = extreme / -8
        packed = _pack(x * _inverse(scale) + 8.5)
        parts = (scale,)
    else:
        least, most = x.aminmax(dim=1, keepdim=True)
        scale = (most - least) / 15
        packed = _pack((x - least) * _inverse(scale) + 0.5)
        parts = (scale, least)
    heads = [part.half().view(torch.uint8) for part in parts]
    return torch.cat([*heads, packed], 1).view(rows, -1)


def _inverse(scale: torch.Tensor) -> torch.Tensor:
    return torch.where(scale == 0, scale, 1 / scale)


def _pack(q: torch.Tensor) -> torch.Tensor:
    q = q.clamp_(0, 15).to(torch.uint8)
    return q[:, :16] | q[:, 16:] << 4
