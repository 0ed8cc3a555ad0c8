"""Token ids from outside: the first one that no vocabulary has is named."""

import pytest
import torch

from llama.layers.ids import check_ids, check_token_tensor, padded


def test_ids_of_the_vocabulary_pass():
    check_ids([[0, 9], [], [5]], 10)
    check_token_tensor(padded([[0, 9], [5]], torch.device("cpu")), 10)
    check_token_tensor(torch.zeros(1, 0, dtype=torch.long), 10)


@pytest.mark.parametrize("wrong", [-1, 10, -(1 << 40), 1 << 40])
def test_others_are_named_by_row_and_limit(wrong):
    named = f"has the token id {wrong}: this model knows 0 to 9"
    with pytest.raises(ValueError, match=f"prompt 1 {named}"):
        check_ids([[0, 9], [5, wrong]], 10)
    with pytest.raises(ValueError, match=f"text 0 {named}"):
        check_ids([[wrong]], 10, "text")
    with pytest.raises(ValueError, match=f"row 1 {named}"):
        check_token_tensor(torch.tensor([[0, 9], [5, wrong]]), 10)
