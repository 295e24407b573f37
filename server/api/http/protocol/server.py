"""Uvicorn inside the server's own event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import uvicorn
from starlette.applications import Starlette

from server.api.http.protocol.connection import HttpConnection
from server.api.http.protocol.reading import ReadingTurns
from server.transport.connection_limits import ConnectionLimits
from server.transport.tls.handshake import Encrypt

CLOSE_TIMEOUT_S = 1  # for clients that are slow to read their last response


class HttpServer(uvicorn.Server):
    """An HTTP server that leaves signals to its owner."""

    def __init__(
        self,
        app: Starlette,
        keep_alive_s: float,
        limits: ConnectionLimits,
        encrypt: Encrypt | None = None,
        max_age_s: float = 0.0,
    ) -> None:
        """Without `encrypt` there is no TLS. `max_age_s` is of a connection; 0 is no limit."""
        turns = ReadingTurns()

        def connect(**arguments: Any) -> asyncio.Protocol:
            make = partial(
                HttpConnection, limits=limits, turns=turns, max_age_s=max_age_s, **arguments
            )
            return make() if encrypt is None else encrypt(make)

        super().__init__(
            uvicorn.Config(
                app,
                http=connect,  # type: ignore[arg-type]  # uvicorn only calls it
                log_config=None,
                access_log=False,
                proxy_headers=False,  # a peer is the other end of the connection, whatever it says
                lifespan="off",
                timeout_graceful_shutdown=CLOSE_TIMEOUT_S,
                timeout_keep_alive=keep_alive_s,  # type: ignore[arg-type]  # passed to call_later
            )
        )

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield
