"""Speedups of speculative decoding and prefix caching, and the overhead of structured outputs.

    python -m benchmarks.savings [CHECKPOINT] [--rounds 3] [--quick] [--out DIRECTORY]

Each round is its own process, in which runs with and without a feature take turns; medians of all
rounds are reported. bf16 on the CPU, compile=True. The last line of stdout is JSON.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional

import fire

from llama import Llama, SamplingParams
from llama.tokenizer import Dialog, Message

DEMO = "checkpoints/SmolLM2-135M-Instruct"
PROMPTS = Path(__file__).with_name("prompts.json")
TURNS = 3  # of runs with and without the feature, per round

WORDS = [
    "river", "stone", "bread", "lamp", "winter", "harbour", "teacher", "music", "garden", "letter",
    "mountain", "window", "silver", "market", "forest", "captain", "bridge", "summer", "painter",
    "candle",
]  # fmt: skip

Figures = Dict[str, float]


def closed(**properties: Any) -> Dict[str, Any]:
    return {"type": "object", "properties": properties, "required": [*properties],
            "additionalProperties": False}  # fmt: skip


NAME, COUNT = {"type": "string", "maxLength": 20}, {"type": "integer", "minimum": 0, "maximum": 99}
SCHEMAS = {
    "person": closed(name=NAME, age=COUNT, married={"type": "boolean"}),
    "list": {"type": "array", "items": NAME, "minItems": 2, "maxItems": 4},
    "nested": closed(title=NAME, place=closed(city=NAME, country={"enum": ["FR", "DE", "IT"]})),
    "either": {"anyOf": [closed(error=NAME), closed(ok={"const": True}, value=COUNT)]},
    "code": closed(code={"type": "string", "pattern": "^[A-Z]{3}-[0-9]{4}$"},
                   tags={"type": "array", "items": {"enum": ["new", "used"]}, "maxItems": 3}),
}  # fmt: skip


def build(path: str, **options: Any) -> Llama:
    return Llama.build(path, max_batch_size=16, device="cpu", dtype="bf16", compile=True, **options)


def decode(llama: Llama, prompt: str, temperature: float, **options: Any) -> Dict[str, Any]:
    """Tokens per second after the first, and the text."""
    dialog: Dialog = [{"role": "user", "content": prompt}]
    first, n, text = 0.0, 0, ""
    for event in llama.stream_chat([dialog], temperature, max_gen_len=200, seed=5, **options):
        first = first or time.perf_counter()
        n += event.token is not None
        text += event.text
    return {"speed": (n - 1) / (time.perf_counter() - first), "text": text}


def speedups(llama: Llama, speculate: str, temperature: float, prompts: List[str]) -> List[float]:
    """Of speculative over plain decoding, for each prompt."""
    ratios = []
    for prompt in prompts:
        turns = [
            [decode(llama, prompt, temperature, speculate=s) for s in ("off", speculate)]
            for _ in range(TURNS)
        ]
        if len({run["text"] for turn in turns for run in turn}) != 1:
            raise AssertionError(f"speculative decoding changed the text after {prompt!r}")
        plain, speculative = (
            statistics.median(run["speed"] for run in side) for side in zip(*turns, strict=True)
        )
        ratios.append(speculative / plain)
    return ratios


def speculation(path: str) -> Figures:
    prompts, found = json.loads(PROMPTS.read_text()), {}
    llama = build(path, draft_ckpt_dir=path, draft_quantize="int4")
    repeating: List[float] = []
    for kind in ("quote", "summarise", "edit"):
        ratios = speedups(llama, "lookup", 0, prompts[kind])
        found[f"lookup, {kind}: x plain"] = statistics.median(ratios)
        repeating += ratios
    found["lookup, these twelve prompts: x plain"] = statistics.median(repeating)
    for how, speculate, temperature in (
        ("lookup, free, greedy", "lookup", 0.0),
        ("lookup, free, drawn at 1.0", "lookup", 1.0),
        ("draft of 4 bits, free, greedy", "draft", 0.0),
    ):
        ratios = speedups(llama, speculate, temperature, prompts["free"])
        found[f"{how}: x plain"] = statistics.median(ratios)
        found[f"{how}, the worst prompt: x plain"] = min(ratios)
    return found


def first_token(llama: Llama, dialog: Dialog) -> float:
    began = time.perf_counter()
    events = llama.stream_chat([dialog], 0, max_gen_len=32)
    next(events)
    took = time.perf_counter() - began
    list(events)  # to its end, which adds it to the prefix cache
    return took


def text_of(llama: Llama, tokens: int, seed: int = 0) -> str:
    """A text of about this many tokens."""
    found, n = "", seed
    while len(llama.tokenizer.encode(found, bos=False, eos=False)) < tokens - 1:
        found, n = f"{found} {WORDS[n * n % 19]} {WORDS[n % 20]} {n},", n + 1
    return found


def prefixes(path: str) -> Figures:
    llama, found, first, second = build(path, prefix_cache_mb=2000), {}, [], []
    for turn in range(TURNS):
        dialog: List[Message] = [{"role": "user", "content": text_of(llama, 1450, 100 * turn)}]
        first.append(first_token(llama, dialog))
        [answer] = llama.chat_completion([dialog], 0, max_gen_len=32)
        dialog += [answer["generation"], {"role": "user", "content": "And what is the next word?"}]
        second.append(first_token(llama, dialog))
    found["chat of 1500 tokens, first turn: s to first token"] = statistics.median(first)
    found["second turn: x the first"] = statistics.median(second) / statistics.median(first)

    plain = build(path)
    shots = text_of(llama, 500, 1000) + "\n"
    questions = [f"{shots}Question {i}: {WORDS[i % 20]} or {WORDS[i % 17]}? A:" for i in range(100)]

    def ask(llama: Llama) -> float:
        began = time.perf_counter()
        for i in range(0, 100, 10):
            llama.text_completion(questions[i : i + 10], 0, max_gen_len=4)
        return time.perf_counter() - began

    def ask_anew() -> float:
        return ask(build(path, prefix_cache_mb=2000))

    turns = [(ask(plain), ask_anew()) for _ in range(TURNS)]
    without, reused = (statistics.median(side) for side in zip(*turns, strict=True))
    found["100 questions after 500 tokens, without reuse: s"] = without
    found["with reuse: x as fast"] = without / reused

    with tempfile.TemporaryDirectory() as directory:
        file, text = Path(directory) / "prefix", text_of(llama, 2000, 5000)
        llama.save_prefix(file, text)
        computing, loading = [], []
        for _ in range(TURNS):
            one, other = (build(path, prefix_cache_mb=2000) for _ in range(2))
            began = time.perf_counter()
            one.prefixes.compute(one._encode([text])[0])  # type: ignore[union-attr]
            computing.append(time.perf_counter() - began)
            began = time.perf_counter()
            other.load_prefix(file)
            loading.append(time.perf_counter() - began)
    found["2000 tokens computed: s"] = statistics.median(computing)
    found["from a file: x computing"] = statistics.median(loading) / statistics.median(computing)
    return found


def forms(path: str) -> Figures:
    """Seconds per token with structured outputs, relative to those without."""
    llama, found = build(path), {}
    row = closed(name={"type": "string"}, n={"type": "integer"})
    form = {"type": "json_schema", "schema": {"type": "array", "items": row, "minItems": 99}}
    for rows in (1, 16):
        for how, temperature in (("greedy", 0.0), ("drawn", 0.8)):
            turns = [
                [per_token(llama, rows, temperature, format_) for format_ in (None, form)]
                for _ in range(2 * TURNS + 1)
            ]
            free, formed = (statistics.median(side) for side in zip(*turns, strict=True))
            what = f"JSON, {rows} row{'s' * (rows > 1)}, {how}: x the time of a token"
            found[what] = formed / free
    return found


def per_token(
    llama: Llama, rows: int, temperature: float, format_: Optional[Dict[str, Any]]
) -> float:
    prompts = ["A list of people:" + " x" * i for i in range(rows)]
    first, n = 0.0, 0
    for _ in llama.stream_text(
        prompts, temperature, max_gen_len=64, stop_tokens={0}, seed=1, response_format=format_
    ):
        first = first or time.perf_counter()
        n += 1
    return (time.perf_counter() - first) / (n - 1)


def validity(path: str, prompts: int) -> Figures:
    """The share of answers that are valid, of prompts x SCHEMAS."""
    import jsonschema

    llama, valid, ended, texts = build(path), 0, 0, 0
    params = SamplingParams(temperature=1.0, top_p=0.95)
    for name, schema in SCHEMAS.items():
        format_ = {"type": "json_schema", "schema": schema}
        for begin in range(0, prompts, 15):
            dialogs: List[Dialog] = [
                [{"role": "user", "content": f"Give me a {name} about {WORDS[i % 20]} no. {i}."}]
                for i in range(begin, min(begin + 15, prompts))
            ]
            for answer in llama.chat_completion(
                dialogs, params=params, seed=begin, max_gen_len=160, response_format=format_
            ):
                texts += 1
                if answer["finish_reason"] == "stop":
                    ended += 1
                    jsonschema.validate(json.loads(answer["generation"]["content"]), schema)
                    valid += 1
    return {"texts of 5 schemas": texts, "of these ended": ended, "valid of those": valid / ended}


PARTS: Dict[str, Callable[..., Figures]] = {
    "speculation": speculation, "prefixes": prefixes, "forms": forms, "validity": validity
}  # fmt: skip


def rounds_of(part: str, path: str, rounds: int) -> Iterator[Figures]:
    for _ in range(rounds):
        command = [sys.executable, "-m", "benchmarks.savings", path, "--part", part]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
        yield json.loads(done.stdout.splitlines()[-1])


def main(
    checkpoint: str = DEMO,
    rounds: int = 3,
    quick: bool = False,
    out: Optional[str] = None,
    part: Optional[str] = None,
) -> None:
    """Measure all parts.

    Args:
        rounds: processes for each part.
        quick: one round, and fewer answers to validate.
        out: a directory for savings.json.
        part: only this part, in this process.
    """
    if part == "validity":
        print(json.dumps(validity(checkpoint, 10 if quick else 300)))
        return
    if part is not None:
        print(json.dumps(PARTS[part](checkpoint)))
        return
    results: Figures = {}
    for name in ("speculation", "prefixes", "forms"):
        found = list(rounds_of(name, checkpoint, 1 if quick else rounds))
        for key in found[0]:
            results[key] = statistics.median(run[key] for run in found)
            print(f"{key:<60}{results[key]:>9.3f}", flush=True)
    for key, value in validity(checkpoint, 10 if quick else 300).items():
        results[key] = value
        print(f"{key:<60}{value:>9.3f}", flush=True)
    if out is not None:
        Path(out).mkdir(parents=True, exist_ok=True)
        (Path(out) / "savings.json").write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results))


if __name__ == "__main__":
    fire.Fire(main)
