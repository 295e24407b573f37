"""Header blocks: reading, caching and writing them."""

from __future__ import annotations

from base64 import b64decode
from typing import Any

import pytest
from hpack import Decoder, Encoder
from hypothesis import given, settings
from hypothesis import strategies as st

from server.transport.metadata import HeaderReader, block, timeout_s, trailer_block
from tests.support.http2_peers import (
    ECHO,
    headers,
)

FIELD = st.tuples(
    st.sampled_from(["a", "grpc-timeout", "x-" + "y" * 40]), st.text("abc", max_size=9)
)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.lists(FIELD, max_size=4), st.booleans(), st.integers(0, 200))))
def test_cached_and_decoded_blocks_mean_the_same(
    requests: list[tuple[list[tuple[str, str]], bool, int]],
) -> None:
    """Whatever the encoder keeps in its table, drops from it, or takes from it."""
    encoder, heads = Encoder(), HeaderReader()
    for fields, resized, size in requests:
        if resized:
            encoder.header_table_size = size
        head = heads.read(encoder.encode([*ECHO, *fields]))
        assert head.path == "/test/Echo"
        assert [(n.decode(), v.decode()) for n, v in head.fields] == [*ECHO[4:], *fields]


def test_a_repeated_block_is_decoded_once() -> None:
    encoder, heads = Encoder(), HeaderReader()
    heads.read(encoder.encode(ECHO))
    usual = encoder.encode(ECHO)
    assert heads.read(usual) is heads.read(encoder.encode(ECHO))


def test_the_block_cache_is_bounded() -> None:
    heads = HeaderReader()
    for n in range(1000):
        assert heads.read(headers(x=str(n))).fields[-1] == (b"x", str(n).encode())
    assert len(heads._cache) <= 128


def test_hpack_decodes_the_blocks_we_write() -> None:
    long = "m" * 5000
    fields: Any = Decoder().decode(trailer_block(13, long, [("a-bin", b"\0\1"), ("b", "c" * 127)]))
    found = dict(fields)
    assert found["grpc-message"] == long
    assert b64decode(found["a-bin"] + "=") == b"\0\1"
    assert found["b"] == "c" * 127
    fields = Decoder().decode(block([("x", "y")], 415))
    assert fields == [(":status", "415"), ("x", "y")]


@pytest.mark.parametrize(
    ("text", "seconds"), [("1S", 1.0), ("20m", 0.02), ("5u", 5e-6), ("2H", 7200.0), ("", None)]
)
def test_timeouts(text: str, seconds: float | None) -> None:
    assert timeout_s(text) == (None if seconds is None else pytest.approx(seconds))
