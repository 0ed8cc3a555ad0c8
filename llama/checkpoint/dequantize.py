"""Dequantizing on all cores the block types whose arithmetic is a multiply (and an add) per value.

The layouts are ggml's (github.com/ggml-org/ggml, ggml-common.h); every other type goes through the
`gguf` package.
"""

from typing import Callable, Dict

import gguf
import torch

_Q = gguf.GGMLQuantizationType


def _q4_0(blocks: torch.Tensor) -> torch.Tensor:
    """fp16 scale, then 16 bytes: value i in the low half of byte i, value i + 16 in the high."""
    scale = blocks[:, :2].view(torch.float16).float()
    return _nibbles(blocks[:, 2:]).sub_(8).mul_(scale)


def _q4_1(blocks: torch.Tensor) -> torch.Tensor:
    """As Q4_0, with an fp16 minimum after the scale in place of the fixed -8."""
    scale = blocks[:, :2].view(torch.float16).float()
    least = blocks[:, 2:4].view(torch.float16).float()
    return _nibbles(blocks[:, 4:]).mul_(scale).add_(least)


def _q8_0(blocks: torch.Tensor) -> torch.Tensor:
    """fp16 scale, then 32 signed bytes."""
    scale = blocks[:, :2].view(torch.float16).float()
    return blocks[:, 2:].view(torch.int8).float().mul_(scale)


def _nibbles(packed: torch.Tensor) -> torch.Tensor:
    out = torch.empty(len(packed), 2, packed.shape[1])
    out[:, 0] = packed & 15
    out[:, 1] = packed >> 4
    return out.flatten(1)


_FAST: Dict[gguf.GGMLQuantizationType, Callable[[torch.Tensor], torch.Tensor]] = {
    _Q.Q4_0: _q4_0,
    _Q.Q4_1: _q4_1,
    _Q.Q8_0: _q8_0,
}


def dequantize(raw: torch.Tensor, kind: gguf.GGMLQuantizationType) -> torch.Tensor:
    """(rows, bytes of a row) -> (rows, values of a row), fp32, to the bit what gguf.dequantize
    gives, several times as fast."""
    if kind not in _FAST:
        return torch.from_numpy(gguf.dequantize(raw.numpy(), kind))
    blocks = raw.view(-1, gguf.GGML_QUANT_SIZES[kind][1])
    return _FAST[kind](blocks).view(len(raw), -1)
