"""Block types of 8- and 4-bit floats that ggml doesn't have: 64 neighbours in a row, an fp32 scale.

They hold exactly what is published as FP8, NF4 and NVFP4. The scale comes first, in four bytes.

    FP8     value = scale · q, q e4m3: a sign, four bits of exponent and three of mantissa
    NF4     value = scale · CODES[q], q four bits
    FP4     the same with bitsandbytes' FP4, whose largest value is 1
    E2M1    value = scale · s · q, q e2m1 (0 to 6) and s an e4m3 for each 16 values: NVFP4; these
            follow the scale in four bytes

Codes of four bits are as in ggml's types, 32 at a time: value i is in the low half of byte i, and
value i + 16 in the high half.
"""

from typing import Dict

import torch

VALUES = 64  # of a block
BYTES: Dict[str, int] = {"FP8": 68, "NF4": 36, "FP4": 36, "E2M1": 40}
GROUP = 16  # values of E2M1 that share an e4m3 scale

E4M3 = torch.float8_e4m3fn
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
TWELFTHS = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
# NF4: quantiles of the normal distribution, arXiv 2305.14314, appendix E.
CODES: Dict[str, torch.Tensor] = {
    "NF4": torch.tensor([
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
        -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
        0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ]),
    "FP4": torch.tensor([*TWELFTHS, *(-value for value in TWELFTHS)]) / 12,
    "E2M1": torch.tensor([*E2M1, *(-value for value in E2M1)]),
}  # fmt: skip


def dequantize(raw: torch.Tensor, kind: str) -> torch.Tensor:
    """(rows, bytes of a row) -> (rows, values of a row), fp32."""
    blocks = raw.view(-1, BYTES[kind])
    scale = scales(raw, kind)
    if kind == "FP8":
        values = blocks[:, 4:].view(E4M3).float()
    else:
        nibbles = blocks[:, -VALUES // 2 :].view(-1, 2, 1, 16)
        indices = torch.cat([nibbles & 15, nibbles >> 4], 2).flatten(1).int()
        values = CODES[kind].to(raw.device)[indices]
    if kind == "E2M1":
        scale = scale.repeat_interleave(GROUP, 1)
    return (values * scale).view(len(raw), -1)


def scales(raw: torch.Tensor, kind: str) -> torch.Tensor:
    """(rows, bytes of a row) -> (blocks, 1), fp32; of E2M1 (blocks, 4)."""
    blocks = raw.view(-1, BYTES[kind])
    scale = blocks[:, :4].view(torch.float32)
    return scale * blocks[:, 4:8].view(E4M3).float() if kind == "E2M1" else scale


def fp8_blocks(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Blocks of codes (rows, cols), e4m3, and fp32 scales (rows, cols / 64).

    NaN among the codes makes the block's scale NaN, since the CPU kernels know no other.
    """
    raw = codes.contiguous().view(torch.uint8).view(len(codes), -1, VALUES)
    broken = ((raw & 127) == 127).any(-1)
    return _joined(torch.where(broken, torch.nan, scale), raw)


def code_blocks(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Blocks of NF4 or FP4 from codes (rows, cols), uint8, and fp32 scales (rows, cols / 64)."""
    return _joined(scale, packed(codes).view(len(codes), -1, VALUES // 2))


def e2m1_blocks(codes: torch.Tensor, groups: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Blocks of E2M1 from codes (rows, cols), e4m3 scales (rows, cols / 16), and an fp32 scale."""
    raw = groups.contiguous().view(torch.uint8).view(len(codes), -1, VALUES // GROUP)
    every = torch.where(((raw & 127) == 127).any(-1), torch.nan, scale)
    return _joined(every, raw, packed(codes).view(len(codes), -1, VALUES // 2))


def mxfp4_blocks(codes: torch.Tensor, exponents: torch.Tensor) -> torch.Tensor:
    """Blocks of ggml's MXFP4 from codes (rows, cols) and exponents (rows, cols / 32), uint8."""
    blocks = torch.cat([exponents[..., None], packed(codes).view(len(codes), -1, 16)], 2)
    return blocks.flatten(1)


def _joined(scale: torch.Tensor, *parts: torch.Tensor) -> torch.Tensor:
    first = scale.float().contiguous()[..., None].view(torch.uint8)
    return torch.cat([first, *parts], 2).flatten(1)


def packed(codes: torch.Tensor) -> torch.Tensor:
    """Codes of four bits (rows, cols), uint8 -> (rows, cols / 2), in ggml's order."""
    halves = codes.reshape(len(codes), -1, 2, 16)
    return (halves[:, :, 0] | halves[:, :, 1] << 4).flatten(1)


def nibbles(raw: torch.Tensor, *, high_first: bool = False) -> torch.Tensor:
    """Bytes (rows, n), two codes in each, the first in the lower half -> (rows, 2 n), uint8."""
    pair = (raw >> 4, raw & 15) if high_first else (raw & 15, raw >> 4)
    return torch.stack(pair, -1).flatten(1)
