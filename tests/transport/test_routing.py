"""Routes of requests: methods and refusals, decided once for repeated headers."""

from __future__ import annotations

import pytest
from grpc import StatusCode

from server.security.peer import Peer
from server.transport.access import EverybodyMayCall
from server.transport.methods import Method, UnaryMethod, WireCall
from server.transport.routing import CACHED_ROUTES, RouteCache, Router

REQUEST = {
    b":method": b"POST",
    b":path": b"/test/Echo",
    b"content-type": b"application/grpc",
    b"key": b"value",
}


async def echo(data: bytes, call: WireCall) -> bytes:
    return data


PEER = Peer("127.0.0.1", True, None)
METHODS: dict[str, Method] = {"/test/Echo": UnaryMethod(echo)}


def headers(**changed: bytes) -> tuple[tuple[bytes, bytes], ...]:
    names = {name.replace("_", "-").encode(): value for name, value in changed.items()}
    return tuple((REQUEST | names).items())


def test_repeated_headers_are_routed_once() -> None:
    routes = RouteCache(Router(METHODS, EverybodyMayCall()).route)
    first, other = headers(), headers(key=b"another")
    route = routes.route(first, PEER)
    assert route.method is METHODS["/test/Echo"]
    assert route.refusal is None
    assert routes.route((*first,), PEER) is route
    assert routes.route(other, PEER) is not route
    assert routes.route((*first,), PEER) is route


def test_the_cache_of_routes_is_bounded() -> None:
    routes = RouteCache(Router(METHODS, EverybodyMayCall()).route)
    for number in range(1000):
        value = b"%d" % number
        assert (b"key", value) in routes.route(headers(key=value), PEER).head.fields
    large = headers(key=bytes(2000))
    assert routes.route(large, PEER) is not routes.route(large, PEER)
    assert len(routes._routes) <= CACHED_ROUTES


@pytest.mark.parametrize(
    ("changed", "code"),
    [
        ({"key": b"v" * 9000}, StatusCode.RESOURCE_EXHAUSTED),
        ({":path": b"/test/Missing"}, StatusCode.UNIMPLEMENTED),
        ({":path": b"test/Echo"}, StatusCode.UNIMPLEMENTED),
        ({"grpc_encoding": b"snappy"}, StatusCode.UNIMPLEMENTED),
        ({"grpc_timeout": b"soon"}, StatusCode.INVALID_ARGUMENT),
    ],
    ids=lambda value: value.name if isinstance(value, StatusCode) else ",".join(value),
)
def test_a_call_that_its_headers_make_impossible_is_refused(
    changed: dict[str, bytes], code: StatusCode
) -> None:
    refusal = Router(METHODS, EverybodyMayCall()).route(headers(**changed), PEER).refusal
    assert refusal is not None
    assert refusal.code is code
    assert (b"grpc-status", b"%d" % code.value[0]) in refusal.headers


@pytest.mark.parametrize(
    ("changed", "status"),
    [({":method": b"GET"}, b"405"), ({"content_type": b"text/html"}, b"415")],
    ids=["GET", "text"],
)
def test_a_request_that_is_no_call_gets_an_http_status(
    changed: dict[str, bytes], status: bytes
) -> None:
    refusal = Router(METHODS, EverybodyMayCall()).route(headers(**changed), PEER).refusal
    assert refusal is not None
    assert refusal.code is None
    assert refusal.headers[0] == (b":status", status)
