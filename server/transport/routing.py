"""What happens to a call, decided from its headers alone.

This is the place where a call is refused before a byte of its body is kept or inflated. Repeated
headers are decided once per connection.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from grpc import StatusCode

from server.security.caller import Caller
from server.security.peer import Peer
from server.transport.access import CallAccess, Denial
from server.transport.metadata import (
    ENCODINGS,
    MAX_HEADER_FIELDS,
    MAX_HEADERS_BYTES,
    Header,
    RequestHead,
    request_head,
    response_head,
)
from server.transport.methods import Abort, Method

RESPONSE_HEAD = response_head("application/grpc")

# Per connection. The bounds matter where a header differs in each request.
CACHED_ROUTES = 128
CACHED_HEAD_BYTES = 1024


class Route(NamedTuple):
    """Where calls with these headers go: to a method, or to a refusal."""

    head: RequestHead
    method: Method | None
    refusal: Refusal | None = None
    caller: Caller | None = None  # None if the call is refused before it is known
    is_lasting: bool = True  # the same for all calls of the connection, until permissions change


@dataclass(frozen=True, slots=True)
class Refusal:
    """The response of a call that is refused for its headers; `code` is None if it is no call."""

    headers: tuple[Header, ...]
    code: StatusCode | None = None


class Router:
    """Finds the route of a request."""

    def __init__(self, methods: Mapping[str, Method], access: CallAccess) -> None:
        self._methods = methods
        self._access = access

    def route(self, headers: tuple[Header, ...], peer: Peer) -> Route:
        head = request_head(headers)
        method = self._methods.get(head.path)
        if not head.is_call:
            return Route(head, method, _not_a_call(head))
        caller = self._access.admit(head, peer)
        if isinstance(caller, Denial):  # each is counted
            return Route(head, method, _denial(caller), is_lasting=False)
        return Route(head, method, _refusal_of(head, method), caller)


class RouteCache:
    """Routes of the requests of one connection."""

    def __init__(self, find: Callable[[tuple[Header, ...], Peer], Route]) -> None:
        self._find = find
        self._routes: dict[tuple[Header, ...], Route] = {}
        self._latest: tuple[Header, ...] = ()
        self._latest_route: Route | None = None

    def clear(self) -> None:
        """Forgets all routes: their callers may have lost permissions."""
        self._routes.clear()
        self._latest_route = None

    def route(self, headers: tuple[Header, ...], peer: Peer) -> Route:
        """The route of a request; `peer` is always the same."""
        if headers == self._latest and self._latest_route is not None:
            return self._latest_route  # much cheaper than their hash
        route = self._routes.get(headers)
        if route is None:
            route = self._find(headers, peer)
            if route.head.size > CACHED_HEAD_BYTES or not route.is_lasting:
                return route
            if len(self._routes) >= CACHED_ROUTES:
                self._routes.clear()
            self._routes[headers] = route
        self._latest, self._latest_route = headers, route
        return route


def refusal(abort: Abort, code: StatusCode) -> Refusal:
    return Refusal((*RESPONSE_HEAD, *abort.trailers), code)


@lru_cache(maxsize=256)
def _denial(denial: Denial) -> Refusal:
    return refusal(Abort(denial.code, denial.message), denial.code)


def _not_a_call(head: RequestHead) -> Refusal:
    return Refusal(response_head("text/plain", 415 if head.method == "POST" else 405))


def _refusal_of(head: RequestHead, method: Method | None) -> Refusal | None:
    """The refusal of a call that no method can answer."""
    if method is None or not head.is_valid:
        code, abort = _problem_of(head, method)
        return refusal(abort, code)
    return None


def _problem_of(head: RequestHead, method: Method | None) -> tuple[StatusCode, Abort]:
    """The status of a call whose method does not exist, or whose headers are not valid."""
    if head.size > MAX_HEADERS_BYTES:
        code = StatusCode.RESOURCE_EXHAUSTED
        message = f"metadata: is {head.size:,} bytes; at most {MAX_HEADERS_BYTES:,} are allowed"
        return code, Abort(code, message)
    if len(head.fields) > MAX_HEADER_FIELDS:
        code = StatusCode.RESOURCE_EXHAUSTED
        message = f"metadata: has {len(head.fields):,} fields; {MAX_HEADER_FIELDS} are allowed"
        return code, Abort(code, message)
    if method is None:
        code = StatusCode.UNIMPLEMENTED
        return code, Abort(code, f"there is no method {head.path[:200]}")
    if head.encoding and head.encoding not in ENCODINGS:
        code = StatusCode.UNIMPLEMENTED
        message = f"grpc-encoding: is {head.encoding[:40]}; {', '.join(ENCODINGS)} are allowed"
        return code, Abort(code, message, [("grpc-accept-encoding", ",".join(ENCODINGS))])
    code = StatusCode.INVALID_ARGUMENT
    message = (
        f"grpc-timeout: is {head.timeout[:40]!r}; 1 to 8 digits and one of H, M, S, m, u and n "
        "are allowed"
    )
    return code, Abort(code, message)
