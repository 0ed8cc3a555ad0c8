"""Checks token ids against the vocabulary, compares them, and pads them into tensors.

An embedding that is sharded over ranks silently returns zeros for ids outside of the vocabulary: a
wrong tokenizer, or padding with -1, would go unnoticed.
"""

from operator import index
from typing import Sequence

import torch


def check_ids(rows: Sequence[Sequence[int]], vocab_size: int, what: str = "prompt") -> None:
    """Raises ValueError for an id outside of the vocabulary, and for rows of anything but ids; the
    message calls a row `what`."""
    for row, ids in enumerate(rows):
        try:
            ends = (min(ids), max(ids)) if len(ids) else ()
            wrong = [id for id in ends if not 0 <= index(id) < vocab_size]
        except TypeError:
            raise ValueError(f"{what} {row} isn't a list of token ids: {ids!r:.60}") from None
        if wrong:
            raise _outside(what, row, wrong[0], vocab_size)


def check_token_tensor(tokens: torch.Tensor, vocab_size: int, what: str = "row") -> None:
    """`check_ids` for a tensor (B, T). It synchronizes with a GPU."""
    if not tokens.numel():
        return
    low, high = torch.stack(torch.aminmax(tokens)).tolist()
    if low < 0 or high >= vocab_size:
        row, column = ((tokens < 0) | (tokens >= vocab_size)).nonzero()[0].tolist()
        raise _outside(what, row, int(tokens[row, column]), vocab_size)


def _outside(what: str, row: int, id: int, vocab_size: int) -> ValueError:
    return ValueError(f"{what} {row} has the token id {id}: this model knows 0 to {vocab_size - 1}")


def padded(rows: Sequence[Sequence[int]], device: torch.device) -> torch.Tensor:
    """Rows of ids as a tensor (B, T), padded with zeros on the right."""
    width = max(map(len, rows))
    return torch.tensor([[*ids, *[0] * (width - len(ids))] for ids in rows]).to(device)


def common_length(a: Sequence[int], b: Sequence[int]) -> int:
    """The length of the common prefix of two sequences of ids."""
    if list(a) == list(b):
        return len(a)
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))  # noqa: B905
