"""The server's paths."""

from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, AsyncContextManager, AsyncIterator, Awaitable, Callable, Dict, List

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import BaseRoute, Mount, Route

from llama.server import errors
from llama.server.chat import chat
from llama.server.completions import completions
from llama.server.embeddings import embeddings
from llama.server.guard import PAGES, Guard
from llama.server.responses import Store, input_items, input_tokens, responses, stored
from llama.server.service import Service, ready
from llama.server.settings import Settings
from llama.server.streams import json
from llama.server.tokens import apply_template, detokenize, tokenize

PAGE = Path(__file__).parent / "page"
POLICY = (
    "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'; base-uri 'none'; "
    "form-action 'none'"
)

Endpoint = Callable[[Request], Awaitable[Response]]


def make_app(
    settings: Settings, serving: Callable[[], AsyncContextManager[None]], keys: List[str]
) -> Starlette:
    """The ASGI application.

    Args:
        serving: entered when the server starts; sets `app.state.service` when the model is loaded.
    """

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with serving():
            yield

    posts: Dict[str, Endpoint] = {
        "/chat/completions": chat,
        "/completions": completions,
        "/responses": responses,
        "/responses/input_tokens": input_tokens,
        "/embeddings": embeddings,
        "/tokenize": tokenize,
        "/detokenize": detokenize,
        "/apply-template": apply_template,
    }
    gets: Dict[str, Endpoint] = {
        "/models": models,
        "/models/{model:path}": model,
        "/health": health,
        "/metrics": metrics,
        "/stats": stats,
    }
    routes: List[BaseRoute] = [
        Route(path, endpoint, methods=["POST"]) for path, endpoint in posts.items()
    ]
    routes += [Route(path, endpoint, methods=["GET"]) for path, endpoint in gets.items()]
    name = "/responses/{id}"
    routes += [Route(name, stored, methods=["GET", "DELETE"])]
    routes += [Route(f"{name}/input_items", input_items, methods=["GET"])]
    routes += [Mount("/v1", routes=[*routes])]  # clients' base_url has it, or hasn't
    routes += [Route(path, page, methods=["GET"]) for path in PAGES]
    routes += [Route("/favicon.ico", no_icon, methods=["GET"])]
    app = Starlette(
        routes=routes, lifespan=lifespan, middleware=[Middleware(Guard, settings, keys)],
        exception_handlers={
            kind: errors.handle for kind in (errors.ApiError, ValueError, 404, 405, 500)
        },
    )  # fmt: skip
    app.state.settings, app.state.service, app.state.store = settings, None, Store()
    return app


async def models(request: Request) -> Response:
    service = ready(request)
    return json({"object": "list", "data": [_model(service, name) for name in service.models]})


async def model(request: Request) -> Response:
    service, name = ready(request), request.path_params["model"]
    service.adapter(name)
    return json(_model(service, name))


def _model(service: Service, name: str) -> Dict[str, Any]:
    return {
        "id": name, "object": "model", "created": service.created, "owned_by": "llama-reference",
        "parent": None if name == service.name else service.name,
        "max_model_len": service.context,
    }  # fmt: skip


async def health(request: Request) -> Response:
    """200 when requests can be answered: also the readiness probe."""
    try:
        ready(request)
    except errors.ApiError as error:
        return JSONResponse({"status": "unavailable", **error.body}, 503, error.headers)
    return JSONResponse({"status": "ok"})


async def metrics(request: Request) -> Response:
    return Response(ready(request).metrics.text(), media_type="text/plain; version=0.0.4")


async def stats(request: Request) -> Response:
    service = ready(request)
    return json({**service.engine.stats._asdict(), "rows": service.rows})


async def page(request: Request) -> Response:
    """The chat page and its other files."""
    name = request.url.path[1:] or "index.html"
    return FileResponse(PAGE / name, headers={"content-security-policy": POLICY})


async def no_icon(request: Request) -> Response:
    """Browsers ask for one, and report an error if the answer is one."""
    return Response(status_code=204)
