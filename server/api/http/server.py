"""Uvicorn inside the server's own event loop."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import uvicorn
from starlette.applications import Starlette

from server.api.http.connection import HttpConnection
from server.api.http.reading import ReadingTurns
from server.transport.connection_limits import ConnectionLimits

CLOSE_TIMEOUT_S = 1  # for clients that are slow to read their last response


class HttpServer(uvicorn.Server):
    """An HTTP server that leaves signals to its owner."""

    def __init__(self, app: Starlette, keep_alive_s: float, limits: ConnectionLimits) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=partial(HttpConnection, limits=limits, turns=ReadingTurns()),  # type: ignore[arg-type]  # uvicorn only calls it
                log_config=None,
                access_log=False,
                lifespan="off",
                timeout_graceful_shutdown=CLOSE_TIMEOUT_S,
                timeout_keep_alive=keep_alive_s,  # type: ignore[arg-type]  # passed to call_later
            )
        )

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield
