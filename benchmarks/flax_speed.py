"""Speed of the Flax model against the torch model, plain and compiled, on the CPU.

    python -m benchmarks.flax_speed [CHECKPOINT] [--turns 5] [--prompt 128] [--n 64] [--threads N]

Batch 1, bf16 and fp32. Each side runs in its own process and the sides take turns. Reported are
medians of prefill (seconds to the first token) and decoding (tokens per second after it). "start"
is the time from starting the process to the end of a first run, with imports, loading and
compilation (torch caches compiled code on disk, so a second start is faster). XLA uses as many
threads as the process has cores, so processes are pinned to cores. The last line of stdout is JSON.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from typing import Any, Dict, List, Tuple

import fire

DEMO = "checkpoints/SmolLM2-135M-Instruct"
Figures = Dict[str, float]


def flax(path: str, dtype: str) -> Any:
    from llama.backends.flax import from_checkpoint
    from llama.families.flax_generation import generate

    model = from_checkpoint(path, dtype=dtype)

    def run(prompt: List[int], n: int) -> Tuple[float, float]:
        times = []
        for length in (1, n):  # all steps are one compiled loop: decoding is the difference
            start = time.perf_counter()
            generate(model, [prompt], length)
            times.append(time.perf_counter() - start)
        return times[0], times[1] - times[0]

    return run


def torch(path: str, dtype: str, compile: bool) -> Any:
    from llama import Llama

    llama = Llama.build(
        path, max_seq_len=512, max_batch_size=1, device="cpu", dtype=dtype, compile=compile
    )

    def run(prompt: List[int], n: int) -> Tuple[float, float]:
        times = [time.perf_counter()]

        def tick() -> bool:  # called after each sampled token
            times.append(time.perf_counter())
            return False

        llama.generate([prompt], n, temperature=0, stop_tokens=set(), should_stop=tick)
        return times[1] - times[0], times[-1] - times[1]

    return run


SIDES: Dict[str, Any] = {
    "flax": flax,
    "torch": lambda path, dtype: torch(path, dtype, False),
    "torch compiled": lambda path, dtype: torch(path, dtype, True),
}


def serve(side: str, path: str, dtype: str) -> None:
    """Answer each task, a line of stdin, by a line of JSON: the seconds of (prefill, decoding)."""
    answers = os.fdopen(os.dup(1), "w")  # keeps libraries' prints out of the answers
    os.dup2(2, 1)
    run = SIDES[side](path, dtype)
    for line in sys.stdin:
        print(json.dumps(run(*json.loads(line))), file=answers, flush=True)


def compare(path: str, dtype: str, prompt: List[int], n: int, turns: int, threads: int) -> Figures:
    cores = sorted(os.sched_getaffinity(0))[:threads]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    processes: Dict[str, Any] = {}

    def start(side: str) -> Any:
        command = [sys.executable, "-m", "benchmarks.flax_speed", path]
        return subprocess.Popen(
            [*command, "--side", side, "--dtype", dtype],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
            preexec_fn=lambda: os.sched_setaffinity(0, cores),
        )

    def ask(side: str) -> Tuple[float, float]:
        process = processes[side]
        print(json.dumps([prompt, n]), file=process.stdin, flush=True)
        line = process.stdout.readline()
        if not line:
            raise RuntimeError(f"{side}: ended with {process.wait()}")
        first, rest = json.loads(line)
        return first, rest

    found: Figures = {}
    try:
        for side in SIDES:
            began = time.perf_counter()
            processes[side] = start(side)
            ask(side)
            found[f"{dtype}, {side}: start, s"] = time.perf_counter() - began
        runs = [[ask(side) for side in SIDES] for _ in range(turns)]
    finally:
        for process in processes.values():
            process.kill()
            process.wait()
    for i, side in enumerate(SIDES):
        first, rest = zip(*(turn[i] for turn in runs), strict=True)
        found[f"{dtype}, {side}: prefill, s"] = statistics.median(first)
        found[f"{dtype}, {side}: tokens/s"] = (n - 1) / statistics.median(rest)
    return found


def main(
    checkpoint: str = DEMO,
    turns: int = 5,
    prompt: int = 128,
    n: int = 64,
    threads: int = len(os.sched_getaffinity(0)),
    side: str = "",
    dtype: str = "",
) -> None:
    """Compare all sides.

    Args:
        prompt, n: tokens of the prompt, and new ones.
        side, dtype: run this side alone, with tasks from stdin.
    """
    if side:
        serve(side, checkpoint, dtype)
        return
    ids = [(7919 * i) % 40000 + 100 for i in range(prompt)]
    results: Figures = {}
    for kind in ("bf16", "fp32"):
        results |= compare(checkpoint, kind, ids, n, turns, threads)
    for key, value in results.items():
        print(f"{key:<40}{value:>10.3f}")
    print(json.dumps(results))


if __name__ == "__main__":
    fire.Fire(main)
