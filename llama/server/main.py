"""Starts the server: listens at once, loads the model meanwhile, and drains at the end."""

import asyncio
import os
import resource
import signal
import socket
import sys
from contextlib import asynccontextmanager
from typing import Any, AsyncIterator, Dict, Mapping

import uvicorn

from llama.engine.leader import follow
from llama.layers import parallel
from llama.server.app import make_app
from llama.server.connections import limited
from llama.server.service import Service, limits, load, model_name
from llama.server.settings import Settings


def run(options: Mapping[str, Any], settings: Settings) -> None:
    """Serve a model until a signal comes: then requests that run are answered first.

    Args:
        options: of `Llama.build`.

    Raises:
        ValueError, OSError: what loading the model or listening fails with.
    """
    keys = settings.keys()
    if not parallel.is_rank_zero():
        for number in (signal.SIGINT, signal.SIGTERM):  # rank 0 ends first, and then this one
            signal.signal(number, signal.SIG_IGN)
        llama = load(options, settings)
        follow(llama.engine(**limits(llama, settings)))
        return
    listening = _listen(settings)
    failure: Dict[str, Exception] = {}

    @asynccontextmanager
    async def serving() -> AsyncIterator[None]:
        task = asyncio.create_task(serve())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def serve() -> None:
        try:
            llama = await asyncio.to_thread(load, options, settings)
            async with llama.async_engine(**limits(llama, settings)) as engine:
                name = settings.served_name or model_name(str(options["ckpt_dir"]))
                app.state.service = Service(llama, engine, settings, name)
                host, port = listening.getsockname()[:2]
                greet(settings, host, port, name, bool(keys))
                while engine.failure is None:
                    await asyncio.sleep(1)
                raise engine.failure
        except Exception as error:
            failure["error"] = error
            server.should_exit = True

    app = make_app(settings, serving, keys)
    config = uvicorn.Config(
        app, http=limited(settings), ws="none", log_config=None, access_log=False,
        server_header=False, lifespan="on", timeout_keep_alive=int(max(settings.timeout, 1)),
        backlog=2048,
    )  # fmt: skip
    server = uvicorn.Server(config)
    try:
        server.run([listening])
    except KeyboardInterrupt:  # uvicorn has drained, and passes the signal on
        pass
    finally:
        listening.close()
    if failure:
        raise failure["error"]


def _listen(settings: Settings) -> socket.socket:
    """Raises OSError: the address is in use, or isn't this machine's."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = settings.max_connections + 256
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(wanted, hard), hard))
    try:
        return socket.create_server(
            (settings.host, settings.port), backlog=2048,
            family=socket.AF_INET6 if ":" in settings.host else socket.AF_INET,
        )  # fmt: skip
    except OSError as error:
        raise OSError(
            f"can't listen on {settings.host}:{settings.port}: {os.strerror(error.errno or 0)}; "
            "choose another --port, 0 for a free one"
        ) from None


def greet(settings: Settings, host: str, port: int, name: str, has_keys: bool) -> None:
    """Print where the server is, and a first request."""
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    print(
        f"{name} at {url}/v1; the chat page: {url}/\n"
        f"curl {url}/v1/chat/completions -H 'Content-Type: application/json' "
        """-d '{"messages": [{"role": "user", "content": "Hello!"}]}'""",
        flush=True,
    )
    if settings.public and not has_keys:
        print(
            f"warning: {host} can be reached by other machines, and no API key is needed: "
            "give --api_key_file or LLAMA_API_KEY", file=sys.stderr, flush=True,
        )  # fmt: skip
