"""The key/value cache: what attention remembers. It belongs to the caller, not to the model."""

import copy
import math
from typing import Any, Dict, List, Sequence, Tuple

import numpy as np
import torch

BLOCK = 256  # positions by which a cache grows
PASS = 4096  # tokens that go through the model at a time: what activations take is bounded by that


def _zeros(shape: Tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros that, on the CPU, take memory only as they are written to.

    torch.zeros writes each page; numpy's come from calloc, where the operating system hands out a
    zeroed page at its first use. So a long cache costs what is used of it.
    """
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    raw = np.zeros(math.prod(shape) * dtype.itemsize, dtype=np.uint8)
    return torch.from_numpy(raw).view(dtype).view(shape)


class KVCache:
    """Keys and values of every layer, for rows that may stand at different lengths.

    `k` and `v` have the shape (n_layers, rows, n_kv_heads, room, head_dim), with the key/value
    heads of this rank; the room grows by blocks of positions, up to max_len. Entries at and beyond
    `lengths[row]` are never attended to, so forgetting is a change of that number and nothing is
    ever cleared. They start as zeros because a masked NaN is still a NaN.
    """

    def __init__(
        self,
        n_layers: int,
        rows: int,
        max_len: int,
        n_kv_heads: int,
        head_dim: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ):
        self.max_len = max_len
        shape = (n_layers, rows, n_kv_heads, min(BLOCK, max_len), head_dim)
        self.k = _zeros(shape, dtype, device)
        self.v = _zeros(shape, dtype, device)
        self.lengths: List[int] = [0] * rows

    @property
    def _parts(self) -> Dict[str, torch.Tensor]:
        """What is stored, each (n_layers, rows, n_kv_heads, positions, something)."""
        return {"k": self.k, "v": self.v}

    @property
    def rows(self) -> int:
        return len(self.lengths)

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self._parts.values())

    def extend(self, starts: Sequence[int], n: int) -> None:
        """Announce that n new positions follow from `starts` (one per row); sets the lengths.

        Raises:
            ValueError: more than fits, or a start behind which positions would be missing.
        """
        for row, (start, length) in enumerate(zip(starts, self.lengths, strict=True)):
            if not 0 <= start <= length:
                raise ValueError(
                    f"start_pos {start} of row {row}: the cache holds {length} positions, "
                    f"so it can go on from 0 to {length}"
                )
            if start + n > self.max_len:
                raise ValueError(
                    f"row {row} would reach {start + n} positions and the cache has room for "
                    f"{self.max_len}: make a longer cache or shorten the input"
                )
        self.reserve(max(starts) + n)
        self.lengths = [start + n for start in starts]

    def reserve(self, n: int) -> None:
        """Make room for n positions in each row, in whole blocks."""
        if n <= self.k.shape[3]:
            return
        used = max(self.lengths)  # no more is copied: what isn't written to takes no memory
        room = min(-(-n // BLOCK) * BLOCK, self.max_len)
        for name, small in self._parts.items():
            shape = (small.shape[0], self.rows, small.shape[2], room, small.shape[4])
            large = _zeros(shape, small.dtype, small.device)
            large[:, :, :, :used] = small[:, : self.rows, :, :used]
            setattr(self, name, large)

    def update(
        self, layer: int, positions: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> Tuple[torch.Tensor, torch.Tensor]:
        """Store a layer's new keys and values and return all that the layer has so far.

        Args:
            positions: (1, T) where all rows stand alike, else (rows, T).
            k, v: (rows, T, n_kv_heads, head_dim).

        Returns:
            Views of shape (rows, n_kv_heads, max(lengths), head_dim).
        """
        self._store(self.k[layer], positions, k)
        self._store(self.v[layer], positions, v)
        rows, end = self.rows, max(self.lengths)
        return self.k[layer, :rows, :, :end], self.v[layer, :rows, :, :end]

    def _store(self, into: torch.Tensor, positions: torch.Tensor, new: torch.Tensor) -> None:
        """new: (rows, T, n_kv_heads, ...), into a layer's part of the cache."""
        if len(positions) == 1:  # a plain slice
            end = max(self.lengths)
            into[: self.rows, :, end - new.shape[1] : end] = new.transpose(1, 2)
        else:
            row = torch.arange(self.rows, device=new.device)[:, None]
            into[row, :, positions] = new

    def truncate(self, lengths: int | Sequence[int]) -> None:
        """Forget everything at and beyond the given lengths (one for all rows, or one each).

        Raises:
            ValueError: a length that the row doesn't have.
        """
        if isinstance(lengths, int):
            lengths = [lengths] * self.rows
        for row, (new, old) in enumerate(zip(lengths, self.lengths, strict=True)):
            if not 0 <= new <= old:
                raise ValueError(f"row {row} holds {old} positions and can't be cut to {new}")
        self.lengths = list(lengths)

    def reset(self) -> None:
        """Forget everything."""
        self.truncate(0)

    def part(self, start: int, stop: int) -> "KVCache":
        """Some neighbouring rows as a cache of their own, in the same memory, with own lengths."""
        part = copy.copy(self)
        for name, whole in self._parts.items():
            setattr(part, name, whole[:, start:stop])
        part.lengths = self.lengths[start:stop]
        return part

    def spread(self, sources: Sequence[int]) -> None:
        """Copy rows: row i becomes what row sources[i] was; ascending, none beyond its own i."""
        lengths = [self.lengths[source] for source in sources]
        for new in reversed(range(len(sources))):
            old, n = sources[new], lengths[new]
            if new != old:
                for part in self._parts.values():
                    part[:, new, :, :n] = part[:, old, :, :n]
        self.lengths = lengths

    def gather(self, sources: Sequence[int]) -> None:
        """Copy rows in any order: row i becomes what row sources[i] was."""
        n = max(self.lengths)
        for part in self._parts.values():
            part[:, : len(sources), :, :n] = part[:, list(sources), :, :n]
        self.lengths = [self.lengths[source] for source in sources]

    def read(self, row: int, start: int, stop: int) -> Dict[str, torch.Tensor]:
        """A copy of what a row holds there: by name, (n_layers, n_kv_heads, stop - start, ...)."""
        return {name: part[:, row, :, start:stop].clone() for name, part in self._parts.items()}

    def write(self, row: int, parts: Dict[str, torch.Tensor]) -> None:
        """Go on with what `read` found elsewhere. The room is to be there (`reserve`).

        Raises:
            ValueError: a cache of another kind or for another number of heads.
        """
        n, start = parts["k"].shape[2], self.lengths[row]
        for name, whole in self._parts.items():
            if name not in parts or parts[name].dtype != whole.dtype:
                raise ValueError(f"{name} isn't what this cache holds: it is {whole.dtype}")
            whole[:, row, :, start : start + n] = parts[name]
        self.lengths[row] = start + n

    def keep(self, rows: Sequence[int]) -> None:
        """Drop all rows but the given ones (ascending), which move up to take their places."""
        for new, old in enumerate(rows):
            if new != old:
                n = self.lengths[old]
                for part in self._parts.values():
                    part[:, new, :, :n] = part[:, old, :, :n]
        self.lengths = [self.lengths[row] for row in rows]


class Int8KVCache(KVCache):
    """Keys and values as bytes, each row of head_dim with a scale of its own: half of bf16.

    What `update` returns is made dense for the layer that asks, in the dtype of its keys.
    """

    def __init__(
        self, n_layers: int, rows: int, max_len: int, n_kv_heads: int, head_dim: int, **where: Any
    ):
        where["dtype"] = torch.int8
        super().__init__(n_layers, rows, max_len, n_kv_heads, head_dim, **where)
        shape = (*self.k.shape[:-1], 1)
        self.k_scale = _zeros(shape, torch.float32, self.k.device)
        self.v_scale = _zeros(shape, torch.float32, self.k.device)

    @property
    def _parts(self) -> Dict[str, torch.Tensor]:
        return {"k": self.k, "v": self.v, "k_scale": self.k_scale, "v_scale": self.v_scale}

    def update(
        self, layer: int, positions: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> Tuple[torch.Tensor, torch.Tensor]:
        rows, end = self.rows, max(self.lengths)
        dense = []
        for new, values, scales in ((k, self.k, self.k_scale), (v, self.v, self.v_scale)):
            scale = new.float().abs().amax(-1, keepdim=True) / 127
            rounded = (new.float() / scale.where(scale > 0, 1)).round().to(torch.int8)
            self._store(values[layer], positions, rounded)
            self._store(scales[layer], positions, scale)
            stored = values[layer, :rows, :, :end] * scales[layer, :rows, :, :end]
            dense.append(stored.to(k.dtype))
        return dense[0], dense[1]
