"""Meta's FP8 releases as .pth: feed-forward layers in e4m3, a scale for each row of a shard.

    consolidated.NN.pth   layers.I.feed_forward.wK.weight   e4m3, or a wider float that holds it
    fp8_scales_N.pt       I_feed_forward.wK_N               a scale for each row of the part

The first and the last layer are as in other releases. Meta's own code rounds activations to 8 bits;
they stay as they are here.
"""

import math
import re
from pathlib import Path
from typing import Callable, Dict, List, Tuple

import torch

from llama.checkpoint import floats
from llama.checkpoint.pth import index_pth
from llama.checkpoint.schemes.weight import FLOATS, QuantizedWeight, whole
from llama.checkpoint.source import Stored
from llama.layers import parallel

Part = Tuple[Stored, Stored]  # of one shard: codes, scales


class MetaFP8Weight(QuantizedWeight):
    """A weight that shards split along an axis."""

    def __init__(self, name: str, parts: List[Part]):
        self._parts, self._axis = parts, parallel.shard_axis(name) or 0
        shape = parts[0][0].shape
        for codes, scales in parts:
            if len(shape) != 2 or codes.shape != shape or math.prod(scales.shape) != shape[0]:
                shapes = f"{codes.shape} and scales {scales.shape}"
                raise ValueError(f"{codes.file}: {name} has {shapes}; expected {shape}, by rows")
            if codes.dtype not in (floats.E4M3, *FLOATS) or scales.dtype not in FLOATS:
                raise ValueError(f"{codes.file}: {name} has {codes.dtype}, {scales.dtype}")
        self._rows, self._cols = shape
        n = len(parts)
        size = (n * shape[0], shape[1]) if self._axis == 0 else (shape[0], n * shape[1])
        kind = "FP8" if shape[1] % floats.VALUES == 0 else None
        super().__init__(size, "Meta's FP8, a scale for each row", kind, {})
        self.nbytes = math.prod(size) * parts[0][0].dtype.itemsize

    def _joined(
        self, start: int, stop: int, f: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        """f of the codes and scales of each part of rows [start, stop)."""
        found = []
        for i, (codes, scales) in enumerate(self._parts):
            first = i * self._rows if self._axis == 0 else 0
            begin, end = max(start - first, 0), min(stop - first, self._rows)
            if begin < end:
                some = codes.read(0, begin, end).to(floats.E4M3)
                found.append(f(some, whole(scales).float().view(-1, 1)[begin:end]))
        return torch.cat(found, self._axis)

    def dense(self, start: int, stop: int) -> torch.Tensor:
        return self._joined(start, stop, lambda codes, scale: codes.float().mul_(scale))

    def blocks(self, start: int, stop: int) -> torch.Tensor:
        n = self._cols // floats.VALUES
        return self._joined(
            start, stop, lambda codes, scale: floats.fp8_blocks(codes, scale.expand(-1, n))
        )


def take(path: Path, shards: List[Dict[str, Stored]]) -> Dict[str, QuantizedWeight]:
    """The weights of a directory whose scales are beside them, taken out of `shards`.

    Raises:
        ValueError: scales that are missing, or of weights that aren't there.
    """
    if not any(path.glob("fp8_scales_*.pt")):
        return {}
    parts: Dict[str, List[Part]] = {}
    for rank, shard in enumerate(shards):
        file = path / f"fp8_scales_{rank}.pt"
        if not file.exists():
            raise ValueError(f"{path} has other scales, but lacks {file.name}; fetch it")
        for key, scales in index_pth(file).items():
            match = re.fullmatch(rf"(\d+)_feed_forward\.(w[123])_{rank}", key)
            name = f"layers.{match[1]}.feed_forward.{match[2]}.weight" if match else key
            if name not in shard:
                raise ValueError(f"{file}: {key[:80]} is no weight of consolidated.{rank:02}.pth")
            parts.setdefault(name, []).append((shard.pop(name), scales))
    for name, found in parts.items():
        if len(found) != len(shards):
            raise ValueError(f"{path}: {name} has scales in {len(found)} of {len(shards)} files")
    for name, stored in [item for shard in shards for item in shard.items()]:
        if stored.dtype not in FLOATS:
            raise ValueError(f"{stored.file}: {name} has the dtype {stored.dtype} and no scales")
    return {name: MetaFP8Weight(name, found) for name, found in parts.items()}
