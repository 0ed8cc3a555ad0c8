"""The sides that benchmarks.peers compares: this code, transformers, llama.cpp, each a process.

    python -m benchmarks.sides KIND PATH DTYPE THREADS      (benchmarks.peers starts these)

A side reads one line of JSON per task, {"prompts": [[id, ...], ...], "n": new tokens of each}, and
answers with one: {"first": seconds until the first token of all, "rest": seconds from there to the
last, "tokens": the new ids}. It sleeps between tasks, so that only one side computes at a time; all
have the same number of threads.

DTYPE is fp32 or bf16, to which weights are converted; for this code also int8 or int4, or `stored`:
as in the file, which is the default. `eager-` before it means the plain layers, compile=False. For
llama.cpp the file determines it.
"""

import http.client
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any, Callable, Dict, List, Sequence, Tuple
from urllib.parse import urlparse

Tokens = List[List[int]]
Answer = Dict[str, Any]

ROWS, CONTEXT = 16, 4224


class Ours:
    def __init__(self, path: Path, dtype: str, threads: int, rows: int = ROWS):
        import torch

        from llama import Llama

        torch.set_num_threads(threads)
        compile, dtype = not dtype.startswith("eager-"), dtype.removeprefix("eager-")
        options: Dict[str, Any] = {"quantize": "dense", "dtype": dtype, "compile": compile}
        if dtype == "stored":
            options = {}
        elif dtype.startswith("int"):
            options.update(quantize=dtype, dtype="bf16")
        self._llama = Llama.build(
            path, max_seq_len=CONTEXT, max_batch_size=rows, device="cpu", **options
        )

    def run(self, prompts: Tokens, n: int) -> Answer:
        times = [time.perf_counter()]

        def tick() -> bool:  # called after each step, which samples a token of each row
            times.append(time.perf_counter())
            return False

        tokens, _ = self._llama.generate(
            prompts, n, temperature=0, stop_tokens=set(), should_stop=tick
        )
        return {"first": times[1] - times[0], "rest": times[-1] - times[1], "tokens": tokens}


class Transformers:
    def __init__(self, path: Path, dtype: str, threads: int, rows: int = ROWS):
        import torch
        from transformers import LlamaForCausalLM

        torch.set_num_threads(threads)
        kind = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
        how: Any
        where, how = (path, {}) if path.is_dir() else (path.parent, {"gguf_file": path.name})
        model = LlamaForCausalLM.from_pretrained(where, dtype=kind, **how)
        self._model: Any = model.eval()
        self._model.generation_config.eos_token_id = None  # nothing ends a row early

    def run(self, prompts: Tokens, n: int) -> Answer:
        import torch

        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        mask = (torch.arange(width) >= width - lengths[:, None]).long()
        times = [time.perf_counter()]

        def tick(ids: Any, scores: Any, **_: Any) -> Any:
            times.append(time.perf_counter())
            return torch.zeros(len(ids), dtype=torch.bool)

        with torch.inference_mode():
            out = self._model.generate(
                ids, attention_mask=mask, do_sample=False, min_new_tokens=n, max_new_tokens=n,
                pad_token_id=0, stopping_criteria=[tick],
            )  # fmt: skip
        tokens = out[:, width:].tolist()
        return {"first": times[1] - times[0], "rest": times[-1] - times[1], "tokens": tokens}


class LlamaCpp:
    """llama.cpp's server, from xllamacpp's wheel, in this process. For one prompt, it measures the
    times itself.

    Each number of parallel sequences gets its own server, with the same context per sequence; only
    one of them is in use at a time.
    """

    def __init__(self, path: Path, dtype: str, threads: int, rows: int = ROWS):
        self._path, self._threads = path, threads
        self._servers: Dict[int, Any] = {}
        self._server(1)

    def _server(self, slots: int) -> Any:
        import xllamacpp

        if slots not in self._servers:
            params = xllamacpp.CommonParams()
            params.model.path = str(self._path)
            params.n_ctx, params.n_parallel, params.kv_unified = CONTEXT * slots, slots, False
            params.warmup, params.verbosity = False, 0
            params.cpuparams.n_threads = params.cpuparams_batch.n_threads = self._threads
            self._servers[slots] = xllamacpp.Server(params)
        return self._servers[slots]

    def run(self, prompts: Tokens, n: int) -> Answer:
        server = self._server(len(prompts))

        def one(prompt: Sequence[int]) -> Dict[str, Any]:
            connection = http.client.HTTPConnection(urlparse(server.listening_address).netloc)
            body = {
                "prompt": list(prompt), "temperature": 0, "n_predict": n, "cache_prompt": False,
                "return_tokens": True, "ignore_eos": True,
            }  # fmt: skip
            connection.request("POST", "/completion", json.dumps(body))
            return json.loads(connection.getresponse().read())

        start = time.perf_counter()
        with ThreadPoolExecutor(len(prompts)) as pool:
            answers = list(pool.map(one, prompts))
        whole = time.perf_counter() - start
        first = answers[0]["timings"]["prompt_ms"] / 1e3
        rest = answers[0]["timings"]["predicted_ms"] / 1e3
        if len(prompts) > 1:
            first, rest = whole, 0.0  # sequences begin and end at different times
        return {"first": first, "rest": rest, "tokens": [answer["tokens"] for answer in answers]}


class CompiledLlamaCpp:
    """The library through llama-cpp-python, which can be compiled for the machine."""

    BATCH = 2048

    def __init__(self, path: Path, dtype: str, threads: int, rows: int = ROWS):
        import llama_cpp

        self._cpp: Any = llama_cpp
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(
            str(path).encode(), llama_cpp.llama_model_default_params()
        )
        vocabulary = llama_cpp.llama_model_get_vocab(self._model)
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(vocabulary)
        self._batch = llama_cpp.llama_batch_init(self.BATCH, 0, 1)
        self._threads = threads
        self._contexts: Dict[int, Any] = {}

    def _context(self, rows: int) -> Any:
        if rows not in self._contexts:
            params = self._cpp.llama_context_default_params()
            params.n_ctx, params.n_seq_max = CONTEXT * rows, rows
            params.n_batch, params.n_ubatch = self.BATCH, 512
            params.n_threads = params.n_threads_batch = self._threads
            self._contexts[rows] = self._cpp.llama_init_from_model(self._model, params)
        return self._contexts[rows]

    def _decode(self, context: Any, fed: List[Tuple[int, int, int, bool]]) -> List[int]:
        """Takes (row, position, token, whether it is the row's last); returns the tokens after the
        last ones."""
        import numpy as np

        found = []
        for begin in range(0, len(fed), self.BATCH):
            part, batch = fed[begin : begin + self.BATCH], self._batch
            batch.n_tokens = len(part)
            for i, (row, position, token, last) in enumerate(part):
                batch.token[i], batch.pos[i], batch.logits[i] = token, position, last
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, row
            if self._cpp.llama_decode(context, batch):
                raise RuntimeError("llama_decode failed")
            for i in [i for i, (*_, last) in enumerate(part) if last]:
                logits = self._cpp.llama_get_logits_ith(context, i)
                found.append(int(np.ctypeslib.as_array(logits, (self._vocab_size,)).argmax()))
        return found

    def run(self, prompts: Tokens, n: int) -> Answer:
        context = self._context(len(prompts))
        self._cpp.llama_memory_clear(self._cpp.llama_get_memory(context), True)
        times, places = [time.perf_counter()], list(map(len, prompts))
        fed = [
            (row, i, token, i == len(prompt) - 1)
            for row, prompt in enumerate(prompts)
            for i, token in enumerate(prompt)
        ]
        rows: Tokens = [[] for _ in prompts]
        for step in range(n):
            for row, token in zip(rows, self._decode(context, fed), strict=True):
                row.append(token)
            times.append(time.perf_counter())
            fed = [(i, places[i] + step, row[-1], True) for i, row in enumerate(rows)]
        return {"first": times[1] - times[0], "rest": times[-1] - times[1], "tokens": rows}


def fastest(work: Callable[[], Any]) -> float:
    """Seconds of the fastest of five calls."""
    times = []
    for _ in range(5):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


@lru_cache
def memory(threads: int) -> Any:
    """512 MB, larger than any processor cache."""
    import torch

    torch.set_num_threads(threads)
    return torch.ones(1 << 27)


def bytes_per_s(threads: int) -> float:
    """How fast this process reads memory just now: it differs between processes, and in time."""
    large = memory(threads)
    return large.nbytes / fastest(large.sum)


class Limit:
    """FLOPs of bf16 (or fp32) matrix products per second; bytes read are measured on every side."""

    def __init__(self, path: Path, dtype: str, threads: int, rows: int = ROWS):
        import torch

        torch.set_num_threads(threads)
        kind = torch.float32 if dtype == "fp32" else torch.bfloat16
        self._square = torch.ones(2048, 2048, dtype=kind)

    def run(self, prompts: Tokens, n: int) -> Answer:
        seconds = fastest(lambda: self._square @ self._square)
        return {"flop_per_s": 2 * 2048**3 / seconds}


SIDES: Dict[str, Any] = {
    "llama": Ours,
    "transformers": Transformers,
    "llama.cpp": LlamaCpp,
    "llama.cpp compiled": CompiledLlamaCpp,
    "limit": Limit,
}


class Side:
    """A handle to a side's process."""

    def __init__(self, kind: str, path: Path, dtype: str, threads: int):
        quiet = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.sides", kind, str(path), dtype, str(threads)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            env={**os.environ, **quiet, "OMP_NUM_THREADS": str(threads)},
        )  # fmt: skip

    def run(self, prompts: Tokens, n: int) -> Answer:
        assert self._process.stdin and self._process.stdout
        print(json.dumps({"prompts": prompts, "n": n}), file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self._process.args!r}: ended with {self._process.wait()}")
        return json.loads(line)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")  # keeps libraries' prints out of the answers
    os.dup2(2, 1)
    kind, path, dtype, threads = sys.argv[1:]
    side = SIDES[kind](Path(path), dtype, int(threads))
    for line in sys.stdin:
        answer = side.run(**json.loads(line))
        answer["bytes_per_s"] = bytes_per_s(int(threads))
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
