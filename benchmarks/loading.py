"""Time and peak memory of loading a checkpoint, each load in its own process.

    python -m benchmarks.loading KIND PATH DTYPE      prints one line of JSON

KIND: `first int4`, `first transformers`, `first llama.cpp` (or `first llama.cpp compiled`: see
benchmarks.sides), from a .gguf file to the first token of a prompt of 5; `load` (checkpoint.open
and checkpoint.load), `build` (Llama.build, the tokenizer included), `transformers`
(from_pretrained, with gguf_file for a .gguf), or `write`, which makes a random checkpoint of Llama
3.2 1B's shape in Meta's format, at model-parallel sizes 1 and 2, below PATH.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from importlib import import_module
from pathlib import Path
from typing import Any, Callable, Dict, List

SHAPE = dict(dim=2048, n_layers=16, n_heads=32, n_kv_heads=8, hidden_dim=8192, vocab_size=32000)


def measure(kind: str, path: Path, dtype: str) -> Dict[str, float]:
    """Run one of the KINDs in a new process; returns the figures it printed."""
    command = [sys.executable, "-m", "benchmarks.loading", kind, str(path), dtype]
    quiet = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    done = subprocess.run(command, env=quiet, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def compare(path: Path, peer: str, rounds: int, quick: bool) -> Dict[str, Dict[str, float]]:
    figures: Dict[str, Dict[str, float]] = {}

    def report(name: str, kind: str, path: Path, dtype: str, rounds: int) -> None:
        runs = [measure(kind, path, dtype) for _ in range(rounds)]
        row = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        row["mb_s"] = row["weights_mb"] / row["load_s"]
        # Weights and working memory, beside what the process held before: the imports.
        row["allowed_mb"] = row["rss_before_mb"] + 1.3 * row["weights_mb"]
        row["own_mb"] = row["rss_peak_mb"] - row["rss_before_mb"]  # without imports
        figures[name] = row
        print(
            f"{name:<34}{dtype:>5}{row['import_s']:>9.2f}{row['load_s']:>9.2f}{row['mb_s']:>8.0f}"
            f"{row['weights_mb']:>9.0f}{row['rss_before_mb']:>9.0f}{row['rss_peak_mb']:>9.0f}"
            f"{row['allowed_mb']:>9.0f}",
            flush=True,
        )

    for side in ("int4", "transformers", peer):
        report(f"gguf, first: {side}", f"first {side}", path, "", 1 if quick else rounds)
    ours, others = "gguf, first: int4", ("gguf, first: transformers", f"gguf, first: {peer}")
    for other in others:
        for key in ("load_s", "own_mb"):
            figures[other][f"ours_{key}_ratio"] = figures[ours][key] / figures[other][key]
    report("gguf: open + load", "load", path, "fp32", rounds)
    report("gguf: Llama.build", "build", path, "fp32", rounds)
    report("gguf: transformers", "transformers", path, "fp32", 1)
    figures["gguf: Llama.build"]["ratio"] = (
        figures["gguf: transformers"]["load_s"] / figures["gguf: Llama.build"]["load_s"]
    )
    from llama.checkpoint.convert import convert  # here: a child's imports are what it measures

    with tempfile.TemporaryDirectory() as directory:
        hf = convert(path, Path(directory) / "hf", "hf", quiet=True)
        report("safetensors: load", "load", hf, "fp32", rounds)
        report("safetensors: transf.", "transformers", hf, "fp32", rounds)
        figures["safetensors: load"]["ratio"] = (
            figures["safetensors: transf."]["load_s"] / figures["safetensors: load"]["load_s"]
        )
        if not quick:
            measure("write", Path(directory), "bf16")
            for mp in (1, 2):
                report(f"meta: {mp} shard(s)", "load", Path(directory) / f"mp{mp}", "bf16", rounds)
            figures["converting 2.2 GB"] = _compare_converting(Path(directory) / "mp1", rounds)
    return figures


def _compare_converting(path: Path, rounds: int) -> Dict[str, float]:
    """MB/s of converting a checkpoint in Meta's format, and of copying it with `cp`."""
    from llama.checkpoint.convert import convert

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


def resident(key: str) -> float:
    """This process's resident memory in MB: VmRSS (current) or VmHWM (peak).

    Not getrusage's ru_maxrss, which on Linux is inherited from the parent process.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024 / 1e6
    raise KeyError(key)


def child(kind: str, path: Path, dtype: str) -> Dict[str, float]:
    if kind.startswith("first "):
        return first(kind.removeprefix("first "), path)
    start = time.perf_counter()
    import torch

    torch_dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    model: Any  # three libraries' models; all have parameters()
    if kind == "transformers":
        from transformers import LlamaForCausalLM

        imported, before = time.perf_counter(), resident("VmRSS")
        how: Any
        where, how = (path, {}) if path.is_dir() else (path.parent, {"gguf_file": path.name})
        model = LlamaForCausalLM.from_pretrained(where, dtype=torch_dtype, **how)
    else:
        from llama import Llama, Transformer, checkpoint
        from llama.layers import parallel

        imported, before = time.perf_counter(), resident("VmRSS")
        if kind == "build":
            llama = Llama.build(path, max_batch_size=1, device="cpu", dtype=torch_dtype)
            model = llama.model
        else:
            device = parallel.initialize(device="cpu")
            source = checkpoint.open(path)
            model = Transformer(source.args, device="meta")
            checkpoint.load(source, model, dtype=torch_dtype, device=device)
    return {
        "import_s": imported - start,
        "load_s": time.perf_counter() - imported,
        "rss_before_mb": before,
        "rss_peak_mb": resident("VmHWM"),
        "weights_mb": sum(weight.nbytes for weight in model.parameters()) / 1e6,
    }


def first(kind: str, path: Path) -> Dict[str, float]:
    """One of benchmarks.sides, up to its first token; memory is given with and without imports."""
    from benchmarks.sides import SIDES

    start, threads = time.perf_counter(), len(os.sched_getaffinity(0))
    modules = {
        "int4": ["llama.generation", "gguf"],
        "transformers": ["torch", "transformers.models.llama"],
    }
    for name in modules.get(kind, ["llama_cpp" if "compiled" in kind else "xllamacpp", "numpy"]):
        import_module(name)
    imported, before = time.perf_counter(), resident("VmRSS")
    side, dtype = ("llama", "int4") if kind == "int4" else (kind, "bf16")
    answer = SIDES[side](path, dtype, threads, rows=1).run([[1, 2, 3, 4, 5]], 1)
    assert len(answer["tokens"][0]) == 1
    return {
        "import_s": imported - start,
        "load_s": time.perf_counter() - imported,
        "rss_before_mb": before,
        "rss_peak_mb": resident("VmHWM"),
        "weights_mb": path.stat().st_size / 1e6,
    }


def write(path: Path) -> Dict[str, float]:
    import torch

    from llama import ModelArgs, checkpoint
    from llama.checkpoint import InMemory, meta, weight_shapes

    args = ModelArgs(**SHAPE)  # type: ignore[arg-type]
    weights = {
        name: torch.empty(shape, dtype=torch.bfloat16).uniform_(-0.02, 0.02)
        for name, shape in weight_shapes(args).items()
    }
    meta.write(InMemory(args, weights), path / "mp1")
    del weights
    meta.write(checkpoint.open(path / "mp1"), path / "mp2", model_parallel_size=2)
    return {}


if __name__ == "__main__":
    kind, path, dtype = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
    print(json.dumps(write(path) if kind == "write" else child(kind, path, dtype)))
