"""The scheduler under a day's traffic, with a virtual clock in place of a model.

Lengths follow the conversations in Azure's trace of 2023 (Splitwise, arXiv 2311.18677): prompts of
1020 tokens in the median, answers of 129. Arrivals are a Poisson process. A pass takes as long as
an affine cost model says.
"""

import heapq
import math
import os
import random
import statistics
import time

from llama.engine.blocks import Blocks
from llama.engine.scheduler import Scheduler, Sequence

REQUESTS = int(os.environ.get("LLAMA_SIMULATED_REQUESTS", 400))
LONGEST = 4096
PASS, TOKEN = 0.008, 0.00008  # seconds of a pass, and of each token in it
LOAD = 0.85  # of what the cost model can serve


def length(rng: random.Random, median: int, spread: float) -> int:
    return max(1, min(int(rng.lognormvariate(0, spread) * median), LONGEST))


def test_nobody_starves_and_planning_is_cheap():
    rng, size, rows, budget = random.Random(0), 64, 64, 512
    scheduler = Scheduler(Blocks(1 + rows * 1500 // size, size), max_tokens=budget, max_rows=rows)
    # A decoding pass is about full: its time, divided by its rows, is that of an answer's token.
    each = (1300 * TOKEN + PASS * 1300 / budget) + 200 * (PASS + rows * TOKEN) / rows
    clock, arrivals, at = 0.0, [], 0.0
    for i in range(REQUESTS):
        at += rng.expovariate(LOAD / each)
        prompt, answer = length(rng, 1020, 0.7), length(rng, 129, 0.9)
        arrivals.append((at, i, prompt, answer))
    heapq.heapify(arrivals)
    came, first, longest_wait, planning, planned, passes = {}, [], 0, 0.0, 0, 0
    entered = {}
    while arrivals or scheduler.running or scheduler.waiting:
        while arrivals and arrivals[0][0] <= clock:
            at, i, prompt, answer = heapq.heappop(arrivals)
            tokens = [i % 50_000] * prompt  # no prompt begins like another
            sequence = Sequence(tokens, prompt + answer, rng.randrange(2))
            scheduler.add(sequence)
            came[sequence], entered[sequence] = at, passes
        began = time.process_time()
        plan = scheduler.plan()
        planning += time.process_time() - began
        if not plan.counts:
            assert arrivals
            clock = max(clock, arrivals[0][0])
            continue
        passes += 1
        planned += len(plan.counts)
        clock += PASS + TOKEN * sum(plan.counts.values())
        began = time.process_time()
        for sequence, n in plan.counts.items():
            if sequence in entered:  # in the order of arrival, up to what priorities are worth
                ahead = scheduler.waiting[0].place if scheduler.waiting else (math.inf, 0)
                assert sequence.place < ahead
                longest_wait = max(longest_wait, passes - entered.pop(sequence))
            scheduler.advance(sequence, n)
            if not sequence.remaining:
                if sequence in came:
                    first.append(clock - came.pop(sequence))
                sequence.tokens.append(7)
                if len(sequence.tokens) >= sequence.max_len:
                    scheduler.remove(sequence)
        planning += time.process_time() - began
    assert len(first) == REQUESTS and scheduler.blocks.used == 0
    cuts = statistics.quantiles(first, n=100)
    print(
        f"\n{REQUESTS} requests in {clock:.0f} s of the clock, {passes} passes, "
        f"{scheduler.preemptions} preemptions; first token p50 {cuts[49]:.2f} s, "
        f"p99 {cuts[98]:.2f} s; longest wait {longest_wait} passes; "
        f"{1e6 * planning / planned:.1f} us of the scheduler for each request and pass"
    )
