"""Ours against transformers, on the same weights, in one run.

    python -m benchmarks.peers [--rounds 5] [--dtypes bf16,fp32] [--quick]

What is measured:
  decode    one prompt of 32 tokens, 64 new ones. Each new token reads all weights once, so this
            is bound by memory bandwidth and by the overhead of small operations.
  ragged    16 prompts of 8 to 128 tokens, 32 new ones each. transformers pads on the left and
            keeps every row to the end.
  prefill   512 tokens, one new one: bound by arithmetic.
  load      from the GGUF file to weights in memory, in a process of its own, imports apart.
  memory    peak resident memory of such a process, torch and imports included, also for a
            generated Meta checkpoint of 2 GB in bf16.

Both sides take turns (A B A B ...) in one process with the same number of threads, and medians are
compared: machines are shared and change their speed, so only ratios within one run mean anything.
Both must give the same greedy tokens in fp32, and the table says how many rows do. The last line of
stdout is JSON.
"""

import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Callable, Dict, List

import fire
import torch

from llama import Llama, ModelArgs
from llama.checkpoint import InMemory, meta, weight_shapes
from llama.generation import pick_dtype

CHECKPOINT = "checkpoints/SmolLM2-135M-Instruct"
LIMIT = 1.3, 300e6  # peak memory while loading: times the weights, plus

LOADER = """
import json, sys, time, torch
side, path, dtype = sys.argv[1:]
def memory(key):
    line = next(line for line in open("/proc/self/status") if key in line)
    return int(line.split()[1]) * 1024
if side == "llama":
    from llama import checkpoint, parallel, Transformer
    from llama.generation import pick_dtype
    parallel.initialize(device="cpu")
    base, start = memory("VmRSS"), time.perf_counter()
    source = checkpoint.open(path)
    model = Transformer(source.args, device="meta")
    checkpoint.load(source, model, dtype=pick_dtype(dtype, torch.device("cpu")))
else:
    from pathlib import Path
    from transformers import AutoModelForCausalLM
    base, start = memory("VmRSS"), time.perf_counter()
    path = Path(path)
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype="float32")
seconds = time.perf_counter() - start
weights = sum(p.nbytes for p in model.parameters())
print(json.dumps(dict(seconds=seconds, base=base, peak=memory("VmHWM"), weights=weights)))
"""


def load_in_fresh_process(side: str, path: Path, dtype: str = "fp32") -> Dict[str, float]:
    command = [sys.executable, "-c", LOADER, side, str(path), dtype]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def alternate(sides: Dict[str, Callable[[], Any]], rounds: int) -> Dict[str, float]:
    """Median seconds of each side, taking turns, after one turn that isn't counted."""
    times: Dict[str, List[float]] = {name: [] for name in sides}
    for counted in [False] + [True] * rounds:
        for name, run in sides.items():
            start = time.perf_counter()
            run()
            if counted:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def peer_generate(model: Any, prompts: List[List[int]], n: int) -> List[List[int]]:
    """transformers' greedy generate with left padding, exactly n new tokens."""
    width = max(map(len, prompts))
    ids = torch.zeros(len(prompts), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    out = model.generate(
        ids,
        attention_mask=mask,
        do_sample=False,
        min_new_tokens=n,
        max_new_tokens=n,
        pad_token_id=0,
    )
    return out[:, width:].tolist()


def speed(path: Path, dtypes: List[str], rounds: int) -> List[Dict[str, Any]]:
    from transformers import AutoModelForCausalLM

    pick = random.Random(0)
    text = [pick.randrange(1000, 40000) for _ in range(16 * 128)]
    ragged = [text[128 * i : 128 * i + pick.randint(8, 128)] for i in range(16)]
    work = {
        "decode": ([text[:32]], 64),
        "ragged": (ragged, 32),
        "prefill": ([text[:512]], 1),
    }
    theirs: Any = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype="float32"
    )
    results = []
    for dtype in dtypes:
        theirs = theirs.to(pick_dtype(dtype, torch.device("cpu"))).eval()
        ours = Llama.build(path, max_seq_len=640, max_batch_size=16, device="cpu", dtype=dtype)
        for name, (prompts, n) in work.items():

            def run_ours(prompts=prompts, n=n, ours=ours):
                return ours.generate(prompts, n, temperature=0, stop_tokens=set())[0]

            def run_theirs(prompts=prompts, n=n, theirs=theirs):
                return peer_generate(theirs, prompts, n)

            same = sum(a == b for a, b in zip(run_ours(), run_theirs(), strict=True))
            seconds = alternate({"llama": run_ours, "transformers": run_theirs}, rounds)
            count = len(prompts[0]) if name == "prefill" else n * len(prompts)
            results.append(
                {
                    "what": name,
                    "dtype": dtype,
                    "batch": len(prompts),
                    "llama_tok_s": count / seconds["llama"],
                    "transformers_tok_s": count / seconds["transformers"],
                    "ratio": seconds["transformers"] / seconds["llama"],
                    "rows_with_equal_tokens": f"{same} of {len(prompts)}",
                }
            )
    return results


def loading(path: Path, rounds: int, with_2gb: bool) -> Dict[str, Any]:
    ours = [load_in_fresh_process("llama", path) for _ in range(rounds)]
    theirs = load_in_fresh_process("transformers", path)
    seconds = statistics.median(run["seconds"] for run in ours)
    result: Dict[str, Any] = {
        "gguf_seconds": seconds,
        "transformers_seconds": theirs["seconds"],
        "ratio": theirs["seconds"] / seconds,
        "memory": {"gguf fp32": ours[0], "transformers gguf fp32": theirs},
    }
    if with_2gb:
        args = ModelArgs(
            dim=2048, n_layers=16, n_heads=32, n_kv_heads=8, hidden_dim=8192, vocab_size=32000
        )
        shapes = weight_shapes(args)
        weights = {n: torch.full(shape, 0.01, dtype=torch.bfloat16) for n, shape in shapes.items()}
        for shards in (1, 2):
            with tempfile.TemporaryDirectory(prefix="llama-bench-") as folder:
                written = meta.write(InMemory(args, weights), Path(folder) / "ckpt", shards)
                run = load_in_fresh_process("llama", written, "bf16")
            run["mb_s"] = run["weights"] / run["seconds"] / 1e6
            result["memory"][f"meta bf16, {shards} shard(s)"] = run
    return result


def main(
    ckpt: str = CHECKPOINT, rounds: int = 5, dtypes: str = "bf16,fp32", quick: bool = False
) -> None:
    """Measure decoding, a ragged batch, prefill, loading and memory against transformers.

    Args:
        ckpt: a directory with one .gguf file.
        rounds: turns of each side; medians are reported.
        dtypes: separated by commas.
        quick: one round, and no 2 GB checkpoint.
    """
    import transformers

    [path] = Path(ckpt).glob("*.gguf")
    rounds = 1 if quick else rounds
    names = dtypes if isinstance(dtypes, (tuple, list)) else dtypes.split(",")
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(": ")[1] for line in lines if "model name" in line), cpu)
    machine = {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "model": path.name,
        "rounds": rounds,
        "load_average": os.getloadavg()[0],
    }
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    load = loading(path, rounds, with_2gb=not quick)
    print(
        f"GGUF load: {load['gguf_seconds']:.2f} s, "
        f"transformers {load['transformers_seconds']:.2f} s "
        f"({load['ratio']:.1f}x)"
    )
    for name, run in load["memory"].items():
        allowed = LIMIT[0] * run["weights"] + LIMIT[1]
        rate = f", {run['mb_s']:.0f} MB/s" if "mb_s" in run else ""
        print(
            f"peak memory, {name}: {run['peak'] / 1e6:.0f} MB for {run['weights'] / 1e6:.0f} MB of "
            f"weights (1.3 x weights + 300 MB: {allowed / 1e6:.0f}){rate}"
        )
    results = speed(path, list(names), rounds)
    print(
        f"{'':8} {'dtype':6} {'batch':>5} {'llama':>9} {'transformers':>13}   ratio  equal tokens"
    )
    for row in results:
        print(
            f"{row['what']:8} {row['dtype']:6} {row['batch']:5} {row['llama_tok_s']:9.1f} "
            f"{row['transformers_tok_s']:13.1f} {row['ratio']:7.2f}  "
            f"{row['rows_with_equal_tokens']}"
        )
    print(json.dumps({"machine": machine, "loading": load, "speed": results}))


if __name__ == "__main__":
    fire.Fire(main)
