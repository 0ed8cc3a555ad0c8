"""Block types for integers with a zero point and an fp32 scale, which ggml's types would round.

A block is 32, 64 or 128 neighbours in a row: value = scale · (q - zero). Layout: the scale, the
zero point as a byte, then q; of 4 bits, in each 32 values as in Q4_0, value i is in the low half of
byte i and value i + 16 in the high half.
"""

from typing import Dict, Optional, Tuple

import torch

BITS_VALUES: Dict[str, Tuple[int, int]] = {
    "I4_32": (4, 32), "I4_64": (4, 64), "I4_128": (4, 128), "I8_32": (8, 32), "I8_128": (8, 128),
}  # fmt: skip
HEAD = 5  # bytes before the quants
BYTES = {kind: HEAD + bits * values // 8 for kind, (bits, values) in BITS_VALUES.items()}


def kind_for(bits: int, group: int, cols: int) -> Optional[str]:
    """The type with the widest blocks that lie within groups of a row; None: there is none."""
    fitting = [
        (values, kind)
        for kind, (of_kind, values) in BITS_VALUES.items()
        if of_kind == bits and group % values == 0 and cols % values == 0
    ]
    return max(fitting)[1] if fitting else None


def pack(q: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, kind: str) -> torch.Tensor:
    """q (rows, cols) and, for each block, scale and zero (rows, blocks) -> (rows, bytes of a row).

    q and zero are unsigned: 0 to 15, or 0 to 255.
    """
    bits, values = BITS_VALUES[kind]
    q = q.to(torch.uint8).reshape(-1, values)
    if bits == 4:
        halves = q.view(len(q), -1, 2, 16)
        q = (halves[:, :, 0] | halves[:, :, 1] << 4).flatten(1)
    heads = scale.float().reshape(-1, 1).view(torch.uint8), zero.to(torch.uint8).reshape(-1, 1)
    return torch.cat([*heads, q], 1).view(len(scale), -1)


def scales(raw: torch.Tensor, kind: str) -> torch.Tensor:
    """The scale of each block, (blocks, 1)."""
    return raw.view(-1, BYTES[kind])[:, :4].contiguous().view(torch.float32)


def dequantize(raw: torch.Tensor, kind: str) -> torch.Tensor:
    """(rows, bytes of a row) -> (rows, values of a row), fp32."""
    blocks, (bits, values) = raw.view(-1, BYTES[kind]), BITS_VALUES[kind]
    q = blocks[:, HEAD:]
    if bits == 4:
        words = q.view(len(q), -1, 1, 16)
        q = torch.cat([words & 15, words >> 4], 2).view(-1, values)
    found = q.float().sub_(blocks[:, 4:5].float()).mul_(scales(raw, kind))
    return found.view(len(raw), -1)


def is_symmetric(raw: torch.Tensor, kind: str) -> bool:
    """Whether all zero points are the middle of the range, 8 or 128."""
    blocks, bits = raw.view(-1, BYTES[kind]), BITS_VALUES[kind][0]
    return bool((blocks[:, 4] == 1 << (bits - 1)).all())


def to_ggml(raw: torch.Tensor, kind: str, target: str) -> torch.Tensor:
    """The same q in blocks of Q4_0, Q4_1 or Q8_0; the fp16 scale and least value are rounded.

    Q4_0 and Q8_0 take the zero point for the middle one: see `is_symmetric`.
    """
    blocks, (_, values) = raw.view(-1, BYTES[kind]), BITS_VALUES[kind]
    scale, q = scales(raw, kind), blocks[:, HEAD:]
    heads = [scale]
    if target == "Q4_1":
        heads.append(scale * -blocks[:, 4:5].float())
    if target == "Q8_0":
        q = q ^ 128
    parts = [head.half().view(torch.uint8).repeat_interleave(values // 32, 0) for head in heads]
    return torch.cat([*parts, q.reshape(len(parts[0]), -1)], 1).view(len(raw), -1)
