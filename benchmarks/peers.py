"""Compares this code with `transformers` and llama.cpp, on the same weights, tokens and machine.

    make bench
    python -m benchmarks.peers --quick
    python -m benchmarks.peers --only decode --rounds 9
    python -m benchmarks.peers --shape 1b

What is measured:

    first     Prefill: from a prompt to its first token. Compute-bound.
    decode    The tokens after the first, of one prompt. Each step reads every weight and the cache
              to compute one token, so it is bound by memory bandwidth.
    batch     1, 4 and 16 prompts of equal lengths; 16 of different lengths (`ragged`); 16 of which
              most are short and a few long (`longer`): tokens per second, from the prompts to the
              last token. transformers gets a batch padded on the left, with an attention mask;
              llama.cpp parallel sequences.
    load      Each in its own process (benchmarks/loading.py): seconds from a .gguf file to the
              first token, without imports, and peak resident memory. Files are in the page cache,
              so the disk isn't measured. Then loading safetensors and Meta's .pth, and converting
              2 GB, compared with `cp`.

Each side is a process that sleeps between its turns (benchmarks/sides.py); all use the same number
of threads. They take turns, A B C A B C, each turn in a new process, and medians of the rounds are
compared: machines vary from hour to hour (temperature, other load) and processes with their place
in memory, so only ratios within one run are meaningful. One of the sides measures the machine: how
fast it reads memory and multiplies matrices; `limit` is the share of that a side reaches, where
each process measures for itself how fast it reads memory.
`eager` is ours with the plain layers, compile=False.

With --shape the weights are random, in the shape of Llama 3.2 1B or Llama 3 8B: see
benchmarks/shapes.py.

llama.cpp is llama-cpp-python if it is installed (CMAKE_ARGS=-DGGML_NATIVE=ON pip install
llama-cpp-python compiles it for this machine, in some minutes), otherwise xllamacpp's wheel, which
is built without AVX-512. The build's features are printed.

Tables go to stdout, whose last line is JSON; with --out they are saved, with plots.
"""

import json
import math
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Tuple

import fire
import torch

from benchmarks import loading, plots, shapes
from benchmarks.sides import Side, Tokens
from llama import ModelArgs, checkpoint
from llama.checkpoint import ggml, weight_shapes
from llama.checkpoint.convert import convert


@dataclass(frozen=True)
class Case:
    """A task, the same for all sides."""

    group: str  # first, decode or batch
    name: str
    prompts: Tokens
    n: int  # new tokens of each

    def is_for(self, label: str) -> bool:
        """Whether a side runs this case: slow ones skip some, or a run would take an hour."""
        slow = label.endswith(("eager", "fp32"))
        return not slow or (self.group != "batch" and "2048" not in self.name)

    def rate(self, answer: Dict[str, float]) -> float:
        """Tokens per second, by group: of the prompt, after the first, or all new ones."""
        if self.group == "first":
            return len(self.prompts[0]) / answer["first"]
        if self.group == "decode":
            return (self.n - 1) / answer["rest"]
        return len(self.prompts) * self.n / (answer["first"] + answer["rest"])

    def best(self, args: ModelArgs, weights: float, limit: Dict[str, float]) -> float:
        """The rate of this machine if it did nothing but read memory and multiply.

        weights: bytes of all matrices, in the side's dtype. The cache is counted as bf16.
        """
        matrices = sum(a * b for _, (a, b) in multiplied(args))
        width = args.n_heads * args.head_dim
        per_key = 2 * args.n_kv_heads * args.head_dim * 2 * args.n_layers  # bytes

        def flop(length: int) -> float:  # of a prompt; only its last token's logits are computed
            inner = matrices - args.vocab_size * args.dim
            return length * (2 * inner + 2 * length * width * args.n_layers)

        lengths = [len(prompt) for prompt in self.prompts]
        first = sum(map(flop, lengths)) / limit["flop_per_s"]
        first = max(first, weights / limit["bytes_per_s"])
        read = weights + sum(length + self.n / 2 for length in lengths) * per_key
        step = max(read / limit["bytes_per_s"], 2 * matrices * len(lengths) / limit["flop_per_s"])
        return self.rate({"first": first, "rest": (self.n - 1) * step})


def cases(vocab_size: int, quick: bool) -> List[Case]:
    rng = random.Random(0)

    def prompt(length: int) -> List[int]:
        return [rng.randrange(vocab_size) for _ in range(length)]

    found = [Case("first", f"first token of {n}", [prompt(n)], 1) for n in (32, 512, 2048)]
    found.append(Case("decode", "decode at 128", [prompt(128)], 65))
    found.append(Case("decode", "decode at 2048", [prompt(2048)], 33))
    for rows in (1, 4, 16):
        found.append(Case("batch", f"{rows} x 128", [prompt(128) for _ in range(rows)], 32))
    found.append(Case("batch", "16 ragged", [prompt(rng.randint(8, 128)) for _ in range(16)], 32))
    longer = [prompt(round(8 * 64 ** (i / 15))) for i in range(16)]
    found.append(Case("batch", "16 longer", longer, 32))
    return [case for case in found if "2048" not in case.name] if quick else found


def multiplied(args: ModelArgs) -> Iterator[Tuple[str, Tuple[int, ...]]]:
    """Names and shapes of the matrices that a decoding step reads."""
    for name, shape in weight_shapes(args).items():
        if len(shape) == 2 and (args.tied_embeddings or name != "tok_embeddings.weight"):
            yield name, shape


Variant = Tuple[str, str, str, str]  # label, side, file, dtype

VARIANTS: List[Variant] = [
    ("llama bf16", "llama", "q4_1", "bf16"),
    ("transformers bf16", "transformers", "q4_1", "bf16"),
    ("llama.cpp BF16", "llama.cpp", "bf16", "bf16"),
    ("llama int8", "llama", "q8_0", "int8"),
    ("llama.cpp Q8_0", "llama.cpp", "q8_0", "int8"),
    ("llama int4, Q4_0", "llama", "q4_0", "int4"),
    ("llama.cpp Q4_0", "llama.cpp", "q4_0", "int4"),
    ("llama int4, Q4_1", "llama", "q4_1", "int4"),
    ("llama.cpp Q4_1", "llama.cpp", "q4_1", "int4"),
    ("llama bf16, eager", "llama", "q4_1", "eager-bf16"),
    ("llama fp32", "llama", "q4_1", "fp32"),
    ("transformers fp32", "transformers", "q4_1", "fp32"),
]
LIMIT: Variant = ("limit", "limit", "q4_1", "bf16")

# With --shape: ours with default options.
SHAPE_VARIANTS: List[Variant] = [
    (f"{side} {kind.upper()}", side, kind, "stored")
    for kind in shapes.KINDS
    for side in ("llama", "llama.cpp")
]
SHAPE_CASES = ("decode at 128", "first token of 32", "first token of 512", "16 ragged")

# The comparisons in the documentation: (title, case, ours, theirs).
RATIOS = [
    ("decode, bf16", "decode at 128", ["llama bf16"], ["transformers bf16"]),
    ("decode, bf16", "decode at 128", ["llama bf16"], ["llama.cpp BF16"]),
    ("decode, 8 bits", "decode at 128", ["llama int8"], ["llama.cpp Q8_0"]),
    ("decode, Q4_0", "decode at 128", ["llama int4, Q4_0"], ["llama.cpp Q4_0"]),
    ("decode, Q4_1", "decode at 128", ["llama int4, Q4_1"], ["llama.cpp Q4_1"]),
    ("prefill of 512, the best of each", "first token of 512", ["llama "], ["llama.cpp "]),
    ("16 ragged prompts, bf16", "16 ragged", ["llama bf16"], ["transformers bf16"]),
    ("16 ragged prompts, bf16", "16 ragged", ["llama bf16"], ["llama.cpp BF16"]),
    ("16 ragged prompts, the best of each", "16 ragged", ["llama "], ["llama.cpp "]),
]
RATIOS += [
    (f"{case}, {kind.upper()}", case, [f"llama {kind.upper()}"], [f"llama.cpp {kind.upper()}"])
    for case in SHAPE_CASES
    for kind in shapes.KINDS
]


def take_turns(
    start: Callable[[str], Any], labels: Sequence[str], chosen: Sequence[Case], rounds: int
) -> Dict[str, Dict[str, List[Any]]]:
    """The sides' answers, by case and label.

    In each round, every side in turn is started, warmed up, runs all cases, and ends: a process's
    place in memory can cost half of its speed, so each round uses new processes.
    """
    answers: Dict[str, Dict[str, List[Any]]] = {case.name: {} for case in chosen}
    for turn in range(rounds):
        for label in labels:
            mine = [case for case in chosen if case.is_for(label)]
            if not mine:
                continue
            began, side = time.perf_counter(), start(label)
            side.run([[1] * 64], 4)
            for rows in {len(case.prompts) for case in mine} - {1}:
                side.run([[1] * 16] * rows, 2)
            for case in mine:
                answer = side.run(case.prompts, case.n)
                answers[case.name].setdefault(label, []).append(answer)
            side.close()
            seconds = time.perf_counter() - began
            print(f"round {turn + 1}: {label}, {seconds:.0f} s", file=sys.stderr, flush=True)
    return answers


def summary(
    case: Case, answers: Dict[str, List[Any]], args: ModelArgs, sizes: Dict[str, float]
) -> Dict[str, Any]:
    """One case, all sides: rates, and shares of the machine's measured limit."""
    limit = {
        key: statistics.median(answer[key] for answer in answers["limit"])
        for key in ("bytes_per_s", "flop_per_s")
    }

    def own(answer: Dict[str, float]) -> Dict[str, float]:
        """With what a side's process itself could read."""
        return {**limit, "bytes_per_s": answer["bytes_per_s"]}

    rows: Dict[str, Any] = {}
    for name, found in answers.items():
        if name == "limit":
            continue
        for answer in found:
            if [len(row) for row in answer["tokens"]] != [case.n] * len(case.prompts):
                raise AssertionError(f"{name}, {case.name}: not {case.n} tokens for each prompt")
        rates = sorted(map(case.rate, found))
        rows[name] = {
            "tok_s": statistics.median(rates),
            "least_tok_s": rates[0],
            "most_tok_s": rates[-1],
            "first_s": statistics.median(answer["first"] for answer in found),
            "limit": statistics.median(
                case.rate(answer) / case.best(args, sizes[name], own(answer)) for answer in found
            ),
        }
    return {
        "group": case.group,
        "prompt_lengths": sorted(map(len, case.prompts)),
        "new_tokens": case.n,
        **limit,
        "sides": rows,
    }


def table(figures: Dict[str, Any]) -> str:
    """Markdown: tokens per second, and the share of the limit in percent."""
    names = list(dict.fromkeys(name for case in figures.values() for name in case["sides"]))
    lines = ["| tok/s (share of the limit) | " + " | ".join(figures) + " |"]
    lines.append("|---" * (len(figures) + 1) + "|")
    for name in names:
        cells = [case["sides"].get(name) for case in figures.values()]
        shown = [f"{cell['tok_s']:.0f} ({cell['limit']:.0%})" if cell else "" for cell in cells]
        lines.append(f"| {name} | " + " | ".join(shown) + " |")
    limits = [
        f"{case['bytes_per_s'] / 1e9:.0f} GB/s, {case['flop_per_s'] / 1e12:.2f} TFLOP/s"
        for case in figures.values()
    ]
    lines.append("| the machine | " + " | ".join(limits) + " |")
    return "\n".join(lines)


def ratios(figures: Dict[str, Any]) -> List[Dict[str, Any]]:
    """The comparisons of RATIOS, as far as they were measured."""
    found = []
    for title, case, ours, theirs in RATIOS:
        rows = figures.get(case, {"sides": {}})["sides"]

        def best(prefixes: List[str], rows: Dict[str, Any] = rows) -> Optional[str]:
            names = [name for name in rows if any(name.startswith(p) for p in prefixes)]
            return max(names, key=lambda name: rows[name]["tok_s"], default=None)

        a, b = best(ours), best(theirs)
        if a and b:
            found.append({"what": title, "ours": a, "theirs": b, "ours_tok_s": rows[a]["tok_s"],
                          "theirs_tok_s": rows[b]["tok_s"], "ours_limit": rows[a]["limit"],
                          "ratio": rows[a]["tok_s"] / rows[b]["tok_s"]})  # fmt: skip
    return found


def table_of_ratios(found: List[Dict[str, Any]]) -> str:
    """Markdown: tokens per second of both, their ratio, and our share of the limit."""
    rows = ["| tok/s | ours | theirs | ratio | share of the limit |", "|---|---|---|---|---|"]
    for r in found:
        rows.append(
            f"| {r['what']} | {r['ours_tok_s']:.0f} ({r['ours']}) | {r['theirs_tok_s']:.0f} "
            f"({r['theirs']}) | **{r['ratio']:.2f}** | {r['ours_limit']:.0%} |"
        )
    return "\n".join(rows)


def equal_rows(path: Path, threads: int, case: Case) -> int:
    """The number of rows of a case for which we and transformers give the same tokens, in fp32."""
    sides = [Side(kind, path, "fp32", threads) for kind in ("llama", "transformers")]
    mine, theirs = (side.run(case.prompts, case.n)["tokens"] for side in sides)
    for side in sides:
        side.close()
    return sum(a == b for a, b in zip(mine, theirs, strict=True))


def files(path: Path, directory: Path) -> Dict[str, Path]:
    """The demo model's weights as .gguf files of each type, written once."""
    found = {"q4_1": path}
    for kind in ("bf16", "q8_0", "q4_0"):
        found[kind] = directory / f"{path.stem}.{kind}.gguf"
        if not found[kind].exists():
            how: Any = {"dtype": torch.bfloat16} if kind == "bf16" else {"quant": kind}
            convert(path, found[kind], "gguf", quiet=True, **how)
    return found


def weights_bytes(path: Path, dtype: str) -> float:
    """Bytes of the matrices that a decoding step reads."""
    source = checkpoint.open(path)
    dense = {"fp32": 4, "bf16": 2}.get(dtype.removeprefix("eager-"))
    return sum(
        math.prod(shape) * dense if dense else ggml.stored_bytes(shape, source.stored_as(name))
        for name, shape in multiplied(source.args)
    )


def processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def llama_cpp() -> Tuple[str, str]:
    """The side that measures llama.cpp, and its package, version and build features."""
    if find_spec("llama_cpp"):
        import llama_cpp as library

        side, package = "llama.cpp compiled", "llama_cpp_python"
        text = library.llama_print_system_info().decode()
    else:
        import xllamacpp

        side, package, text = "llama.cpp", "xllamacpp", xllamacpp.get_system_info()
    has = ", ".join(p.split("=")[0].split(":")[-1].strip() for p in text.split("|") if "= 1" in p)
    return side, f"{package} {version(package)}: {has}"


def main(
    ckpt: str = "checkpoints/SmolLM2-135M-Instruct",
    rounds: int = 5,
    threads: Optional[int] = None,
    only: Optional[str] = None,
    quick: bool = False,
    out: Optional[str] = None,
    shape: Optional[str] = None,
):
    """Measure, print tables and one line of JSON, and save them with plots.

    Args:
        ckpt: a .gguf file of Q4_1 weights, or a directory with one, which all sides can read.
        rounds: turns of each side.
        threads: of each side; by default one per core.
        only: first, decode, batch or load; by default all of them.
        quick: 2 rounds, no prompt of 2048 tokens and no model of 2 GB.
        out: a directory for the tables, figures and plots.
        shape: 1b or 8b, with random weights in place of ckpt's; without `load`.
    """
    if only not in (None, "first", "decode", "batch", "load"):
        raise ValueError(f"only={only!r}: choose first, decode, batch or load")
    with tempfile.TemporaryDirectory() as directory:
        if shape:
            names = {kind: Path(directory) / f"{shape}.{kind}.gguf" for kind in shapes.KINDS}
            by_kind = {kind: shapes.write(shape, kind, path) for kind, path in names.items()}
            by_kind["q4_1"] = by_kind["q4_0"]  # for the limit, which reads none
            return measure(by_kind, SHAPE_VARIANTS, rounds, threads, only, quick, out, False)
        source = checkpoint.open(ckpt)
        if source.path.suffix != ".gguf":
            raise ValueError(f"{ckpt}: transformers and llama.cpp read .gguf files, not Meta's")
        by_kind = files(source.path, Path(directory))
        return measure(by_kind, VARIANTS, rounds, threads, only, quick, out, True)


def measure(
    by_kind: Dict[str, Path],
    variants: List[Variant],
    rounds: int,
    threads: Optional[int],
    only: Optional[str],
    quick: bool,
    out: Optional[str],
    real: bool,
) -> None:
    """`main`, of files by kind; `real`: of a model that makes sense, which can be compared."""
    source = checkpoint.open(by_kind["q4_1"])
    rounds = min(rounds, 2) if quick else rounds
    threads = threads or torch.get_num_threads()
    peer, build = llama_cpp()
    about: Dict[str, Any] = {
        "processor": processor(),
        "threads": threads,
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
        "torch": version("torch"),
        "transformers": version("transformers"),
        "llama.cpp": build,
        "checkpoint": source.path.name,
        "rounds": rounds,
        "date": time.strftime("%Y-%m-%d"),
    }
    print("\n".join(f"{key:<14}{value}" for key, value in about.items()), flush=True)
    results: Dict[str, Any] = {**about}
    text = []
    if real and only in (None, "load"):
        columns = "dtype import s   load s    MB/s  weights   before     peak  allowed"
        print(f"\n{'load':<34}{columns}")
        results["load"] = loading.compare(source.path, peer, rounds, quick)
        print("(MB; peak: highest resident memory of the process; allowed: 1.3 x weights + 300)")
    chosen = [c for c in cases(source.args.vocab_size, quick) if only in (None, c.group)]
    if not real:
        chosen = [case for case in chosen if case.name in SHAPE_CASES or "2048" in case.name]
    if chosen:
        sizes = {label: weights_bytes(by_kind[f], d) for label, _, f, d in variants}
        how = {label: rest for label, *rest in [*variants, LIMIT]}

        def start(label: str) -> Side:
            kind, file, dtype = how[label]
            kind = peer if kind == "llama.cpp" else kind
            return Side(kind, by_kind[file], dtype, threads)

        answers = take_turns(start, list(how), chosen, rounds)
        results["generation"] = {
            case.name: summary(case, answers[case.name], source.args, sizes) for case in chosen
        }
        ragged = [case for case in chosen if case.name == "16 ragged"]
        if real and ragged:
            results["equal_rows_fp32"] = equal_rows(source.path, threads, ragged[0])
        text.append(table(results["generation"]))
        results["ratios"] = ratios(results["generation"])
        text.append(table_of_ratios(results["ratios"]))
        print("\n" + "\n\n".join(text))
    if out is not None:
        keep(results, text, Path(out))
    print()
    print(json.dumps(results))


def keep(results: Dict[str, Any], text: List[str], out: Path) -> None:
    """Write the figures, the tables and the plots of a run to a directory."""
    out.mkdir(parents=True, exist_ok=True)
    about = "\n".join(
        f"- {key}: {value}" for key, value in results.items() if not isinstance(value, (dict, list))
    )
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    (out / "results.md").write_text("\n\n".join(["# Side by side", about, *text]) + "\n")
    if results.get("generation"):
        plots.draw(results, out)


if __name__ == "__main__":
    fire.Fire(main)
