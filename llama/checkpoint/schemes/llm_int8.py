"""LLM.int8(), arXiv 2208.07339, as bitsandbytes writes it: integers with a scale for each row.

    weight         (out, in)   int8
    SCB            (out,)      fp32: the largest magnitude of a row, which is stored as 127
    weight_format  ()          uint8: 0, rows follow each other

bitsandbytes quantizes activations too, but for those beyond a threshold.
They stay as they are here.
"""

from typing import Dict, Mapping, Optional

import torch

from llama.checkpoint.schemes.integers import Codes, IntegerWeight
from llama.checkpoint.schemes.weight import QuantizedWeight, need, only, whole
from llama.checkpoint.source import Stored


class Int8Weight(IntegerWeight):
    def __init__(self, parts: Mapping[str, Stored]):
        weight = need(parts, "weight", None, torch.int8)
        if len(weight.shape) != 2:
            raise ValueError(f"has weight of shape {weight.shape}")
        super().__init__(weight.shape, "LLM.int8()", parts, bits=8, group=weight.shape[1])
        self._weight, self._scale = weight, need(parts, "SCB", weight.shape[:1], torch.float32)
        if "weight_format" in parts and whole(parts["weight_format"]).any():
            raise ValueError("has a weight_format other than rows, of an old bitsandbytes")

    def codes(self, start: int, stop: int) -> Codes:
        q = self._weight.read(0, start, stop).view(torch.uint8) ^ 128
        scale = self._scale.read(0, start, stop)[:, None] / 127
        return Codes(q, scale, torch.full(scale.shape, 128, dtype=torch.uint8))


def weight(parts: Dict[str, Stored]) -> Optional[QuantizedWeight]:
    """The weight of a module; None: it isn't quantized."""
    if "SCB" not in parts:
        return None
    only(parts, "weight", "SCB", "weight_format")
    return Int8Weight(parts)
