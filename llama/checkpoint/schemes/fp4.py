"""4-bit floats (e2m1) with scales for groups of neighbours in a row: NVFP4 and MXFP4.

Two are in a byte, the first in the lower half.

    nvfp4-pack-quantized  weight_packed  (out, in / 2)   uint8
                          weight_scale   (out, in / 16)  e4m3    weight_global_scale  (1,)   fp32
                          value = weight_scale / weight_global_scale · q
    modelopt              weight, weight_scale of the same  weight_scale_2 ()      fp32
                          value = weight_scale · weight_scale_2 · q
    mxfp4-pack-quantized  weight_packed  (out, in / 2)   uint8
                          weight_scale   (out, in / 32)  uint8: value = 2^(weight_scale - 127) · q
    mxfp4                 weight_blocks  (out, in / 32, 16)      weight_scales  (out, in / 32)

Activations stay as they are, also where a config has them in four bits (NVFP4, MXFP4 without A16).
"""

import math
from typing import Any, Dict, Mapping, Optional

import torch

from llama.checkpoint import floats
from llama.checkpoint.schemes.weight import FLOATS, Parts, QuantizedWeight, need, only, whole
from llama.checkpoint.source import Stored

E8M0 = (torch.uint8, torch.float8_e8m0fnu)


class FP4Weight(QuantizedWeight):
    def __init__(self, label: str, parts: Parts, packed: str, scales: str, group: int):
        self._packed = need(parts, packed, None, torch.uint8)
        rows, cols = self._packed.shape[0] if self._packed.shape else 0, 0
        if rows:
            cols = 2 * math.prod(self._packed.shape[1:])
        if not rows or not cols or cols % group:
            raise ValueError(
                f"has {packed} of shape {self._packed.shape}, not of groups of {group}"
            )
        self._group, self._scales = group, need(parts, scales, (rows, cols // group))
        super().__init__((rows, cols), label, None, parts)

    def codes(self, start: int, stop: int) -> torch.Tensor:
        """(stop - start, cols), from 0 to 15."""
        return floats.nibbles(self._packed.read(0, start, stop).reshape(stop - start, -1))

    def scales(self, start: int, stop: int) -> torch.Tensor:
        """(stop - start, groups), fp32."""
        raise NotImplementedError

    def dense(self, start: int, stop: int) -> torch.Tensor:
        scales = self.scales(start, stop).repeat_interleave(self._group, 1)
        return floats.CODES["E2M1"][self.codes(start, stop).int()].mul_(scales)


class NVFP4Weight(FP4Weight):
    """shared: the name of the tensor's own scale; divides: those of groups are divided by it."""

    def __init__(self, label: str, parts: Parts, packed: str, shared: str, divides: bool = False):
        super().__init__(label, parts, packed, "weight_scale", floats.GROUP)
        need(parts, "weight_scale", None, floats.E4M3)
        self._whole, self._divides = need(parts, shared, None, *FLOATS), divides
        if math.prod(self._whole.shape) != 1:
            raise ValueError(f"has {shared} of shape {self._whole.shape}, not of one")
        self.kind = "E2M1" if self.shape[1] % floats.VALUES == 0 else None

    def _scale(self) -> torch.Tensor:
        scale = whole(self._whole).float().view(1, 1)
        return 1 / scale if self._divides else scale

    def scales(self, start: int, stop: int) -> torch.Tensor:
        return self._scales.read(0, start, stop).float() * self._scale()

    def blocks(self, start: int, stop: int) -> torch.Tensor:
        groups = self._scales.read(0, start, stop)
        return floats.e2m1_blocks(self.codes(start, stop), groups, self._scale())


class MXFP4Weight(FP4Weight):
    def __init__(self, label: str, parts: Parts, packed: str, scales: str):
        super().__init__(label, parts, packed, scales, 32)
        need(parts, scales, None, *E8M0)
        self.kind = "MXFP4"

    def scales(self, start: int, stop: int) -> torch.Tensor:
        return self._exponents(start, stop).view(torch.float8_e8m0fnu).float()

    def _exponents(self, start: int, stop: int) -> torch.Tensor:
        return self._scales.read(0, start, stop).view(torch.uint8)

    def blocks(self, start: int, stop: int) -> torch.Tensor:
        return floats.mxfp4_blocks(self.codes(start, stop), self._exponents(start, stop))


def nvfp4(parts: Dict[str, Stored]) -> QuantizedWeight:
    """The weight of a module in compressed-tensors' nvfp4-pack-quantized."""
    only(parts, "weight_packed", "weight_scale", "weight_global_scale")
    label = "compressed-tensors NVFP4"
    return NVFP4Weight(label, parts, "weight_packed", "weight_global_scale", divides=True)


def mxfp4(parts: Dict[str, Stored]) -> QuantizedWeight:
    """The weight of a module in compressed-tensors' mxfp4-pack-quantized."""
    only(parts, "weight_packed", "weight_scale")
    return MXFP4Weight("compressed-tensors MXFP4", parts, "weight_packed", "weight_scale")


class MXFP4:
    """Named as in the experts of gpt-oss."""

    def __init__(self, config: Mapping[str, Any]):
        pass

    def weight(self, module: str, parts: Dict[str, Stored]) -> Optional[QuantizedWeight]:
        if not parts.keys() & {"weight_blocks", "weight_scales"}:
            return None
        only(parts, "weight_blocks", "weight_scales")
        return MXFP4Weight("MXFP4", parts, "weight_blocks", "weight_scales")
