"""Streams, seeds, samples and stops: a row depends on nothing but itself."""

import json
import random
from dataclasses import replace

import pytest
import torch
from conftest import TINY, run_ranks, write_checkpoint
from test_stopping import cut

from llama import Llama, SamplingParams

TEXTS = ["a", "The quick", "x" * 30, "2 + 2 =", "zz zz", "ö", "hello there", "?!", "q", "a b c d e"]
SAMPLED = SamplingParams(temperature=1.0, top_p=0.95, top_k=200, repetition_penalty=1.05)


def collected(events, n_rows, n=1):
    """Texts and finish reasons of a stream, and what is true of any stream."""
    texts = [[""] * n for _ in range(n_rows)]
    reasons = [[None] * n for _ in range(n_rows)]
    for event in events:
        assert reasons[event.row][event.sample] is None  # nothing comes after the end
        texts[event.row][event.sample] += event.text
        reasons[event.row][event.sample] = event.finish_reason
    assert all(all(row) for row in reasons)
    return [text for row in texts for text in row], [reason for row in reasons for reason in row]


@pytest.mark.parametrize(
    "params", [SamplingParams(temperature=0), SAMPLED], ids=["greedy", "drawn"]
)
@pytest.mark.parametrize("stop", [[], ["e", "zz"]], ids=["free", "stops"])
def test_a_stream_is_the_completion(tiny, params, stop):
    options = dict(params=params, seed=5, n=2, stop=stop, max_gen_len=20)
    whole = tiny.text_completion(TEXTS[:5], **options)
    texts, reasons = collected(tiny.stream_text(TEXTS[:5], **options), 5, 2)
    assert texts == [p["generation"] for p in whole]
    assert reasons == [p["finish_reason"] for p in whole]


def test_a_chat_stream_is_the_answer(smollm2):
    dialogs = [[{"role": "user", "content": "What is the capital of France?"}]]
    [answer] = smollm2.chat_completion(dialogs, 0, max_gen_len=24)
    events = list(smollm2.stream_chat(dialogs, 0, max_gen_len=24))
    assert "".join(event.text for event in events) == answer["generation"]["content"]
    assert events[-1].finish_reason == answer["finish_reason"] == "stop"
    assert len(events) > 5 and "Paris" in answer["generation"]["content"]


@pytest.mark.parametrize("name, size", [("tiny", 1), ("tiny", 5), ("tiny", 16), ("smollm2", 5)])
def test_a_row_depends_on_its_prompt_and_seed_only(request, name, size):
    """In batches of any size and order, streamed or not."""
    llama = request.getfixturevalue(name)
    prompts = [f"{text} {i}" for i, text in enumerate(TEXTS[:8])] * 2
    seeds = list(range(100, 116))
    options = dict(params=SAMPLED, max_gen_len=8)
    expected = [p["generation"] for p in llama.text_completion(prompts, seed=seeds, **options)]
    order = random.Random(size).sample(range(16), 16)
    found = {}
    for at in range(0, 16, size):
        rows = order[at : at + size]
        batch, own = [prompts[i] for i in rows], [seeds[i] for i in rows]
        texts, _ = collected(llama.stream_text(batch, seed=own, **options), len(rows))
        found |= dict(zip(rows, texts, strict=True))
    assert [found[i] for i in range(16)] == expected
    assert len(set(expected)) == 16  # the same prompt with another seed goes on differently


def test_ranks_draw_the_same(tmp_path):
    """A row's tokens are the same on one rank and on three."""
    args = replace(TINY, n_heads=6, n_kv_heads=3, dim=48, hidden_dim=100)
    path = write_checkpoint(tmp_path / "tiny", args)
    prompts, seeds = [[1, 2, 3], [9] * 20, [7]], [3, 4, 5]
    one = Llama.build(path, device="cpu", dtype="fp32")
    expected, _ = one.generate(prompts, 16, params=SAMPLED, seed=seeds, stop_tokens=set())
    report = run_ranks(
        3, "generate", tmp_path / "out.json", ckpt=str(path), prompts=prompts,
        params=SAMPLED.__dict__, seed=seeds, no_stops=True,
    )  # fmt: skip
    assert report["tokens"] == expected and report["all_ranks"] == [expected] * 3


def test_samples_share_a_prefill_and_are_those_of_their_seeds(tiny):
    fed, forward = [], tiny.model.hidden

    def spy(tokens, *rest):
        fed.append(tuple(tokens.shape))
        return forward(tokens, *rest)

    prompts = [[5] * 30, [6, 7]]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny.model, "hidden", spy)
        tokens, _ = tiny.generate(prompts, 6, params=SAMPLED, seed=1, n=4, stop_tokens=set())
    assert fed[0] == (2, 30) and fed[1:] == [(8, 1)] * 5
    assert len(tokens) == 8 and len({tuple(row) for row in tokens}) == 8
    for i, prompt in enumerate(prompts):
        alone, _ = tiny.generate([prompt], 6, params=SAMPLED, seed=1, n=4, stop_tokens=set())
        assert alone == tokens[4 * i : 4 * i + 4]
        first, _ = tiny.generate([prompt], 6, params=SAMPLED, seed=1, stop_tokens=set())
        assert first[0] == tokens[4 * i]


def test_stop_strings_cut_what_would_have_come(smollm2):
    prompts = ["One, two, three,", "The alphabet: A, B, C,"]
    free = smollm2.text_completion(prompts, 0, max_gen_len=12)
    stops = [[","], ["\n"], ["five", "E, F"], ["nowhere to be found"]]
    for stop in stops:
        found = smollm2.text_completion(prompts, 0, max_gen_len=12, stop=stop)
        for whole, part in zip(free, found, strict=True):
            assert part["generation"] == cut(whole["generation"], stop)
            if part["generation"] != whole["generation"]:
                assert part["finish_reason"] == "stop"


def test_should_stop_ends_all_rows(tiny):
    asked = iter([False, False, True])
    found = tiny.text_completion(["a", "bc"], 0, max_gen_len=50, should_stop=lambda: next(asked),
                                 logprobs=True)  # fmt: skip
    assert [len(p["tokens"]) for p in found] == [3, 3]
    assert [p["finish_reason"] for p in found] == ["stop", "stop"]


def test_alternatives_are_the_most_probable_tokens(tiny):
    [found] = tiny.text_completion(["abc"], 0, max_gen_len=5, logprobs=True, top_logprobs=3)
    for text, logprob, best in zip(
        found["tokens"], found["logprobs"], found["top_logprobs"], strict=True
    ):
        assert len(best) == 3 and best[0] == (text, pytest.approx(logprob))
        assert best[0][1] > best[1][1] > best[2][1]
    with pytest.raises(ValueError, match="top_logprobs=-1"):
        tiny.text_completion(["abc"], top_logprobs=-1)


def test_banned_and_processed_tokens_do_not_come(tiny):
    free, _ = tiny.generate([[1, 2, 3]], 12, temperature=0, stop_tokens=set())
    banned = SamplingParams(temperature=0, banned_tokens=set(free[0]))
    other, _ = tiny.generate([[1, 2, 3]], 12, params=banned, stop_tokens=set())
    assert set(other[0]).isdisjoint(free[0])

    def only_even(ids, logits):
        assert ids[:3] == [1, 2, 3]
        return logits.index_fill(0, torch.arange(1, len(logits), 2), -torch.inf)

    even, _ = tiny.generate(
        [[1, 2, 3]], 12, params=SamplingParams(1.0, logits_processor=only_even), stop_tokens=set()
    )
    assert all(token % 2 == 0 for token in even[0])


def test_long_prompts_go_through_in_passes(tiny, monkeypatch):
    """What comes out doesn't depend on how much goes in at a time."""
    prompts = [[(7 * i) % 500 for i in range(n)] for n in (3, 60, 61, 100)]
    options = dict(temperature=0, logprobs=True, echo=True, stop_tokens=set())
    expected, known = tiny.generate(prompts, 8, **options)
    for tokens in (4, 28, 200):
        monkeypatch.setattr(tiny._calls.plain.scheduler, "max_tokens", tokens)
        found, scores = tiny.generate(prompts, 8, **options)
        assert found == expected
        for a, b in zip(scores, known, strict=True):
            assert torch.allclose(torch.tensor(a), torch.tensor(b), atol=1e-4)


def test_closing_a_stream_frees_its_cache(tiny):
    stream = tiny.stream_text(["a", "b"], 0, max_gen_len=20)
    next(stream)
    assert tiny._calls.plain.stats.blocks_used == 2
    stream.close()
    stats = tiny._calls.plain.stats
    assert tiny._calls.plain.idle and stats.blocks_used == stats.blocks_known == 0
    assert tiny.text_completion(["a"], 0, max_gen_len=4)
    assert tiny._calls.plain.stats.blocks_known == 0  # nothing is kept from call to call


@pytest.mark.parametrize(
    "options, message",
    [
        ({"n": 0}, "n=0 must be at least 1"),
        ({"n": 9}, "2 prompts of 9 samples, and max_batch_size is 16"),
        ({"seed": [1]}, "1 seeds for 2 prompts"),
        ({"seed": 1.5}, "seed=1.5 isn't a whole number"),
        ({"seed": ["1", 2]}, "isn't a whole number, nor a list of them"),
        ({"stop": "x"}, "stop='x'"),
        ({"params": {"top_k": 4}}, r"params={'top_k': 4}: a SamplingParams"),
    ],
)
def test_mistakes_are_named(tiny, options, message):
    with pytest.raises(ValueError, match=message):
        tiny.text_completion(["a", "b"], max_gen_len=2, **options)


def test_events_are_json(tiny):
    events = list(tiny.stream_text(["a"], 0, max_gen_len=2, logprobs=True, top_logprobs=2))
    assert json.loads(json.dumps([event._asdict() for event in events]))[0]["row"] == 0


def test_stop_tokens_of_a_call(tiny):
    """In place of the tokenizer's, for texts and their streams."""
    [free] = tiny.text_completion(["abc"], 0, max_gen_len=12, logprobs=True, stop_tokens=set())
    ids, _ = tiny.generate([tiny.tokenizer.encode("abc", bos=True, eos=False)], 12, 0,
                           stop_tokens=set())  # fmt: skip
    stop = ids[0][5]
    end = ids[0].index(stop)
    [cut_] = tiny.text_completion(["abc"], 0, max_gen_len=12, logprobs=True, stop_tokens={stop})
    assert cut_["finish_reason"] == "stop" and cut_["tokens"] == free["tokens"][:end]
    events = list(tiny.stream_text(["abc"], 0, max_gen_len=12, stop_tokens={stop}))
    assert [event.token for event in events] == [*ids[0][:end], None]
