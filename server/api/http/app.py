"""The HTTP application: metrics, probes and REST."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.health import ServingState
from server.api.http.access import HttpAccess
from server.api.http.metrics_page import MetricsPage
from server.api.http.problem import http_problem
from server.api.http.routes import HEADER_LENGTH
from server.api.visible_models import VisibleModels
from server.execution.devices import Devices
from server.security.caller import Caller
from server.security.permissions import LISTS
from server.telemetry.metrics import Metrics

CLOSE = (b"connection", b"close")
CORS_MAX_AGE_S = 7200  # how long a browser may remember what is allowed; Chrome's maximum


class Draining:
    """Closes each connection after its next response once the server stops accepting requests.

    Load balancers then open new connections, which they do to other servers. Connections that are
    closed while they are idle may lose a request that is on its way.
    """

    def __init__(self, app: ASGIApp, state: ServingState) -> None:
        self._app = app
        self._state = state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._state.is_accepting:
            await self._app(scope, receive, send)
            return

        async def send_and_close(message: Message) -> None:
            if message["type"] == "http.response.start" and CLOSE not in message["headers"]:
                message["headers"] = [*message["headers"], CLOSE]
            await send(message)

        await self._app(scope, receive, send_and_close)


def application(
    metrics: Metrics,
    models: VisibleModels,
    access: HttpAccess,
    state: ServingState,
    devices: Devices,
    routes: Sequence[Route],
    cors_origins: Sequence[str],
) -> Starlette:
    """The routes with /metrics, /healthz and /readyz.

    Pages of the origins may call them, those of any origin if one is "*".
    """

    async def healthz(request: Request) -> Response:
        """503 if only a restart of the process can help: a device is lost."""
        lost = devices.lost_reason
        if lost and not _may_list(access.caller_or_stranger(request)):
            lost = "a device is lost; restart the server"
        return PlainTextResponse(f"{lost or 'ok'}\n", status_code=503 if lost else 200)

    async def readyz(request: Request) -> Response:
        """200 once loading has finished and some model answers.

        The body has every version that the caller may list.
        """
        caller = access.caller_or_stranger(request)
        is_ready = state.is_accepting and models.is_ready
        body: dict[str, Any] = {"ready": is_ready, "accepting": state.is_accepting}
        if _may_list(caller):
            body["models"] = [
                {
                    "name": version.model_name,
                    "version": version.number,
                    "state": version.state.name,
                    "reason": version.reason,
                }
                for version in models.versions(caller.principal)
            ]
        return JSONResponse(body, status_code=200 if is_ready else 503)

    async def on_http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return http_problem(error)

    return Starlette(
        routes=[
            Route("/metrics", MetricsPage(metrics, access).get),
            Route("/healthz", healthz),
            Route("/readyz", readyz),
            *routes,
        ],
        exception_handlers={HTTPException: on_http_error},
        middleware=[Middleware(Draining, state=state), *_cors(cors_origins)],
    )


def _may_list(caller: Caller) -> bool:
    return not caller.principal.roles.isdisjoint(LISTS)


def _cors(origins: Sequence[str]) -> list[Middleware]:
    """What tells browsers that pages of the origins may call the server."""
    if not origins:
        return []
    cors = Middleware(
        CORSMiddleware,
        allow_origins=origins,
        allow_methods=("GET", "POST"),
        allow_headers=("*",),
        expose_headers=(HEADER_LENGTH, "Retry-After"),
        max_age=CORS_MAX_AGE_S,
    )
    return [cors]
