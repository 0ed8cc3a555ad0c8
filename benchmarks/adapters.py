"""What LoRA adapters cost: a pass of rows that decode, with none, one, or four of them.

    python -m benchmarks.adapters [CHECKPOINT] [--rank 16] [--rounds 50] [--dtype bf16]

Random adapters of all matrices, on the CPU. Passes of all kinds take turns; the fastest of each is
reported, in milliseconds and against a model that has none loaded. The last line of stdout is JSON.
"""

import json
import time
from typing import Dict, Sequence, Tuple

import fire
import torch

from llama import Llama
from llama.backends import adapters
from llama.checkpoint.adapter import Adapter, Pair
from llama.engine.passes import hidden
from llama.layers.paged import PAGE, PagedRows
from llama.training import lora

CONTEXT = 2 * PAGE - 1  # tokens before that of the pass
Figures = Dict[str, float]


def random_adapter(llama: Llama, rank: int, seed: int) -> Adapter:
    blank = lora.fresh(llama.model, rank, rank, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    return Adapter({
        name: Pair(A, 0.01 * torch.randn(B.shape, generator=generator), scale)
        for name, (A, B, scale) in blank.pairs.items()
    })  # fmt: skip


@torch.inference_mode()
def measure(sides: Dict[str, Tuple[Llama, Sequence[int]]], rows: int, rounds: int) -> Figures:
    """Milliseconds of the fastest pass of so many rows, of each model with some of its adapters."""
    tables = [[1 + 2 * row, 2 + 2 * row] for row in range(rows)]
    found = dict.fromkeys(sides, float("inf"))
    pools = {name: llama.model.new_cache(1 + 2 * rows, PAGE) for name, (llama, _) in sides.items()}
    for _ in range(rounds):
        for name, (llama, numbers) in sides.items():
            chosen = [numbers[row % len(numbers)] for row in range(rows)]
            cache = PagedRows(pools[name], tables, [CONTEXT] * rows, chosen)
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
    plain, llama = (
        Llama.build(checkpoint, max_seq_len=2 * PAGE, device="cpu", dtype=dtype) for _ in range(2)
    )
    for seed in range(4):
        adapters.add(llama.model, str(seed), random_adapter(llama, rank, seed))
    sides: Dict[str, Tuple[Llama, Sequence[int]]] = {
        "none loaded": (plain, [0]), "none used": (llama, [0]), "one": (llama, [1]),
        "four": (llama, [1, 2, 3, 4]),
    }  # fmt: skip
    report: Dict[int, Figures] = {}
    for n in rows:
        report[n] = measure(sides, n, rounds)
        for name, took in report[n].items():
            print(f"{n} rows, {name}: {took:.2f} ms, x{took / report[n]['none loaded']:.2f}")
    print(json.dumps({"dtype": dtype, "rank": rank, "rows": report}))


if __name__ == "__main__":
    fire.Fire(main)
