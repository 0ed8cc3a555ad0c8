"""Passes of an engine on this machine, timed: what `llama plan --measure` writes."""

import random
import statistics
import time
from pathlib import Path
from typing import Any, Callable, Dict, List, Sequence, Tuple

import psutil
import torch

from llama.apps.machines import Kind, identity, opened, stored, work
from llama.apps.plan_options import PlanOptions
from llama.backends import memory
from llama.engine.blocks import Blocks
from llama.engine.engine import Engine
from llama.engine.simulation import Pass, fit
from llama.generation import Llama
from llama.layers.paged import PAGE
from llama.layers.parallel import pick_dtype
from llama.text.files import write_json

CONTEXTS = (0, 1024)
# Tokens of a pass. Kernels take some at once, so that every number of a few has a time of its own;
# larger ones lie in the middle between multiples of 16 and 32, which are the best ones.
FEW = (1, 2, 3, 4, 5, 6, 7, 8, 9)
CHUNKS = (*FEW, 12, 16, 20, 36, 52, 116, 244, 372, 512)
ROWS, ROUNDS = 16, 3
DECODED, CHEAP = 8, 64  # passes of which the median counts; tokens up to which three prompts' do

Timed = Tuple[Pass, float]


def grid(max_rows: int, max_tokens: int) -> List[Tuple[int, int, int]]:
    """Passes to be timed: rows, new tokens of each, tokens known before."""
    rows = [n for n in CHUNKS if n <= max_rows and n not in (5, 7)]
    found = [(n, 1, context) for n in rows for context in (64, *CONTEXTS[1:])]
    for n in CHUNKS[1:]:
        contexts = CONTEXTS[:1] if n in FEW else CONTEXTS
        found += [(1, n, context) for context in contexts if n <= max_tokens]
    return found


def passes(engine: Engine, of: Sequence[Tuple[int, int, int]], rng: random.Random) -> List[Timed]:
    """Time a pass of each; what is known before are blocks that only claim to be computed."""
    found = []
    for values in engine.pool.parts.values():
        values.fill_(1)  # memory that was never written isn't read from memory
    for rows, n, context in of:
        decodes, times = n == 1, []
        for _ in range(3 if 1 < n <= CHEAP else 1):
            engine.scheduler.blocks.clear()
            for _ in range(rows):
                prompt = [rng.randrange(engine.model.vocab_size) for _ in range(context + n)]
                _claim(engine.scheduler.blocks, prompt[:context])
                engine.add(prompt, DECODED if decodes else 1, temperature=0, stop_tokens=set())
            while not engine.idle:
                began = time.perf_counter()
                engine.step()
                times.append(time.perf_counter() - began)
        made = Pass.of([(n, context + (DECODED // 2 if decodes else 0))] * rows)
        found.append((made, statistics.median(times)))
    engine.scheduler.blocks.clear()
    return found


def _claim(blocks: Blocks, tokens: List[int]) -> None:
    """Have these tokens, of whole blocks, found in the cache."""
    table, node = blocks.allocate(len(tokens) // blocks.size), None
    for i, block in enumerate(table):
        node = blocks.publish(node, block, tokens[i * blocks.size : (i + 1) * blocks.size])
    blocks.release(table)


def medians(rounds: Sequence[Sequence[Timed]]) -> List[Timed]:
    """Of the same passes, timed several times."""
    return [(one[0][0], statistics.median(t for _, t in one)) for one in zip(*rounds, strict=True)]


def fastest(work: Callable[[], Any]) -> float:
    times = []
    for _ in range(5):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return min(times)


def machine(device: torch.device) -> Kind:
    """This machine's figures: reading 512 MB, and a product of bf16."""
    large = torch.ones(1 << 27, device=device)
    square = torch.ones(2048, 2048, dtype=torch.bfloat16, device=device)
    read = large.nbytes / fastest(lambda: large.sum().item())
    flops = 2 * 2048**3 / fastest(lambda: (square @ square)[0, 0].item())
    whole = psutil.virtual_memory().total
    if device.type == "cuda":
        whole = torch.cuda.mem_get_info(device)[1]
    return Kind(1, read, flops, whole, 0, device.type)


def write(options: PlanOptions, path: Path) -> Dict[str, Any]:
    """Time the passes of a model on this machine and write them.

    Returns:
        About them, for `line`.

    Raises:
        FileNotFoundError, ValueError: those of `Llama.build`.
    """
    most, longest = CHUNKS[-1], CONTEXTS[-1] + CHUNKS[-1] + DECODED
    llama = Llama.build(
        options.model, dtype=options.dtype, quantize=options.quantize, kv_cache=options.kv_cache,
        max_seq_len=longest, max_batch_size=ROWS,
    )  # fmt: skip
    engine = llama.engine(most, ROWS, ROWS * (longest + PAGE))
    of = grid(ROWS, most)
    timed = medians([passes(engine, of, random.Random(seed)) for seed in range(ROUNDS)])
    here = machine(llama.device)
    args, source = opened(options.model)
    kind = stored(options, source, llama.device)
    need = memory.estimate(args, 1, pick_dtype(options.dtype, llama.device), kind, source=source)
    write_json(
        path,
        {
            "model": identity(args, options, kind), "work": work(args, need.weights),
            "kind": here._asdict(), "passes": [[*made, seconds] for made, seconds in timed],
        },
    )  # fmt: skip
    cost = fit(timed)
    off = [abs(cost(made) / seconds - 1) for made, seconds in timed]
    one, many = cost(Pass.of([(1, 64)])), cost(Pass.of([(most, 0)]))
    return {
        "file": str(path), "passes": len(timed), "one_token_s": one, "most_tokens": most,
        "most_tokens_s": many, "off_median": statistics.median(off), "off_most": max(off),
        "bandwidth": here.bandwidth, "flops": here.flops,
    }  # fmt: skip


def line(found: Dict[str, Any]) -> str:
    """What was measured, for people."""
    return (
        f"{found['file']}: {found['passes']} passes; 1 token {found['one_token_s'] * 1e3:.2f} ms, "
        f"{found['most_tokens']} tokens {found['most_tokens_s'] * 1e3:.1f} ms; the fitted cost "
        f"model is off by {found['off_median']:.1%} in the median, {found['off_most']:.1%} at "
        f"most; {found['bandwidth'] / 1e9:.0f} GB/s, {found['flops'] / 1e12:.2g} TFLOP/s"
    )
