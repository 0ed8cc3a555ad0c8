"""Rows whose keys and values lie in blocks of a common pool, in any order, and may share blocks.

The pool is a `KVCache` whose rows are the blocks, `model.new_cache(n_blocks, PAGE)`. A row's table
lists its blocks: the first holds its positions 0 to PAGE - 1, and so on (PagedAttention, arXiv
2309.06180). Which blocks are free, and which rows share them, is the caller's business.
"""

import ctypes
import mmap
import os
from itertools import pairwise
from typing import Any, Dict, Iterable, Iterator, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F

from llama.layers.cache import KVCache

PAGE = 64  # positions of a block
SCRATCH = 0  # the block that takes what padding writes


class PagedRows(KVCache):
    """Some rows of a pool, as the cache of a forward pass.

    Args:
        tables: for each row its blocks, at least as many as it will need.
        lengths: positions that each row holds.
        adapters: the number of each row's adapter (`llama.layers.low_rank`), by default 0: none.
        images: what each row's tokens see; by default nothing.

    Attributes:
        counts: new positions of each row in this pass.
    """

    def __init__(
        self,
        pool: KVCache,
        tables: Sequence[Sequence[int]],
        lengths: Sequence[int],
        adapters: Sequence[int] = (),
        images: Sequence[Sequence[Any]] = (),
    ):
        self.images = images
        self.pool, self.lengths = pool, list(lengths)
        width = max(map(len, tables))
        padded = [[*table, *[SCRATCH] * (width - len(table))] for table in tables]
        self.tables = torch.tensor(padded, dtype=torch.int32)
        self._blocks: Optional[torch.Tensor] = None  # the tables, on the pool's device
        self.max_len = PAGE * width
        self.counts = [0] * len(tables)
        self.adapters = list(adapters) or [0] * len(tables)

    def select(self, rows: Sequence[int]) -> "PagedRows":
        """Some of the rows, in that order; they share what is in the pool."""
        other = object.__new__(PagedRows)
        other.pool, other.max_len = self.pool, self.max_len
        other.tables = self.tables[list(rows)]
        other._blocks = None
        other.lengths = [self.lengths[row] for row in rows]
        other.counts = [self.counts[row] for row in rows]
        other.adapters = [self.adapters[row] for row in rows]
        other.images = [self.images[row] for row in rows] if self.images else ()
        return other

    def extend_each(self, counts: Sequence[int]) -> None:
        """Make room for so many new positions of each row.

        Raises:
            ValueError: more than a row's blocks hold.
        """
        ends = [start + n for start, n in zip(self.lengths, counts, strict=True)]
        if max(ends) > self.max_len:
            raise ValueError(
                f"a row would reach {max(ends)} positions, and its {self.tables.shape[1]} blocks "
                f"hold {self.max_len}: give it more blocks"
            )
        self.lengths, self.counts = ends, list(counts)

    def reserve(self, n: int) -> None:
        """Widen the tables, for padding alone: the caller gives rows the blocks that they need."""
        more = blocks_for(n) - self.tables.shape[1]
        if more > 0:
            self.tables = F.pad(self.tables, (0, more), value=SCRATCH)
            self._blocks = None

    def prepare(self, n: int) -> None:
        """Put the tables of rows with up to n new positions on the pool's device. In the middle of
        a pass a GPU would be waited for."""
        self.reserve(max(self.lengths) + n)
        self._blocks = self.tables.to(self.pool.k.device).long()

    def extend(self, starts: Sequence[int], n: int) -> None:
        self.max_len = max(self.max_len, max(starts) + n)
        super().extend(starts, n)
        if self._blocks is None:
            self.prepare(0)
        self._at: Optional[Tuple[torch.Tensor, torch.Tensor]] = None

    def update(
        self, layer: int, positions: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> Tuple[torch.Tensor, torch.Tensor]:
        assert self._blocks is not None
        if self._at is None:  # the same in all layers
            places = positions.expand(len(self.lengths), -1)
            self._at = self._blocks.gather(1, places // PAGE), places % PAGE
        blocks, offsets = self._at
        parts = self.pool.parts
        for name, new in self.pool.encode(k, v).items():
            parts[name][layer][blocks, :, offsets] = new
        used = self._blocks[:, : blocks_for(max(self.lengths))]
        found = {
            name: part[layer][used].transpose(1, 2).flatten(2, 3)[:, :, : max(self.lengths)]
            for name, part in parts.items()
        }
        return self.pool.decode(found, k.dtype)

    def truncate(self, lengths: int | Sequence[int]) -> None:
        super().truncate(lengths)
        self.counts = [0] * len(self.lengths)


def copy_block(pool: KVCache, source: int, target: int) -> None:
    """Copy all layers' keys and values of one block to another."""
    for part in pool.parts.values():
        part[:, target] = part[:, source]


def erase_blocks(pool: KVCache, blocks: Sequence[int]) -> None:
    """Zeros for what may not be numbers: a mask hides a value, but not that it isn't one."""
    for block in blocks:
        for part in pool.parts.values():
            part[:, block] = 0


def free_layers(pool: KVCache, layers: Sequence[int], blocks: Iterable[int]) -> None:
    """Give the memory of some layers' keys and values in blocks back to the operating system, whole
    pages of it. They can be written again, and what is read before that is nothing in particular.
    """
    if os.name == "nt":
        return
    libc = ctypes.CDLL(None)
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    for part in pool.parts.values():
        size = part[0, 0].nbytes
        for first, last in runs(blocks):
            for layer in layers:
                begin = part[layer, first].data_ptr()
                end = (begin + (last - first + 1) * size) // mmap.PAGESIZE * mmap.PAGESIZE
                begin = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE
                if begin < end:
                    libc.madvise(begin, end - begin, mmap.MADV_DONTNEED)


def runs(numbers: Iterable[int]) -> Iterator[Tuple[int, int]]:
    """The first and last of the runs of neighbours among numbers."""
    whole = sorted(set(numbers))
    if not whole:
        return
    breaks = [i for i in range(1, len(whole)) if whole[i] != whole[i - 1] + 1]
    for begin, end in pairwise([0, *breaks, len(whole)]):
        yield whole[begin], whole[end - 1]


def read_blocks(pool: KVCache, table: Sequence[int], n: int) -> Dict[str, torch.Tensor]:
    """A copy of the first n positions in these blocks, by name: (n_layers, n_kv_heads, n, ...)."""
    return {
        name: part[:, list(table)].transpose(1, 2).flatten(2, 3)[:, :, :n].contiguous()
        for name, part in pool.parts.items()
    }


def write_blocks(pool: KVCache, table: Sequence[int], parts: Dict[str, torch.Tensor]) -> None:
    """Write to these blocks what `read_blocks` returned.

    Raises:
        ValueError: it was read from a cache of another type or dtype.
    """
    for name, whole in pool.parts.items():
        if name not in parts or parts[name].dtype != whole.dtype:
            raise ValueError(f"{name} isn't what this cache holds: it is {whole.dtype}")
        for block, values in zip(table, parts[name].split(PAGE, 2), strict=True):
            whole[:, block, :, : values.shape[2]] = values


def blocks_for(positions: int) -> int:
    """The number of blocks that hold so many positions."""
    return -(-positions // PAGE)
