"""Compares `llama serve` with other servers under the load of `llama bench load`.

    python -m benchmarks.serving --llama_server PATH
    python -m benchmarks.serving --path FILE.gguf --rounds 3 --only "llama serve" "llama.cpp"

Each side is started on the same weights, with the same number of threads and rows and the same
context, and gets the same requests (llama.apps.load), `concurrency` of them at a time. A side
sleeps (SIGSTOP) while another has its turn; the turns go A B A B, and medians of the rounds are
compared.

The sides: `llama serve`; with --alone its engine without HTTP; `llama.cpp`, its llama-server,
compiled for this machine, of which the path is given; `transformers`, `transformers serve` with
continuous batching, with --hf a directory in Hugging Face's format (whose configuration should
name no eos token, since transformers has no ignore_eos).
"""

import asyncio
import json
import os
import platform
import signal
import socket
import statistics
import string
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional

import fire

from llama import Llama
from llama.apps import load

DEMO = "checkpoints/SmolLM2-135M-Instruct/SmolLM2-135M-Instruct.Q4_1.gguf"
CONTEXT = 2048  # tokens of a row


class Side:
    """A server in a process of its own, asleep but in its turns."""

    def __init__(self, name: str, command: List[str], url: str, model: Optional[str] = None):
        self.name, self.url = name, url
        self._how: Dict[str, Any] = {"model": model, "ignore_eos": model is None}
        self.rounds: List[Dict[str, Any]] = []
        log = Path(tempfile.gettempdir()) / f"{name.replace(' ', '-')}.log"
        self._log = open(log, "w")  # noqa: SIM115
        self._process = subprocess.Popen(
            command, stdout=self._log, stderr=subprocess.STDOUT, start_new_session=True
        )
        self._wait()
        self._signal(signal.SIGSTOP)

    def turn(self, jobs: List[load.Job], warm: List[load.Job], concurrency: int) -> None:
        self._signal(signal.SIGCONT)
        load.run(self.url, warm, len(warm), **self._how)  # awake
        self.rounds.append(load.run(self.url, jobs, concurrency, **self._how))
        self._signal(signal.SIGSTOP)

    def close(self) -> None:
        self._signal(signal.SIGKILL)
        self._process.wait()
        self._log.close()

    def _signal(self, number: int) -> None:
        os.killpg(self._process.pid, number)

    def _wait(self) -> None:
        end = time.monotonic() + 600
        while self._process.poll() is None and time.monotonic() < end:
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=5):
                    return
            except (OSError, urllib.error.URLError):
                time.sleep(0.5)
        raise ValueError(f"{self.name} doesn't start: see {self._log.name}")


class InProcess:
    """The engine of `llama serve` without HTTP, in this process."""

    name = "engine alone"

    def __init__(self, path: str, rows: int):
        self._llama = Llama.build(path, max_batch_size=rows, max_seq_len=CONTEXT)
        self.rounds: List[Dict[str, Any]] = []

    def turn(self, jobs: List[load.Job], warm: List[load.Job], concurrency: int) -> None:
        self.rounds.append(asyncio.run(self._turn(jobs, warm, concurrency)))

    async def _turn(
        self, jobs: List[load.Job], warm: List[load.Job], concurrency: int
    ) -> Dict[str, Any]:
        encode, bos = self._llama.tokenizer.encode, self._llama.tokenizer.add_bos
        limit = asyncio.Semaphore(concurrency)

        async def one(job: load.Job) -> load.Timing:
            async with limit:
                sent, times = time.perf_counter(), []
                ids = encode(job.prompt, bos=bos, eos=False)
                async for _ in engine.stream(ids, job.max_tokens, temperature=0, stop_tokens=set()):
                    times.append(time.perf_counter())
                return load.timing(job.max_tokens, sent, times)

        async with self._llama.async_engine() as engine:
            await asyncio.gather(*map(one, warm))
            began = time.perf_counter()
            found = await asyncio.gather(*map(one, jobs))
        return load.summary(found, time.perf_counter() - began, concurrency)

    def close(self) -> None: ...


def sides(
    path: str,
    threads: int,
    rows: int,
    llama_server: Optional[str],
    hf: Optional[str],
    alone: bool,
) -> Iterator["Side | InProcess"]:
    def url() -> str:
        with socket.create_server(("127.0.0.1", 0)) as free:
            return f"http://127.0.0.1:{free.getsockname()[1]}"

    os.environ["OMP_NUM_THREADS"] = str(threads)
    at = url()
    yield Side(
        "llama serve",
        [sys.executable, "-m", "llama", "serve", path, "--port", at.rpartition(":")[2],
         "--max_batch_size", str(rows), "--max_seq_len", str(CONTEXT), "--log", "off"],
        at,
    )  # fmt: skip
    if alone:
        yield InProcess(path, rows)
    if llama_server:
        at = url()
        yield Side(
            "llama.cpp",
            [llama_server, "-m", path, "--port", at.rpartition(":")[2], "-t", str(threads),
             "-np", str(rows), "-c", str(rows * CONTEXT), "-cb", "--no-webui"],
            at,
        )  # fmt: skip
    if hf:
        at = url()
        yield Side(
            "transformers",
            [str(Path(sys.executable).parent / "transformers"), "serve", "--port",
             at.rpartition(":")[2], "--continuous-batching", "--dtype", "bfloat16",
             "--device", "cpu", hf],
            at, hf,
        )  # fmt: skip


def main(
    path: str = DEMO,
    requests: int = 32,
    concurrency: int = 16,
    rounds: int = 3,
    threads: Optional[int] = None,
    llama_server: Optional[str] = None,
    hf: Optional[str] = None,
    rate: Optional[float] = None,
    letters: bool = False,
    alone: bool = False,
    out: Optional[str] = None,
) -> None:
    """Print a table of the medians, and a line of JSON; with out, save it as serving.json there.

    Args:
        alone: also the engine without HTTP.
        letters: prompts of letters in place of words, for the models of benchmarks.shapes, in
            whose vocabulary a letter is a token.
    """
    threads = threads or len(os.sched_getaffinity(0))
    texts = (string.ascii_letters, "") if letters else (load.WORDS, " ")
    found = list(sides(path, threads, concurrency, llama_server, hf, alone))
    try:
        for number in range(rounds):  # each with texts of its own, which no cache knows
            jobs = load.make_jobs(requests, rate, number, *texts)
            warm = load.make_jobs(2, None, rounds + number, *texts)
            for side in found:
                side.turn(jobs, warm, concurrency)
                print(side.name, json.dumps(side.rounds[-1]), file=sys.stderr, flush=True)
    finally:
        for side in found:
            side.close()
    summary: Dict[str, Any] = {
        "path": path, "requests": requests, "concurrency": concurrency, "rounds": rounds,
        "threads": threads, "machine": platform.processor() or platform.machine(),
        "sides": {side.name: _medians(side.rounds) for side in found},
    }  # fmt: skip
    for name, values in summary["sides"].items():
        print(f"{name:<14}" + "  ".join(f"{key} {value:g}" for key, value in values.items()))
    print(json.dumps(summary))
    if out:
        Path(out).mkdir(parents=True, exist_ok=True)
        (Path(out) / "serving.json").write_text(json.dumps(summary, indent=1) + "\n")


def _medians(rounds: List[Dict[str, Any]]) -> Dict[str, float]:
    flat = [
        {
            "tokens/s": one["tokens/s"],
            "first p50": one["first token"]["p50"], "first p95": one["first token"]["p95"],
            "between p50": one["between tokens"]["p50"],
            "between p95": one["between tokens"]["p95"],
        }
        for one in rounds
    ]  # fmt: skip
    return {key: statistics.median(one[key] for one in flat) for key in flat[0]}


if __name__ == "__main__":
    fire.Fire(main)
