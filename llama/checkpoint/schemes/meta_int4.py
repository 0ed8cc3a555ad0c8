"""Meta's 4-bit releases of Llama 3.2 1B and 3B, SpinQuant (arXiv 2405.16406) and QLoRA, as .pth.

    weight           (out, in)       int8: of 4 bits, -8 to 7; the embedding and output of 8
    scales, zeros    (out, in / g)   floats, (out, 1) for 8 bits; zeros, if there, are integers
    adaptor.A.weight (rank, in), adaptor.B.weight (out, rank): of QLoRA, added times `scale`

SpinQuant's models were rotated so that w2 expects its input after a Hadamard transform. It is
applied to the rows of w2 instead, and QLoRA's adapters are added to the weights: both become dense.
Meta's own code rounds activations to 8 bits; they stay as they are here.
"""

from typing import Any, Dict, Mapping, Optional

import torch

from llama.checkpoint.schemes.integers import Codes, IntegerWeight
from llama.checkpoint.schemes.weight import FLOATS, QuantizedWeight, need, only, whole
from llama.checkpoint.source import Stored

SCHEME = "int4_weight_int8_dynamic_activation"


def hadamard(rows: torch.Tensor) -> torch.Tensor:
    """rows times the orthonormal Hadamard matrix of their width, a power of 2."""
    width, step = rows.shape[-1], 1
    while step < width:
        pairs = rows.view(-1, width // (2 * step), 2, step)
        first, second = pairs[:, :, 0], pairs[:, :, 1]
        rows = torch.stack([first + second, first - second], 2).view(rows.shape)
        step *= 2
    return rows * width**-0.5


class MetaInt4Weight(IntegerWeight):
    def __init__(
        self, parts: Mapping[str, Stored], bits: int, group: int, rotated: bool, scale: float
    ):
        weight, self._parts = need(parts, "weight", None, torch.int8), parts
        if len(weight.shape) != 2:
            raise ValueError(f"has weight of shape {weight.shape}")
        rows, cols = weight.shape
        group, method = (cols if bits == 8 else group), "Meta's int4,"
        super().__init__((rows, cols), method, parts, bits=bits, group=group)
        self._bits, self._rotated, self._scale = bits, rotated, scale
        need(parts, "scales", (rows, cols // group), *FLOATS)
        if "zeros" in parts:
            zeros = whole(need(parts, "zeros", (rows, cols // group), *FLOATS)).float()
            if not torch.equal(zeros, zeros.round().clamp(-(1 << bits) / 2, (1 << bits) / 2 - 1)):
                raise ValueError(f"has zeros that aren't integers of {bits} bits")
        if "adaptor.A.weight" in parts or "adaptor.B.weight" in parts:
            A = need(parts, "adaptor.A.weight", None, *FLOATS)
            if len(A.shape) != 2 or A.shape[1] != cols:
                raise ValueError(f"has adaptor.A.weight of shape {A.shape}")
            need(parts, "adaptor.B.weight", (rows, A.shape[0]), *FLOATS)
            self.kind, self.label = None, self.label + ", adapters added"
        if rotated:
            if cols & (cols - 1):
                raise ValueError(f"is {cols} wide; a Hadamard transform takes powers of 2")
            self.kind, self.label = None, self.label + ", a rotation added"

    def codes(self, start: int, stop: int) -> Codes:
        middle = 1 << (self._bits - 1)
        q = self._parts["weight"].read(0, start, stop).short().add_(middle)
        if int(q.min()) < 0 or int(q.max()) >= 2 * middle:
            raise ValueError(f"{self._parts['weight'].file}: integers beyond {self._bits} bits")
        scale = self._parts["scales"].read(0, start, stop)
        zero = torch.full(scale.shape, float(middle))
        if "zeros" in self._parts:
            zero += self._parts["zeros"].read(0, start, stop)
        return Codes(q.byte(), scale, zero.byte())

    def dense(self, start: int, stop: int) -> torch.Tensor:
        found = super().dense(start, stop)
        if "adaptor.B.weight" in self._parts:
            A = whole(self._parts["adaptor.A.weight"]).float()
            B = self._parts["adaptor.B.weight"].read(0, start, stop).float()
            found.addmm_(B, A, alpha=self._scale)
        return hadamard(found) if self._rotated else found


class MetaInt4:
    """Made from params.json's quantization_args and lora_args."""

    def __init__(self, config: Any, lora: Any = None):
        if not isinstance(config, dict) or not isinstance(lora or {}, dict):
            raise ValueError(f"quantization_args={config!r}, lora_args={lora!r}: not settings")
        if config.get("scheme", SCHEME) != SCHEME:
            raise ValueError(f"scheme={config['scheme']!r}; read here is {SCHEME}")
        group = config.get("group_size")
        scale: Any = (lora or {}).get("scale")
        if type(group) is not int or not 0 < group < 1 << 31:
            raise ValueError(f"group_size={group!r} isn't a positive number")
        if lora and (type(scale) not in (int, float) or not abs(scale) < 1 << 31):
            raise ValueError(f"lora_args: scale={scale!r} isn't a number")
        self._group, self._lora = group, lora is not None
        self._scale = float(scale or 0)
        self._spinquant = config.get("spinquant") is True

    def weight(self, module: str, parts: Dict[str, Stored]) -> Optional[QuantizedWeight]:
        if "scales" not in parts:
            return None
        adapters = ("adaptor.A.weight", "adaptor.B.weight") if self._lora else ()
        only(parts, "weight", "scales", "zeros", *adapters)
        bits = 8 if module in ("tok_embeddings", "output") else 4
        rotated = self._spinquant and module.endswith("feed_forward.w2")
        return MetaInt4Weight(parts, bits, self._group, rotated, self._scale)
