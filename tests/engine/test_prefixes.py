"""What was computed before isn't computed again, and gives the same text."""

import random
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import List

import pytest
import torch
from conftest import TINY, random_model, random_weights, run_ranks, write_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st

from llama import Llama, SamplingParams
from llama.checkpoint import InMemory, fingerprint, gguf, huggingface, meta
from llama.engine.passes import hidden
from llama.engine.prefixes import MIN_SHARED, common_prefixes
from llama.layers.cache import Int8KVCache, KVCache

CPU = torch.device("cpu")
SHOTS = "in: one out: 1\nin: two out: 2\nin: three out: 3\n"  # 48 bytes, so as many tokens
BIG = 1 << 30


def with_prefixes(llama: Llama, limit: int = BIG, draft=None) -> Llama:
    other = Llama(llama.model, llama.tokenizer, draft=draft)
    other._keep_prefixes(limit, lambda: "tiny")
    return other


@pytest.fixture
def reusing(tiny) -> Llama:
    return with_prefixes(tiny)


class Fed:
    """Rows and tokens of the longest one, of each pass."""

    def __init__(self, monkeypatch):
        self.shapes = []

        def spy(model, new, cache):
            self.shapes.append((len(new), max(map(len, new))))
            return hidden(model, new, cache)

        monkeypatch.setattr("llama.engine.steps.hidden", spy)

    def take(self) -> List[tuple]:
        shapes, self.shapes = self.shapes, []
        return shapes


# --- the same text, for less ---------------------------------------------------------------------


@pytest.mark.parametrize("kind", [KVCache, Int8KVCache])
@pytest.mark.parametrize("temperature", [0, 0.8])
def test_a_second_call_computes_what_is_new(make_model, tiny, monkeypatch, temperature, kind):
    model = make_model()
    model.new_cache = partial(model.new_cache, cache_type=kind)
    plain, reusing = Llama(model, tiny.tokenizer), with_prefixes(Llama(model, tiny.tokenizer))
    options = dict(temperature=temperature, seed=5, stop_tokens=set())
    [first], _ = plain.generate([[*range(60)]], 12, **options)
    longer = [*range(60), *first, 7, 7, 9]  # a chat's next turn
    expected, _ = plain.generate([longer], 12, **options)
    fed = Fed(monkeypatch)
    assert reusing.generate([[*range(60)]], 12, **options)[0] == [first]
    assert fed.take()[0] == (1, 60)
    assert reusing.generate([longer], 12, **options)[0] == expected
    # The answer's last token was drawn and never fed.
    assert fed.take()[0] == (1, 4)
    assert reusing.generate([longer], 12, **options)[0] == expected
    assert fed.take()[0] == (1, 1)  # the last token alone: its logits aren't kept


def test_a_chats_next_turn(smollm2, monkeypatch):
    llama = with_prefixes(smollm2)
    dialog = [{"role": "user", "content": "What is the capital of France? " * 10}]
    [answer] = llama.chat_completion([dialog], 0, max_gen_len=12)
    dialog += [answer["generation"], {"role": "user", "content": "And of Italy?"}]
    fed = Fed(monkeypatch)
    [found] = llama.chat_completion([dialog], 0, max_gen_len=12)
    [(rows, new), *_] = fed.take()
    assert rows == 1 and new < 20
    assert found == smollm2.chat_completion([dialog], 0, max_gen_len=12)[0]


def test_a_batch_computes_what_its_prompts_share_once(tiny, reusing, monkeypatch):
    prompts = [f"{SHOTS}in: {word} out:" for word in ("four", "five", "six", "sevenandahalf")]
    options = dict(temperature=0, max_gen_len=8, n=2)
    expected = tiny.text_completion(prompts, **options)
    assert reusing.text_completion(prompts, **options) == expected
    common = 1 + len(SHOTS) + len("in: ")  # with bos
    tails = sum(1 + len(prompt) - common for prompt in prompts)
    assert reusing._calls.plain.stats.computed_tokens <= common + tails + 4 * 2 * 8
    fed = Fed(monkeypatch)
    again = [f"{SHOTS}in: {word} out:" for word in ("eight", "nine")]
    expected = tiny.text_completion(again, **options)
    fed.take()
    assert reusing.text_completion(again, **options) == expected
    assert fed.take()[0][1] < 12


def test_rows_that_share_different_things(tiny, reusing):
    """Families within families, rows alone, a prompt that another begins with, the same twice."""
    draw = random.Random(0)
    a, b = ([draw.randrange(500) for _ in range(40)] for _ in "ab")
    tails = [[draw.randrange(500) for _ in range(n)] for n in (1, 9, 20, 3)]
    prompts = [a, [*a, *b], [*a, *b, *tails[0]], [*a, *b, *tails[1]], [*a, *tails[2]], tails[3], a]
    options = dict(temperature=0, stop_tokens=set())
    expected, _ = tiny.generate(prompts, 20, **options)
    for _ in range(2):
        assert reusing.generate(prompts, 20, **options)[0] == expected
    for prompt, text in zip(prompts, expected, strict=True):
        assert reusing.generate([prompt], 20, **options)[0] == [text]
        assert reusing.prefixes.cached([*prompt, *text]) == len(prompt) + 19


def test_scored_prompts_are_computed_whole(tiny, reusing):
    options = dict(max_gen_len=4, temperature=0, echo=True, logprobs=True)
    for _ in range(2):
        found = reusing.text_completion(["abc" * 20], **options)
        assert found == tiny.text_completion(["abc" * 20], **options)


@pytest.mark.parametrize("speculate", ["lookup", "draft"])
def test_with_speculation(tiny, speculate):
    """What was guessed and not drawn isn't kept."""
    reusing = with_prefixes(tiny, draft=random_model(TINY, seed=1))
    prompt = [1, 2, 3, 4] * 10
    params = SamplingParams(temperature=0.9)
    for seed in range(6):
        options = dict(params=params, seed=seed, stop_tokens={5})
        expected, _ = tiny.generate([prompt, prompt[:30]], 40, **options)
        found, _ = reusing.generate([prompt, prompt[:30]], 40, **options, speculate=speculate)
        assert found == expected
        text = [*prompt, *found[0]]
        once = tiny.model.new_cache(1)
        with torch.inference_mode():
            tiny.model.hidden(torch.tensor([text]), 0, once)
        assert reusing.prefixes.cached(text) >= len(text) - 1
        kept = reusing.prefixes._computed(text)["k"]
        assert torch.allclose(kept, once.k[:, 0, :, : len(text)], atol=1e-4)


# --- what is kept --------------------------------------------------------------------------------


def test_the_least_recently_used_goes_first(tiny):
    small = with_prefixes(tiny, 1)  # no more than the blocks of a call: 32
    options = dict(temperature=0, max_gen_len=1, stop_tokens=set())
    texts = [[i] * 128 for i in range(20)]
    for text in texts:
        small.generate([text[:-1]], **options)
        small.generate([[0] * 127], **options)
    assert small.prefixes.cached(texts[0]) == small.prefixes.cached(texts[19]) == 127
    assert small.prefixes.cached(texts[1]) == 0
    assert small._calls.plain.stats.blocks_known <= small._calls.plain.stats.blocks == 32


TEXTS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=12), min_size=1, max_size=12)


def test_frozen_prefixes_stay_as_they_are(tiny, reusing):
    """What is generated then depends on nothing that was generated before."""
    options = dict(temperature=0, stop_tokens=set())
    prompts = [[*range(50), 9, i] for i in range(4)]
    reusing.prefixes.share(prompts)
    before = reusing._calls.plain.stats.blocks_known
    assert reusing.prefixes.cached(prompts[0]) == 51
    assert reusing.generate(prompts, 9, **options)[0] == tiny.generate(prompts, 9, **options)[0]
    assert reusing._calls.plain.stats.blocks_known == before
    assert reusing.prefixes.cached([*prompts[0], 1]) == 51


# --- what prompts have in common -----------------------------------------------------------------


def test_common_prefixes():
    a, b, c = [1] * MIN_SHARED, [2] * MIN_SHARED, [3] * MIN_SHARED
    assert list(common_prefixes([a])) == [] == list(common_prefixes([a, b]))
    assert list(common_prefixes([[*a, 5], [*a, 6]])) == [a]
    assert list(common_prefixes([a, a])) == []  # MIN_SHARED - 1 tokens without the last
    assert list(common_prefixes([[*a, 4], [*a, 4]])) == [a]
    nested = [[*a, *b, 5], [*a, *b, 6], [*a, *c, 7], [*a, *c, 8], [9]]
    assert list(common_prefixes(nested)) == [a, [*a, *c], [*a, *b]]
    assert list(common_prefixes([[*a, 5], [*a, 6, *b], [*a, 6, *b, 1]])) == [a, [*a, 6, *b][:-1]]


@settings(max_examples=100)
@given(TEXTS, st.integers(1, 4))
def test_common_prefixes_are_prefixes_of_several_prompts(texts, least):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llama.engine.prefixes.MIN_SHARED", least)
        for found in common_prefixes(texts):
            assert len(found) >= least
            assert sum(text[: len(found)] == found and len(text) > len(found) for text in texts) > 1


# --- on disk -------------------------------------------------------------------------------------


def build(path: Path, **options) -> Llama:
    return Llama.build(
        path, device="cpu", max_seq_len=128, prefix_cache_mb=100, **({"dtype": "fp32"} | options)
    )


@pytest.mark.parametrize("options", [{}, {"kv_cache": "int8"}, {"dtype": "bf16"}])
def test_a_prefix_from_a_file_is_the_one_computed(tiny_dir, tmp_path, monkeypatch, options):
    first, second = build(tiny_dir, **options), build(tiny_dir, **options)
    first.save_prefix(tmp_path / "shots", SHOTS)
    assert second.load_prefix(tmp_path / "shots") == len(SHOTS) + 1  # and bos
    prompt = [SHOTS + "in: four out:"]
    expected = build(tiny_dir, **options).text_completion(prompt, 0, max_gen_len=9)
    fed = Fed(monkeypatch)
    assert second.text_completion(prompt, 0, max_gen_len=9) == expected
    assert fed.take()[0] == (1, len("in: four out:"))


def test_a_prefix_of_a_gpu_is_read_without_one(tiny_dir, tmp_path, monkeypatch):
    build = partial(Llama.build, tiny_dir, device="cpu", dtype="fp32", prefix_cache_mb=1)
    with monkeypatch.context() as patch:
        patch.setattr("torch.serialization.location_tag", lambda storage: "cuda:0")
        build().save_prefix(tmp_path / "shots", "abc abc")
    assert build().load_prefix(tmp_path / "shots") == 8


def test_a_dialog_in_a_file(smollm2, tmp_path):
    dialog = [{"role": "system", "content": "Be brief. " * 10}, {"role": "user", "content": "Hi"}]
    first, second = with_prefixes(smollm2), with_prefixes(smollm2)
    first.save_prefix(tmp_path / "file", dialog)
    n = second.load_prefix(tmp_path / "file")
    assert n == len(smollm2.formatter.encode_dialog_prompt(dialog))
    other = [dialog[0], {"role": "user", "content": "Hello there"}]
    assert second.prefixes.cached(smollm2.formatter.encode_dialog_prompt(other)) > 30


def test_ranks_write_what_one_rank_reads_and_the_other_way_round(tmp_path):
    """Two ranks with a key/value head each, and four that share them."""
    path = write_checkpoint(tmp_path / "tiny", TINY)
    prompt = [SHOTS + "in: four out:"]
    one = build(path)
    one.save_prefix(tmp_path / "by1", SHOTS)
    expected = one.text_completion(prompt, 0, max_gen_len=9)[0]["generation"]
    for world in (2, 4):
        report = run_ranks(
            world, "prefixes", tmp_path / f"{world}.json", ckpt=str(path), prompt=prompt[0],
            shots=SHOTS, read=str(tmp_path / "by1"), write=str(tmp_path / f"by{world}"),
        )  # fmt: skip
        assert report == {**report, "text": expected, "fed": len("in: four out:")}
        other = build(path)
        other.load_prefix(tmp_path / f"by{world}")
        assert other.text_completion(prompt, 0, max_gen_len=9)[0]["generation"] == expected


def test_fingerprints_tell_weights_apart_and_not_formats(tmp_path, tiny_dir, smollm2_path):
    source = InMemory(TINY, random_weights(TINY))
    meta.write(source, tmp_path / "meta", 2)
    huggingface.write(source, tmp_path / "hf")
    one = fingerprint(source)
    assert one == fingerprint(meta.MetaCheckpoint(tmp_path / "meta"))
    assert one == fingerprint(huggingface.HFCheckpoint(tmp_path / "hf"))
    assert one == fingerprint(meta.MetaCheckpoint(tiny_dir))
    others = {fingerprint(InMemory(TINY, random_weights(TINY, seed=1)))}
    others.add(fingerprint(InMemory(replace(TINY, rope_theta=1e4), random_weights(TINY))))
    for name in random_weights(TINY):
        weights = random_weights(TINY)
        weights[name] = weights[name] * 1.01
        others.add(fingerprint(InMemory(TINY, weights)))
    assert len(others) == 2 + len(random_weights(TINY)) and one not in others
    assert len(fingerprint(gguf.GGUFCheckpoint(smollm2_path))) == 16


def test_mistakes_are_named(tiny, tiny_dir, tmp_path):
    with pytest.raises(ValueError, match="build with prefix_cache_mb"):
        tiny.save_prefix(tmp_path / "x", "abc")
    with pytest.raises(ValueError, match="prefix_cache_mb=-1 must be"):
        Llama.build(tiny_dir, prefix_cache_mb=-1)
    llama = build(tiny_dir)
    with pytest.raises(FileNotFoundError):
        llama.load_prefix(tmp_path / "none")
    (tmp_path / "text").write_text("no prefix")
    torch.save({"a": 1}, tmp_path / "other")
    llama.save_prefix(tmp_path / "good", "abc")
    (tmp_path / "cut").write_bytes((tmp_path / "good").read_bytes()[:900])
    for name in ("text", "other", "cut"):
        with pytest.raises(ValueError, match="isn.t a saved prefix"):
            llama.load_prefix(tmp_path / name)
    for name in ("text", "other", "."):  # nothing of someone else's is overwritten
        with pytest.raises(FileExistsError, match="choose another name"):
            llama.save_prefix(tmp_path / name, "abc")
    assert (tmp_path / "text").read_text() == "no prefix"
    llama.save_prefix(tmp_path / "good", "abcd")
    assert build(tiny_dir).load_prefix(tmp_path / "good") == 5
    for other in (build(tiny_dir, dtype="bf16"), build(tiny_dir, kv_cache="int8"),
                  build(write_checkpoint(tmp_path / "weights", TINY, seed=3))):  # fmt: skip
        with pytest.raises(ValueError, match="another model"):
            other.load_prefix(tmp_path / "good")
    with pytest.raises(ValueError, match="max_seq_len is 128"):
        llama.save_prefix(tmp_path / "long", "a" * 200)
    assert not (tmp_path / "long").exists()
