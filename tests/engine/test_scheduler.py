"""The scheduler with a model that computes nothing: what it promises, over random schedules."""

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama.engine.blocks import Blocks
from llama.engine.scheduler import PATIENCE, Scheduler, Sequence

SIZE = 4


class Cache:
    """What each position of each block holds: the token there and all those before it."""

    def __init__(self, scheduler: Scheduler):
        self.scheduler, self.held = scheduler, {}

    def step(self) -> dict:
        """Compute a pass, and check that each row finds in its blocks what it should."""
        plan = self.scheduler.plan()
        blocks = self.scheduler.blocks
        assert sum(plan.counts.values()) <= self.scheduler.max_tokens
        assert len(self.scheduler.running) <= self.scheduler.max_rows
        for source, target in plan.copies:
            for i in range(SIZE):
                self.held[target, i] = self.held.get((source, i))
        written = Counter()
        for sequence, n in plan.counts.items():
            assert n >= 1
            for at in range(sequence.computed, sequence.computed + n):
                place = sequence.table[at // SIZE], at % SIZE
                assert place[0] != 0
                written[place] += 1
                self.held[place] = sequence.adapter, *sequence.tokens[: at + 1]
        assert max(written.values(), default=0) <= 1
        for sequence, n in plan.counts.items():
            for at in range(sequence.computed + n):
                found = self.held[sequence.table[at // SIZE], at % SIZE]
                assert found == (sequence.adapter, *sequence.tokens[: at + 1]), "another row's"
        used = Counter(block for s in self.scheduler.running for block in s.table)
        assert len(used) == blocks.used
        assert {b: blocks._users[b] for b in used} == dict(used)
        return plan

    def generate(self, plan) -> list:
        """Each row that is computed whole gets a token; returns those that are finished."""
        done = []
        for sequence, n in plan.counts.items():
            self.scheduler.advance(sequence, n)
            if not sequence.remaining:
                # What a row says depends on what it has said, as a model's would.
                sequence.tokens.append(hash(tuple(sequence.tokens)) % 3)
                if len(sequence.tokens) >= sequence.max_len:
                    done.append(sequence)
                    self.scheduler.remove(sequence)
        return done


requests = st.lists(
    st.tuples(
        st.lists(st.integers(0, 2), min_size=1, max_size=20),  # prompts that often share beginnings
        st.integers(1, 12),  # new tokens
        st.integers(0, 2),  # priority
        st.integers(0, 8),  # steps before the next one comes
        st.integers(0, 30),  # steps until it is cancelled, 30: never
        st.integers(0, 1),  # adapter
    ),
    min_size=1,
    max_size=12,
)


@settings(max_examples=200)
@given(requests, st.integers(8, 20), st.integers(1, 64), st.integers(1, 6), st.integers(1, 64))
def test_any_schedule_ends_with_each_row_as_alone(requests, blocks, max_tokens, max_rows, limit):
    sizes = dict(max_tokens=max_tokens, max_rows=max_rows, max_prefill=limit)
    scheduler = Scheduler(Blocks(blocks + 1, SIZE), **sizes)
    cache, expected, alive, finished = Cache(scheduler), {}, {}, []
    todo = list(requests)
    step = wait = 0
    while todo or alive:
        while todo and wait <= 0:
            prompt, new, priority, wait, patience, adapter = todo.pop(0)
            sequence = Sequence(list(prompt), len(prompt) + new, priority, adapter=adapter)
            scheduler.add(sequence)
            alive[sequence] = step + patience if patience < 30 else 10**9
            text = list(prompt)
            for _ in range(new):
                text.append(hash(tuple(text)) % 3)
            expected[sequence] = text
        wait -= 1
        for sequence in [s for s, end in alive.items() if end <= step]:
            scheduler.remove(sequence)
            del alive[sequence]
        plan = cache.step()
        assert plan.counts or not alive
        for sequence in cache.generate(plan):
            del alive[sequence]
            finished.append(sequence)
            assert sequence.tokens == expected[sequence]
        step += 1
        assert step < 5000, "somebody waits for ever"
    assert scheduler.blocks.used == 0 and not scheduler.running and not scheduler.waiting
    scheduler.blocks.clear()
    assert scheduler.blocks.available == blocks and scheduler.blocks.known == 0


def drain(scheduler, cache):
    passes = []
    while scheduler.running or scheduler.waiting:
        plan = cache.step()
        passes.append(plan)
        cache.generate(plan)
    return passes


def make(blocks=64, max_tokens=16, max_rows=8, **limit):
    sizes = dict(max_tokens=max_tokens, max_rows=max_rows, **limit)
    scheduler = Scheduler(Blocks(blocks + 1, SIZE), **sizes)
    return scheduler, Cache(scheduler)


def test_a_common_prefix_is_computed_once_even_if_all_come_together():
    scheduler, cache = make(blocks=400, max_tokens=128, max_rows=64)
    prefix = [random.Random(0).randrange(100) for _ in range(250)]
    for i in range(64):
        scheduler.add(Sequence([*prefix, 1000 + i], 252))
    drain(scheduler, cache)
    assert scheduler.computed == 250 + 64  # the prefix, and a token of each
    assert scheduler.reused == 63 * 250


def test_a_long_prompt_neither_stops_others_nor_waits_for_them():
    scheduler, cache = make(blocks=200, max_tokens=20, max_rows=4, max_prefill=5)
    short = [Sequence([i], 100) for i in range(3)]
    for sequence in short:
        scheduler.add(sequence)
    cache.generate(cache.step())
    long = Sequence(list(range(100, 200)), 101)
    scheduler.add(long)
    steps = 0
    while len(long.tokens) == 100:
        plan = cache.step()
        assert all(plan.counts[s] == 1 for s in short)  # each of them gets its token
        cache.generate(plan)
        steps += 1
    assert steps == 100 // 5  # of each pass
    other = Sequence(list(range(200, 220)), 21)  # and all of a pass where none decodes
    for sequence in (*short, long):
        if sequence in scheduler.running:
            scheduler.remove(sequence)
    scheduler.add(other)
    assert scheduler.plan().counts == {other: 20}


def test_higher_priority_overtakes_within_its_patience_only():
    scheduler, cache = make(blocks=100, max_rows=1)
    running, low = Sequence([1], 400), Sequence([2], 3)
    scheduler.add(running)
    cache.generate(cache.step())
    scheduler.add(low)
    for _ in range(PATIENCE - 2):
        cache.generate(cache.step())
    early = Sequence([3], 3, priority=1)
    scheduler.add(early)
    assert scheduler.waiting == [early, low]
    for _ in range(5):
        cache.generate(cache.step())
    late = Sequence([4], 3, priority=1)
    scheduler.add(late)
    assert scheduler.waiting == [early, low, late]


def test_what_never_fits_is_refused_with_the_numbers():
    scheduler, _ = make(blocks=4)
    with pytest.raises(ValueError, match="up to 17 tokens, and the cache holds 16: shorten it"):
        scheduler.add(Sequence([1], 17))
    scheduler.add(Sequence([1], 16))


def test_the_last_one_gives_way_and_is_computed_again():
    scheduler, cache = make(blocks=4, max_rows=2)
    first, second = Sequence([1, 2, 3], 16), Sequence([7, 8, 9], 16)
    scheduler.add(first)
    scheduler.add(second)
    passes = drain(scheduler, cache)
    assert any(plan.preempted == [second] for plan in passes)
    assert not any(first in plan.preempted for plan in passes)
    assert len(first.tokens) == len(second.tokens) == 16


def test_a_draft_is_dropped_before_anybody_gives_way():
    scheduler, cache = make(blocks=2, max_rows=2)
    one, two = Sequence([1, 2, 3], 4), Sequence([4, 5, 6], 4)
    for sequence in (one, two):
        scheduler.add(sequence)
    plan = cache.step()
    for sequence, n in plan.counts.items():
        scheduler.advance(sequence, n)
        sequence.tokens.append(0)
        sequence.draft = [1, 1, 1]
    plan = scheduler.plan()
    assert not plan.preempted and plan.counts == {one: 1, two: 1}
