"""GPTQ, arXiv 2210.17323, as AutoGPTQ and GPTQModel write it: 4 or 8 bits, the bits n below.

qweight  (in · n / 32, out)   int32: 32 / n input features a word, the first one lowest
qzeros   (groups, out · n / 32)   int32, of outputs; format "gptq" stores each less 1, "gptq_v2"
         as it is
scales   (groups, out)        a float
g_idx    (in,)                int32: the group of each input, for desc_act (activation order)
"""

from typing import Any, Dict, Mapping, Optional

import torch

from llama.checkpoint.schemes.awq import group_size
from llama.checkpoint.schemes.integers import Codes, IntegerWeight, columns, unpacked
from llama.checkpoint.schemes.weight import (
    FLOATS,
    QuantizedWeight,
    need,
    only,
    whole,
)
from llama.checkpoint.source import Stored

ONES = {4: 0x11111111, 8: 0x01010101}


class GptqWeight(IntegerWeight):
    def __init__(self, parts: Mapping[str, Stored], bits: int, group: int, less_one: bool):
        qweight, self._parts = need(parts, "qweight", None, torch.int32), parts
        if len(qweight.shape) != 2:
            raise ValueError(f"has qweight of shape {qweight.shape}")
        per_word, (words, rows) = 32 // bits, qweight.shape
        cols, order = words * per_word, None
        if "g_idx" in parts:
            order = whole(need(parts, "g_idx", (cols,), torch.int32)).long()
        group = cols if group == -1 else group
        super().__init__((rows, cols), "GPTQ", parts, bits=bits, group=group, order=order)
        need(parts, "qzeros", (cols // group, -(-rows // per_word)), torch.int32)
        need(parts, "scales", (cols // group, rows), *FLOATS)
        self._bits, self._add = bits, ONES[bits] if less_one else 0

    def codes(self, start: int, stop: int) -> Codes:
        per_word = 32 // self._bits
        words = columns(self._parts["qweight"], start, stop).T
        first = start // per_word
        # In each word at once, as the packer subtracted: a carry undoes its borrow.
        zeros = columns(self._parts["qzeros"], first, -(-stop // per_word)) + self._add
        zero = unpacked(zeros, self._bits)[:, start - first * per_word :][:, : stop - start].T
        scale = columns(self._parts["scales"], start, stop).T
        return Codes(unpacked(words, self._bits), scale, zero)


class Gptq:
    def __init__(self, config: Mapping[str, Any]):
        bits = config.get("bits")
        if type(bits) is not int or bits not in ONES:
            raise ValueError(f"bits={bits!r}; read here are 4 and 8")
        self.bits, self.group = bits, group_size(config)
        format = config.get("checkpoint_format", config.get("format")) or "gptq"
        if format not in ("gptq", "gptq_v2"):
            raise ValueError(f"checkpoint_format={format!r}; read here are gptq and gptq_v2")
        if config.get("dynamic"):
            raise ValueError("dynamic: other settings for some modules, which aren't read here")
        self.less_one = format == "gptq"

    def weight(self, module: str, parts: Dict[str, Stored]) -> Optional[QuantizedWeight]:
        if "qweight" not in parts:
            return None
        only(parts, "qweight", "qzeros", "scales", "g_idx")
        return GptqWeight(parts, self.bits, self.group, self.less_one)
