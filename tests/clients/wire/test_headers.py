"""Headers of requests are those that gRPC requires; those of responses are read once."""

from __future__ import annotations

import pytest

from convserve_client.loadgen.wire.headers import ResponseHead, ResponseHeads, timeout


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0000001, "1u"),
        (0.02, "20000u"),
        (99.999999, "99999999u"),
        (100.0001, "100001m"),
        (200_000.5, "200001S"),
        (1e9, "277778H"),
        (-1, "0u"),
    ],
)
def test_a_timeout_is_rounded_up(seconds: float, text: str) -> None:
    assert timeout(seconds) == text


def test_repeated_headers_are_read_once() -> None:
    heads = ResponseHeads()
    first = heads.read(((b":status", b"200"), (b"content-type", b"application/grpc")))
    other = heads.read(((b":status", b"503"),))
    assert heads.read(((b":status", b"200"), (b"content-type", b"application/grpc"))) is first
    assert (first.is_grpc, other.is_grpc, other.status) == (True, False, "503")
    assert first.fields == ((b"content-type", b"application/grpc"),)


def test_headers_that_differ_each_time_are_not_kept() -> None:
    heads = ResponseHeads()
    for number in range(3000):
        assert heads.read(((b"grpc-status", b"0"), (b"turn", b"%d" % number))).is_ok
    long = heads.read(((b"long", bytes(2000)),))
    assert heads.read(((b"long", bytes(2000)),)) is not long


def test_binary_metadata_may_be_joined_or_invalid() -> None:
    head = ResponseHead(fields=((b"a-bin", b"AAE, Ag"), (b"b-bin", b"!"), (b"c", b"x")))
    assert head.metadata() == [
        ("a-bin", b"\0\1"),
        ("a-bin", b"\2"),
        ("b-bin", b"!"),
        ("c", "x"),
    ]
