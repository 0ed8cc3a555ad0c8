"""Requests that come, go and share: each as alone, and nothing left behind."""

import gc
import os
import random
import threading
from collections import deque
from dataclasses import replace

import psutil
import pytest
import torch
from conftest import TINY, random_weights, write_byte_tokenizer, write_checkpoint
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llama import Llama, SamplingParams
from llama.checkpoint import InMemory, meta
from llama.engine import engine as engine_module
from llama.layers.revision import changed

SMALL = replace(TINY, head_dim=32)  # as the kernels take it
SAMPLED = SamplingParams(temperature=0.9, top_p=0.95, top_k=40, repetition_penalty=1.1)


@pytest.fixture(scope="module", params=["kernels", "kernels-bf16-int8", "plain"])
def llama(request, tmp_path_factory) -> Llama:
    path = write_checkpoint(tmp_path_factory.mktemp("engine") / "model", SMALL)
    how = {"plain": dict(dtype="fp32", compile=False), "kernels": dict(dtype="fp32")}
    options = how.get(request.param, dict(dtype="bf16", kv_cache="int8"))
    return Llama.build(path, device="cpu", max_batch_size=8, max_seq_len=128, **options)


def alone(llama: Llama, prompt, new, params, seed, n=1):
    """Tokens and log-probabilities of a prompt's samples, computed by themselves."""
    return llama.generate(
        [prompt], new, params=params, seed=seed, n=n, logprobs=True, stop_tokens=set()
    )


def result(request):
    """The events of a request: tokens and log-probabilities of each sample."""
    tokens, logprobs = [[] for _ in request.rows], [[] for _ in request.rows]
    for event in request.events:
        if event.token is not None:
            tokens[event.sample].append(event.token)
            logprobs[event.sample].append(event.logprob)
    return tokens, logprobs


def equal(llama, request, expected) -> bool:
    """To the bit with the kernels; the plain layers' sums depend on the shape of a pass."""
    (tokens, logprobs), (of_tokens, of_logprobs) = result(request), expected
    if llama.model.__class__.__name__ == "NativeTransformer":
        return (tokens, logprobs) == (of_tokens, of_logprobs)
    close = [
        torch.allclose(torch.tensor(a), torch.tensor(b), rtol=0, atol=1e-4)
        for a, b in zip(logprobs, of_logprobs, strict=True)
    ]
    return tokens == of_tokens and all(close)


schedules = st.lists(
    st.tuples(
        st.integers(0, 3),  # which text it begins with
        st.integers(1, 90),  # tokens of it
        st.integers(1, 12),  # new tokens
        st.booleans(),  # greedy
        st.integers(1, 3),  # samples
        st.sampled_from(["plain", "plain", "guided", "guessed"]),
        st.integers(0, 6),  # steps until the next one comes
        st.integers(0, 40),  # steps until it is cancelled; from 20 on never
    ),
    min_size=1,
    max_size=8,
)
CHANCE = random.Random(0)
TEXTS = [[CHANCE.randrange(500) for _ in range(90)] for _ in range(3)]
TEXTS.append(TEXTS[0][:70] + TEXTS[1][:20])  # begins like another


SCHEDULES = int(os.environ.get("LLAMA_SCHEDULES", 40))  # `make soak` takes more
limits = (st.sampled_from([256, 320, 1024]), st.integers(1, 64), st.integers(1, 8))


# Of a guided request one sequence is ready, and then both are preempted.
PREEMPTED = [
    (2, 59, 1, False, 1, "plain", 1, 40), (0, 64, 2, False, 3, "plain", 0, 40),
    (2, 60, 6, False, 2, "guided", 0, 40), (0, 32, 3, False, 2, "plain", 0, 40),
    (0, 33, 1, False, 1, "guided", 0, 40),
]  # fmt: skip


@pytest.mark.parametrize("llama", ["kernels", "kernels-bf16-int8"], indirect=True)
@settings(max_examples=SCHEDULES)
@example(PREEMPTED, 256, 43, 3)
@given(schedules, *limits)
def test_any_schedule_gives_each_request_its_own_answer(llama, plan, cache, chunk, rows):
    follow(llama, plan, cache, chunk, rows)


@pytest.mark.parametrize("llama", ["plain"], indirect=True)
@settings(max_examples=SCHEDULES // 8)
@given(schedules, *limits)
def test_any_schedule_on_the_plain_layers(llama, plan, cache, chunk, rows):
    follow(llama, plan, cache, chunk, rows)


class Guesses:
    """Draft tokens that are right up to some place: every case of acceptance, whatever it costs."""

    def __init__(self):
        self.answers, self.chance = {}, random.Random(0)

    def propose(self, batch):
        drafts = []
        for row in batch:
            draft = self.answers[row.seed][len(row.answer) :][: self.chance.randint(0, 6)]
            draft += [self.chance.randrange(500) for _ in range(self.chance.randint(0, 2))]
            drafts.append(draft[: max(row.max_len - len(row.prompt) - len(row.answer) - 1, 0)])
        return drafts

    def learn(self, sampled, alone):
        assert all(isinstance(tokens, list) for tokens in sampled)

    def forget(self, row):
        pass


def follow(llama, plan, cache, chunk, rows):
    """Add and cancel requests as a schedule says; compare each with itself alone."""
    engine = llama.engine(cache_tokens=cache, max_tokens_per_step=chunk, max_rows=rows)
    guesses = Guesses()
    engine.speculators = lambda name, _: guesses if name else None
    todo, requests, step, wait = list(plan), [], 0, 0
    while todo or not engine.idle:
        while todo and wait <= 0:
            which, length, new, greedy, n, kind, wait, patience = todo.pop(0)
            params = SamplingParams(temperature=0) if greedy else SAMPLED
            if kind == "guided":
                params = replace(params, guidance_scale=1.5, negative_prompt=TEXTS[1][:3])
            asked = (TEXTS[which][:length], new, params, len(requests), n)
            request = engine.make(
                asked[0], new, params=params, seed=len(requests), n=n, logprobs=True,
                stop_tokens=set(), speculate="lookup" if kind == "guessed" else None,
            )  # fmt: skip
            if kind == "guessed":
                answers, _ = alone(llama, *asked)
                seeds = [row.seed for row in request.rows]
                guesses.answers |= dict(zip(seeds, answers, strict=True))
            engine.submit(request)
            requests.append((request, asked, step + patience if patience < 20 else 10**9))
        wait -= 1
        for request, _, end in requests:
            if end <= step and not request.finished:
                used = engine.stats.blocks_used
                engine.cancel(request)
                assert engine.stats.blocks_used <= used and request.finished
        engine.step()
        step += 1
        assert step < 3000, "a request waits for ever"
    assert engine.stats.blocks_used == 0
    for request, asked, end in requests:
        if end > step:
            assert equal(llama, request, alone(llama, *asked)), asked


def test_a_prefix_is_computed_once_for_all_that_begin_with_it(llama):
    """64 requests that come together: token counts and memory, not only time."""
    engine = llama.engine(cache_tokens=8192, max_rows=64)
    prefix = TEXTS[0]
    requests = [engine.add([*prefix, i], 2, temperature=0, stop_tokens=set()) for i in range(64)]
    most = 0
    while not engine.idle:
        engine.step()
        most = max(most, engine.stats.blocks_used)
    stats = engine.stats
    assert stats.computed_tokens == len(prefix) + 64 * 2
    assert stats.cached_tokens == 63 * len(prefix)
    assert most <= 1 + 64  # the whole block of 64 tokens once, and a tail for each
    for i in (0, 17, 63):
        expected, _ = llama.generate([[*prefix, i]], 2, temperature=0, stop_tokens=set())
        assert result(requests[i])[0] == expected
    assert stats.blocks_used == 0


def test_one_that_fails_fails_alone(llama):
    """A logits processor that raises, and a hidden state that isn't a number."""
    engine = llama.engine(cache_tokens=1024)

    def broken(ids, logits):
        if len(ids) > 12:
            raise KeyError("the caller's own fault")
        return logits

    good = [
        engine.add(TEXTS[i], 8, temperature=0, logprobs=True, stop_tokens=set()) for i in range(2)
    ]
    bad = engine.add(TEXTS[2][:10], 8, params=SamplingParams(0, logits_processor=broken))
    events = []
    with pytest.raises(KeyError, match="the caller's own fault"):
        events += engine.events(bad)
    while not engine.idle:
        engine.step()
    assert bad.finished and isinstance(bad.error, KeyError)
    for i, request in enumerate(good):
        assert equal(llama, request, alone(llama, TEXTS[i], 8, SamplingParams(temperature=0), 0))
    assert engine.stats.blocks_used == 0


def test_should_stop_ends_a_request_or_fails_it(llama):
    """Whichever of its rows it meets; a row that is still waiting ends with it."""
    engine = llama.engine(cache_tokens=1024, max_rows=2)
    asked = iter([False, True])
    options = dict(temperature=0, stop_tokens=set())
    request = engine.make_all([[1], [2], [3]], 9, should_stop=lambda: next(asked), **options)
    events = list(engine.run(request))
    ends = {event.row: event.finish_reason for event in events if event.finish_reason}
    assert ends == dict.fromkeys(range(3), "stop")
    tokens = [event.row for event in events if event.token is not None]
    assert sorted(tokens) == [0, 0, 1, 1]
    other = engine.add([4, 5], 9, **options)
    request = engine.make_all([[1], [2]], 9, should_stop=lambda: {}["no"], **options)
    with pytest.raises(KeyError, match="no"):
        list(engine.run(request))
    assert len(list(engine.events(other))) == 9 and engine.idle


@pytest.mark.parametrize(
    "wrong", [lambda logits: None, lambda logits: logits[:-1], lambda logits: 1]
)
def test_what_a_logits_processor_gives_is_checked(llama, wrong):
    engine = llama.engine(cache_tokens=1024)
    params = SamplingParams(0, logits_processor=lambda ids, logits: wrong(logits))
    with pytest.raises(ValueError, match=r"logits_processor gave .*: it gets logits of shape"):
        list(engine.run(engine.make([1, 2], 4, params=params)))
    assert engine.idle


def test_a_request_may_be_cancelled_by_its_own_processor(llama):
    engine = llama.engine(cache_tokens=1024)

    def stop(ids, logits):
        if len(ids) == 6:
            engine.cancel(request)
        return logits

    params = SamplingParams(0, logits_processor=stop)
    request = engine.add([1, 2], 100, params=params, stop_tokens=set())
    steps = 0
    while not engine.idle:
        engine.step()
        steps += 1
    assert request.finished and steps == 5 and engine.stats.blocks_used == 0


@pytest.mark.parametrize("name", ["propose", "compute", "draw", "advance"])
def test_iterators_are_collected_at_any_moment(llama, monkeypatch, name):
    """Of a request that is in the pass, too: a reader in a cycle is found by Python's collector."""
    engine = llama.engine(cache_tokens=256)
    expected = alone(llama, TEXTS[0], 8, SamplingParams(temperature=0), 0)
    reader = {"events": engine.run(engine.make(TEXTS[1], 50, stop_tokens=set()))}
    reader["itself"] = reader
    next(reader["events"])
    del reader
    own = getattr(engine_module, name)

    def collecting(*args):
        gc.collect()
        return own(*args)

    monkeypatch.setattr(engine_module, name, collecting)
    options = dict(temperature=0, logprobs=True, stop_tokens=set())
    request = engine.add(TEXTS[0], 8, **options)
    for _ in range(9):
        engine.step()
    assert equal(llama, request, expected) and engine.idle and engine.stats.blocks_used == 0


def test_the_last_events_are_read_whichever_thread_makes_them(llama):
    """Another one that finishes the request once this one has seen no events."""
    engine = llama.engine(cache_tokens=1024)

    class Events(deque):
        def __len__(self):
            if (length := super().__len__()) or request.finished:
                return length
            while not engine.idle:
                engine.step()
            return 0

    request = engine.add([1, 2], 5, temperature=0, stop_tokens=set())
    request.events = Events()
    events = list(engine.events(request))
    assert len(events) == 5 and events[-1].finish_reason == "length"


@pytest.mark.parametrize("prompt", [[[1, 2]], "text", ["a"], [None]])
def test_a_prompt_is_a_list_of_ids(llama, prompt):
    with pytest.raises(ValueError, match="prompt 0 isn't a list of token ids"):
        llama.engine(cache_tokens=1024).add(prompt, 4)


@pytest.mark.parametrize("row", [0, 1, 2])
def test_a_request_fails_whichever_of_its_rows_does(llama, row):
    def broken(ids, logits):
        if ids[0] == row:
            raise KeyError("mine")
        return logits

    engine = llama.engine(cache_tokens=1024)
    params = SamplingParams(0, logits_processor=broken)
    request = engine.make_all([[0], [1], [2]], 5, params=params, n=2, stop_tokens=set())
    with pytest.raises(KeyError, match="mine"):
        list(engine.run(request))
    assert engine.idle and engine.stats.blocks_used == 0


@pytest.mark.parametrize("compile", [None, False])
def test_logits_that_are_not_finite_end_their_request_alone(tmp_path, compile):
    """A row of the embedding is NaN: who has that token fails, and its blocks harm nobody."""
    path, weights = tmp_path / "model", random_weights(SMALL)
    weights["tok_embeddings.weight"][77] = float("nan")
    meta.write(InMemory(SMALL, weights), path, 1)
    write_byte_tokenizer(path / "tokenizer.model")
    llama = Llama.build(path, device="cpu", dtype="fp32", compile=compile, max_seq_len=128)
    engine = llama.engine(cache_tokens=192)
    for _ in range(3):  # in the same blocks again
        bad = engine.add([5, 77, 6], 4, temperature=0)
        good = engine.add([5, 9, 6], 4, temperature=0, stop_tokens=set())
        while not engine.idle:
            engine.step()
        with pytest.raises(ValueError, match="aren't finite"):
            list(engine.events(bad))
        expected, _ = llama.generate([[5, 9, 6]], 4, temperature=0, stop_tokens=set())
        assert result(good)[0] == expected


def test_a_failing_processor_leaves_the_prefix_that_others_use(llama):
    def broken(ids, logits):
        raise KeyError("the caller's own fault")

    engine = llama.engine(cache_tokens=1024)
    list(engine.events(engine.add(TEXTS[0], 2, temperature=0, stop_tokens=set())))
    with pytest.raises(KeyError):
        list(engine.events(engine.add(TEXTS[0], 2, params=SamplingParams(logits_processor=broken))))
    before = engine.stats.cached_tokens
    list(engine.events(engine.add(TEXTS[0], 2, temperature=0, stop_tokens=set())))
    assert engine.stats.cached_tokens - before == len(TEXTS[0]) - 1


def test_changed_weights_find_nothing_of_the_earlier_ones(tmp_path):
    path = write_checkpoint(tmp_path / "model", SMALL)
    llama = Llama.build(path, device="cpu", dtype="fp32", compile=False, max_seq_len=128)
    engine = llama.engine(cache_tokens=1024)
    list(engine.events(engine.add(TEXTS[0], 4, temperature=0, stop_tokens=set())))
    with torch.no_grad():
        llama.model.layers[0].attention.wk.weight.mul_(-1)
    changed(llama.model)
    request = engine.add(TEXTS[0], 4, temperature=0, logprobs=True, stop_tokens=set())
    while not engine.idle:
        engine.step()
    assert engine.stats.cached_tokens == 0
    assert equal(llama, request, alone(llama, TEXTS[0], 4, SamplingParams(temperature=0), 0))


def test_many_wait_in_a_queue_and_memory_stays(llama):
    engine = llama.engine(cache_tokens=512, max_rows=8)
    for i in range(400):
        engine.add([i % 500, 3, 4], 2, temperature=0, stop_tokens=set())
    assert engine.stats.waiting == 400
    while not engine.idle:
        engine.step()
    stats = engine.stats
    assert stats.blocks_used == 0 and stats.blocks_known <= stats.blocks == 8


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("chunk", [7, 512])
def test_echo_scores_the_prompt_first(llama, n, chunk):
    """Even where the cache knows it, in chunks, with other rows beside it."""
    engine = llama.engine(cache_tokens=1024, max_tokens_per_step=chunk)
    options = dict(temperature=0, logprobs=True, stop_tokens=set())
    list(engine.events(engine.add(TEXTS[0], 2, **options)))
    other = engine.add(TEXTS[1], 9, **options)
    request = engine.add(TEXTS[0], 4, echo=True, top_logprobs=2, n=n, **options)
    while not engine.idle:
        engine.step()
    assert len(result(other)[0][0]) == 9
    expected, [scores, *_] = llama.generate([TEXTS[0]], 4, echo=True, n=n, **options)
    for sample in range(n):
        events = [event for event in request.events if event.sample == sample]
        assert [event.token for event in events] == expected[sample]
        assert events[0].logprob is None is events[0].top_logprobs
        assert [event.logprob for event in events[1:]] == pytest.approx(scores[1:], abs=1e-4)
        for event in events[1:]:
            (_, first), (_, second) = event.top_logprobs
            assert event.logprob <= first >= second
        text = "".join(event.text for event in events)
        assert text == llama.tokenizer.decode(expected[sample])
    assert events[-1].cached_tokens == 0  # samples share what was computed for the first


def test_echo_alone_and_a_prompt_alone(llama):
    engine = llama.engine(cache_tokens=1024)
    events = list(engine.events(engine.add([5, 6, 7], 0, echo=True)))
    assert [event.token for event in events] == [5, 6, 7, None]
    assert [event.logprob for event in events] == [None] * 4
    assert events[-1].finish_reason == "length"
    engine.add([5, 6, 7], 30, echo=True, logprobs=True, n=2)
    engine.step()
    engine.cancel_all()
    assert engine.idle and engine.stats.blocks_used == 0


def test_cached_tokens_are_told_at_the_end(llama):
    engine = llama.engine(cache_tokens=1024)
    options = dict(temperature=0, stop_tokens=set())
    ends = []
    for cache_prompt in (True, True, False):
        request = engine.add(TEXTS[0], 5, cache_prompt=cache_prompt, **options)
        events = list(engine.events(request))
        assert [event.cached_tokens for event in events[:-1]] == [None] * 4
        ends.append(events[-1].cached_tokens)
    assert ends == [0, len(TEXTS[0]) - 1, 0]


def test_min_tokens_bans_stop_tokens_and_stop_strings(llama):
    engine = llama.engine(cache_tokens=1024)
    free, _ = llama.generate([TEXTS[0]], 12, temperature=0, stop_tokens=set())
    first, text = free[0][0], llama.tokenizer.decode(free[0])

    def answer(least, **options):
        params = SamplingParams(temperature=0, min_tokens=least)
        return list(engine.events(engine.add(TEXTS[0], 12, params=params, **options)))

    assert [event.token for event in answer(0, stop_tokens={first})] == [None]
    events = answer(5, stop_tokens={first})
    assert sum(event.token is not None for event in events) >= 5
    assert first not in [event.token for event in events]
    stop = [text[0]] if text else ["x"]
    events = answer(12, stop_tokens=set(), stop=stop)
    assert "".join(event.text for event in events) == text
    with pytest.raises(ValueError, match="min_tokens=-1"):
        answer(-1)


def test_requests_are_made_while_a_step_runs(llama):
    """`make` waits for no step: grammars may take long to compile."""
    engine = llama.engine(cache_tokens=1024)
    with engine.lock:  # as a step does
        found, format_ = [], {"type": "regex", "regex": "[ab]{3}"}

        def make():
            found.append(engine.make([1, 2], 8, response_format=format_, stop_tokens={7}))

        thread = threading.Thread(target=make)
        thread.start()
        thread.join(60)
        assert not thread.is_alive()
        assert engine.idle and engine.stats.waiting == 0
    engine.submit(found[0])
    text = "".join(event.text for event in engine.events(found[0]))
    assert len(text) == 3 and set(text) <= {"a", "b"}
    engine.cancel(left := engine.make([1], 5))
    engine.submit(left)
    assert engine.idle


REQUESTS = int(os.environ.get("LLAMA_REQUESTS", 200))  # `make soak` takes more


def test_many_requests_wait_and_memory_stays(llama):
    """All are queued at once, and each is answered; what they took is given back."""
    engine, chance = llama.engine(max_rows=16, cache_tokens=1024), random.Random(1)
    process = psutil.Process()

    def rounds(count):
        requests = []
        for _ in range(count):
            prompt = [chance.randrange(500) for _ in range(chance.randrange(1, 30))]
            new = chance.randrange(1, 6)
            requests.append((engine.add(prompt, new, stop_tokens=set()), new))
        assert engine.stats.waiting == count and engine.stats.running == 0
        while not engine.idle:
            engine.step()
        for request, new in requests:
            assert request.error is None
            assert sum(event.token is not None for event in request.events) == new
        assert engine.stats.blocks_used == 0

    for _ in range(3):  # the first ones fill the cache, and what allocators keep
        rounds(REQUESTS)
    gc.collect()
    before = process.memory_info().rss
    rounds(REQUESTS)
    gc.collect()
    after = process.memory_info().rss
    print(f"{REQUESTS} requests: resident memory {before / 1e6:.1f} MB, then {after / 1e6:.1f} MB")
    assert after <= 1.01 * before


def test_what_can_not_be_is_refused_with_the_numbers(llama):
    engine = llama.engine(cache_tokens=64)
    with pytest.raises(ValueError, match="up to 70 tokens, and the cache holds 64"):
        engine.add([1] * 10, 60)
    with pytest.raises(ValueError, match="prompt 0 is empty"):
        engine.add([], 5)
    with pytest.raises(ValueError, match="top_logprobs=-1 must lie between 0"):
        engine.add([1], 5, top_logprobs=-1)
    for wrong in ({"stop_tokens": 2}, {"stop_tokens": {"</s>"}}, {"top_logprobs": 2.0},
                  {"priority": "high"}):  # fmt: skip
        with pytest.raises(ValueError, match=rf"{next(iter(wrong))}=.* isn't a"):
            engine.add([1], 5, **wrong)
    for name in ("temperature", "top_p"):
        with pytest.raises(ValueError, match=rf"{name}=0.5 beside params, .*SamplingParams"):
            engine.add([1], 5, **{name: 0.5}, params=SamplingParams(top_k=3))
    guided = SamplingParams(guidance_scale=2, negative_prompt=[1, 2])
    with pytest.raises(ValueError, match="up to 101 tokens, and the cache holds 64"):
        engine.add([1], 49, params=guided)  # two sequences, a block each
    with pytest.raises(ValueError, match="max_rows=0 must be at least 1"):
        llama.engine(max_rows=0)
    with pytest.raises(ValueError, match="isn't queued: submit it"):
        list(engine.events(engine.make([1], 5)))  # which would be waited for forever
    assert engine.idle
