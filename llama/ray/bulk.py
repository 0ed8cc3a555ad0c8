"""Many requests on a Ray cluster: actors with an engine each, which answer blocks of requests.

What is lost with a worker or a node is computed again, as long as anything comes: the engines that
are left go on, and Ray starts another one for one that died where there is room. The driver sleeps
in `ray.wait` until a block is finished; a pipeline of Ray Data looks for that ten times a second,
and has three more actors that wake up all the time.
"""

import os
import sys
from collections import deque
from contextlib import contextmanager
from dataclasses import asdict, replace
from itertools import groupby
from math import ceil
from pathlib import Path
from typing import Any, Dict, Iterator, List, Mapping, Optional, Sequence, Tuple

from llama.ray.predictor import Predictor
from llama.server.offline import EngineFailed, Reply, Request, beginning
from llama.server.settings import Settings

ROWS = 32  # of a block
CALLS = 6  # blocks that an engine answers at once: more rows than run, so that all of them do
DEATHS = 3  # of each engine, without a reply in between, before none is started any more
BEGINNING = 256  # characters of a prompt that requests share which belong together


class Worker(Predictor):
    """An engine for blocks of requests."""

    def answer(self, requests: Sequence[Request]) -> List[Reply]:
        try:
            return super().answer(requests)
        except EngineFailed:
            os._exit(1)  # another one is started


def answers(
    requests: Sequence[Request],
    options: Mapping[str, Any],
    settings: Settings,
    address: Optional[str] = None,
    engines: Optional[int] = None,
    cpus: Optional[float] = None,
) -> Iterator[List[Reply]]:
    """The replies, some at a time, in the order in which they come; each one once.

    Args:
        requests: those that begin alike as neighbours.
        options: of `Llama.build`.
        address: of the cluster; None: the one that this machine belongs to, or else a new one;
            local: a new one.
        engines: how many; by default as many as there are GPUs, or without any, machines.
        cpus: of each, without GPUs; by default a machine's.

    Raises:
        ValueError: Ray isn't installed; no room for an engine.
        ConnectionError: no cluster there.
        OSError: no engine answers.
    """
    options = {name: _absolute(value) for name, value in options.items()}
    adapters = [f"{name}={_absolute(path)}" for name, path in settings.adapters.items()]
    options["settings"] = asdict(replace(settings, adapter=adapters))
    with _cluster(address) as ray:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        count, resources = _pool(nodes, engines, cpus)
        pool = _Pool(ray, options, count, resources)
        try:
            size = min(ROWS, ceil(len(requests) / count / CALLS / 2))
            yield from pool.answers(deque(blocks(requests, size)))
        finally:
            pool.close()


class _Pool:
    """Engines, and the blocks that each of them is answering."""

    def __init__(
        self, ray: Any, options: Mapping[str, Any], count: int, resources: Mapping[str, float]
    ):
        self._ray, self._options = ray, options
        self._actor = ray.remote(Worker).options(
            max_concurrency=CALLS, scheduling_strategy="SPREAD", **resources
        )
        self._engines: List[Any] = []
        self._blocks: Dict[Any, int] = {}  # how many each engine has that is loaded
        # By what will be there: the engine, and its block, or none while it is loading.
        self._running: Dict[Any, Tuple[Any, List[Request]]] = {}
        for _ in range(count):
            self._start()
        self._deaths, self._most = 0, DEATHS * count

    def answers(self, waiting: "deque[List[Request]]") -> Iterator[List[Reply]]:
        """The replies to all blocks.

        Raises:
            OSError: engines only die.
        """
        while waiting or any(block for _, block in self._running.values()):
            [found], _ = self._ray.wait([*self._running])
            engine, block = self._running.pop(found)
            try:
                replies = self._ray.get(found)
            except self._ray.exceptions.RayError as error:
                reason = str(error).strip().splitlines()[-1]
                if block:
                    waiting.appendleft(block)
                    print(f"{len(block)} requests are asked again: {reason}", file=sys.stderr)
                if engine in self._engines:  # the first time that this is noticed
                    self._remove(engine)
                    self._deaths += 1
                    if self._deaths == self._most:
                        raise OSError(f"no engine answers: {reason}") from error
                    self._start()
            else:
                if not block:
                    self._blocks[engine] = 0
                else:
                    self._deaths = 0
                    if engine in self._blocks:
                        self._blocks[engine] -= 1
                    yield replies
            while waiting and min(self._blocks.values(), default=CALLS + 1) <= CALLS:
                engine = min(self._blocks, key=self._blocks.__getitem__)
                block = waiting.popleft()
                self._blocks[engine] += 1  # one more than it answers at once: that one waits there
                self._running[engine.answer.remote(block)] = engine, block

    def _start(self) -> None:
        engine = self._actor.remote(**self._options)
        self._engines.append(engine)
        self._running[engine.__ray_ready__.remote()] = engine, []

    def _remove(self, engine: Any) -> None:
        self._engines.remove(engine)
        self._blocks.pop(engine, None)
        self._ray.kill(engine)

    def close(self) -> None:
        for engine in [*self._engines]:
            self._remove(engine)


def blocks(requests: Sequence[Request], size: int) -> Iterator[List[Request]]:
    """Cut requests into blocks, each of which one engine answers. What begins alike isn't parted if
    it fits into one."""
    block: List[Request] = []
    for _, group in groupby(requests, lambda request: beginning(request)[:BEGINNING]):
        alike = list(group)
        if block and len(block) + len(alike) > size:
            yield block
            block = []
        block += alike
        while len(block) > size:
            yield block[:size]
            block = block[size:]
    if block:
        yield block


def _absolute(value: Any) -> Any:
    """A path of this machine for processes with other working directories."""
    local = isinstance(value, (str, Path)) and Path(value).exists()
    return str(Path(value).absolute()) if local else value


def _pool(
    machines: List[Mapping[str, float]], engines: Optional[int], cpus: Optional[float]
) -> Tuple[int, Dict[str, float]]:
    """How many engines there are, and what each takes."""
    gpus = int(sum(machine.get("GPU", 0) for machine in machines))
    if gpus:
        return engines or gpus, {"num_gpus": 1}
    have = [machine["CPU"] for machine in machines if machine.get("CPU")]
    if not have:
        raise ValueError("the cluster has neither GPUs nor CPUs")
    each = cpus or max(1, min(have) // ceil((engines or 1) / len(have)))
    return engines or max(1, sum(int(cpu // each) for cpu in have)), {"num_cpus": each}


@contextmanager
def _cluster(address: Optional[str]) -> Iterator[Any]:
    """Ray, connected."""
    try:
        import ray
    except ImportError as error:
        raise ValueError(
            f"llama batch --ray needs {error.name}: pip install llama-reference[ray]"
        ) from None
    if ray.is_initialized():
        yield ray
        return
    quiet: Dict[str, Any] = {"log_to_driver": False, "logging_level": "error"}
    try:
        try:
            if address != "local":
                ray.init(address or "auto", **quiet)
        except ConnectionError:
            if address:
                raise
        if not ray.is_initialized():
            ray.init("local", include_dashboard=False, _node_ip_address="127.0.0.1", **quiet)
        yield ray
    finally:
        ray.shutdown()
