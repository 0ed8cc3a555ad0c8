"""This code and `transformers`, side by side: the same weights, the same tokens, one machine.

    make bench
    python -m benchmarks.peers --dtype fp32 --rounds 9
    python -m benchmarks.peers --quick

What is measured:

    decode    One prompt of 32 tokens, 64 greedy tokens. Each step reads every weight to make one
              token, so it is bound by memory bandwidth, and by what a step costs beside that.
    ragged    16 prompts of unlike lengths at once, 32 greedy tokens each. First comes prefill, all
              prompt tokens in one go, bound by arithmetic (`prefill` times it alone, with the first
              token of each row); then decode with 16 rows. `transformers` gets the batch as it
              wants it: padded on the left, with an attention mask.
    longer    The same with 16 prompts of 8 to 512 tokens, most of them short, as questions are.
    load      From a .gguf file, from the same weights as .safetensors, and from Meta's .pth files
              for a model of 2 GB, each in a process of its own (benchmarks/loading.py), with the
              highest resident memory. The files have been read before, so it isn't the disk that
              is measured. (transformers leaves safetensors unread until they are used; ours have
              been looked through for NaN.) And how fast the 2 GB are converted, beside `cp`.

Both sides make the same number of tokens (no stop tokens), and `equal rows` says how many rows are
the same, token by token, in fp32: work is compared with equal work. In bf16 rounding decides
between near-equal tokens, so rows may part.

Only the ratios mean something, and only within one run: processors differ, and one processor
differs from hour to hour with heat and neighbours. So both sides take turns, A B A B, and the
medians of the rounds are compared. A machine with other work to do measures that work (the load
average is printed): two programs that wait for each other's threads slow down far more than twice.

The table goes to stdout; the last line is JSON with every figure.
"""

import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional

import fire
import torch

from benchmarks import loading
from llama import Llama, checkpoint
from llama.checkpoint.convert import convert
from llama.parallel import pick_dtype

Tokens = List[List[int]]
Generate = Callable[[Tokens, int], Tokens]  # prompts, new tokens of each -> new tokens


def ours(path: Path, dtype: str, rows: int) -> Generate:
    llama = Llama.build(path, max_seq_len=640, max_batch_size=rows, device="cpu", dtype=dtype)

    def generate(prompts: Tokens, n: int) -> Tokens:
        return llama.generate(prompts, n, temperature=0, stop_tokens=set())[0]

    return generate


def peer(model: Any, dtype: torch.dtype) -> Generate:
    model = model.to(dtype)
    model.generation_config.eos_token_id = None  # nothing ends a row early

    @torch.inference_mode()
    def generate(prompts: Tokens, n: int) -> Tokens:
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        mask = (torch.arange(width) >= width - lengths[:, None]).long()
        out = model.generate(
            ids,
            attention_mask=mask,
            do_sample=False,
            min_new_tokens=n,
            max_new_tokens=n,
            pad_token_id=0,
        )
        return out[:, width:].tolist()

    return generate


def alternate(sides: Dict[str, Callable[[], Any]], rounds: int) -> Dict[str, float]:
    """Median seconds of each side, taking turns, after one turn each that isn't counted."""
    seconds: Dict[str, List[float]] = {name: [] for name in sides}
    for turn in range(rounds + 1):
        for name, run in sides.items():
            start = time.perf_counter()
            run()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def compare_generation(
    path: Path, vocab_size: int, dtype: str, rounds: int
) -> Dict[str, Dict[str, Any]]:
    from transformers import LlamaForCausalLM

    rng = random.Random(0)

    def prompt(length: int) -> List[int]:
        return [rng.randrange(vocab_size) for _ in range(length)]

    ragged = [prompt(rng.randint(8, 128)) for _ in range(16)]
    longer = [prompt(round(8 * 64 ** (i / 15))) for i in range(16)]
    cases = {
        "decode": ([prompt(32)], 64),
        "prefill": (ragged, 1),
        "ragged": (ragged, 32),
        "longer": (longer, 32),
    }

    model = LlamaForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    ).eval()
    a, b = ours(path, "fp32", 16), peer(model, torch.float32)
    figures: Dict[str, Dict[str, Any]] = {}
    for name, (prompts, n) in cases.items():
        mine, theirs = a(prompts, n), b(prompts, n)
        if any(len(row) != n for row in mine + theirs):
            raise AssertionError(f"{name}: a side made fewer than {n} tokens")
        figures[name] = {
            "prompt_lengths": sorted(map(len, prompts)),
            "new_tokens": n,
            "equal_rows_fp32": sum(x == y for x, y in zip(mine, theirs, strict=True)),
        }
    if dtype != "fp32":
        a, b = ours(path, dtype, 16), peer(model, pick_dtype(dtype, torch.device("cpu")))
    for name, (prompts, n) in cases.items():
        sides: Dict[str, Callable[[], Any]] = {
            "llama": lambda p=prompts, n=n: a(p, n),  # type: ignore[misc]
            "transformers": lambda p=prompts, n=n: b(p, n),  # type: ignore[misc]
        }
        seconds = alternate(sides, rounds)
        for side, value in seconds.items():
            figures[name][f"{side}_tok_s"] = len(prompts) * n / value
        figures[name]["ratio"] = seconds["transformers"] / seconds["llama"]
        figures[name]["load_average"] = os.getloadavg()[0]
        row = figures[name]
        lengths = row["prompt_lengths"]
        print(
            f"{name:<10}{len(prompts):>3} x {lengths[0]:>3}..{lengths[-1]:<3} +{n:<3}"
            f"{row['llama_tok_s']:>10.1f}{row['transformers_tok_s']:>14.1f}{row['ratio']:>8.2f}"
            f"{row['equal_rows_fp32']:>8} of {len(prompts):<2}{row['load_average']:>8.1f}",
            flush=True,
        )
    return figures


def compare_loading(path: Path, rounds: int, quick: bool) -> Dict[str, Dict[str, float]]:
    figures: Dict[str, Dict[str, float]] = {}

    def report(name: str, kind: str, path: Path, dtype: str, rounds: int) -> None:
        runs = [loading.measure(kind, path, dtype) for _ in range(rounds)]
        row = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        row["mb_s"] = row["weights_mb"] / row["load_s"]
        row["allowed_mb"] = 1.3 * row["weights_mb"] + 300
        figures[name] = row
        print(
            f"{name:<22}{dtype:>5}{row['import_s']:>9.2f}{row['load_s']:>9.2f}{row['mb_s']:>8.0f}"
            f"{row['weights_mb']:>9.0f}{row['rss_before_mb']:>9.0f}{row['rss_peak_mb']:>9.0f}"
            f"{row['allowed_mb']:>9.0f}",
            flush=True,
        )

    report("gguf: open + load", "load", path, "fp32", rounds)
    report("gguf: Llama.build", "build", path, "fp32", rounds)
    report("gguf: transformers", "transformers", path, "fp32", 1)
    figures["gguf: Llama.build"]["ratio"] = (
        figures["gguf: transformers"]["load_s"] / figures["gguf: Llama.build"]["load_s"]
    )
    with tempfile.TemporaryDirectory() as directory:
        hf = convert(path, Path(directory) / "hf", "hf", quiet=True)
        report("safetensors: load", "load", hf, "fp32", rounds)
        report("safetensors: transf.", "transformers", hf, "fp32", rounds)
        figures["safetensors: load"]["ratio"] = (
            figures["safetensors: transf."]["load_s"] / figures["safetensors: load"]["load_s"]
        )
        if not quick:
            loading.measure("write", Path(directory), "bf16")
            for mp in (1, 2):
                report(f"meta: {mp} shard(s)", "load", Path(directory) / f"mp{mp}", "bf16", rounds)
            figures["converting 2.2 GB"] = compare_converting(Path(directory) / "mp1", rounds)
    return figures


def compare_converting(path: Path, rounds: int) -> Dict[str, float]:
    """MB/s of converting a checkpoint in Meta's format, and of `cp`, which does nothing else."""
    size = sum(file.stat().st_size for file in path.iterdir()) / 1e6
    out = path.with_name("converted")

    def cp() -> None:
        subprocess.run(["cp", "-r", path, out], check=True)

    def to(kind: str) -> Callable[[], Any]:
        return lambda: convert(path, out, kind, quiet=True)

    sides: Dict[str, Callable[[], Any]] = {"cp": cp, "hf": to("hf"), "gguf": to("gguf")}
    seconds: Dict[str, List[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, run in sides.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
            shutil.rmtree(out) if out.is_dir() else out.unlink()
    figures = {name: size / statistics.median(times) for name, times in seconds.items()}
    print("converting, MB/s:     " + "  ".join(f"{n} {v:.0f}" for n, v in figures.items()))
    return figures


def processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def main(
    ckpt: str = "checkpoints/SmolLM2-135M-Instruct",
    rounds: int = 5,
    dtype: Optional[str] = None,
    quick: bool = False,
):
    """Measure and print a table, then one line of JSON.

    Args:
        ckpt: a .gguf file or a directory with one, which both sides can read.
        rounds: counted turns of each side.
        dtype: bf16 or fp32; by default what Llama.build would pick on this processor.
        quick: 2 rounds and no model of 2 GB.
    """
    source = checkpoint.open(ckpt)
    if source.path.suffix != ".gguf":
        raise ValueError(f"{ckpt}: transformers reads .gguf files, not Meta's")
    picked = pick_dtype(dtype, torch.device("cpu"))
    name = "fp32" if picked == torch.float32 else "bf16"
    rounds = min(rounds, 2) if quick else rounds
    about = {
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
        "torch": version("torch"),
        "transformers": version("transformers"),
        "checkpoint": source.path.name,
        "dtype": name,
        "rounds": rounds,
    }
    print("\n".join(f"{key:<14}{value}" for key, value in about.items()))

    columns = "dtype import s   load s    MB/s  weights   before     peak  allowed"
    print(f"\nload                  {columns}")
    load = compare_loading(source.path, min(rounds, 3), quick)
    print("(MB; peak: highest resident memory of the process; allowed: 1.3 x weights + 300)")

    print("\ntokens/s  prompts + new        llama  transformers   ratio  equal rows    load")
    generation = compare_generation(source.path, source.args.vocab_size, name, rounds)
    print()
    print(json.dumps({**about, "load": load, "generation": generation}))


if __name__ == "__main__":
    fire.Fire(main)
