"""Token ids that come from outside: checked against the vocabulary, and padded into tensors.

An embedding split over ranks gives zeros for an id that it doesn't know, without an error: a wrong
tokenizer, or padding with -1, would pass unnoticed.
"""

from typing import Sequence

import torch


def check_ids(rows: Sequence[Sequence[int]], vocab_size: int, what: str = "prompt") -> None:
    """Raises ValueError for an id outside of the vocabulary, by row, id and limit.

    Args:
        what: a row is called.
    """
    for row, ids in enumerate(rows):
        for wrong in (min(ids, default=0), max(ids, default=0)):
            if not 0 <= wrong < vocab_size:
                raise _outside(what, row, wrong, vocab_size)


def check_token_tensor(tokens: torch.Tensor, vocab_size: int, what: str = "row") -> None:
    """`check_ids` for a tensor (B, T). On a GPU it waits for all that is queued there."""
    if not tokens.numel():
        return
    low, high = torch.stack(torch.aminmax(tokens)).tolist()
    if low < 0 or high >= vocab_size:
        row, column = ((tokens < 0) | (tokens >= vocab_size)).nonzero()[0].tolist()
        raise _outside(what, row, int(tokens[row, column]), vocab_size)


def _outside(what: str, row: int, id: int, vocab_size: int) -> ValueError:
    return ValueError(f"{what} {row} has the token id {id}: this model knows 0 to {vocab_size - 1}")


def padded(rows: Sequence[Sequence[int]], device: torch.device) -> torch.Tensor:
    """Rows of ids as a tensor (B, T), the shorter ones with zeros behind them."""
    width = max(map(len, rows))
    return torch.tensor([[*ids, *[0] * (width - len(ids))] for ids in rows]).to(device)
