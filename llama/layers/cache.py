"""The key/value cache. It belongs to the caller, not to the model."""

import copy
import math
import mmap
import os
from typing import Any, Dict, List, Sequence, Tuple

import torch

GROWTH = 256  # positions by which a cache grows
PASS = 4096  # tokens per forward pass at most, which bounds the memory of activations


def _zeros(shape: Tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A tensor of zeros; on the CPU, its pages take memory only once they are written to.

    The operating system maps the pages of an anonymous mapping on first use; torch.zeros writes to
    each. So a long cache takes memory only for the positions in use, unless pages are huge ones,
    for which numpy's zeros ask: a block of positions lies in as many places as there are layers.
    """
    size = math.prod(shape)
    if device.type != "cpu" or not size:
        return torch.zeros(shape, dtype=dtype, device=device)
    private = {} if os.name == "nt" else {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS}
    memory = mmap.mmap(-1, size * dtype.itemsize, **private)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):  # Linux
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


class KVCache:
    """Keys and values of every layer, for rows (sequences of a batch) of different lengths.

    `k` and `v` have the shape (n_layers, rows, n_kv_heads, capacity, head_dim), with the key/value
    heads of this rank; the capacity grows by GROWTH positions, up to max_len. Entries from
    `lengths[row]` on are masked, so truncating only changes that number. They are initialized to
    zeros, since uninitialized memory may hold NaN, which a mask doesn't remove.

    `images` is for networks that read some: for each row what its tokens see, the caller's too.
    """

    images: Sequence[Sequence[Any]] = ()

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
        shape = (n_layers, rows, n_kv_heads, min(GROWTH, max_len), head_dim)
        self.k = _zeros(shape, dtype, device)
        self.v = _zeros(shape, dtype, device)
        self.lengths: List[int] = [0] * rows

    @property
    def parts(self) -> Dict[str, torch.Tensor]:
        """The stored tensors, each (n_layers, rows, n_kv_heads, capacity, ...)."""
        return {"k": self.k, "v": self.v}

    @property
    def rows(self) -> int:
        return len(self.lengths)

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts.values())

    def extend(self, starts: Sequence[int], n: int) -> None:
        """Make space for n new positions from `starts` on (one per row), and set the lengths.

        Raises:
            ValueError: positions beyond max_len, or a start that would leave a gap.
        """
        for row, (start, length) in enumerate(zip(starts, self.lengths, strict=True)):
            if not 0 <= start <= length:
                raise ValueError(
                    f"start_pos {start} of row {row}: the cache holds {length} positions, "
                    f"so it can continue from 0 to {length}"
                )
            if start + n > self.max_len:
                raise ValueError(
                    f"row {row} would reach {start + n} positions and the cache has space for "
                    f"{self.max_len}: make a longer cache or shorten the input"
                )
        self.reserve(max(starts) + n)
        self.lengths = [start + n for start in starts]

    def reserve(self, n: int) -> None:
        """Grow the capacity to n positions per row, rounded up to a multiple of GROWTH."""
        if n <= self.k.shape[3]:
            return
        used = max(self.lengths)  # only these are copied: see _zeros
        capacity = min(-(-n // GROWTH) * GROWTH, self.max_len)
        for name, small in self.parts.items():
            shape = (small.shape[0], self.rows, small.shape[2], capacity, small.shape[4])
            large = _zeros(shape, small.dtype, small.device)
            large[:, :, :, :used] = small[:, : self.rows, :, :used]
            setattr(self, name, large)

    def update(
        self, layer: int, positions: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> Tuple[torch.Tensor, torch.Tensor]:
        """Store a layer's new keys and values; return all those of the layer.

        Args:
            positions: (1, T) if all rows have the same positions, else (rows, T).
            k, v: (rows, T, n_kv_heads, head_dim).

        Returns:
            Views of shape (rows, n_kv_heads, max(lengths), head_dim).
        """
        parts = self.parts
        for name, new in self.encode(k, v).items():
            self._store(parts[name][layer], positions, new)
        rows, end = self.rows, max(self.lengths)
        held = {name: part[layer, :rows, :, :end] for name, part in parts.items()}
        return self.decode(held, k.dtype)

    def encode(self, k: torch.Tensor, v: torch.Tensor) -> Dict[str, torch.Tensor]:
        """What is stored of keys and values, (..., head_dim), by the names of `parts`."""
        return {"k": k, "v": v}

    def decode(
        self, held: Dict[str, torch.Tensor], dtype: torch.dtype
    ) -> Tuple[torch.Tensor, torch.Tensor]:
        """The keys and values that were stored."""
        return held["k"], held["v"]

    def _store(self, into: torch.Tensor, positions: torch.Tensor, new: torch.Tensor) -> None:
        """new: (rows, T, n_kv_heads, ...), into a layer's part of the cache."""
        if len(positions) == 1:  # a plain slice
            end = max(self.lengths)
            into[: self.rows, :, end - new.shape[1] : end] = new.transpose(1, 2)
        else:
            row = torch.arange(self.rows, device=new.device)[:, None]
            into[row, :, positions] = new

    def truncate(self, lengths: int | Sequence[int]) -> None:
        """Drop the entries at and beyond the given lengths (one for all rows, or one each).

        Raises:
            ValueError: a row is shorter than that.
        """
        if isinstance(lengths, int):
            lengths = [lengths] * self.rows
        for row, (new, old) in enumerate(zip(lengths, self.lengths, strict=True)):
            if not 0 <= new <= old:
                raise ValueError(f"row {row} holds {old} positions: it can't be truncated to {new}")
        self.lengths = list(lengths)

    def reset(self) -> None:
        """Drop all entries."""
        self.truncate(0)

    def part(self, start: int, stop: int) -> "KVCache":
        """Rows start to stop as a cache of their own; it shares their memory, not their lengths."""
        part = copy.copy(self)
        for name, whole in self.parts.items():
            setattr(part, name, whole[:, start:stop])
        part.lengths = self.lengths[start:stop]
        return part

    def spread(self, sources: Sequence[int]) -> None:
        """Copy row sources[i] to row i, for all i; sources ascend, with sources[i] <= i."""
        lengths = [self.lengths[source] for source in sources]
        for row in reversed(range(len(sources))):
            self._copy(sources[row], row)
        self.lengths = lengths

    def _copy(self, old: int, new: int) -> None:
        n = self.lengths[old]
        for part in self.parts.values() if new != old else ():
            part[:, new, :, :n] = part[:, old, :, :n]

    def gather(self, sources: Sequence[int]) -> None:
        """Copy row sources[i] to row i, for all i, in any order."""
        n = max(self.lengths)
        for part in self.parts.values():
            part[:, : len(sources), :, :n] = part[:, list(sources), :, :n]
        self.lengths = [self.lengths[source] for source in sources]

    def read(self, row: int, start: int, stop: int) -> Dict[str, torch.Tensor]:
        """A copy of a row's positions start to stop, by name: (n_layers, n_kv_heads, n, ...)."""
        return {name: part[:, row, :, start:stop].clone() for name, part in self.parts.items()}

    def write(self, row: int, parts: Dict[str, torch.Tensor]) -> None:
        """Append what `read` returned to a row. Call `reserve` before.

        Raises:
            ValueError: it was read from a cache of another type or dtype.
        """
        n, start = parts["k"].shape[2], self.lengths[row]
        for name, whole in self.parts.items():
            if name not in parts or parts[name].dtype != whole.dtype:
                raise ValueError(f"{name} isn't what this cache holds: it is {whole.dtype}")
            whole[:, row, :, start : start + n] = parts[name]
        self.lengths[row] = start + n

    def keep(self, rows: Sequence[int]) -> None:
        """Keep only the given rows (ascending), which become rows 0, 1, ..."""
        for new, old in enumerate(rows):
            self._copy(old, new)
        self.lengths = [self.lengths[row] for row in rows]


class Int8KVCache(KVCache):
    """Keys and values as int8, with one fp32 scale per head and position: half the memory of bf16.

    `update` returns a layer's dequantized, in the dtype of the new keys.
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
    def parts(self) -> Dict[str, torch.Tensor]:
        return {"k": self.k, "v": self.v, "k_scale": self.k_scale, "v_scale": self.v_scale}

    def encode(self, k: torch.Tensor, v: torch.Tensor) -> Dict[str, torch.Tensor]:
        found: Dict[str, torch.Tensor] = {}
        for name, new in (("k", k), ("v", v)):
            scale = new.float().abs().amax(-1, keepdim=True) / 127
            rounded = (new.float() / scale.where(scale > 0, 1)).round().to(torch.int8)
            found |= {name: rounded, f"{name}_scale": scale}
        return found

    def decode(
        self, held: Dict[str, torch.Tensor], dtype: torch.dtype
    ) -> Tuple[torch.Tensor, torch.Tensor]:
        k, v = ((held[name] * held[f"{name}_scale"]).to(dtype) for name in ("k", "v"))
        return k, v


def ungrouped(part: torch.Tensor, heads: int) -> torch.Tensor:
    """Keys or values (B, n_kv_heads, S, head_dim), for attention of `heads` queries with a mask.

    CUDA's fused kernels take a mask or groups of heads, not both; they get a copy for each head.
    The others take groups.
    """
    return part.repeat_interleave(heads // part.shape[1], 1) if part.is_cuda else part
