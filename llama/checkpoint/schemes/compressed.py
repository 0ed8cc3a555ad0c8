"""compressed-tensors, as llm-compressor writes it: a format for each group of modules.

Integers, of 4 or 8 bits, the bits n below; with zero points if `symmetric` is false:

    pack-quantized   weight_packed  (out, in · n / 32)  int32: q + 2^(n-1), the first value lowest
                     weight_zero_point  (out · n / 32, groups)   int32, rows packed alike
                     weight_shape   (2,)     weight_g_idx  (in,): the group of each input
    int-quantized    weight         (out, in)   int8     weight_zero_point  (out, groups)   int8
    both             weight_scale   (out, groups); (out, 1): by rows; (1,): of all

Scales of activations (`input_activations`) and of the cache aren't used: they stay as they are.
"""

import re
from typing import Any, Callable, Dict, List, Mapping, NamedTuple, Optional, Tuple

import torch

from llama.checkpoint.schemes import fp4, fp8
from llama.checkpoint.schemes.integers import Codes, IntegerWeight, unpacked
from llama.checkpoint.schemes.weight import FLOATS, QuantizedWeight, need, only, whole
from llama.checkpoint.source import Stored

# Scales of activations and of the cache, by the last part of their names.
UNUSED = re.compile(r"(input|output|k|v|q)_(scale|zero_point|global_scale)")


class Group(NamedTuple):
    """What a config says of a group of modules."""

    targets: List[str]
    format: str
    weights: Mapping[str, Any]

    def match(self, module: str) -> Optional[Tuple[int, str]]:
        """The first of its targets that covers a module, None if none does; a lower one of another
        group precedes. As in the library's `match_targets`: names, then patterns for the start of
        one ("re:..."), then classes."""
        found = [
            (2, target) if target == "Linear" else (int(target.startswith("re:")), target)
            for target in self.targets
            if target in ("Linear", module)
            or (target.startswith("re:") and re.match(target[3:], module))
        ]
        return min(found, default=None)


class CompressedWeight(IntegerWeight):
    def __init__(self, parts: Mapping[str, Stored], group: Group):
        self._parts, self._packed = parts, group.format == "pack-quantized"
        about = group.weights
        bits = about.get("num_bits")
        if type(bits) is not int or bits not in (4, 8) or (bits == 4 and not self._packed):
            raise ValueError(f"has num_bits={bits!r}; read here are 4 and 8, in {group.format} 8")
        self._bits, per_word, order = bits, 32 // bits, None
        if self._packed:
            packed = need(parts, "weight_packed", None, torch.int32)
            found = whole(need(parts, "weight_shape", (2,), torch.int64, torch.int32)).tolist()
            rows, cols = found
            if packed.shape != (rows, -(-cols // per_word)):
                raise ValueError(f"of weight_shape {found} has weight_packed of {packed.shape}")
        else:
            weight = need(parts, "weight", None, torch.int8)
            if len(weight.shape) != 2:
                raise ValueError(f"has weight of shape {weight.shape}")
            rows, cols = weight.shape
        if "weight_g_idx" in parts and about.get("actorder") in ("group", "dynamic", True):
            order = whole(need(parts, "weight_g_idx", (cols,))).long()
        self._scale = need(parts, "weight_scale", None, *FLOATS)
        strategy, size = about.get("strategy"), about.get("group_size")
        if strategy in ("channel", "tensor"):
            size = cols
            self._per_row = strategy == "channel" and self._scale.shape in ((rows, 1), (rows,))
            if not self._per_row and self._scale.shape not in ((1,), (), (1, 1)):
                raise ValueError(f"has weight_scale of shape {self._scale.shape}")
        elif strategy != "group" or type(size) is not int or size < 1:
            raise ValueError(f"has strategy={strategy!r}, group_size={size!r}: not read here")
        else:
            self._per_row = True
            need(parts, "weight_scale", (rows, -(-cols // size)))
        method = f"compressed-tensors {group.format}"
        super().__init__((rows, cols), method, parts, bits=bits, group=size, order=order)
        self._zero = None if about.get("symmetric", True) else parts.get("weight_zero_point")
        if self._zero is not None:
            groups = cols // self.group if self._per_row else 1
            stored, dtype = (rows if self._per_row else 1), torch.int8
            if self._packed:
                stored, dtype = -(-stored // per_word), torch.int32
            shapes = ((stored, groups), (stored,), ()) if groups == 1 else ((stored, groups),)
            if self._zero.shape not in shapes or self._zero.dtype != dtype:
                raise ValueError(f"has weight_zero_point of {self._zero.dtype}, {self._zero.shape}")
        elif not about.get("symmetric", True):
            raise ValueError("lacks weight_zero_point, and is to be asymmetric")

    def codes(self, start: int, stop: int) -> Codes:
        middle, rows = 1 << (self._bits - 1), stop - start
        if self._packed:
            words = self._parts["weight_packed"].read(0, start, stop)
            q = unpacked(words, self._bits)[:, : self.shape[1]]
        else:
            q = self._parts["weight"].read(0, start, stop).view(torch.uint8) ^ 128
        groups = self.shape[1] // self.group
        if self._per_row:
            scale = self._scale.read(0, start, stop).view(rows, groups)
        else:
            scale = whole(self._scale).view(1, 1).expand(rows, 1)
        if self._zero is None:
            zero = torch.full((rows, groups), middle, dtype=torch.uint8)
        elif self._packed and self._per_row:
            first, per_word = start // (32 // self._bits), 32 // self._bits
            words = self._zero.read(0, first, -(-stop // per_word)).view(-1, groups).T
            zero = unpacked(words, self._bits)[:, start - first * per_word :][:, :rows].T
        elif self._per_row:
            zero = self._zero.read(0, start, stop).view(rows, groups).view(torch.uint8) ^ 128
        else:
            one = whole(self._zero).view(1)
            one = unpacked(one, self._bits)[:1] if self._packed else one.view(torch.uint8) ^ 128
            zero = one.view(1, 1).expand(rows, 1)
        return Codes(q, scale, zero)


def _integers(parts: Dict[str, Stored], group: Group) -> QuantizedWeight:
    if group.weights.get("type", "int") != "int":
        raise ValueError(f"has weights of type {group.weights['type']!r}, not integers")
    names = ("weight_packed", "weight_shape") if "weight_packed" in parts else ("weight",)
    only(parts, *names, "weight_scale", "weight_zero_point", "weight_g_idx")
    return CompressedWeight(parts, group)


def _one_each(parts: Dict[str, Stored], group: Group) -> QuantizedWeight:
    """A byte for each value: an integer or FP8."""
    if group.weights.get("type", "int") == "int":
        return _integers(parts, group)
    return fp8.compressed(parts, group.weights)


# What reads the weights of a format.
FORMATS: Dict[str, Callable[[Dict[str, Stored], Group], QuantizedWeight]] = {
    "pack-quantized": _integers,
    "int-quantized": _integers,
    "naive-quantized": _one_each,
    "float-quantized": _one_each,
    "nvfp4-pack-quantized": lambda parts, group: fp4.nvfp4(parts),
    "mxfp4-pack-quantized": lambda parts, group: fp4.mxfp4(parts),
}


class CompressedTensors:
    def __init__(self, config: Mapping[str, Any]):
        groups = config.get("config_groups")
        if not isinstance(groups, dict) or not all(isinstance(g, dict) for g in groups.values()):
            raise ValueError(f"config_groups={str(groups)[:80]}: not settings by group")
        sparsity = config.get("sparsity_config") or {"format": "dense"}
        if sparsity != sparsity | {"format": "dense"} or config.get("transform_config"):
            raise ValueError("sparsity_config, transform_config: not read here")
        self.groups = []
        for name, about in groups.items():
            format = about.get("format") or config.get("format")
            targets, weights = about.get("targets"), about.get("weights")
            if not isinstance(format, str) or format not in FORMATS:
                known = ", ".join(FORMATS)
                raise ValueError(f"{name} has the format {format!r}; read here: {known}")
            if not isinstance(targets, list) or not isinstance(weights, dict):
                raise ValueError(f"{name} has targets={targets!r}, weights={weights!r}")
            self.groups.append(Group([str(target) for target in targets], format, weights))

    def weight(self, module: str, parts: Dict[str, Stored]) -> Optional[QuantizedWeight]:
        for unused in [part for part in parts if UNUSED.fullmatch(part)]:
            del parts[unused]
        if not any(part.startswith("weight_") for part in parts):
            return None
        found = [(match, group) for group in self.groups if (match := group.match(module))]
        if not found:
            raise ValueError("is quantized, and no group of config_groups covers it")
        _, group = min(found, key=lambda one: one[0])
        return FORMATS[group.format](parts, group)
