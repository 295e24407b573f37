"""The HTTP application: connections, draining, and what browsers may do."""

from __future__ import annotations

from collections.abc import Sequence

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.http.client_certificates import RequireCertificate
from server.api.http.problem import http_problem
from server.api.http.protocol.connection import OLD
from server.api.http.routes import HEADER_LENGTH
from server.api.rpc.health import ServingState

CLOSE = (b"connection", b"close")
CORS_MAX_AGE_S = 7200  # how long a browser may remember what is allowed; Chrome's maximum


class Draining:
    """Closes each connection after its next response once the server stops accepting requests.

    Also a connection that has reached its maximum age. Load balancers then open new connections,
    which they do to other servers. Connections that are closed while they are idle may lose a
    request that is on its way.
    """

    def __init__(self, app: ASGIApp, state: ServingState) -> None:
        self._app = app
        self._state = state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._state.is_accepting and OLD not in scope["state"]:
            await self._app(scope, receive, send)
            return

        async def send_and_close(message: Message) -> None:
            if message["type"] == "http.response.start" and CLOSE not in message["headers"]:
                message["headers"] = [*message["headers"], CLOSE]
            await send(message)

        await self._app(scope, receive, send_and_close)


def application(
    routes: Sequence[Route],
    state: ServingState,
    cors_origins: Sequence[str],
    requires_certificate: bool,
) -> Starlette:
    """The routes. Pages of the origins may call them, those of any origin if one is "*".

    With `requires_certificate` clients without one may only call the probes.
    """

    async def on_http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return http_problem(error)

    return Starlette(
        routes=routes,
        exception_handlers={HTTPException: on_http_error},
        middleware=[
            Middleware(Draining, state=state),
            *([Middleware(RequireCertificate)] if requires_certificate else []),
            *_cors(cors_origins),
        ],
    )


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
