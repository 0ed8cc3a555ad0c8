"""Dropout of adapters: what torch's does to each value, and the same for an example anywhere."""

from dataclasses import replace

import pytest
import torch
from conftest import TINY, random_model
from test_lora import adapter
from test_trainer import RECIPE, examples, same, weights_of

from llama.training import Trainer, lora, recompute_blocks
from llama.training.dropout import Dropout, number
from llama.training.packing import Span


def test_values_are_dropped_or_scaled():
    x = torch.ones(2, 400, 64)
    found = Dropout(0.2, [Span(0, 0, 400), Span(1, 0, 390)], [3, 4])(x, "wq", True)
    assert set(found.unique().tolist()) == {0.0, 1.25}
    assert (found[1, 390:] == 0).all()  # padding
    for row in (found[0], found[1, :390]):
        dropped = (row == 0).float()
        assert abs(dropped.mean() - 0.2) < 0.02
        assert abs(dropped.mean(0) - 0.2).max() < 0.11 and abs(dropped.mean(1) - 0.2).max() < 0.3
    assert not torch.equal(found[0, :390], found[1, :390])


def test_masks_are_of_the_example_and_the_matrix_not_of_their_place():
    x = torch.ones(1, 20, 8)
    one = Dropout(0.5, [Span(0, 3, 9), Span(0, 9, 20)], [1, 2])(x, "wq", True)
    two = Dropout(0.5, [Span(0, 0, 11), Span(0, 11, 17)], [2, 1])(x, "wq", True)
    assert torch.equal(one[0, 3:9], two[0, 11:17]) and torch.equal(one[0, 9:], two[0, :11])
    other = Dropout(0.5, [Span(0, 3, 9), Span(0, 9, 20)], [1, 2])(x, "wk", True)
    assert not torch.equal(one, other)
    assert len({number(*of) for of in [(1, 2, 3), (1, 23), (12, 3), (1, 2, 3)]}) == 3


def learned(**changes):
    model = random_model(TINY).requires_grad_(False)
    lora.attach(model, adapter())
    if changes.pop("recompute", False):
        recompute_blocks(model)
    pack = changes.pop("pack", False)
    trainer = Trainer(model, examples(), replace(RECIPE, **changes), pack)
    return [step.loss for step in trainer.run()], trainer


def test_a_run_with_dropout(tmp_path):
    """Another than without, the same with recomputed blocks, in parts, packed, and resumed."""
    losses, trainer = learned(lora_dropout=0.3)
    expected = weights_of(trainer)
    plain, _ = learned()
    assert max(abs(a - b) for a, b in zip(losses, plain, strict=True)) > 1e-3
    assert not any(layer.dropout for layer in lora.layers(trainer.model))
    again, recomputed = learned(lora_dropout=0.3, recompute=True)
    assert again == losses and same(weights_of(recomputed), expected)
    for changes in ({"micro_batches": 2}, {"pack": True}):
        found, _ = learned(lora_dropout=0.3, **changes)
        assert max(abs(a - b) for a, b in zip(losses, found, strict=True)) < 1e-5
    other, _ = learned(lora_dropout=0.3, seed=2)
    assert other != losses


def test_an_interrupted_step_leaves_no_dropout(monkeypatch):
    model = random_model(TINY).requires_grad_(False)
    lora.attach(model, adapter())
    trainer = Trainer(model, examples(), replace(RECIPE, lora_dropout=0.3))
    monkeypatch.setattr(torch.Tensor, "backward", lambda loss: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trainer.one_step()
    assert not any(layer.dropout for layer in lora.layers(model))


def test_as_by_peft_where_nothing_is_dropped():
    losses, _ = learned(lora_dropout=1e-9)
    assert losses == pytest.approx(learned()[0], abs=1e-6)
