"""Samplers against exact probabilities."""

import ast
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from llama.generation import sample_top_p
from llama.sampling import sample

PROBS = torch.tensor([0.1, 0.4, 0.05, 0.25, 0.2])


def frequencies(draw, n: int = 20000) -> torch.Tensor:
    return torch.bincount(draw(n), minlength=5) / n


@pytest.mark.parametrize(
    "p, kept", [(0.0, [1]), (0.3, [1]), (0.5, [1, 3]), (0.84, [1, 3, 4]), (0.9, [1, 3, 4, 0])]
)
def test_top_p_keeps_the_smallest_set_that_reaches_p(p, kept):
    generator = torch.Generator().manual_seed(0)
    found = frequencies(lambda n: sample_top_p(PROBS.expand(n, -1), p, generator).squeeze(-1))
    expected = torch.zeros(5)
    expected[kept] = PROBS[kept] / PROBS[kept].sum()
    assert found[expected == 0].sum() == 0
    assert (found - expected).abs().max() < 0.015  # more than 4 standard deviations


def test_top_p_1_is_the_distribution_itself():
    generator = torch.Generator().manual_seed(0)
    found = frequencies(lambda n: sample_top_p(PROBS.expand(n, -1), 1.0, generator).squeeze(-1))
    assert (found - PROBS).abs().max() < 0.015


def test_top_p_equals_metas_draw_for_draw():
    # Their module imports torchvision for images; this one function of it doesn't need that.
    source = Path(find_spec("llama_models.llama3").origin).with_name("generation.py").read_text()
    [function] = [
        node
        for node in ast.parse(source).body
        if isinstance(node, ast.FunctionDef) and node.name == "sample_top_p"
    ]
    namespace = {"torch": torch}
    exec(ast.unparse(function), namespace)
    metas = namespace["sample_top_p"]

    probs = torch.softmax(3 * torch.randn(64, 1000, generator=torch.Generator().manual_seed(3)), -1)
    for p in (0.1, 0.5, 0.9, 0.999):
        torch.manual_seed(5)
        expected = metas(probs.clone(), p)
        assert torch.equal(sample_top_p(probs, p, torch.Generator().manual_seed(5)), expected)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_temperature_divides_the_logits(temperature):
    generator = torch.Generator().manual_seed(0)
    found = frequencies(lambda n: sample(PROBS.log().expand(n, -1), temperature, 1.0, generator))
    expected = PROBS ** (1 / temperature)
    assert (found - expected / expected.sum()).abs().max() < 0.015


def test_temperature_0_is_argmax_without_dividing():
    """(litgpt issue 401)"""
    logits = torch.tensor([[1.0, 3.0, 2.0], [-5.0, -7.0, -6.0]])
    assert sample(logits, 0, 0.9).tolist() == [1, 0]
    assert sample(logits.bfloat16(), 0.0, 0.9).tolist() == [1, 0]


def test_the_generator_alone_decides():
    logits = torch.randn(8, 100)
    draws = [sample(logits, 1.0, 0.9, torch.Generator().manual_seed(7)) for _ in range(2)]
    torch.manual_seed(7)
    state = torch.get_rng_state()
    sample(logits, 1.0, 0.9, torch.Generator().manual_seed(8))
    assert torch.equal(*draws) and torch.equal(state, torch.get_rng_state())
