"""Compares `llama serve` with other servers under the load of `llama bench load`.

    python -m benchmarks.serving --llama_server PATH
    python -m benchmarks.serving --path FILE.gguf --rounds 3 --only "llama serve" "llama.cpp"

Each side is started on the same weights, with the same number of threads and rows and the same
context, and gets the same requests (llama.apps.load), `concurrency` of them at a time. A side
sleeps (SIGSTOP) while another has its turn; the turns go A B A B, and medians of the rounds are
compared.

The sides: `llama serve`; `llama.cpp`, its llama-server, compiled for this machine, of which the
path is given; `transformers`, `transformers serve` with continuous batching, with --hf a directory
in Hugging Face's format.
"""

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

from llama.apps import load

DEMO = "checkpoints/SmolLM2-135M-Instruct/SmolLM2-135M-Instruct.Q4_1.gguf"
CONTEXT = 2048  # tokens of a row


class Side:
    """A server in a process of its own, asleep but in its turns."""

    def __init__(self, name: str, command: List[str], url: str, model: Optional[str] = None):
        self.name, self.url, self.model = name, url, model
        self.rounds: List[Dict[str, Any]] = []
        log = Path(tempfile.gettempdir()) / f"{name.replace(' ', '-')}.log"
        self._log = open(log, "w")  # noqa: SIM115
        self._process = subprocess.Popen(
            command, stdout=self._log, stderr=subprocess.STDOUT, start_new_session=True
        )
        self._wait()
        self._signal(signal.SIGSTOP)

    def turn(self, jobs: List[load.Job], concurrency: int) -> None:
        self._signal(signal.SIGCONT)
        load.run(self.url, jobs[:2], 2, model=self.model)  # awake, and warm
        self.rounds.append(load.run(self.url, jobs, concurrency, model=self.model))
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


def sides(
    path: str, threads: int, rows: int, llama_server: Optional[str], hf: Optional[str]
) -> Iterator[Side]:
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
             "--device", "cpu", "--force-model", hf],
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
    out: Optional[str] = None,
) -> None:
    """Print a table of the medians, and a line of JSON; with out, save it as serving.json there.

    Args:
        letters: prompts of letters in place of words, for the models of benchmarks.shapes, in
            whose vocabulary a letter is a token.
    """
    threads = threads or len(os.sched_getaffinity(0))
    texts = (string.ascii_letters, "") if letters else (load.WORDS, " ")
    jobs = load.make_jobs(requests, rate, 1, *texts)
    found = list(sides(path, threads, concurrency, llama_server, hf))
    try:
        for _ in range(rounds):
            for side in found:
                side.turn(jobs, concurrency)
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
