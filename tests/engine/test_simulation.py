"""The scheduler under a day's traffic, with a virtual clock in place of a model.

Lengths follow the conversations in Azure's trace of 2023 (Splitwise, arXiv 2311.18677): prompts of
1020 tokens in the median, answers of 129. Arrivals are a Poisson process. A pass takes as long as
an affine cost model says.
"""

import math
import os
import random
import statistics
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama.engine.blocks import Blocks
from llama.engine.scheduler import Scheduler
from llama.engine.simulation import Arrival, Cost, Pass, fit, passes, simulate

REQUESTS = int(os.environ.get("LLAMA_SIMULATED_REQUESTS", 400))
LONGEST = 4096
PASS, TOKEN = 0.008, 0.00008  # seconds of a pass, and of each token in it
AFFINE = Cost(((0, PASS), (1, PASS + TOKEN)))
LOAD = 0.85  # of what the cost model can serve


def length(rng: random.Random, median: int, spread: float) -> int:
    return max(1, min(int(rng.lognormvariate(0, spread) * median), LONGEST))


def test_nobody_starves_and_planning_is_cheap():
    rng, size, rows, budget = random.Random(0), 64, 64, 512
    scheduler = Scheduler(Blocks(1 + rows * 1500 // size, size), max_tokens=budget, max_rows=rows)
    # A decoding pass is about full: its time, divided by its rows, is that of an answer's token.
    each = (1300 * TOKEN + PASS * 1300 / budget) + 200 * (PASS + rows * TOKEN) / rows

    def arrivals():
        at = 0.0
        for i in range(REQUESTS):
            at += rng.expovariate(LOAD / each)
            prompt, answer = length(rng, 1020, 0.7), length(rng, 129, 0.9)
            tokens = [i % 50_000] * prompt  # no prompt begins like another
            yield Arrival(at, tokens, answer, rng.randrange(2))

    timings, entered, begun, longest_wait, planned, made = [], {}, set(), 0, 0, 0
    began = time.process_time()
    for plan in passes(scheduler, arrivals(), AFFINE, timings):
        ahead = scheduler.waiting[0].place if scheduler.waiting else (math.inf, 0)
        for sequence in scheduler.waiting:
            entered.setdefault(sequence.place, made)
        for sequence in plan.counts:
            if sequence.place not in begun:
                begun.add(sequence.place)
                # In the order of arrival, up to what priorities are worth.
                assert sequence.place < ahead
                longest_wait = max(longest_wait, made - entered.get(sequence.place, made))
        planned += len(plan.counts)
        made += 1
    took = time.process_time() - began
    assert len(timings) == REQUESTS and scheduler.blocks.used == 0
    cuts = statistics.quantiles([timing.first for timing in timings], n=100)
    print(
        f"\n{REQUESTS} requests in {timings[-1].times[-1]:.0f} s of the clock, {made} passes, "
        f"{scheduler.preemptions} preemptions; first token p50 {cuts[49]:.2f} s, "
        f"p99 {cuts[98]:.2f} s; longest wait {longest_wait} passes; "
        f"{1e6 * took / planned:.1f} us of the simulation for each request and pass"
    )


@given(st.integers(0, 10_000))
def test_requests_are_conserved_and_no_pass_is_free(seed):
    """Every request gets its tokens, in order; the clock goes on by what the passes take."""
    rng, size = random.Random(seed), 8
    scheduler = Scheduler(Blocks(1 + 30, size), max_tokens=rng.randint(1, 40), max_rows=4)
    arrivals = [
        Arrival(i * rng.random(), [rng.randrange(3)] * rng.randint(1, 100), rng.randint(1, 40))
        for i in range(10)
    ]
    arrivals.sort()
    cost, timings, spent = Cost(((1, 1.0), (8, 1.5)), row=0.1, position=0.01), [], 0.0
    for plan in passes(scheduler, arrivals, cost, timings):
        spent += cost(Pass.planned(plan))
    assert [timing.at for timing in timings] == [arrival.at for arrival in arrivals]
    for timing, arrival in zip(timings, arrivals, strict=True):
        assert len(timing.times) == arrival.answer
        assert timing.first >= 1 and min(timing.between, default=1) >= 1
    end = max(timing.times[-1] for timing in timings)
    assert spent <= end + 1e-6 <= spent + arrivals[-1].at + 1e-3
    assert scheduler.blocks.used == 0


def test_a_prefix_that_is_shared_is_computed_once():
    def computed(prompts):
        scheduler = Scheduler(Blocks(100, 8), max_tokens=32, max_rows=4)
        simulate(scheduler, [Arrival(0, prompt, 2) for prompt in prompts], AFFINE)
        return scheduler.computed

    own, common = [[i] * 96 for i in range(4)], [[9] * 80 + [i] * 16 for i in range(4)]
    assert computed(own) - computed(common) == 3 * 80


def test_costs_are_linear_between_points_and_beyond():
    cost = Cost(((1, 1.0), (3, 2.0), (7, 2.0), (9, 3.0)), row=10)
    made = [cost(Pass(1, tokens, 0, 0)) - 10 for tokens in (1, 2, 3, 5, 8, 11)]
    assert made == pytest.approx([1, 1.5, 2, 2, 2.5, 4])
    assert Cost(((1, 5.0),))(Pass(1, 100, 7, 7)) == 5


@given(st.integers(0, 1000))
def test_known_coefficients_are_found_again(seed):
    rng = random.Random(seed)
    known = Cost(
        tuple((at, rng.uniform(0.01, 0.02) * at**0.5) for at in (1, 4, 16, 64, 512)),
        row=rng.uniform(1e-5, 1e-3), position=rng.uniform(1e-7, 1e-5), pair=rng.uniform(0, 1e-7),
    )  # fmt: skip
    made = [
        Pass.of([(n, context)] * rows)
        for rows in (1, 4, 16)
        for n in (1, 4, 16, 64, 512)
        for context in (0, 64, 1024)
        if rows * n in (1, 4, 16, 64, 512)
    ]
    found = fit([(one, known(one)) for one in made])
    for one in [*made, Pass.of([(1, 100)] * 7 + [(300, 64)])]:
        assert found(one) == pytest.approx(known(one), rel=1e-6)
    noisy = fit([(one, known(one) * rng.uniform(0.98, 1.02)) for one in made])
    assert all(noisy(one) == pytest.approx(known(one), rel=0.05) for one in made)
    assert min(noisy.row, noisy.position, noisy.pair) >= 0
