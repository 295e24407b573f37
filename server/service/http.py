"""HTTP: /metrics for Prometheus, /healthz and /readyz for orchestrators, and the calls of REST."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from server.catalog import Catalog
from server.metrics import Metrics
from server.service.rest import http_problem


def application(
    metrics: Metrics, catalog: Catalog, accepting: Callable[[], bool], calls: Sequence[Route]
) -> Starlette:
    """`accepting` says whether new calls are taken at all."""

    async def read_metrics(request: Request) -> Response:
        text, content_type = metrics.render_for(request.headers.get("accept", ""))
        return Response(text, headers={"content-type": content_type})

    async def healthz(request: Request) -> Response:
        """The process lives and its loop turns."""
        return PlainTextResponse("ok\n")

    async def readyz(request: Request) -> Response:
        """200 once loading is through and some model answers; the body says what of each model."""
        ready = accepting() and catalog.ready
        body = {
            "ready": ready,
            "accepting": accepting(),
            "models": [
                {
                    "name": status.model,
                    "version": status.version,
                    "state": status.state.name,
                    "reason": status.reason,
                }
                for status in catalog.statuses()
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
