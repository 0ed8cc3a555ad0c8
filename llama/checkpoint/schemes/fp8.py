"""8-bit floats (e4m3) with a scale for the tensor, for rows, for groups in rows, or for blocks.

Hugging Face has them under several names; all mean value = scale · q:

    compressed-tensors  weight (out, in)  weight_scale      by `strategy`
    fbgemm_fp8          weight (out, in)  weight_scale      (out, 1)
    fp8                 weight (out, in)  weight_scale_inv  (out / 128, in / 128), by
                        `weight_block_size`; without blocks a scalar, also called weight_scale

They go with activations in 8 bits, whose scales are in the files (`input_scale`) or follow from the
activations. Here activations stay as they are, so that results differ from such kernels' by their
rounding: up to 1/16 of an activation, which has three bits of mantissa.
"""

from typing import Any, Dict, Mapping, Optional, Tuple

import torch

from llama.checkpoint import floats
from llama.checkpoint.schemes.weight import FLOATS, Parts, QuantizedWeight, need, only, whole
from llama.checkpoint.source import Stored

UNUSED = ("input_scale", "input_scale_ub", "activation_scale", "k_scale", "v_scale", "kv_scale")


Block = Tuple[Optional[int], Optional[int]]  # rows and columns that share a scale; None: all


class FP8Weight(QuantizedWeight):
    """A weight of e4m3 numbers.

    Args:
        method: the scheme, for the label.
        scale: the name of its tensor among `parts`.
        block: what shares a scale.
    """

    def __init__(self, method: str, parts: Parts, scale: str, block: Block):
        self._codes = need(parts, "weight", None, floats.E4M3)
        if len(self._codes.shape) != 2 or 0 in self._codes.shape:
            raise ValueError(f"has weight of shape {self._codes.shape}")
        rows, cols = self._codes.shape
        self._scale = need(parts, scale, None, *FLOATS, torch.float8_e8m0fnu)
        self._tall, self._wide = block[0] or rows, block[1] or cols
        self._grid = -(-rows // self._tall), -(-cols // self._wide)
        alike = {self._grid, self._grid[:1]} if self._grid[1] == 1 else {self._grid}
        if self._scale.shape not in alike | ({()} if self._grid == (1, 1) else set()):
            raise ValueError(f"has {scale} of shape {self._scale.shape}, not {self._grid}")
        fits = cols % floats.VALUES == 0 and self._wide % floats.VALUES == 0
        shared = "one scale" if self._grid == (1, 1) else f"a scale for {self._tall} x {self._wide}"
        shared = "a scale for each row" if self._tall == 1 and self._wide == cols else shared
        super().__init__((rows, cols), f"{method}, {shared}", "FP8" if fits else None, parts)

    def _scales(self, start: int, stop: int, step: int) -> torch.Tensor:
        """(stop - start, cols / step): of rows [start, stop), every step-th column."""
        first = start // self._tall
        if self._scale.shape:
            some = self._scale.read(0, first, -(-stop // self._tall)).float()
        else:
            some = whole(self._scale).float()
        down = torch.arange(start, stop) // self._tall - first
        across = torch.arange(0, self.shape[1], step) // self._wide
        return some.view(-1, self._grid[1])[down][:, across]

    def dense(self, start: int, stop: int) -> torch.Tensor:
        return self._codes.read(0, start, stop).float().mul_(self._scales(start, stop, 1))

    def blocks(self, start: int, stop: int) -> torch.Tensor:
        codes = self._codes.read(0, start, stop)
        return floats.fp8_blocks(codes, self._scales(start, stop, floats.VALUES))


def compressed(parts: Dict[str, Stored], about: Mapping[str, Any]) -> QuantizedWeight:
    """The weight of a module, by what compressed-tensors' config says of its group."""
    strategy, size = about.get("strategy"), about.get("group_size")
    structure = about.get("block_structure")
    if about.get("num_bits") != 8 or not about.get("symmetric", True):
        raise ValueError(f"has {about.get('num_bits')!r} bits, symmetric={about.get('symmetric')}")
    block: Block
    if strategy == "block":
        block = _sizes(structure)
    elif strategy == "group":
        block = (1, _sizes([1, size])[1])
    elif strategy in ("tensor", "channel"):
        block = (None if strategy == "tensor" else 1, None)
    else:
        raise ValueError(f"has strategy={strategy!r}: not read here")
    only(parts, "weight", "weight_scale")
    return FP8Weight("compressed-tensors FP8", parts, "weight_scale", block)


def _sizes(given: Any) -> Tuple[int, int]:
    if (
        not isinstance(given, (list, tuple))
        or len(given) != 2
        or not all(type(n) is int and n > 0 for n in given)
    ):
        raise ValueError(f"blocks of {str(given)[:80]}: not two positive numbers")
    return given[0], given[1]


class Fbgemm:
    """Meta's Llama 3.1 405B FP8, and what transformers writes with FbgemmFp8Config."""

    def __init__(self, config: Mapping[str, Any]):
        pass  # activation_scale_ub is of activations

    def weight(self, module: str, parts: Dict[str, Stored]) -> Optional[QuantizedWeight]:
        return _weight("fbgemm_fp8", parts, (1, None))


class FineGrained:
    """transformers' FineGrainedFP8Config; without blocks AutoFP8's."""

    def __init__(self, config: Mapping[str, Any]):
        blocks = config.get("weight_block_size")
        self._block = None if blocks is None else _sizes(blocks)

    def weight(self, module: str, parts: Dict[str, Stored]) -> Optional[QuantizedWeight]:
        return _weight("fine-grained FP8", parts, self._block or (None, None))


def _weight(method: str, parts: Dict[str, Stored], block: Block) -> Optional[QuantizedWeight]:
    for name in UNUSED:
        parts.pop(name, None)
    scale = "weight_scale_inv" if "weight_scale_inv" in parts else "weight_scale"
    if scale not in parts and ("weight" not in parts or parts["weight"].dtype != floats.E4M3):
        return None
    only(parts, "weight", scale)
    return FP8Weight(method, parts, scale, block)
