"""NF4 and FP4, arXiv 2305.14314 (QLoRA), as bitsandbytes writes them: 16 values, a scale for 64.

The weight is taken row after row. Two codes are in a byte, the first in the upper half.

    weight                   (out · in / 2, 1)  uint8, or another dtype whose bytes are meant
    weight.quant_state....   bytes of JSON: quant_type, shape, blocksize, ...
    weight.quant_map         (16,)              what each code means
    weight.absmax            (blocks,)          fp32: value = absmax · quant_map[code]

With double quantization absmax is uint8, and in its place stands

    nested_quant_map[absmax] · nested_absmax[block / nested_blocksize] + nested_offset
"""

import json
import math
from typing import Any, Dict, Mapping, Optional

import torch

from llama.checkpoint import floats
from llama.checkpoint.schemes.weight import QuantizedWeight, need, only, whole
from llama.checkpoint.source import Stored

STATE = "weight.quant_state.bitsandbytes__"
NESTED = ("weight.nested_absmax", "weight.nested_quant_map")


class NF4Weight(QuantizedWeight):
    def __init__(self, parts: Mapping[str, Stored], code: str):
        self._code = code.upper()
        state = _read_state(need(parts, STATE + code, None, torch.uint8))
        shape, size = state.get("shape"), state.get("blocksize", 0)
        if (
            not isinstance(shape, list)
            or len(shape) != 2
            or not all(_is_size(n) for n in (*shape, size))
            or shape[1] % 2
        ):
            raise ValueError(f"has shape={str(shape)[:80]}, blocksize={str(size)[:80]}")
        rows, cols = shape
        packed = need(parts, "weight")
        if math.prod(packed.shape) * packed.dtype.itemsize * 2 != rows * cols:
            raise ValueError(f"of shape {(rows, cols)} has {packed.dtype} of {packed.shape}")
        self._packed = packed._replace(shape=(rows, cols // 2), dtype=torch.uint8)
        known = whole(need(parts, "weight.quant_map", (16,), torch.float32))
        if not torch.allclose(known, floats.CODES[self._code], rtol=1e-5, atol=1e-7):
            raise ValueError(f"has a quant_map that isn't {self._code}'s: {known.tolist()}")
        self._size, blocks = size, -(-rows * cols // size)
        self._nested = NESTED[0] in parts
        self._absmax = need(
            parts, "weight.absmax", (blocks,), torch.uint8 if self._nested else torch.float32
        )
        if self._nested:
            nested, offset = state.get("nested_blocksize", 0), state.get("nested_offset", "")
            if not _is_size(nested) or type(offset) not in (int, float):
                about = f"nested_blocksize={str(nested)[:80]}, nested_offset={str(offset)[:80]}"
                raise ValueError(f"has {about}")
            self._nested_size, self._offset = int(nested), float(offset)
            above = -(-blocks // self._nested_size)
            self._above = need(parts, NESTED[0], (above,), torch.float32)
            self._map = need(parts, NESTED[1], (256,), torch.float32)
        fits = size % floats.VALUES == 0 and cols % floats.VALUES == 0
        label = f"bitsandbytes {self._code}, blocks of {size}"
        label += ", double quantization" if self._nested else ""
        super().__init__((rows, cols), label, self._code if fits else None, parts)

    def codes(self, start: int, stop: int) -> torch.Tensor:
        return floats.nibbles(self._packed.read(0, start, stop), high_first=True)

    def _scales(self, start: int, stop: int, step: int) -> torch.Tensor:
        """(stop - start, cols / step): of rows [start, stop), every step-th column."""
        cols = self.shape[1]
        of_block = torch.arange(start * cols, stop * cols, step) // self._size
        first, last = start * cols // self._size, -(-stop * cols // self._size)
        absmax = self._absmax.read(0, first, last)
        if self._nested:
            above = whole(self._above)[torch.arange(first, last) // self._nested_size]
            absmax = whole(self._map)[absmax.int()] * above + self._offset
        return absmax[of_block - first].view(stop - start, -1)

    def dense(self, start: int, stop: int) -> torch.Tensor:
        values = floats.CODES[self._code][self.codes(start, stop).int()]
        return values.mul_(self._scales(start, stop, 1))

    def blocks(self, start: int, stop: int) -> torch.Tensor:
        scales = self._scales(start, stop, floats.VALUES)
        return floats.code_blocks(self.codes(start, stop), scales)


def _is_size(n: Any) -> bool:
    return type(n) is int and 0 < n < 1 << 31


def _read_state(stored: Stored) -> Dict[str, Any]:
    try:
        state = json.loads(bytes(whole(stored).numpy()))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"has a quant_state that isn't JSON: {error}") from None
    if not isinstance(state, dict):
        raise ValueError(f"has a quant_state of {type(state).__name__}")
    return state


def weight(parts: Dict[str, Stored]) -> Optional[QuantizedWeight]:
    """The weight of a module; None: it isn't in four bits."""
    found = [code for code in ("nf4", "fp4") if STATE + code in parts]
    if not found:
        return None
    only(parts, "weight", STATE + found[0], "weight.quant_map", "weight.absmax", *NESTED)
    return NF4Weight(parts, found[0])
