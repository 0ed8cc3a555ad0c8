"""Texts as vectors: against transformers' states, and each as it is alone."""

import pytest
import torch
from conftest import TINY, random_weights
from test_model import gap, to_hugging_face

TEXTS = ["a", "The quick brown fox", "jumps", "over the lazy dog " * 5, "ö"]


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_vectors_are_pooled_states_of_transformers(tiny, pooling):
    theirs = to_hugging_face(TINY, random_weights(TINY))
    expected = []
    for text in TEXTS:
        ids = tiny.tokenizer.encode(text, bos=True, eos=False)
        with torch.inference_mode():
            states = theirs(torch.tensor([ids]), output_hidden_states=True).hidden_states[-1][0]
        expected.append(states[-1] if pooling == "last" else states.mean(0))
    found = tiny.embed(TEXTS, pooling, normalize=False, batch_size=2)
    assert gap(found, torch.stack(expected)) < 1e-4
    alone = torch.cat([tiny.embed([text], pooling, normalize=False) for text in TEXTS])
    assert gap(found, alone) < 1e-5
    unit = tiny.embed(TEXTS, pooling)
    assert gap(unit.norm(dim=-1), torch.ones(5)) < 1e-6
    assert gap(unit, found / found.norm(dim=-1, keepdim=True)) < 1e-6


def test_what_is_alike_is_near(smollm2):
    cat, kitten, tax = smollm2.embed(
        ["The cat sleeps on the sofa.", "A kitten naps on the couch.", "Taxes are due in April."]
    )
    assert cat @ kitten > cat @ tax and cat @ kitten > kitten @ tax


def test_mistakes_are_named(tiny, smollm2):
    with pytest.raises(ValueError, match="'last' or 'mean'"):
        tiny.embed(["a"], "max")
    with pytest.raises(ValueError, match="text 1 has 0 tokens"):
        smollm2.embed(["a", ""])
    with pytest.raises(ValueError, match="text 0 has 201 tokens: it takes 1 to max_seq_len, 128"):
        tiny.embed(["a" * 200])
    assert tiny.embed([]).shape == (0, TINY.dim)
