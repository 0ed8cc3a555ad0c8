"""Fine-tuning of a LoRA adapter against transformers and peft: time and memory of a step.

    python -m benchmarks.finetuning [CHECKPOINT] [--rounds 2] [--steps 4] [--dtype fp32|bf16]
        [--length 512] [--batch 4] [--labels 1.0]
    torchrun --nproc_per_node N -m benchmarks.finetuning CHECKPOINT --side full

Each side is a process of its own, and they take turns; both learn from the same random tokens, of
which the share `labels`, the last ones of a row, are in the loss: all of a text, some of a dialog.
Rank 16 on all matrices, AdamW, clipping; adapters are fp32. The median of all steps but the first
is reported, in seconds of the clock and of all processors, and the most memory that a process had,
in MB, with the weights. The last line of stdout is JSON. The second command learns all weights on N
ranks by FSDP2, each of which prints its own figures.
"""

import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Tuple

import fire
import torch

DEMO = "checkpoints/SmolLM2-135M-Instruct"
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
Figures = Dict[str, Any]


class Shape(NamedTuple):
    """What both sides learn from."""

    steps: int
    batch: int
    length: int
    dtype: str
    labels: float


def examples(vocab_size: int, shape: Shape) -> List[Tuple[List[int], List[int]]]:
    """Rows of ids and labels."""
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(vocab_size, (shape.steps * shape.batch, shape.length), generator=generator)
    first = shape.length - int(shape.length * shape.labels)
    return [(row, [-100] * first + row[first:]) for row in rows.tolist()]


def measured(step: Callable[[int], float], steps: int) -> Figures:
    clock, processors, losses = [], [], []
    for i in range(steps):
        start, before = time.perf_counter(), time.process_time()
        losses.append(step(i))
        clock.append(time.perf_counter() - start)
        processors.append(time.process_time() - before)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000  # KB on Linux
    return {"seconds": clock[1:], "cpu": processors[1:], "MB": peak, "losses": losses}


def ours(path: str, shape: Shape, method: str = "lora") -> Figures:
    from dataclasses import replace

    from llama import checkpoint
    from llama.layers import parallel
    from llama.training import Example, Recipe, Trainer, run

    device, low = parallel.initialize(1, "cpu"), DTYPES[shape.dtype]
    source = checkpoint.open(path)
    args = replace(source.args, max_seq_len=shape.length, max_batch_size=1)
    adapter = {"rank": 16, "alpha": 32.0} if method == "lora" else None
    model = run.load_model(source, args, low, device, adapter, False, shard=True)
    rows = [Example(*row) for row in examples(args.vocab_size, shape)]
    recipe = Recipe(epochs=1, batch_size=shape.batch, warmup_steps=0, dtype=low)
    trainer = Trainer(model, rows, recipe)
    return measured(lambda _: trainer.one_step().loss, shape.steps)


def theirs(path: str, shape: Shape) -> Figures:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from llama.training.data import order

    base = AutoModelForCausalLM.from_pretrained(path, dtype=DTYPES[shape.dtype])
    config = LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear")
    model = get_peft_model(base, config).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=2e-4, betas=(0.9, 0.95), weight_decay=0.0)
    rows = examples(base.config.vocab_size, shape)
    turn = order(len(rows), 0, 1)

    def step(i: int) -> float:
        chosen = turn[i * shape.batch : (i + 1) * shape.batch]
        tokens, labels = (torch.tensor([rows[j][k] for j in chosen]) for k in (0, 1))
        optimizer.zero_grad()
        loss = model(input_ids=tokens, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        return loss.item()

    return measured(step, shape.steps)


def main(
    checkpoint: str = DEMO,
    rounds: int = 2,
    steps: int = 4,
    dtype: str = "fp32",
    length: int = 512,
    batch: int = 4,
    labels: float = 1.0,
    side: str = "",
) -> None:
    shape = Shape(steps, batch, length, dtype, labels)
    if side:
        sides: Dict[str, Callable[[str, Shape], Figures]]
        sides = {"ours": ours, "theirs": theirs, "full": partial(ours, method="full")}
        print(json.dumps(sides[side](checkpoint, shape)))
        return
    found: Dict[str, List[Figures]] = {"ours": [], "theirs": []}
    with tempfile.TemporaryDirectory() as folder:
        from llama.checkpoint.convert import convert

        path = convert(checkpoint, Path(folder) / "hf", "hf", quiet=True, dtype=DTYPES[dtype])
        for _ in range(rounds):
            for name, runs in found.items():
                command = [sys.executable, "-m", "benchmarks.finetuning", str(path), "--side", name]
                command += [f"--{key}={value}" for key, value in shape._asdict().items()]
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
                runs.append(json.loads(done.stdout.splitlines()[-1]))
    report: Figures = shape._asdict()
    for name, runs in found.items():
        report[name] = {
            key: statistics.median(second for run in runs for second in run[key])
            for key in ("seconds", "cpu")
        } | {"MB": max(run["MB"] for run in runs), "losses": runs[0]["losses"]}
    for key in ("seconds", "cpu", "MB"):
        ratio = report["ours"][key] / report["theirs"][key]
        print(f"{key}: {report['ours'][key]:.2f} and {report['theirs'][key]:.2f}, x{ratio:.2f}")
    print(json.dumps(report))


if __name__ == "__main__":
    fire.Fire(main)
