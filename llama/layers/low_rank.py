"""LoRA adapters beside a model's weights, chosen for each row of a pass: y = W x + scale · B (A x).

Rows of different adapters are computed together (S-LoRA, arXiv 2311.03285); a row without one is
what it would be in a model without adapters. The adapter of a row is a number: 0 is none, 1 the
first that was added. `llama.backends.adapters` adds them.
"""

import threading
from contextlib import contextmanager
from typing import Iterator, List, Optional, Sequence

import torch
from fairscale.nn.model_parallel.mappings import reduce_from_model_parallel_region
from torch import nn


class Adapters(threading.local):
    """Those of the rows of the pass that a thread computes.

    Attributes:
        rows: which rows have one, or None: none has.
        which: the number of each of these.
    """

    rows: Optional[torch.Tensor] = None
    which: torch.Tensor


class LowRankLinear(nn.Module):
    """A linear layer with adapters, stacked. Their ranks are padded to the largest with zeros.

    Of a column-parallel layer, a rank has its rows of B and all of A; of a row-parallel layer, its
    columns of A and all of B.

    Attributes:
        A, B: (adapters + 1, r, in), (adapters + 1, out, r), scaled; the first are zeros.
    """

    A: torch.Tensor
    B: torch.Tensor

    def __init__(self, base: nn.Module, chosen: Adapters, splits_outputs: bool):
        super().__init__()
        self.base, self._chosen, self._splits_outputs = base, chosen, splits_outputs
        self.register_buffer("A", torch.zeros(1, 0, 0), persistent=False)
        self.register_buffer("B", torch.zeros(1, 0, 0), persistent=False)

    @property
    def weight(self) -> torch.Tensor:
        return self.base.weight  # type: ignore[return-value]

    def add(self, number: int, A: torch.Tensor, B: torch.Tensor) -> None:
        """Add an adapter: A (r, in), and B (out, r) times the scale."""
        self.A, self.B = (_stacked(*pair, number) for pair in ((self.A, A), (self.B, B)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y, rows = self.base(x), self._chosen.rows  # x: (B, T, in)
        if rows is None:
            return y
        which = self._chosen.which.where(self._chosen.which < len(self.A), 0)
        z = x[rows] @ self.A[which].mT  # (rows, T, r)
        if not self._splits_outputs:
            z = reduce_from_model_parallel_region(z)
        return y.index_add(0, rows, z @ self.B[which].mT)


def _stacked(before: torch.Tensor, new: torch.Tensor, number: int) -> torch.Tensor:
    """Matrices of any shapes as one tensor, with zeros for what is missing before `number`."""
    shape = [max(a, b) for a, b in zip(before.shape[1:], new.shape, strict=True)]
    found = new.new_zeros(number + 1, *shape)
    found[: len(before), : before.shape[1], : before.shape[2]] = before
    found[number, : new.shape[0], : new.shape[1]] = new
    return found


def names(model: nn.Module) -> List[str]:
    """The names of a model's adapters, in the order of their numbers."""
    return getattr(model, "_adapter_names", [])


def number(model: nn.Module, name: Optional[str]) -> int:
    """The number of the adapter of this name; 0 of None.

    Raises:
        ValueError: no adapter of this name.
    """
    known = names(model)
    if name is not None and name not in known:
        raise ValueError(
            f"no adapter {name!r}: there is {', '.join(known) or 'none'}; add it with add_adapter"
        )
    return 0 if name is None else 1 + known.index(name)


def chosen(model: nn.Module) -> Adapters:
    """What the layers with adapters of a model share."""
    found = getattr(model, "_adapters", None)
    if found is None:
        model._adapters = found = Adapters()  # type: ignore[assignment]
    assert isinstance(found, Adapters)
    return found


@contextmanager
def choose(model: nn.Module, numbers: Sequence[int]) -> Iterator[None]:
    """The adapters of the rows, in passes of this thread until the context ends."""
    rows = [row for row, one in enumerate(numbers) if one]
    if not rows:
        yield
        return
    adapters, device = chosen(model), next(model.parameters()).device
    adapters.rows = torch.tensor(rows, device=device)
    adapters.which = torch.tensor([numbers[row] for row in rows], device=device)
    try:
        yield
    finally:
        adapters.rows = None
