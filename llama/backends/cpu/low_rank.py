"""LoRA adapters of the CPU kernels' layers: packed, and those of a pass as the kernels take it."""

from ctypes import addressof
from itertools import accumulate, groupby
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F

from llama.backends.cpu import kernels
from llama.backends.cpu.packing import LANES, Arena, interleave
from llama.checkpoint.adapter import Pair

SPAN, LARGEST_RANK = 256, 512  # as in low_rank.h
GROUPS = (("wq", "wk", "wv"), ("wo",), ("w1", "w3"), ("w2",))  # of the same inputs, as in MATRICES


class PassAdapters(NamedTuple):
    """The adapters of a pass, and what they point to."""

    struct: kernels.Adapters
    kept: Tuple[Any, ...]


class NativeAdapters:
    """Any number of adapters.

    Args:
        widths: of the inputs of each of GROUPS.
        dtype: of the model.
    """

    def __init__(self, n_layers: int, widths: Sequence[int], dtype: torch.dtype):
        self._n_layers, self._dtype = n_layers, dtype
        spans = [len(group) * -(-cols // SPAN) for group, cols in zip(GROUPS, widths, strict=True)]
        self._spans, self._most = max(spans), 0  # the largest rank
        self._memory: List[torch.Tensor] = []
        self._structs: List[kernels.LowRank] = []  # of each adapter, layer and matrix
        self._table: Any = None  # of these

    def add(self, pairs: Dict[str, Pair]) -> None:
        """Pack an adapter: this rank's part, by Meta's names of the weights.

        Raises:
            ValueError: too large a rank; an adapter of single experts.
        """
        if any(".experts." in name for name in pairs):
            raise ValueError(
                "an adapter of experts, which the CPU kernels don't take beside the weights: build "
                "with adapter_dir"
            )
        most = max(len(pair.A) for pair in pairs.values())
        if most > LARGEST_RANK:
            raise ValueError(
                f"an adapter of rank {most}, and the CPU kernels take at most {LARGEST_RANK}: "
                "build with compile=False, or with adapter_dir"
            )
        # A mixture's w1 to w3 are those of its shared expert.
        places = {name: (int(name.split(".")[1]), name.split(".")[-2]) for name in pairs}
        stored = {place: self._stored(pairs[name]) for name, place in places.items()}
        scales = {place: pairs[name].scale for name, place in places.items()}
        order = [  # that of their use
            (layer, matrix, half)
            for layer in range(self._n_layers)
            for group in GROUPS
            for half in (0, 1)
            for matrix in group
            if (layer, matrix) in stored
        ]
        halves = [interleave(stored[layer, matrix][half]) for layer, matrix, half in order]
        arena, at = Arena([half.nbytes for half in halves]), {}
        for place, half in zip(order, halves, strict=True):
            self._memory.append(arena.take())
            self._memory[-1].copy_(half.view(-1).view(torch.uint8))
            at[place] = self._memory[-1].data_ptr()
        for layer in range(self._n_layers):
            for matrix in kernels.MATRICES:
                struct = kernels.LowRank()
                if (layer, matrix) in stored:
                    A, _ = stored[layer, matrix]
                    struct = kernels.LowRank(
                        at[layer, matrix, 0], at[layer, matrix, 1], A.dtype == torch.bfloat16,
                        len(A), scales[layer, matrix],
                    )  # fmt: skip
                    self._most = max(self._most, len(A))
                self._structs.append(struct)
        self._table = (kernels.LowRank * len(self._structs))(*self._structs)

    def _stored(self, pair: Pair) -> Tuple[torch.Tensor, torch.Tensor]:
        """A and B, bf16 if the model or all values are; the rank becomes a multiple of 16."""
        missing = -len(pair.A) % LANES
        A, B = F.pad(pair.A.float(), (0, 0, 0, missing)), F.pad(pair.B.float(), (0, missing))
        narrow = A.bfloat16(), B.bfloat16()
        if self._dtype == torch.bfloat16 or all(map(torch.equal, narrow, (A, B))):
            return narrow
        return A, B

    def of_pass(
        self, numbers: Sequence[int], counts: Sequence[int], work: Any
    ) -> Optional[PassAdapters]:
        """The adapters of rows of these numbers of tokens.

        Args:
            numbers: the adapter of each row; 0: none.
            work: the Workspace.

        Returns:
            None if no row has an adapter.
        """
        begins, runs = [0, *accumulate(counts)], []
        for number, group in groupby(range(len(counts)), numbers.__getitem__):
            rows = list(group)
            if number:
                runs.append((number - 1, begins[rows[0]], begins[rows[-1] + 1]))
        if not runs:
            return None
        table, of_runs = self._table, torch.tensor(runs, dtype=torch.int32)
        partial = work.take("low rank", self._spans * begins[-1] * self._most)
        struct = kernels.Adapters(
            addressof(table), of_runs.data_ptr(), len(runs), self._n_layers,
            self._most, partial.data_ptr(),
        )  # fmt: skip
        return PassAdapters(struct, (table, of_runs))
