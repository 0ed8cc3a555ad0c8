"""`llama serve`: an OpenAI-compatible server."""

from typing import Annotated

from cyclopts import Parameter

from llama.apps.options import flat
from llama.apps.server.settings import Settings
from llama.backends.options import ModelOptions


@flat("Model", hidden=("prefix_cache_mb",))  # the engine caches all prefixes
class ServedModel(ModelOptions):
    ckpt_dir: str = "checkpoints/SmolLM2-135M-Instruct"
    max_batch_size: Annotated[int, Parameter(alias="--batch_size")] = 16


@flat("Server")
class Server(Settings): ...


MODEL, SERVER = ServedModel(), Server()  # type: ignore[call-arg]  # as defaults


def serve(model: ServedModel = MODEL, server: Server = SERVER) -> None:
    """Serve a model to clients of OpenAI's API, and a chat page to browsers.

    Listens on 127.0.0.1:8000. Endpoints: /v1/chat/completions, /v1/completions, /v1/responses,
    /v1/embeddings, /v1/models, /tokenize, /detokenize, /apply-template, /health, /metrics. The chat
    page is at /. Ctrl-C answers what runs and then ends; a second one ends at once.

    Raises:
        ValueError: options out of range; what `Llama.build` raises; missing packages.
        FileNotFoundError: no checkpoint there.
        OSError: the address is in use.
    """
    try:
        from llama.apps.server.main import run
    except ImportError as error:
        raise ValueError(
            f"llama serve needs {error.name}: pip install llama-reference[server]"
        ) from None
    from llama.layers import parallel

    parallel.initialize(device=model.device, timeout=model.rank_timeout)
    run(vars(model), Settings(**vars(server)))
