"""Header blocks are encoded and decoded as HPACK and gRPC require."""

from __future__ import annotations

from typing import Any

import pytest
from hpack import Decoder, Encoder

from convserve_client.loadgen.wire.headers import (
    HeaderDecoder,
    ResponseHead,
    request_block,
    timeout,
)


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


def test_a_long_method_name_fits_into_the_request_headers() -> None:
    path = "/" + "m" * 20_000
    block = request_block(path, "h:1", 1.0)
    found: dict[Any, Any] = dict(Decoder(max_header_list_size=1 << 20).decode(block))
    assert (found[":path"], found["te"]) == (path, "trailers")


def test_a_cached_block_is_decoded_again_when_the_table_changed() -> None:
    decoder, encoder = HeaderDecoder(), Encoder()
    first = encoder.encode([("a", "1")])
    again = encoder.encode([("a", "1")])
    assert decoder.read(first).fields == decoder.read(again).fields == ((b"a", b"1"),)
    assert decoder.read(again) is decoder.read(again)
    decoder.read(encoder.encode([("b", "2")]))
    assert decoder.read(again).fields == ((b"b", b"2"),)  # the same index means the newest one now


def test_binary_metadata_may_be_joined_or_invalid() -> None:
    head = ResponseHead(fields=((b"a-bin", b"AAE, Ag"), (b"b-bin", b"!"), (b"c", b"x")))
    assert head.metadata() == [
        ("a-bin", b"\0\1"),
        ("a-bin", b"\2"),
        ("b-bin", b"!"),
        ("c", "x"),
    ]
