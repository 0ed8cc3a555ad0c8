"""What every request passes: size, host, key, CORS; and a line about it when it has been answered.

Keys are compared by digest, in constant time. A page of another site can't reach a server on
loopback by a host name of its own (DNS rebinding), since such names are refused.
"""

import hashlib
import hmac
import json
import time
import uuid
from collections.abc import Sequence
from typing import Dict, Optional

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llama.server.errors import ApiError, response
from llama.server.settings import LOOPBACK, Settings

PAGES = ("/", "/page.css", "/page.js", "/markdown.js")
OPEN = (*PAGES, "/favicon.ico", "/health")  # to all: no model's text is in them
CORS = {
    "access-control-allow-methods": "GET, POST, DELETE, OPTIONS",
    "access-control-max-age": "600",
}
EXPOSED = "X-Ignored-Parameters, Retry-After, x-request-id"  # to pages, beside the usual ones


class Guard:
    """ASGI middleware."""

    def __init__(self, app: ASGIApp, settings: Settings, keys: Sequence[str]):
        self._app, self._settings = app, settings
        self._digests = [_digest(key.encode()) for key in keys]
        self._origins = {origin.rstrip("/") for origin in settings.cors}  # browsers send no slash

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers, began = Headers(scope=scope), time.perf_counter()
        scope["state"] = {**scope.get("state", {}), "notes": (notes := {})}
        origin = headers.get("origin")
        allowed = origin if self._origins & {origin, "*"} else None
        received = 0

        async def receive_some() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._settings.max_body_mb * 1e6:
                raise self._too_large()
            return message

        async def send_more(message: Message) -> None:
            if message["type"] == "http.response.start":
                notes["status"] = message["status"]
                more = MutableHeaders(scope=message)
                more["x-content-type-options"] = "nosniff"
                more["x-request-id"] = uuid.uuid4().hex
                if allowed:
                    more["access-control-allow-origin"] = allowed
                    more["access-control-expose-headers"] = EXPOSED
                    more.add_vary_header("Origin")
            await send(message)

        try:
            asked = headers.get("access-control-request-method")
            if asked and self._settings.cors and scope["method"] == "OPTIONS":
                names = headers.get("access-control-request-headers", "")
                preflight = Response(headers={**CORS, "access-control-allow-headers": names})
                await preflight(scope, receive, send_more)
                return
            self._check(scope["path"], headers)
        except ApiError as error:
            await response(error)(scope, receive, send_more)
        else:
            try:
                await self._app(scope, receive_some, send_more)
            except Exception as error:
                if "status" not in notes:  # with the headers that all answers have
                    await response(error)(scope, receive, send_more)
                raise
        finally:
            self._log(scope, notes, time.perf_counter() - began)

    def _check(self, path: str, headers: Headers) -> None:
        host = headers.get("host", "").lower()
        name = host[1:].partition("]")[0] if host[:1] == "[" else host.partition(":")[0]
        if not self._settings.public and name not in LOOPBACK:
            raise ApiError(
                403, f"host {name[:100]!r}: this server answers {', '.join(LOOPBACK)} only"
            )
        size = headers.get("content-length", "0")
        if size.isdigit() and int(size) > self._settings.max_body_mb * 1e6:
            raise self._too_large()
        if self._digests and path not in OPEN:
            kind, _, key = headers.get("authorization", "").partition(" ")
            found = _digest(key.strip().encode() if kind.lower() == "bearer" else b"")
            if not any([hmac.compare_digest(found, digest) for digest in self._digests]):
                raise ApiError(
                    401, "give a valid API key: Authorization: Bearer KEY",
                    kind="authentication_error", code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )  # fmt: skip

    def _too_large(self) -> ApiError:
        limit = self._settings.max_body_mb
        return ApiError(
            413, f"the body is larger than {limit:g} MB (--max_body_mb)", code="body_too_large",
            headers={"Connection": "close"},
        )  # fmt: skip

    def _log(self, scope: Scope, notes: Dict[str, object], seconds: float) -> None:
        """A line about a request: what it was, not what it said."""
        if self._settings.log == "off" or scope["path"] == "/health":  # probes come often
            return
        line: Dict[str, Optional[object]] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "method": scope["method"],
            "path": scope["path"][:200],
            "status": notes.pop("status", None),  # None: the client left before
            **notes,
            "seconds": round(seconds, 4),
        }
        if self._settings.log == "json":
            print(json.dumps(line), flush=True)
        else:
            at, method, path, status, *rest = line
            more = "".join(f"  {name} {line[name]}" for name in rest)
            # repr() without its quotes: a path can't write control characters to the terminal.
            print(
                line[at],
                line[method],
                repr(line[path])[1:-1],
                line[status] or "left",
                more,
                flush=True,
            )


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
