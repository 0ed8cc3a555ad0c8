"""Many requests on a Ray cluster: Ray Data with a pool of actors, one engine in each.

What is lost with a worker or a node is computed again, as long as anything comes: the engines that
are left go on, Ray starts another one for one that died where there is room, and what is missing in
the end is asked for once more.
"""

import logging
import os
import socket
import sys
import warnings
from contextlib import contextmanager
from dataclasses import asdict, replace
from itertools import groupby
from math import ceil
from pathlib import Path
from typing import Any, Dict, Iterator, List, Mapping, Optional, Sequence, Tuple

import numpy as np

from llama.ray.predictor import Predictor
from llama.server.offline import EngineFailed, Reply, Request, beginning
from llama.server.settings import Settings

ROWS = 32  # of a block
CALLS = 6  # blocks that an engine answers at once: more rows than run, so that all of them do
PATHS = ("ckpt_dir", "tokenizer_path", "draft_ckpt_dir", "adapter_dir")  # of `Llama.build`
BEGINNING = 256  # characters of a prompt that requests share which belong together


class Worker(Predictor):
    """An engine for blocks of requests."""

    def __call__(self, batch: Dict[str, np.ndarray]) -> Dict[str, np.ndarray]:
        columns = (batch[name] for name in Request._fields)
        try:
            replies = self.answer([
                Request(int(number), str(path), bytes(body), int(seed))
                for number, path, body, seed in zip(*columns, strict=True)
            ])  # fmt: skip
        except EngineFailed:
            os._exit(1)  # Ray starts another one
        found = zip(*replies, strict=True)
        return {
            name: np.array([*column], object if name == "body" else None)
            for name, column in zip(Reply._fields, found, strict=True)
        }


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
    options, settings = absolute(options, settings)
    with _cluster(address) as ray:
        left = {request.number: request for request in requests}
        while left:
            before, failure = len(left), None
            try:
                for replies in _once(ray, list(left.values()), options, settings, engines, cpus):
                    fresh = [reply for reply in replies if left.pop(reply.number, None)]
                    if fresh:
                        yield fresh
            except (ray.exceptions.RayError, ray.data.exceptions.SystemException) as error:
                failure = error
            if len(left) == before:
                reason = str(failure or "all have died").strip().splitlines()[-1]
                raise OSError(f"no engine answers: {reason}") from failure
            if left:
                print(f"{len(left)} requests are asked again: an engine was lost", file=sys.stderr)


def _once(
    ray: Any,
    requests: List[Request],
    options: Mapping[str, Any],
    settings: Settings,
    engines: Optional[int],
    cpus: Optional[float],
) -> Iterator[List[Reply]]:
    """What comes of an attempt, in which blocks that fail are left out."""
    import pyarrow

    count, resources = _pool([n["Resources"] for n in ray.nodes() if n["Alive"]], engines, cpus)
    size = min(ROWS, ceil(len(requests) / count / CALLS / 2))
    context = ray.data.DataContext.get_current().copy()
    context.enable_progress_bars = context.print_on_execution_start = False
    context.max_errored_blocks, context.max_consecutive_actor_init_deaths = -1, 3
    tables = [
        pyarrow.table(dict(zip(Request._fields, zip(*block, strict=True), strict=True)))
        for block in blocks(requests, size)
    ]
    with ray.data.DataContext.current(context), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ray 2.64 will name the last two otherwise
        found = ray.data.from_arrow(tables).map_batches(
            Worker, batch_size=None,
            fn_constructor_kwargs={**options, "settings": asdict(settings)},
            compute=ray.data.ActorPoolStrategy(
                size=count, max_tasks_in_flight_per_actor=CALLS + 1,
                max_concurrent_calls_per_actor=CALLS, enable_true_multi_threading=True,
            ),
            # A call waits for its own actor, which needn't come back: it is another attempt's.
            max_restarts=-1, max_task_retries=0, **resources,
        )  # fmt: skip
    for batch in found.iter_batches(batch_size=None, prefetch_batches=0):
        columns = (batch[name] for name in Reply._fields)
        yield [Reply(int(n), int(s), bytes(b)) for n, s, b in zip(*columns, strict=True)]


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


def absolute(options: Mapping[str, Any], settings: Settings) -> Tuple[Dict[str, Any], Settings]:
    """With paths of this machine for processes with other working directories."""

    def path(value: Any) -> Any:
        return str(Path(value).absolute()) if value and Path(value).exists() else value

    adapters = [f"{name}={path(value)}" for name, value in settings.adapters.items()]
    paths = {name: path(options[name]) for name in PATHS if name in options}
    return {**options, **paths}, replace(settings, adapter=adapters)


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
    if each > max(have):
        raise ValueError(f"cpus={each:g} of an engine: the largest machine has {max(have):g}")
    room = sum(int(cpu // each) for cpu in have) if cpus else len(have)
    return engines or room, {"num_cpus": each}


def connect(address: Optional[str], **options: Any) -> None:
    """`ray.init`, which waits for long if nobody answers.

    Raises:
        ConnectionError: no cluster there, or one of another version.
    """
    import ray

    host, _, port = (address or "").rpartition(":")
    try:
        if port.isdigit():
            name = host.rpartition("/")[2].strip("[]")
            socket.create_connection((name, int(port)), timeout=10).close()
        ray.init(address, **options)
    except (OSError, OverflowError, RuntimeError) as error:
        raise ConnectionError(f"no cluster at ray={address}: {error}") from error


@contextmanager
def _cluster(address: Optional[str]) -> Iterator[Any]:
    """Ray, connected."""
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ValueError(
            f"llama batch --ray needs {error.name}: pip install llama-reference[ray]"
        ) from None
    if ray.is_initialized():
        yield ray
        return
    quiet: Dict[str, Any] = {"log_to_driver": False, "logging_level": "error"}
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # what it tells of, is dealt with here
    try:
        try:
            if address != "local":
                connect(address or "auto", **quiet)
        except ConnectionError as error:
            if address or isinstance(error.__cause__, RuntimeError):
                raise
        if not ray.is_initialized():
            ray.init("local", include_dashboard=False, _node_ip_address="127.0.0.1", **quiet)
        yield ray
    finally:
        ray.shutdown()
