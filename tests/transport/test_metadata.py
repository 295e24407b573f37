"""Headers of requests and of responses."""

from __future__ import annotations

from base64 import b64decode

import pytest

from server.transport.metadata import (
    fitted,
    request_head,
    response_head,
    size_of,
    timeout_s,
    trailers,
)

REQUEST = (
    (b":method", b"POST"),
    (b":path", b"/test/Echo"),
    (b"content-type", b"application/grpc"),
    (b"grpc-timeout", b"20m"),
    (b"key-bin", b"AAE"),
    (b"key", b"value"),
)


def test_a_request_head_has_what_grpc_needs() -> None:
    head = request_head(REQUEST)
    assert (head.method, head.path, head.content_type) == ("POST", "/test/Echo", "application/grpc")
    assert (head.timeout_s, head.encoding) == (0.02, "")
    assert head.size == sum(len(name) + len(value) + 32 for name, value in REQUEST)
    assert head.metadata()[2:] == [("key-bin", b"\0\1"), ("key", "value")]


def test_trailers_are_ascii() -> None:
    found = dict(trailers(13, "h\u00e4 100%", [("a-bin", b"\0\1"), ("b", "c")]))
    assert found[b"grpc-status"] == b"13"
    assert found[b"grpc-message"] == b"h%C3%A4 100%25"
    assert b64decode(found[b"a-bin"] + b"=") == b"\0\1"
    assert found[b"b"] == b"c"


def test_headers_of_a_response_fit_the_limit_of_the_client() -> None:
    headers = (*response_head("application/grpc"), *trailers(3, "ä" * 50, [("a-bin", b"\0" * 100)]))
    assert fitted(headers, size_of(headers)) == headers
    for limit in range(200, size_of(headers)):
        found = fitted(headers, limit)
        assert size_of(found) <= limit
        assert (b"grpc-status", b"3") in found
        message = dict(found).get(b"grpc-message", b"")
        assert len(message) % 3 == 0  # no escape is cut
    assert size_of(found) > 300  # most of the message


def test_a_response_head_starts_with_the_status() -> None:
    expected = ((b":status", b"415"), (b"content-type", b"text/plain"))
    assert response_head("text/plain", 415) == expected


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        *(("1S", 1.0), ("500m", 0.5), ("2M", 120.0), ("1H", 3600.0), ("7u", 7e-6), ("5n", 5e-9)),
        *(("99999999S", 99_999_999.0), ("", None), ("1", None), ("S", None), ("-1S", None)),
        *(("123456789S", None), ("1.5S", None), ("1 S", None)),
    ],
)
def test_timeouts(text: str, seconds: float | None) -> None:
    assert timeout_s(text) == (None if seconds is None else pytest.approx(seconds))
