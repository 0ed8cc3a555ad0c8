"""What LoRA adapters cost: a pass of rows that decode, without adapters, with one, and with four.

    python -m benchmarks.adapters [CHECKPOINT] [--rank 16] [--rounds 50] [--dtype bf16]

Random adapters of all matrices, on the CPU. Passes of all kinds take turns; the fastest of each is
reported, in milliseconds and against that without adapters. The last line of stdout is JSON.
"""

import json
import time
from typing import Any, Dict, Tuple

import fire
import torch

from llama import Llama
from llama.backends import adapters
from llama.checkpoint.adapter import Adapter, Pair
from llama.engine.passes import hidden
from llama.layers.paged import PAGE, PagedRows
from llama.training import lora

CONTEXT = 2 * PAGE - 1  # tokens before that of the pass
MIXTURES = {"without": (0,), "one": (1,), "four": (1, 2, 3, 4)}


def random_adapter(llama: Llama, rank: int, seed: int) -> Adapter:
    blank, generator = (
        lora.fresh(llama.model, rank, rank, seed=seed),
        torch.Generator().manual_seed(seed),
    )
    return Adapter({
        name: Pair(A, 0.01 * torch.randn(B.shape, generator=generator), scale)
        for name, (A, B, scale) in blank.pairs.items()
    })  # fmt: skip


@torch.inference_mode()
def measure(llama: Llama, rows: int, rounds: int) -> Dict[str, float]:
    """Milliseconds of the fastest pass of so many rows, with each mixture of loaded adapters."""
    pool = llama.model.new_cache(1 + 2 * rows, PAGE)
    tables = [[1 + 2 * row, 2 + 2 * row] for row in range(rows)]
    mixtures = {name: n for name, n in MIXTURES.items() if max(n) <= len(llama.adapters)}
    found = dict.fromkeys(mixtures, float("inf"))
    for _ in range(rounds):
        for name, numbers in mixtures.items():
            chosen = [numbers[row % len(numbers)] for row in range(rows)]
            cache = PagedRows(pool, tables, [CONTEXT] * rows, chosen)
            start = time.perf_counter()
            llama.model.logits(hidden(llama.model, [[5]] * rows, cache))
            found[name] = min(found[name], 1000 * (time.perf_counter() - start))
    return found


def main(
    checkpoint: str = "checkpoints/SmolLM2-135M-Instruct",
    rank: int = 16,
    rounds: int = 50,
    rows: Tuple[int, ...] = (1, 16),
    dtype: str = "bf16",
) -> None:
    llama = Llama.build(checkpoint, max_seq_len=2 * PAGE, device="cpu", dtype=dtype)
    before = {n: measure(llama, n, rounds)["without"] for n in rows}
    for seed in range(4):
        adapters.add(llama.model, str(seed), random_adapter(llama, rank, seed))
    report: Dict[str, Any] = {"dtype": dtype, "rank": rank, "rows": {}}
    for n in rows:
        found = {"none loaded": before[n], **measure(llama, n, rounds)}
        report["rows"][n] = found
        for name, took in found.items():
            print(f"{n} rows, {name}: {took:.2f} ms, x{took / found['without']:.2f}")
    print(json.dumps(report))


if __name__ == "__main__":
    fire.Fire(main)
