"""A server as users start it: `llama serve` in a process of its own, on a free port of loopback."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from typing import Iterator, List

import httpx
import psutil
from conftest import ROOT, llama_command, torchrun

PATIENCE = 600  # seconds that something may take on a machine with other work


class Served:
    """A running server.

    Attributes:
        url: without /v1.
        lines: what it has printed so far.
        client: for requests.
    """

    def __init__(self, process: subprocess.Popen):
        self.process, self.lines = process, []
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()
        wait_for(lambda: self.find(r" at (http://\S+)/v1;") or process.poll() is not None)
        if process.poll() is not None:
            self._thread.join(PATIENCE)  # it may not have read what was printed last
            raise RuntimeError("".join(self.lines))
        self.url = self.find(r" at (http://\S+)/v1;")[1]
        self.client = httpx.Client(base_url=self.url, timeout=PATIENCE)

    def _read(self) -> None:
        for line in self.process.stdout:
            self.lines.append(line)

    def find(self, pattern: str):
        return next(filter(None, (re.search(pattern, line) for line in [*self.lines])), None)

    def stats(self) -> dict:
        return self.client.get("/stats").json()

    def chat(self, text: str, **body):
        messages = [{"role": "user", "content": text}]
        return self.client.post("/v1/chat/completions", json={"messages": messages, **body})

    def wait_idle(self) -> None:
        """Until no request runs or waits, and no block of the cache is held."""
        held = ("rows", "running", "waiting", "blocks_used")

        def idle() -> bool:
            stats = self.stats()
            return not any(stats[name] for name in held)

        wait_for(idle)

    def end(self, signum: int = signal.SIGINT) -> int:
        self.process.send_signal(signum)
        code = self.process.wait(PATIENCE)
        self._thread.join(PATIENCE)
        return code


@contextlib.contextmanager
def serve(
    *options: object, env: dict | None = None, ranks: int = 0, forked: bool = True
) -> Iterator[Served]:
    """ranks: under torchrun, if there are any. forked: the process stands for another one."""
    port = [] if any("--port" in str(option) for option in options) else ["--port=0"]
    on_ray = any("--ray" in str(option) for option in options)
    if on_ray:
        port = [f"--port={free_port()}"]  # its proxies can't take any
    command = [sys.executable, "-m", "llama"]
    if ranks:
        command = [*torchrun(ranks, [sys.executable]), "-m", "llama"]
    elif forked and not on_ray:
        command = llama_command()
    command = [*command, "serve", *port, *map(str, options)]
    process = subprocess.Popen(
        command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env={**os.environ, **(env or {})},
    )  # fmt: skip
    try:
        served = Served(process)
        yield served
        served.client.close()
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            for one in psutil.Process(process.pid).children(recursive=True):  # of torchrun
                one.kill()
        process.kill()
        process.wait(PATIENCE)
        process.stdout.close()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return found.getsockname()[1]


def add_node(cluster, **options: object) -> None:
    """With one processor. Ray's own limits of 30 s for a node and 60 s for a worker to start may be
    too short for a busy machine."""
    os.environ.setdefault("RAY_worker_register_timeout_seconds", str(PATIENCE))
    options |= {"include_log_monitor": False, "no_monitor": True}  # a Python less each
    for left in (2, 1, 0):
        try:
            cluster.add_node(num_cpus=1, object_store_memory=200_000_000, **options)
            return
        except Exception:
            if not left:
                raise


@contextlib.contextmanager
def ray_cluster(nodes: int = 2):
    """Nodes of a Ray cluster on loopback, with a processor each; yields their `Cluster`."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    for name in ("READY_CHECK", "HEALTH_CHECK"):  # by default 5 and 10 s
        os.environ.setdefault(f"RAY_SERVE_PROXY_{name}_TIMEOUT_S", "60")
    from ray.cluster_utils import Cluster

    found = Cluster()
    try:
        for _ in range(nodes):  # Ray takes .1 for the address outside
            add_node(found, include_dashboard=False, node_ip_address="127.0.0.2")
        yield found
    finally:
        found.shutdown()


def wait_for(condition, patience: float = PATIENCE):
    """What the condition returns, once it is true."""
    end = time.monotonic() + patience
    while not (found := condition()):
        assert time.monotonic() < end, "it hasn't come true in time"
        time.sleep(0.02)
    return found


def events(response: httpx.Response) -> List[str]:
    """The data of server-sent events, in order."""
    return [line[6:] for line in response.iter_lines() if line.startswith("data: ")]
