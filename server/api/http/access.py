"""Access control for HTTP routes, from the head of a request, before its body is read."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from server.api.http.body import CLOSE
from server.api.http.problem import problem
from server.api.status import STATUS, message_of
from server.errors import ServingError, Unauthenticated
from server.security.access import AccessControl
from server.security.caller import Caller
from server.security.identity.authenticator import MISSING
from server.security.peer import Peer

PEER = "peer"  # name in the state of a request
CHALLENGE = 'Bearer realm="convserve"'


class HttpAccess:
    """Applies access control to requests. Used on the event loop's thread only."""

    def __init__(self, control: AccessControl) -> None:
        self._control = control

    def admit(self, request: Request, method: str) -> Caller:
        """The caller of a method. Raises Unauthenticated, Forbidden."""
        return self._control.admit(method, request.scope["headers"], _peer(request))

    def caller_or_stranger(self, request: Request) -> Caller:
        """The caller of a route that is open to everybody."""
        return self._control.caller_or_stranger(request.scope["headers"], _peer(request))


def refusal(request: Request, error: ServingError, method: str) -> Response:
    """The response to a request that is not admitted."""
    headers: dict[str, str] = {}
    if isinstance(error, Unauthenticated):  # RFC 6750: no error code if there was no credential
        code = "" if error.reason == MISSING else ', error="invalid_token"'
        headers["WWW-Authenticate"] = CHALLENGE + code
    if "expect" in request.headers:
        headers |= CLOSE
    return problem(STATUS[type(error)], message_of(error, method), headers=headers)


def _peer(request: Request) -> Peer:
    peer: Peer = request.scope["state"][PEER]
    return peer
