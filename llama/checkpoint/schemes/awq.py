"""AWQ, arXiv 2306.00978, as AutoAWQ writes it ("gemm"): 4 bits with zero points, no bias.

    qweight  (in, out / 8)       int32: input features are rows, eight outputs a word
    qzeros   (in / g, out / 8)   int32, packed alike
    scales   (in / g, out)       a float

The bits of a word hold outputs 0 2 4 6 1 3 5 7, from the lowest on.
"""

from typing import Any, Dict, Mapping, Optional

import torch

from llama.checkpoint.schemes.integers import Codes, IntegerWeight, columns, unpacked
from llama.checkpoint.schemes.weight import FLOATS, QuantizedWeight, need, only
from llama.checkpoint.source import Stored


class AwqWeight(IntegerWeight):
    def __init__(self, parts: Mapping[str, Stored], group: int):
        qweight, self._parts = need(parts, "qweight", None, torch.int32), parts
        if len(qweight.shape) != 2:
            raise ValueError(f"has qweight of shape {qweight.shape}")
        cols, rows = qweight.shape[0], qweight.shape[1] * 8
        group = cols if group == -1 else group
        super().__init__((rows, cols), "AWQ", parts, bits=4, group=group)
        need(parts, "qzeros", (cols // group, rows // 8), torch.int32)
        need(parts, "scales", (cols // group, rows), *FLOATS)

    def codes(self, start: int, stop: int) -> Codes:
        def outputs(name: str) -> torch.Tensor:
            words = columns(self._parts[name], start // 8, -(-stop // 8))
            # Four bits are at (which two bytes, which of these, which half) in a word.
            places = unpacked(words, 4).view(len(words), -1, 2, 2, 2)
            found = places.permute(1, 3, 4, 2, 0).reshape(-1, len(words))
            return found[start % 8 :][: stop - start]

        scale = columns(self._parts["scales"], start, stop).T
        return Codes(outputs("qweight"), scale, outputs("qzeros"))


class Awq:
    def __init__(self, config: Mapping[str, Any]):
        version, bits = config.get("version", "gemm"), config.get("bits", 4)
        if str(version).lower() != "gemm" or bits != 4:
            raise ValueError(
                f"version={version!r}, bits={bits!r}; read here is version gemm of 4 bits"
            )
        if config.get("zero_point", True) is not True:
            raise ValueError("zero_point=False; read here are weights with zero points")
        self.group = group_size(config)

    def weight(self, module: str, parts: Dict[str, Stored]) -> Optional[QuantizedWeight]:
        if "qweight" not in parts:
            return None
        only(parts, "qweight", "qzeros", "scales")
        return AwqWeight(parts, self.group)


def group_size(config: Mapping[str, Any], default: int = 128) -> int:
    """The group_size of a config, -1 for whole rows.

    Raises:
        ValueError: it isn't a number.
    """
    group = config.get("group_size", default)
    if type(group) is not int or (group != -1 and not 0 < group < 1 << 31):
        raise ValueError(f"group_size={group!r} is neither a positive number nor -1")
    return group
