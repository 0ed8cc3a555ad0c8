"""Errors in OpenAI's shape: {"error": {"message", "type", "param", "code"}}."""

import re
from typing import Any, Dict, Mapping, Optional

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

# What the engine calls otherwise than OpenAI's API does.
_NAMES = {"max_gen_len": "max_tokens", "speculate": "speculation"}


class ApiError(Exception):
    """A request that can't be answered.

    Args:
        param: the name of the parameter at fault.
        code: a word for programs.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: Optional[str] = None,
        code: Optional[str] = None,
        headers: Optional[Mapping[str, str]] = None,
    ):
        super().__init__(message)
        self.status, self.headers = status, headers
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


def invalid(message: str, param: Optional[str] = None, code: Optional[str] = None) -> ApiError:
    return ApiError(400, message, param=param, code=code)


def busy(message: str, seconds: int = 1, status: int = 429) -> ApiError:
    """The server can't take the request now; the client may come again."""
    return ApiError(
        status, message, kind="overloaded_error", code="overloaded",
        headers={"Retry-After": str(seconds)},
    )  # fmt: skip


def as_api_error(error: Exception) -> ApiError:
    """Whatever a request failed with. Errors of users begin with the parameter's name."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ValueError):
        text = str(error)
        named = re.match(r"(\w+)=", text)
        name = named[1] if named else None
        return invalid(text, _NAMES.get(name, name) if name else None)
    return ApiError(500, f"{type(error).__name__}: {error}", kind="server_error", code="internal")


def response(error: Exception) -> Response:
    found = as_api_error(error)
    return JSONResponse(found.body, found.status, found.headers)


async def handle(request: Request, error: Exception) -> Response:
    """Starlette's exception handler, of its own 404 and 405, too."""
    status: Any = getattr(error, "status_code", None)
    if status is not None:
        known: Dict[int, str] = {404: "no such path", 405: "this path takes another method"}
        text = f"{request.method} {request.url.path}: {known.get(status, str(error))}"
        error = ApiError(status, text, headers=getattr(error, "headers", None))
    return response(error)
