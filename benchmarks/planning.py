"""Compares what `llama plan` predicts with what the engine does, under the same requests.

    python -m benchmarks.planning [MODEL.gguf ...] [--shape 1b] [--seconds 20] [--out DIRECTORY]

For each model, and for the demo model also in bf16, the engine serves requests at half the rate
that it can, and then requests that come all at once. Before and after each of these runs passes are
timed, since the machine's speed drifts, and to these alone a cost model is fitted. The scheduler
then serves the same requests on a virtual clock. The last line of stdout is JSON.
"""

import gc
import json
import math
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence

import fire

from benchmarks import shapes
from llama import Llama
from llama.apps import measuring, planning
from llama.apps.load import percentiles
from llama.apps.plan_options import PlanOptions
from llama.engine.blocks import Blocks
from llama.engine.engine import Engine
from llama.engine.simulation import Arrival, Cost, Timing, fit, simulate
from llama.engine.steps import make_scheduler
from llama.layers.paged import PAGE, blocks_for

DEMO = "checkpoints/SmolLM2-135M-Instruct"
ROWS, STEP, CACHE = 16, 512, 16 * 1664
TRAFFIC = {"prompt": 128, "answer": 32, "shared": 64, "max_seq_len": 1024}
LOADS = {"half of what it can": 0.5, "all at once": math.inf}  # of the estimated capacity


def serve(engine: Engine, arrivals: Sequence[Arrival]) -> List[Timing]:
    """The engine's own times for requests that come at their times."""
    begin, todo, found = time.perf_counter(), list(reversed(arrivals)), {}
    while todo or not engine.idle:
        now = time.perf_counter() - begin
        while todo and todo[-1].at <= now:
            come = todo.pop()
            request = engine.add(come.prompt, come.answer, temperature=0, stop_tokens=set())
            found[request] = Timing(come.at)
        if engine.idle:
            time.sleep(max(0.0, todo[-1].at - (time.perf_counter() - begin)))
            continue
        events = engine.step()
        now = time.perf_counter() - begin
        for request, _ in events:
            found[request].times.append(now)
            request.events.clear()
    engine.scheduler.blocks.clear()
    return list(found.values())


def predict(cost: Cost, arrivals: Sequence[Arrival]) -> List[Timing]:
    blocks = Blocks(1 + blocks_for(CACHE), PAGE)
    return simulate(make_scheduler(blocks, STEP, ROWS, "cpu"), arrivals, cost)


def summary(timings: Sequence[Timing]) -> Dict[str, float]:
    first = percentiles([timing.first for timing in timings])
    gaps = percentiles([gap for timing in timings for gap in timing.between])
    tokens = sum(len(timing.times) for timing in timings)
    return {
        "tokens/s": round(tokens / max(timing.times[-1] for timing in timings), 2),
        "first p50": first["p50"], "first p95": first["p95"], "between p95": gaps["p95"],
    }  # fmt: skip


def check(name: str, seconds: float, **build: Any) -> Dict[str, Any]:
    """Measured and predicted figures of a model under both loads."""
    llama = Llama.build(name, max_seq_len=2048, max_batch_size=ROWS, device="cpu", **build)
    engine = llama.engine(STEP, ROWS, CACHE)
    options = PlanOptions(name, max_rows=ROWS, **TRAFFIC)  # type: ignore[arg-type]
    of = measuring.grid(ROWS, STEP)
    timed = [measuring.passes(engine, of, random.Random(0))]
    served: Dict[str, Any] = {}
    for load, share in LOADS.items():
        many = planning.arrivals(options, math.inf, 150, random.Random(1))
        cost = fit(measuring.medians(timed))
        capacity = 150 / max(timing.times[-1] for timing in predict(cost, many))
        n = max(8, round(min(share, 1) * capacity * seconds))
        arrivals = [
            # Tokens that the vocabulary has; prompts differ after those that they share.
            come._replace(
                prompt=[1 + token % (engine.model.vocab_size - 1) for token in come.prompt]
            )
            for come in planning.arrivals(options, share * capacity, n, random.Random(2))
        ]
        gc.collect()
        served[load] = arrivals, serve(engine, arrivals)
        timed.append(measuring.passes(engine, of, random.Random(len(timed))))
    medians = measuring.medians(timed)
    cost, (before, *_, after) = fit(medians), timed
    drift = [b / a - 1 for (_, a), (_, b) in zip(before, after, strict=True)]
    loads = {
        load: {"requests": len(arrivals), "measured": summary(timings),
               "predicted": summary(predict(cost, arrivals))}
        for load, (arrivals, timings) in served.items()
    }  # fmt: skip
    return {
        "loads": loads, "passes": [[*made, round(took, 6)] for made, took in medians],
        "drift": round(statistics.median(drift), 3),
        "fit": round(statistics.median(abs(cost(made) / t - 1) for made, t in medians), 3),
    }  # fmt: skip


def table(found: Dict[str, Any]) -> List[str]:
    """Markdown: measured / predicted, and how much the prediction is off."""
    names = ("tokens/s", "first p50", "first p95", "between p95")
    lines = [
        "| model, load | requests | " + " | ".join(names) + " |",
        "|---|---|" + "---|" * len(names),
    ]
    for model, entry in found.items():
        for load, row in entry["loads"].items():
            cells = []
            for name in names:
                a, b = row["measured"][name], row["predicted"][name]
                scale, unit = (1, "") if name == "tokens/s" else (1000, " ms")
                cells.append(f"{a * scale:.0f} / {b * scale:.0f}{unit} ({b / a - 1:+.0%})")
            lines.append(f"| {model}, {load} | {row['requests']} | {' | '.join(cells)} |")
    return lines


def main(
    *models: str,
    shape: Optional[str] = None,
    seconds: float = 20,
    demo: bool = True,
    out: Optional[str] = None,
) -> None:
    """Print a table, and a line of JSON; with out, save both as planning.md and planning.json.

    Args:
        models: files to be checked beside the demo model.
        shape: 1b or 8b: also random weights in Q4_0.
        seconds: of each run, about.
    """
    sides: Dict[str, Dict[str, Any]] = {}
    if demo:
        sides["demo Q4_1"] = {"name": DEMO}
        sides["demo bf16"] = {"name": DEMO, "quantize": "dense", "dtype": "bf16"}
    sides.update((Path(model).stem, {"name": model}) for model in models)
    with tempfile.TemporaryDirectory() as directory:
        if shape:
            path = shapes.write(shape, "q4_0", Path(directory) / "model.gguf")
            sides[f"{shape} Q4_0"] = {"name": str(path)}
        found = {}
        for label, side in sides.items():
            found[label] = check(seconds=seconds, **side)
            print(label, json.dumps(found[label]), flush=True)
    text = "\n".join(table(found))
    print(text)
    print(json.dumps(found))
    if out:
        Path(out).mkdir(parents=True, exist_ok=True)
        (Path(out) / "planning.md").write_text(text + "\n")
        (Path(out) / "planning.json").write_text(json.dumps(found) + "\n")


if __name__ == "__main__":
    fire.Fire(main)
