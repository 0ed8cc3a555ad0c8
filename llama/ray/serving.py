"""`llama serve` on many machines: replicas of the engine on Ray Serve, behind one address.

A client's request reaches a proxy, which Ray Serve has on every machine; an `Ingress`, which reads
the body to know whose cache holds the beginning of the prompt; and a `Replica`, whose answer goes
back the same way, piece by piece. What leaves, ends, or dies on this way is told to both sides.
"""

import asyncio
import re
import signal
import threading
import time
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path
from typing import Any, AsyncIterator, Dict, List, Mapping, Optional, Tuple

import ray
import ray.serve
from ray.serve import Application
from starlette.types import Message, Scope

from llama.backends.options import ModelOptions
from llama.ray.bulk import absolute, connect
from llama.ray.ingress import Ingress, Whole
from llama.ray.routing import PrefixRouter
from llama.server.app import make_app
from llama.server.main import greet
from llama.server.service import Service, limits, load, model_name
from llama.server.settings import Replicas, Settings

NAME = "llama"  # of the application


class Replica:
    """An engine, and the paths of `llama serve` without its sockets."""

    async def __init__(  # type: ignore[misc]  # Ray Serve awaits it
        self, options: Mapping[str, Any], settings: Settings, keys: List[str]
    ):
        llama = await asyncio.to_thread(load, options, settings)
        self._engine = llama.async_engine(**limits(llama, settings))
        await self._engine.__aenter__()  # to the end of the process
        name = settings.served_name or model_name(str(options["ckpt_dir"]))
        self._name = ray.serve.get_replica_context().replica_id.unique_id
        self._app = make_app(settings, nullcontext, keys)
        self._app.state.service = Service(llama, self._engine, settings, name, self._name)

    def check_health(self) -> None:
        """Ray Serve replaces a replica when this raises: the engine's thread has failed."""
        if self._engine.failure is not None:
            raise self._engine.failure

    async def answer(self, scope: Scope, body: bytes) -> AsyncIterator[List[Message]]:
        """The messages of an answer, those that are there together, from the first of the body on.

        Ending the iteration early cancels the request.
        """
        sent: asyncio.Queue[Optional[Message]] = asyncio.Queue()
        received = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> Message:
            if not received:
                await asyncio.Event().wait()  # the client's leaving cancels the task
            return received.pop()

        task = asyncio.create_task(self._app(scope, receive, sent.put))
        task.add_done_callback(lambda _: sent.put_nowait(None))
        messages: List[Message] = []
        try:
            while (message := await sent.get()) is not None:
                messages.append(message)
                if sent.empty() and message["type"] != "http.response.start":
                    yield messages
                    messages = []
            if messages:
                yield messages
            await task  # what it failed with
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def whole(self, scope: Scope) -> Whole:
        """An answer to a request without a body."""
        status, body = 500, b""
        async for messages in self.answer(scope, b""):
            for message in messages:
                status = message.get("status", status)
                body += message.get("body", b"")
        return status, body

    def keeper(self, ids: List[str]) -> Optional[str]:
        """This replica's name, if it keeps a response, or an item of one, with such an id."""
        return self._name if any(one in self._app.state.store for one in ids) else None


def app(args: Mapping[str, Any]) -> Application:
    """The application for `serve run` and `serve deploy`.

    Args:
        args: options of `llama serve` by name; API keys are read here.

    Raises:
        ValueError: an option that doesn't exist, or is out of range.
        FileNotFoundError: no api_key_file.
    """
    return _bind(*_options(args))


def serve(ckpt_dir: str | Path, **options: Any) -> None:
    """Serve a model on a Ray cluster; returns when it answers. `ray.serve.delete("llama")` ends it.

    Deploying again replaces the replicas one after the other, while the others answer.

    Args:
        options: those of `llama serve`, such as replicas=2, max_batch_size=16, port=8000. Without
            `ray`, the cluster is the one to which this process is connected, else this machine's.

    Raises:
        ValueError: an option that doesn't exist, or is out of range; a model that can't be loaded.
        FileNotFoundError: no api_key_file.
        ConnectionError: no such cluster.
    """
    deploy(*_options({"ckpt_dir": ckpt_dir, **options}))


def deploy(options: Mapping[str, Any], settings: Settings, replicas: Replicas) -> None:
    """`serve`, with the options as `llama serve` has them."""
    if settings.port == 0:
        raise ValueError("port=0: the proxies of Ray Serve need the same port on all machines")
    application = _bind(options, settings, replicas)
    if not ray.is_initialized():
        local: Dict[str, Any] = {"include_dashboard": False, "object_store_memory": 200_000_000}
        connect(replicas.ray or "auto", **(local if replicas.ray == "local" else {}))
    http = {"host": settings.host, "port": settings.port}
    ray.serve.start(proxy_location="EveryNode", http_options=http)
    try:
        ray.serve.run(application, name=NAME, route_prefix="/")
    except RuntimeError as error:
        found = ray.serve.status().applications[NAME].deployments.values()
        told = "\n".join(one.message for one in found)  # with a traceback
        causes = re.findall(r"^\S*(?:Error|Exception): .*", told, flags=re.MULTILINE)
        raise ValueError(f"can't serve: {causes[-1] if causes else error}") from None


def run(options: Mapping[str, Any], settings: Settings, replicas: Replicas) -> None:
    """Serve a model on a Ray cluster until a signal comes; requests that run are answered first.

    Raises:
        ValueError, OSError: as `serve`.
    """
    deploy(options, settings, replicas)
    name = settings.served_name or model_name(str(options["ckpt_dir"]))
    greet(settings, settings.host, settings.port, name, bool(settings.keys()))
    stop = threading.Event()
    before = [(n, signal.signal(n, lambda *_: stop.set())) for n in (signal.SIGINT, signal.SIGTERM)]
    stop.wait()
    for number, handler in before:  # a second one ends at once
        signal.signal(number, handler)
    ray.serve.delete(NAME, _blocking=False)
    while NAME in ray.serve.status().applications:
        time.sleep(0.1)
    ray.shutdown()


def _options(args: Mapping[str, Any]) -> Tuple[Mapping[str, Any], Settings, Replicas]:
    left, made = {"max_batch_size": 16, **args}, []
    kinds: List[Any] = [ModelOptions, Settings, Replicas]
    for kind in kinds:
        names = [one.name for one in fields(kind) if one.name in left]
        made.append(kind(**{name: left.pop(name) for name in names}))
    if left:
        raise ValueError(f"{', '.join(left)}: llama serve has no such options")
    model, settings, replicas = made
    return vars(model), settings, replicas


def _bind(options: Mapping[str, Any], settings: Settings, replicas: Replicas) -> Application:
    options, settings = absolute(options, settings)
    number: Dict[str, Any] = {"num_replicas": replicas.replicas}
    if replicas.max_replicas is not None:
        number = {
            "autoscaling_config": {
                "min_replicas": replicas.replicas,
                "max_replicas": replicas.max_replicas,
                "target_ongoing_requests": replicas.target_requests,
            }
        }
    engines: Any = ray.serve.deployment(
        name="Replica", **number, max_ongoing_requests=2 * settings.max_queue,
        graceful_shutdown_timeout_s=replicas.drain, max_constructor_retry_count=3,
        ray_actor_options={"num_cpus": replicas.cpus, "num_gpus": replicas.gpus},
        request_router_config={
            "request_router_class": f"{PrefixRouter.__module__}.{PrefixRouter.__qualname__}",
            "request_router_kwargs": {"imbalance": replicas.imbalance},
        },
    )(Replica)  # fmt: skip
    door: Any = ray.serve.deployment(
        name="Ingress", num_replicas=replicas.replicas, ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=settings.max_connections, graceful_shutdown_timeout_s=replicas.drain,
    )(Ingress)  # fmt: skip
    return door.bind(engines.bind(options, settings, settings.keys()), settings.max_body_mb)
