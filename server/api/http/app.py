"""HTTP: /metrics for Prometheus, /healthz and /readyz for orchestrators, and the calls of REST."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import h11
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from uvicorn.protocols.http.h11_impl import H11Protocol

from server.api.http.routes import http_problem
from server.models.registry import ModelRegistry
from server.telemetry.metrics import Metrics

HEAD_S = 20.0  # for the head of a request to come whole, as long as gRPC's port waits


class Connection(H11Protocol):
    """Uvicorn's, which waits for a request for ever: whoever is silent, or stops within a head,
    would hold a file that others need, those who call by gRPC too."""

    _silence: asyncio.TimerHandle | None = None  # runs while no request is under way

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._await_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._heard()
        elif self._silence is None:
            self._await_head()

    def connection_lost(self, error: Exception | None) -> None:
        self._heard()
        super().connection_lost(error)

    def _await_head(self) -> None:
        self._silence = self.loop.call_later(HEAD_S, self.transport.close)

    def _heard(self) -> None:
        if self._silence is not None:
            self._silence.cancel()
            self._silence = None


def application(
    metrics: Metrics,
    registry: ModelRegistry,
    accepting: Callable[[], bool],
    lost: Callable[[], str],
    calls: Sequence[Route],
) -> Starlette:
    """`accepting` says whether new calls are taken at all, `lost` what only another process can use
    again, with the reason, or nothing."""

    async def read_metrics(request: Request) -> Response:
        text, content_type = metrics.render_for(request.headers.get("accept", ""))
        return Response(text, headers={"content-type": content_type})

    async def healthz(request: Request) -> Response:
        """The process lives, its loop turns, and to start it anew would mend nothing."""
        reason = lost()
        return PlainTextResponse(f"{reason or 'ok'}\n", status_code=503 if reason else 200)

    async def readyz(request: Request) -> Response:
        """200 once loading is through and some model answers; the body says what of each model."""
        ready = accepting() and registry.is_ready
        body = {
            "ready": ready,
            "accepting": accepting(),
            "models": [
                {
                    "name": status.model_name,
                    "version": status.number,
                    "state": status.state.name,
                    "reason": status.reason,
                }
                for status in registry.versions()
            ],
        }
        return JSONResponse(body, status_code=200 if ready else 503)

    async def problem(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return http_problem(error)

    return Starlette(
        routes=[
            Route("/metrics", read_metrics),
            Route("/healthz", healthz),
            Route("/readyz", readyz),
            *calls,
        ],
        exception_handlers={HTTPException: problem},
    )
