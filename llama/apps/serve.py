"""`llama serve`: an OpenAI-compatible server."""

from typing import Annotated

from cyclopts import Parameter

from llama.apps.options import flat
from llama.backends.options import ModelOptions
from llama.server.settings import Replicas, Settings

BATCH = (
    "contexts of max_seq_len tokens that the cache holds, unless cache_tokens says otherwise; four "
    "times as many answers are computed at once."
)


@flat("Model", hidden=("prefix_cache_mb",))  # the engine caches all prefixes
class ServedModel(ModelOptions):
    ckpt_dir: str = "checkpoints/SmolLM2-135M-Instruct"
    max_batch_size: Annotated[int, Parameter(alias="--batch_size", help=BATCH)] = 16


@flat("Server")
class Server(Settings): ...


@flat("Replicas")
class OnRay(Replicas): ...


MODEL, SERVER, ON_RAY = ServedModel(), Server(), OnRay()  # type: ignore[call-arg]  # as defaults


def serve(model: ServedModel = MODEL, server: Server = SERVER, replicas: OnRay = ON_RAY) -> None:
    """Serve a model to clients of OpenAI's API, and a chat page to browsers.

    Listens on 127.0.0.1:8000. Endpoints: /v1/chat/completions, /v1/completions, /v1/responses,
    /v1/embeddings, /v1/models, /tokenize, /detokenize, /apply-template, /health, /metrics, /stats.
    The chat page is at /. Ctrl-C answers what runs and then ends; a second one ends at once.

    Raises:
        ValueError: options out of range; what `Llama.build` raises; missing packages.
        FileNotFoundError: no checkpoint there.
        OSError: the address is in use.
    """
    on_ray = replicas.ray is not None
    if replicas != ON_RAY and not on_ray:
        raise ValueError("replicas run on a Ray cluster: give its address, or --ray local")
    try:
        from llama.server.main import run

        if on_ray:
            from llama.ray.serving import run as run_on_ray
    except ImportError as error:
        extra = "ray" if on_ray else "server"
        raise ValueError(
            f"llama serve needs {error.name}: pip install llama-reference[{extra}]"
        ) from None
    settings = Settings(**vars(server))
    if on_ray:
        run_on_ray(vars(model), settings, Replicas(**vars(replicas)))
        return
    from llama.layers import parallel

    parallel.initialize(device=model.device, timeout=model.rank_timeout)
    run(vars(model), settings)
