"""Limits that uvicorn lacks: on open connections, and on the time that a request takes to come."""

import asyncio
from typing import Any, Optional, Type, cast

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from llama.server.settings import Settings


def limited(settings: Settings) -> Type[asyncio.Protocol]:
    """The protocol of a connection, as uvicorn takes it."""

    class Limited(HttpToolsProtocol):
        _waiting: Optional[asyncio.TimerHandle] = None  # for a request's head

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            if len(self.connections) > settings.max_connections:
                transport.close()
            self._wait()

        def connection_lost(self, exc: Optional[Exception]) -> None:
            self._cancel()
            super().connection_lost(exc)

        def on_headers_complete(self) -> None:
            self._cancel()
            super().on_headers_complete()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            if self.cycle is None or self.cycle.response_complete:  # no further one is under way
                self._wait()

        def _wait(self) -> None:
            self._cancel()
            self._waiting = self.loop.call_later(settings.timeout, self.transport.close)

        def _cancel(self) -> None:
            if self._waiting is not None:
                self._waiting.cancel()
                self._waiting = None

    return cast(Any, Limited)
