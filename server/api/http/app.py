"""The HTTP application: metrics, probes and REST."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import h11
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from uvicorn.protocols.http.h11_impl import H11Protocol

from server.api.health import ServingState
from server.api.http.problem import http_problem
from server.execution.devices import Devices
from server.models.registry import ModelRegistry
from server.telemetry.metrics import Metrics

HEAD_S = 20.0  # for the head of a request to arrive; the gRPC port waits as long


class HttpConnection(H11Protocol):
    """Uvicorn's connection with a timeout for the head of a request.

    Uvicorn waits without limit. A silent client would hold a file descriptor that other clients
    need, those of the gRPC port too.
    """

    _head_timer: asyncio.TimerHandle | None = None  # runs while no request is in progress

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._start_timer()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._stop_timer()
        elif self._head_timer is None:
            self._start_timer()

    def connection_lost(self, error: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(error)

    def _start_timer(self) -> None:
        self._head_timer = self.loop.call_later(HEAD_S, self.transport.close)

    def _stop_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None


def application(
    metrics: Metrics,
    registry: ModelRegistry,
    state: ServingState,
    devices: Devices,
    routes: Sequence[Route],
) -> Starlette:
    """The routes with /metrics, /healthz and /readyz."""

    async def read_metrics(request: Request) -> Response:
        text, content_type = metrics.render_for(request.headers.get("accept", ""))
        return Response(text, headers={"content-type": content_type})

    async def healthz(request: Request) -> Response:
        """503 if only a restart of the process can help: a device is lost."""
        lost = devices.lost_reason
        return PlainTextResponse(f"{lost or 'ok'}\n", status_code=503 if lost else 200)

    async def readyz(request: Request) -> Response:
        """200 once loading has finished and some model answers; the body has every version."""
        is_ready = state.is_accepting and registry.is_ready
        body = {
            "ready": is_ready,
            "accepting": state.is_accepting,
            "models": [
                {
                    "name": version.model_name,
                    "version": version.number,
                    "state": version.state.name,
                    "reason": version.reason,
                }
                for version in registry.versions()
            ],
        }
        return JSONResponse(body, status_code=200 if is_ready else 503)

    async def on_http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return http_problem(error)

    return Starlette(
        routes=[
            Route("/metrics", read_metrics),
            Route("/healthz", healthz),
            Route("/readyz", readyz),
            *routes,
        ],
        exception_handlers={HTTPException: on_http_error},
    )
