"""Packed rows against rows of their own: losses, gradients, and nothing seen of other examples."""

import pytest
import torch
from conftest import TINY, random_model
from test_trainer import examples

from llama.training import IGNORED, Example, next_token_loss
from llama.training.packing import Span, packed, plain

CPU = torch.device("cpu")


def gradients(model, rows, layout):
    found = layout(rows, CPU)
    model.zero_grad()
    loss = next_token_loss(model, found.tokens, found.labels, **found.options)
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("n", [1, 2, 11, 30])
def test_packed_is_unpacked(n):
    rows, model = examples(n), random_model(TINY)
    (loss, found), (other, expected) = (gradients(model, rows, how) for how in (packed, plain))
    assert abs(loss - other) <= 1e-5 * other
    for name, gradient in expected.items():
        assert (found[name] - gradient).abs().max() <= 1e-5 * gradient.abs().max(), name


def test_every_example_is_in_one_place_and_there_is_less_padding():
    rows = examples(30)
    found, other = packed(rows, CPU), plain(rows, CPU)
    assert found.tokens.shape[1] == other.tokens.shape[1]
    assert len(found.tokens) <= len(other.tokens) * 0.7
    taken = torch.zeros_like(found.tokens)
    for (row, begin, end), example in zip(found.spans, rows, strict=True):
        assert found.tokens[row, begin:end].tolist() == example.tokens
        assert found.labels[row, begin + 1 : end].tolist() == example.labels[1:]
        assert found.labels[row, begin] == IGNORED
        assert found.options["positions"][row, begin:end].tolist() == [*range(end - begin)]
        taken[row, begin:end] += 1
    assert taken.max() == 1 and (found.labels[taken == 0] == IGNORED).all()


def test_no_token_sees_another_example():
    """Whatever else is in a row, an example's hidden states are its own, to the last bit."""
    rows = [Example(tokens, tokens) for tokens in ([*range(20)], [5, 6, 7], [8] * 9, [1, 2, 3, 4])]
    model, found = random_model(TINY), packed(rows, CPU)
    other = [Example([t + 100 for t in row.tokens], row.labels) for row in rows]
    with torch.no_grad():
        expected = model.hidden(found.tokens, **found.options)
        for i, (row, begin, end) in enumerate(found.spans):
            changed = [rows[j] if j == i else other[j] for j in range(len(rows))]
            again = packed(changed, CPU)
            states = model.hidden(again.tokens, **again.options)
            assert torch.equal(states[row, begin:end], expected[row, begin:end])


def test_rows_that_do_not_fit_together_stay_as_they_are():
    rows = [Example([1, 2, 3, 4], [1, 2, 3, 4]), Example([5, 6, 7], [5, 6, 7])]
    found = packed(rows, CPU)
    assert found.options == {} and found.spans == [Span(0, 0, 4), Span(1, 0, 3)]
