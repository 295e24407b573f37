"""Requests from clients without a certificate, where certificates are required."""

from __future__ import annotations

from grpc import StatusCode
from starlette.types import ASGIApp, Receive, Scope, Send

from server.api.http.access import PEER
from server.api.http.problem import problem
from server.security.peer import Peer

PROBES = ("/healthz", "/readyz")  # kubelets have no certificate


def has_certificate(scope: Scope) -> bool:
    """Whether the peer of a request has shown one that is valid."""
    peer: Peer = scope["state"][PEER]
    return peer.certificate is not None


class RequireCertificate:
    """Refuses requests from peers without a certificate, except probes.

    The TLS handshake can't: it ends before the path is known.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] in PROBES or has_certificate(scope):
            await self._app(scope, receive, send)
            return
        detail = "this server requires a client certificate; send one in the TLS handshake"
        headers = {"connection": "close"}  # the next one may bring a certificate
        await problem(StatusCode.PERMISSION_DENIED, detail, headers=headers)(scope, receive, send)
