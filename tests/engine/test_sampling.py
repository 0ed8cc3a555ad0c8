"""Samplers against exact probabilities."""

import ast
import math
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers

from llama.engine import sampling
from llama.engine.sampling import (
    RandomNumbers,
    SamplingParams,
    constrained,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    keep_typical,
    most_probable,
    penalize_repetition,
    sample_from,
    sample_token,
    warped,
    would_repeat,
)
from llama.generation import sample_top_p

ANY = RandomNumbers(0, torch.device("cpu"))
PROBS = torch.tensor([0.1, 0.4, 0.05, 0.25, 0.2])


def whole(kept, n: int) -> torch.Tensor:
    """Logits of all n tokens, -inf where a filter ruled them out."""
    ids, logits = kept
    return torch.full((n,), -math.inf).index_copy(0, ids, logits) if ids is not None else logits


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
    params = SamplingParams(temperature=temperature, top_p=1.0)
    expected = PROBS ** (1 / temperature)
    found = torch.softmax(whole(warped(PROBS.log(), params), 5), -1)
    assert torch.allclose(found, expected / expected.sum(), atol=1e-6)


def test_temperature_0_is_argmax_without_dividing():
    """(litgpt issue 401)"""
    params = SamplingParams(temperature=0, top_p=0.9, top_k=2)
    assert params.is_argmax
    for logits, best in (([1.0, 3.0, 2.0], 1), ([-5.0, -7.0, -6.0], 0)):
        assert sample_token(torch.tensor(logits), params, [], [], ANY) == best
        assert sample_token(torch.tensor(logits).bfloat16(), params, [], [], ANY) == best
    assert not SamplingParams(temperature=0, banned_tokens=[1]).is_argmax
    assert (
        sample_token(torch.tensor([1.0, 3.0, 2.0]), replace(params, banned_tokens=[1]), [], [], ANY)
        == 2
    )


def test_draws_follow_the_distribution():
    """Chi-squared over 5 tokens, one of which has no probability."""
    probs = torch.tensor([0.1, 0.4, 0.0, 0.3, 0.2])
    n = 20_000
    numbers = RandomNumbers(0, torch.device("cpu"))
    found = torch.bincount(
        torch.tensor([sample_from(probs, numbers[i]) for i in range(n)]), minlength=5
    )
    assert found[2] == 0
    expected = probs[probs > 0] * n
    chi2 = ((found[probs > 0] - expected) ** 2 / expected).sum()
    assert chi2 < 16.27  # p = 0.001 at 3 degrees of freedom


@pytest.mark.parametrize("spread", [0.1, 3.0, 30.0])
def test_large_vocabularies_are_sampled_by_the_same_sum(spread):
    """In parts as a whole, up to the rounding of sums; never a token without probability."""
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(2560, generator=generator) * spread
    logits[::2] = logits[128:512] = -math.inf
    probs = torch.softmax(logits, -1)
    numbers = torch.rand(500, generator=generator, dtype=torch.float64)
    ends = [0.0, 1 - 2.0**-53]
    cumulative = probs.double().cumsum(-1)
    for number in [*numbers, *torch.tensor(ends, dtype=torch.float64)]:
        token = sample_from(probs, number)
        assert probs[token] > 0
        target = number * cumulative[-1]
        assert cumulative[token] > target - 1e-12
        assert cumulative[token] - probs[token] <= target + 1e-12


def test_the_numbers_alone_decide():
    """The n-th is the answer's n-th token's, in whatever order and however often they are asked."""
    logits, params, cpu = torch.randn(100), SamplingParams(temperature=1.0), torch.device("cpu")
    orders = [list(range(8)), [7, 3, 3, 0, 1, 2, 4, 5, 6, 7]]
    state = torch.get_rng_state()
    draws = []
    for order in orders:
        numbers = RandomNumbers(7, cpu)
        draws.append({n: sample_token(logits, params, [], [0] * n, numbers) for n in order})
    other = RandomNumbers(8, cpu)
    assert draws[0] == draws[1] and len(set(draws[0].values())) > 1
    assert draws[0] != {n: sample_token(logits, params, [], [0] * n, other) for n in range(8)}
    assert torch.equal(state, torch.get_rng_state())


# --- each against exact probabilities ------------------------------------------------------------


@pytest.mark.parametrize("size", [5, 1500, 5000])
@pytest.mark.parametrize("spread", [0.0, 0.01, 1.0, 8.0])
def test_top_p_is_that_of_a_full_sort(size, spread):
    """Flat and peaked, with ties, beyond the head that is looked at first: the same set exactly."""
    generator = torch.Generator().manual_seed(size)
    for i in range(8):
        logits = torch.randn(size, generator=generator) * spread
        if i % 2:
            logits = logits.bfloat16().float()  # many are equal
        if i % 3 == 0:
            logits[::2] = -math.inf
        ordered, ids = torch.softmax(logits, -1).sort(descending=True, stable=True)
        for p in (0.0, 0.3, 0.9, 0.999, 1.0):
            out = ordered.cumsum(-1) - ordered > p
            expected = logits.index_fill(0, ids[out], -math.inf)
            assert torch.equal(whole(keep_top_p(logits, p), size), expected)


@pytest.mark.parametrize("spread", [0.0, 1.0, 8.0])
def test_filters_keep_the_same_where_tokens_are_not_picked_out(spread, monkeypatch):
    """As on a GPU, where that would wait; flat and peaked."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5000, generator=generator) * spread
    filters = [(keep_top_k, k) for k in (1, 40, 4999)]
    filters += [(keep_top_p, p) for p in (0.0, 0.5, 0.9, 0.999)]
    filters += [(keep_min_p, 0.1), (keep_typical, 0.5)]
    expected = [whole(keep(logits, value), 5000) for keep, value in filters]
    monkeypatch.setattr(sampling, "_picks", lambda logits: False)
    for (keep, value), those in zip(filters, expected, strict=True):
        ids, found = keep(logits, value)
        assert ids is None and torch.equal(found, those), (keep, value)


def test_sampling_where_there_is_no_float64():
    """On Apple's MPS, numbers are drawn and summed up on the CPU."""
    numbers = RandomNumbers(3, torch.device("mps"))
    assert numbers[5] == RandomNumbers(3, torch.device("cpu"))[5]
    for ids in (None, torch.arange(10, 15)):
        there = [
            SimpleNamespace(device=torch.device("mps"), cpu=lambda value=value: value)
            for value in (PROBS, ids)
        ]
        found = sample_from(there[0], numbers[0], None if ids is None else there[1])
        assert found == sample_from(PROBS, numbers[0], ids)


@pytest.mark.parametrize("size", [5, 128, 1280, 1300])
def test_the_most_probable_token_is_the_first_largest(size):
    generator = torch.Generator().manual_seed(size)
    logits = torch.randn(50, size, generator=generator).bfloat16().float()  # many are equal
    logits[7] = -math.inf
    values, ids = most_probable(logits)
    assert torch.equal(values, logits.amax(-1))
    assert ids.tolist() == [row.index(max(row)) for row in logits.tolist()]
    logits[3, size // 2] = math.nan
    assert most_probable(logits)[0].isnan().nonzero().tolist() == [[3]]


@pytest.mark.parametrize("k", [1, 7, 40, 900, 5000])
def test_top_k_of_large_vocabularies(k):
    """With ties; from parts, where they are enough."""
    generator = torch.Generator().manual_seed(k)
    for size in (1000, 5000, 40000):
        logits = torch.randn(size, generator=generator).bfloat16().float()
        logits[::3] = -math.inf
        expected = logits.masked_fill(logits < logits.sort().values[-min(k, size)], -math.inf)
        assert torch.equal(whole(keep_top_k(logits, k), size), expected)


def test_logits_that_are_not_numbers_are_an_error():
    for filters in ({}, {"top_k": 3}, {"min_p": 0.1}, {"typical_p": 0.5}, {"top_p": 0.9},
                    {"top_p": 0.9, "min_p": 0.1}, {"top_p": 0.9, "typical_p": 0.5}):  # fmt: skip
        params = SamplingParams(1.0, **{"top_p": 1.0, **filters})
        for wrong in (math.nan, math.inf):
            for size in (3, 1280):
                logits = torch.ones(size).index_fill(0, torch.tensor([1]), wrong)
                with pytest.raises(ValueError, match="no token can be sampled"):
                    sample_token(logits, params, [], [], ANY)


@pytest.mark.parametrize(
    "more",
    [
        {"banned_tokens": range(8)},
        {"logits_processor": lambda ids, logits: logits * math.nan},
        {"logits_processor": lambda ids, logits: logits - math.inf},
    ],
)
@pytest.mark.parametrize("temperature", [0, 1])
def test_what_is_ruled_out_is_never_chosen(temperature, more):
    with pytest.raises(ValueError, match="no token can be sampled: .* all tokens are banned"):
        sample_token(torch.ones(8), SamplingParams(temperature, **more), [], [], ANY)


def test_a_processor_may_write_to_its_logits():
    """What is the model's own stays so, as for log-probabilities."""

    def ban(ids, logits):
        logits[3] = -math.inf
        return logits

    own = torch.arange(4.0)
    assert sample_token(own, SamplingParams(0, logits_processor=ban), [], [], ANY) == 2
    assert own.tolist() == [0, 1, 2, 3]


def test_small_distributions():
    """Worked out by hand, for probabilities 0.4, 0.25, 0.2, 0.1, 0.05."""
    logits = PROBS.log()

    def kept(found):
        return [i for i, value in enumerate(whole(found, 5).tolist()) if math.isfinite(value)]

    assert kept(keep_top_k(logits, 2)) == [1, 3]
    assert kept(keep_top_k(logits, 99)) == [0, 1, 2, 3, 4]
    assert kept(keep_top_p(logits, 0.5)) == [1, 3]
    assert kept(keep_top_p(logits, 0.0)) == [1]
    assert kept(keep_min_p(logits, 0.49)) == [1, 3, 4]  # 0.2 is half of 0.4
    assert kept(keep_min_p(logits, 1.0)) == [1]
    # Entropy 1.41: the informations 0.92, 1.39, 1.61, 2.30, 3.00 are 0.49, 0.02, 0.20, 0.89, 1.58
    # away from it, so tokens come in the order 3, 4, 1, 0, 2 with 0.25, 0.45, 0.85, 0.95, 1.
    assert kept(keep_typical(logits, 0.2)) == [3]
    assert kept(keep_typical(logits, 0.4)) == [3, 4]
    assert kept(keep_typical(logits, 0.8)) == [1, 3, 4]
    found = penalize_repetition(torch.tensor([2.0, -2.0, 1.0]), 2.0, [0, 1, 1])
    assert found.tolist() == [1.0, -4.0, 1.0]
    assert would_repeat([1, 2, 3, 1, 2], 3) == [3]
    assert would_repeat([1, 2, 1, 3, 1], 2) == [2, 3]
    assert would_repeat([5, 6], 1) == [5, 6]
    assert would_repeat([1, 2], 3) == []
    zeros = torch.zeros(4)
    params = SamplingParams(presence_penalty=0.5, frequency_penalty=0.25, logit_bias={3: 1.5})
    assert constrained(zeros, params, [0, 1], [1, 2, 2]).tolist() == [0, -0.75, -1.0, 1.5]
    assert zeros.tolist() == [0.0] * 4  # not changed in place


def test_the_order_is_the_documented_one():
    """A user's processor sees the penalties, and the temperature comes after it."""
    seen = []

    def processor(ids, logits):
        seen.append((ids, logits.tolist()))
        return logits * 2

    params = SamplingParams(
        temperature=0.5, top_p=1.0, repetition_penalty=2.0, logits_processor=processor
    )
    logits = constrained(torch.tensor([2.0, 1.0]), params, [0], [])
    assert seen == [([0], [1.0, 1.0])] and logits.tolist() == [2.0, 2.0]
    assert whole(warped(logits, params), 2).tolist() == [4.0, 4.0]


PEERS = {
    "top_k": (lambda x, ids: whole(keep_top_k(x, 7), len(x)), transformers.TopKLogitsWarper(7)),
    "top_p": (lambda x, ids: whole(keep_top_p(x, 0.8), len(x)), transformers.TopPLogitsWarper(0.8)),
    "min_p": (lambda x, ids: whole(keep_min_p(x, 0.1), len(x)), transformers.MinPLogitsWarper(0.1)),
    "typical_p": (
        lambda x, ids: whole(keep_typical(x, 0.6), len(x)),
        transformers.TypicalLogitsWarper(0.6),
    ),
    "repetition_penalty": (
        lambda x, ids: penalize_repetition(x, 1.3, ids),
        transformers.RepetitionPenaltyLogitsProcessor(1.3),
    ),
    "no_repeat_ngram_size": (
        lambda x, ids: constrained(x, SamplingParams(no_repeat_ngram_size=2), ids[:5], ids[5:]),
        transformers.NoRepeatNGramLogitsProcessor(2),
    ),
    "logit_bias": (
        lambda x, ids: constrained(x, SamplingParams(logit_bias={3: 2.5, 9: -1.0}), ids, []),
        transformers.SequenceBiasLogitsProcessor([[[3], 2.5], [[9], -1.0]]),
    ),
    "banned_tokens": (
        lambda x, ids: constrained(x, SamplingParams(banned_tokens=[4, 8]), ids, []),
        transformers.NoBadWordsLogitsProcessor([[4], [8]], eos_token_id=0),
    ),
}


@pytest.mark.parametrize("name", PEERS)
@pytest.mark.parametrize("scale", [0.3, 1.0, 5.0])
def test_each_equals_transformers_on_the_same_logits(name, scale):
    ours, theirs = PEERS[name]
    generator = torch.Generator().manual_seed(1)
    for _ in range(50):
        logits = scale * torch.randn(64, generator=generator)
        ids = torch.randint(64, (40,), generator=generator)
        expected = theirs(ids[None], logits[None].clone())[0]
        found = ours(logits, ids.tolist())
        assert torch.equal(found.isinf(), expected.isinf())
        finite = expected.isfinite()
        assert (found - expected)[finite].abs().max() <= 1e-6


def test_all_together_equal_transformers_chain():
    params = SamplingParams(
        temperature=0.7, top_k=30, top_p=0.9, min_p=0.02, typical_p=0.95, repetition_penalty=1.2,
        no_repeat_ngram_size=3, banned_tokens=[5], logit_bias={7: 1.0},
    )  # fmt: skip
    chain = transformers.LogitsProcessorList([
        transformers.SequenceBiasLogitsProcessor([[[7], 1.0]]),
        transformers.RepetitionPenaltyLogitsProcessor(1.2),
        transformers.NoRepeatNGramLogitsProcessor(3),
        transformers.NoBadWordsLogitsProcessor([[5]], eos_token_id=0),
        transformers.TemperatureLogitsWarper(0.7),
        transformers.TopKLogitsWarper(30),
        transformers.TopPLogitsWarper(0.9),
        transformers.MinPLogitsWarper(0.02),
        transformers.TypicalLogitsWarper(0.95),
    ])  # fmt: skip
    generator = torch.Generator().manual_seed(2)
    for _ in range(100):
        logits = 2 * torch.randn(200, generator=generator)
        ids = torch.randint(200, (60,), generator=generator)
        expected = torch.softmax(chain(ids[None], logits[None].clone())[0], -1)
        found = warped(constrained(logits, params, ids[:20].tolist(), ids[20:].tolist()), params)
        assert (torch.softmax(whole(found, 200), -1) - expected).abs().max() <= 1e-6


@pytest.mark.parametrize(
    "wrong",
    [{"temperature": -1}, {"temperature": math.nan}, {"temperature": math.inf}, {"top_p": 1.5},
     {"top_k": -1}, {"min_p": 2}, {"typical_p": 0}, {"repetition_penalty": 0},
     {"presence_penalty": math.inf}, {"no_repeat_ngram_size": -2},
     {"presence_penalty": "1"}, {"frequency_penalty": None}, {"guidance_scale": "2"},
     {"top_k": 1.5}, {"top_k": "5"}, {"min_tokens": 2.0}, {"no_repeat_ngram_size": None}],
    ids=str,
)  # fmt: skip
def test_values_out_of_range_are_named(wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError, match=f"{name}={value} must"):
        SamplingParams(**wrong)


@pytest.mark.parametrize("id", [-1, 512, 10**9, 1.5])
@pytest.mark.parametrize("name", ["negative_prompt", "logit_bias", "banned_tokens"])
def test_unknown_ids_are_named(tiny, name, id):
    params = SamplingParams(guidance_scale=2, **{name: {5: 1.0, id: 1.0}})
    with pytest.raises(
        ValueError, match=f"{name} has the token id {id}: this model knows 0 to 511"
    ):
        tiny.generate([[1]], 2, params=params)
