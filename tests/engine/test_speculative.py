"""Guessing tokens changes the speed, and nothing else."""

import random
from dataclasses import replace
from typing import List

import pytest
import torch
from conftest import THOROUGH, TINY, random_model, run_ranks, write_checkpoint

from llama import Llama, SamplingParams
from llama.engine.rows import Row
from llama.engine.speculative import (
    DRAFT_LENGTHS,
    MAX_DRAFT,
    MAX_MATCH,
    DraftLength,
    PromptLookup,
    Proposal,
    _interpolate,
    _Text,
)

GREEDY = SamplingParams(temperature=0)
SAMPLED = SamplingParams(temperature=0.8, top_p=0.95, top_k=50)
PENALIZED = SamplingParams(temperature=0.7, repetition_penalty=1.1, no_repeat_ngram_size=5)

WORDS = "the cat sat on a mat and saw the dog that sat on the log"


def prompts(n: int) -> List[str]:
    """Texts that go on as they began, more or less."""
    draw = random.Random(0)
    return [" ".join(draw.choices(WORDS.split(), k=4) * draw.randint(1, 4)) for _ in range(n)]


def ids(n: int) -> List[List[int]]:
    return [list(prompt.encode())[:60] for prompt in prompts(n)]


class Oracle:
    """Guesses the right tokens, up to one that is wrong on purpose: every case of acceptance."""

    def __init__(self, answers, seed=0):
        self.answers, self.random = answers, random.Random(seed)
        self.seen = set()

    def propose(self, batch):
        self.guesses = []
        for row in batch:
            right = self.answers[row.index][len(row.answer) :][: self.random.randint(0, 6)]
            right += [self.random.randrange(256) for _ in range(self.random.randint(0, 2))]
            room = row.max_len - len(row.prompt) - len(row.answer) - 1
            self.guesses.append(right[: max(room, 0)])
        return self.guesses

    def learn(self, drawn, alone):
        for tokens in drawn:
            self.seen.add(len(tokens))

    def forget(self, row):
        pass


def with_oracle(llama, answers, monkeypatch, seed=0):
    oracle = Oracle(answers, seed)
    monkeypatch.setattr(llama._calls.plain, "speculators", lambda name, _: oracle if name else None)
    return oracle


@pytest.fixture(scope="module")
def drafted(tiny) -> Llama:
    """The tiny model with one of the same shape and other weights to draft for it."""
    return Llama(tiny.model, tiny.tokenizer, draft=random_model(TINY, seed=1))


@pytest.fixture(scope="module")
def self_drafted(tiny) -> Llama:
    return Llama(tiny.model, tiny.tokenizer, draft=tiny.model)


# --- the same text -------------------------------------------------------------------------------


@pytest.mark.parametrize("params", [GREEDY, SAMPLED, PENALIZED], ids=["greedy", "drawn", "barred"])
@pytest.mark.parametrize("seed", range(4))
def test_any_guesses_leave_the_tokens_as_they_are(tiny, monkeypatch, params, seed):
    """Rows that accept different numbers at each pass, some of which end before the others."""
    options = dict(max_gen_len=30, params=params, seed=seed, n=2, logprobs=True)
    for stop_tokens in (set(), {7, 90, 200}):
        expected, known = tiny.generate(ids(5), **options, stop_tokens=stop_tokens)
        with monkeypatch.context() as patch:
            answers = [expected[2 * i] for i in range(5)]
            oracle = with_oracle(tiny, answers, patch, seed)
            found, scores = tiny.generate(
                ids(5), **options, stop_tokens=stop_tokens, speculate="lookup"
            )
        assert found == expected
        assert len(oracle.seen) > 3  # one token, and several, at a time
        for ours, theirs in zip(scores, known, strict=True):
            assert torch.allclose(torch.tensor(ours), torch.tensor(theirs), atol=1e-4)


@pytest.mark.parametrize("params", [GREEDY, SAMPLED, PENALIZED], ids=["greedy", "drawn", "barred"])
@pytest.mark.parametrize("size", [1, 8])
@pytest.mark.slow
def test_texts_are_those_of_plain_decoding(drafted, self_drafted, params, size):
    for llama in (drafted, self_drafted):
        for begin in range(0, 16 if THOROUGH else min(16, 4 * size), size):
            batch = ids(16)[begin : begin + size]
            options = dict(max_gen_len=40, params=params, seed=begin, stop_tokens={3, 120})
            expected, _ = llama.generate(batch, **options, speculate="off")
            for speculate in ("lookup", "draft"):
                found, _ = llama.generate(batch, **options, speculate=speculate)
                assert found == expected


def test_the_real_models_texts_too(smollm2_path, monkeypatch):
    """One by one and all together, fp32, greedy; a draft of 4 bits that mostly agrees."""
    monkeypatch.setattr(DraftLength, "choose", lambda self, guesses: 3)  # whatever it costs
    options = dict(device="cpu", dtype="fp32", compile=True)
    llama = Llama.build(smollm2_path, **options, draft_ckpt_dir=smollm2_path, draft_quantize="int4")
    text = [f"Repeat after me: {prompt}. Repeat after me:" for prompt in prompts(4)]
    text += [f"Question {i}: what is {i} + {i}? Answer:" for i in range(2, 6)]
    new = 20 if THOROUGH else 10
    for size in (1, 8):
        accepted = {"lookup": 0, "draft": 0}
        for begin in range(0, 8, size):
            batch = text[begin : begin + size]
            expected = llama.text_completion(batch, 0, max_gen_len=new, speculate="off")
            for speculate in accepted:
                found = llama.text_completion(batch, 0, max_gen_len=new, speculate=speculate)
                accepted[speculate] += sum(one.pop("speculation")["accepted"] for one in found)
                assert found == expected
        assert all(accepted.values())


def test_guidance_and_guesses(tiny, monkeypatch):
    params = replace(SAMPLED, guidance_scale=1.5, negative_prompt=[5, 6, 7])
    options = dict(max_gen_len=30, params=params, seed=3, stop_tokens=set())
    expected, _ = tiny.generate(ids(4), **options)
    with_oracle(tiny, expected, monkeypatch)
    assert tiny.generate(ids(4), **options, speculate="lookup")[0] == expected


def test_streams_stops_and_the_end_of_the_context(tiny, monkeypatch):
    """An event for each token; nothing after a stop string or the context's last position."""
    expected = tiny.text_completion(prompts(4), 0, max_gen_len=None, stop=["zz", "e"], n=2)
    plain, _ = tiny.generate([list(p.encode()) for p in prompts(4)], 128, temperature=0)
    with_oracle(tiny, plain, monkeypatch)
    options = dict(max_gen_len=None, stop=["zz", "e"], n=2, speculate="lookup")
    found = tiny.text_completion(prompts(4), 0, **options)
    counts = [prediction.pop("speculation") for prediction in found]
    assert found == expected and sum(count["accepted"] for count in counts) > 0
    events = list(tiny.stream_text(prompts(4), 0, **options))
    for i, prediction in enumerate(expected):
        own = [event for event in events if (event.row, event.sample) == divmod(i, 2)]
        assert "".join(event.text for event in own) == prediction["generation"]
        assert [bool(event.finish_reason) for event in own].index(True) == len(own) - 1
        assert own[-1].speculation["passes"] <= len(own)


def test_should_stop_ends_rows_within_a_pass(tiny, monkeypatch):
    expected, _ = tiny.generate(ids(3), 40, temperature=0, stop_tokens=set())
    with_oracle(tiny, expected, monkeypatch)
    asked = iter([False, False, True])
    options = dict(stop_tokens=set(), speculate="lookup", should_stop=lambda: next(asked))
    found, _ = tiny.generate(ids(3), 40, temperature=0, **options)
    for ours, whole in zip(found, expected, strict=True):
        assert 3 <= len(ours) < 40 and ours == whole[: len(ours)]


@pytest.mark.parametrize("speculate", ["lookup", "draft"])
def test_ranks_guess_and_draw_the_same(tmp_path, speculate):
    """On three ranks what one rank draws without guesses; rank 0's clock decides for all."""
    args = replace(TINY, n_heads=6, n_kv_heads=3, dim=48, hidden_dim=100)
    path = write_checkpoint(tmp_path / "tiny", args)
    draft = write_checkpoint(tmp_path / "draft", replace(args, n_layers=1))
    one = Llama.build(path, device="cpu", dtype="fp32")
    expected, _ = one.generate(ids(3), 24, params=SAMPLED, seed=[3, 4, 5], stop_tokens=set())
    report = run_ranks(
        3, "generate", tmp_path / "out.json", ckpt=str(path), prompts=ids(3), max_gen_len=24,
        params=SAMPLED.__dict__, seed=[3, 4, 5], no_stops=True, speculate=speculate,
        build={"draft_ckpt_dir": str(draft)},
    )  # fmt: skip
    assert report["tokens"] == expected and report["all_ranks"] == [expected] * 3


# --- the same distribution -----------------------------------------------------------------------


SEEDS = range(20 if THOROUGH else 5)  # fixed before the first run


@pytest.mark.parametrize("speculate", ["lookup", "draft"])
@pytest.mark.slow
def test_draws_follow_the_models_distribution(make_model, tiny, speculate, monkeypatch):
    """Chi-squared of the third token after two that are free, against exact probabilities.

    Other seeds would draw other texts: it is the distribution that mustn't know of guesses.
    """
    monkeypatch.setattr(DraftLength, "choose", lambda self, guesses: 3)  # whatever it costs
    vocab, n = 8, 400
    draft = make_model(vocab_size=vocab, seed=2)
    llama = Llama(make_model(vocab_size=vocab, max_batch_size=n), tiny.tokenizer, draft=draft)
    prompt, model = [1, 2, 1, 2, 1], llama.model
    pairs = torch.cartesian_prod(torch.arange(vocab), torch.arange(vocab))
    texts = torch.cat([torch.tensor(prompt).expand(len(pairs), -1), pairs], 1)
    with torch.inference_mode():
        probs = model(texts).softmax(-1)[:, len(prompt) - 1 :].double()
    first, second, third = probs[:, 0], probs[:, 1], probs[:, 2]
    paths = torch.arange(len(pairs))
    weight = first[paths, pairs[:, 0]] * second[paths, pairs[:, 1]]
    expected = (weight[:, None] * third).sum(0) * n
    params = SamplingParams(temperature=1.0, top_p=1.0)
    accepted, values = 0, []
    for seed in SEEDS:
        options = dict(params=params, seed=seed, n=n, stop_tokens=set(), speculate=speculate)
        request = llama._calls.make([prompt], 6, 1.0, 1.0, **options)
        for event in llama._calls.plain.run(request):
            accepted += event.speculation["accepted"] if event.speculation else 0
        found = torch.bincount(
            torch.tensor([row.answer[2] for row in request.rows]), minlength=vocab
        )
        values.append(float(((found - expected) ** 2 / expected).sum()))
    assert accepted > 5 * len(SEEDS)
    assert max(values) < 18.48  # p = 0.01 at 7 degrees of freedom, for each of the seeds


# --- where guesses come from ---------------------------------------------------------------------


def test_the_longest_match_is_found_and_the_latest_of_equals():
    text = _Text([5, 1, 2, 3, 9, 8, 1, 2, 7, 7, 4, 2, 3])
    assert text.find(2) == (2, [9, 8])
    text.extend([9, 6, 1, 2])
    assert text.find(3) == (2, [7, 7, 4])  # the later of the two places after 1 2
    text = _Text([5, 1, 2, 3, 9, 1, 2, 4, 5, 1, 2])
    assert text.find(1) == (3, [3])  # 5 1 2, and not the later 1 2
    assert _Text([1]).find(4) == (0, []) and _Text([1, 2, 3]).find(4) == (0, [])
    assert text.find(0) == (3, []) and text.find(-1) == (3, [])


def test_a_text_that_goes_round_is_followed_round():
    text = _Text([4, 1, 2, 3, 1, 2, 3, 1, 2])
    assert text.find(7)[1] == [3, 1, 2, 3, 1, 2, 3]
    assert _Text([6] * 40).find(MAX_DRAFT) == (MAX_MATCH, [6] * MAX_DRAFT)


@pytest.mark.parametrize("seed", range(5))
def test_a_text_that_grows_is_the_text(seed):
    draw = random.Random(seed)
    whole = [draw.randrange(4) for _ in range(200)]
    grown = _Text(whole[:10])
    for i in range(10, 200):
        grown.extend(whole[i : i + 1])
    match, tokens = grown.find(8)
    assert (match, tokens) == _Text(whole).find(8)
    end = whole[-match:]
    places = [i for i in range(match, 200) if whole[i - match : i] == end]
    assert any((whole[i:] + whole[places[-1] :])[:1] == tokens[:1] for i in places)


def row(prompt, answer=(), max_len=100) -> Row:
    return Row(0, 0, prompt, max_len, GREEDY, 1, (), answer=list(answer))


def test_no_more_is_guessed_than_can_be_drawn(monkeypatch):
    monkeypatch.setattr(DraftLength, "choose", lambda self, guesses: MAX_DRAFT)
    for left, expected in ((10, 9), (2, 1), (1, 0)):
        assert (
            len(PromptLookup(DraftLength()).propose([row([1, 2] * 5, max_len=10 + left)])[0])
            == expected
        )


# --- the pace ------------------------------------------------------------------------------------


def settled(chance: float, seconds, rows: int = 1, steps: int = 300) -> int:
    """The width at which a pace ends where guesses are right with a chance."""
    pace, draw = DraftLength(), random.Random(0)
    tried = []
    for _ in range(steps):
        guesses = [Proposal([1] * MAX_DRAFT, [16] * MAX_DRAFT) for _ in range(rows)]
        width = pace.choose(guesses)
        drawn = []
        for _ in range(rows):
            tokens = []
            while len(tokens) <= width and (not tokens or tokens[-1] == 1):
                tokens.append(1 if draw.random() < chance else 0)
            drawn.append(tokens)
        pace.passed(rows * (1 + width), seconds(rows * (1 + width)))
        pace.learn(guesses, drawn)
        tried.append(width)
    return sorted(tried[steps // 2 :])[steps // 4]


def test_the_pace_is_the_one_that_pays():
    assert settled(0.98, lambda n: 1 + 0.02 * n) == MAX_DRAFT
    assert settled(0.98, lambda n: float(n)) == 0  # twice the tokens, twice the time
    assert 1 <= settled(0.6, lambda n: 1 + 0.02 * n) <= 7
    assert settled(0.05, lambda n: 1 + 0.1 * n) == 0
    assert settled(0.95, lambda n: 1 + 0.02 * n, rows=8) < settled(0.95, lambda n: 1 + 0.001 * n)


def test_a_pace_begins_slowly_and_recovers_from_an_outlier():
    pace, widths = DraftLength(), []
    guesses = [Proposal([1] * MAX_DRAFT, [16] * MAX_DRAFT)]
    for step in range(80):
        width = pace.choose(guesses)
        widths.append(width)
        pace.passed(1 + width, 50.0 if step == 3 else 1.0)
        pace.learn(guesses, [[1] * (width + 1)])
    assert widths[:4] == list(DRAFT_LENGTHS[:4]) and widths[-1] == MAX_DRAFT
    assert pace.choose([Proposal([], [])]) == 0 and pace.choose([]) == 0


def test_times_between_known_ones_are_interpolated():
    known = [(2, 1.0), (4, 2.0), (8, 3.0)]
    assert [_interpolate(known, n) for n in (1, 2, 3, 4, 6, 8, 99)] == [1, 1, 1.5, 2, 2.5, 3, 3]


def test_guesses_are_given_up_where_they_lose(tiny, monkeypatch):
    """A draft whose guesses are as good as dice is asked ever more rarely, over calls too."""
    monkeypatch.setattr("llama.engine.speculative.time.perf_counter", iter(range(10**6)).__next__)
    llama = Llama(tiny.model, tiny.tokenizer, draft=random_model(TINY, seed=1))
    proposed = []
    for _ in range(3):
        request = llama._calls.make([[1, 2, 3]], 100, 0, 0.9, stop_tokens=set())
        *_, last = llama._calls.plain.run(request)
        proposed.append(last.speculation["proposed"])
        assert last.speculation["passes"] > 90
    assert proposed[0] < 30 and max(proposed[1:]) < 6


# --- mistakes ------------------------------------------------------------------------------------


def broken(ids, logits):
    if len(ids) > 12:
        raise KeyError("the caller's own fault")
    return logits


@pytest.mark.parametrize(
    "how, error",
    [({"logits_processor": broken}, KeyError), ({"frequency_penalty": -1e37}, ValueError)],
)
def test_one_that_fails_while_its_draft_is_made_fails_alone(drafted, monkeypatch, how, error):
    monkeypatch.setattr(DraftLength, "choose_or_probe", lambda self, proposals: 3)
    engine, options = drafted.engine(cache_tokens=1024), dict(seed=1, stop_tokens=set())
    good = engine.add([4, 5], 20, temperature=1.0, **options)
    bad = engine.add([1, 2, 3], 60, params=SamplingParams(1.0, **how), **options)
    while not engine.idle:
        engine.step()
    assert isinstance(bad.error, error)
    tokens = [event.token for event in good.events]
    assert [tokens] == drafted.generate([[4, 5]], 20, 1.0, speculate="off", **options)[0]


def test_mistakes_are_named(tiny, tiny_dir, tmp_path):
    with pytest.raises(ValueError, match="'lookup', 'draft' or 'off'"):
        tiny.text_completion(["a"], speculate="yes")
    with pytest.raises(ValueError, match="build with draft_ckpt_dir"):
        tiny.text_completion(["a"], speculate="draft")
    other = write_checkpoint(tmp_path / "other", replace(TINY, vocab_size=600))
    with pytest.raises(ValueError, match="another vocabulary .600 tokens. .* .512"):
        Llama.build(tiny_dir, device="cpu", dtype="fp32", draft_ckpt_dir=other)
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        Llama.build(tiny_dir, device="cpu", dtype="fp32", draft_ckpt_dir=tmp_path / "none")
