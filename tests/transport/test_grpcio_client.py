"""grpcio as a client: compression, statuses, metadata, deadlines, streams."""

from __future__ import annotations

import asyncio
import gzip
import zlib
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any, cast

import grpc as grpcio
import pytest
from grpc import StatusCode

from server.telemetry.loop_lag import LoopLag
from server.transport.calls.calls_in_progress import TransportLimits
from server.transport.http2 import connection as http2
from tests.support.http2_peers import (
    BODY,
    DATA,
    END_HEADERS,
    END_STREAM,
    HEADERS,
    HELLO,
    NO_ERROR,
    RST_STREAM,
    WAIT_S,
    Bare,
    Raw,
    bare,
    frame,
    headers,
    message,
    raw,
)


@asynccontextmanager
async def channel(one: Bare, **options: Any) -> AsyncIterator[Any]:
    private = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_receive_message_length", -1)]
    target = f"127.0.0.1:{one.port}"
    async with grpcio.aio.insecure_channel(target, options=private, **options) as found:
        yield found


@pytest.mark.parametrize("how", [grpcio.Compression.Gzip, grpcio.Compression.Deflate])
async def test_requests_may_be_compressed(how: grpcio.Compression) -> None:
    async with bare() as one, channel(one, compression=how) as client:
        for data in (b"", b"a" * 100_000, b"abc"):
            assert await client.unary_unary("/test/Echo")(data, timeout=WAIT_S) == data


@pytest.mark.parametrize(
    ("encoding", "data", "code"),
    [
        ("gzip", gzip.compress(bytes(5 << 20), mtime=0), b"8"),
        ("gzip", gzip.compress(b"abc", mtime=0)[:-6], b"3"),
        ("deflate", b"no such thing", b"3"),
        ("gzip", gzip.compress(b"abc", mtime=0) + b"more", b"3"),
        ("br", b"", b"12"),
    ],
    ids=["bomb", "cut off", "noise", "more behind it", "unknown"],
)
async def test_a_bad_or_too_large_compressed_request_gets_a_status(
    encoding: str, data: bytes, code: bytes
) -> None:
    async with bare() as one, raw(one, HELLO) as connection:
        sent = headers(grpc_encoding=encoding)
        connection.send(frame(HEADERS, END_HEADERS, 1, sent))
        connection.send(frame(DATA, END_STREAM, 1, message(data, 1)))
        _, payload = await connection.until(HEADERS, 1)
        assert b"grpc-status" + bytes((len(code),)) + code in payload
        await connection.echoes(3)


@pytest.mark.parametrize("path", ["/test/Echo", "/test/Each"])
async def test_inflated_bytes_count_as_received_while_they_grow(path: str) -> None:
    limits = TransportLimits(message_bytes=4 << 20, receiving_bytes=2 << 20, streams=100)
    data = gzip.compress(bytes(3 << 20), mtime=0)  # below the limit of one message
    async with bare(limits) as one, raw(one, HELLO) as connection:
        connection.send(frame(HEADERS, END_HEADERS, 1, headers(path=path, grpc_encoding="gzip")))
        connection.send(frame(DATA, END_STREAM, 1, message(data, 1)))
        _, payload = await connection.until(HEADERS, 1)
        assert b"grpc-status\x018" in payload
        assert b"bytes of requests are being received" in payload
        await connection.echoes(3)


async def test_deflate_means_the_zlib_format() -> None:
    async with bare() as one, raw(one, HELLO) as connection:
        connection.send(frame(HEADERS, END_HEADERS, 1, headers(grpc_encoding="deflate")))
        connection.send(frame(DATA, END_STREAM, 1, message(zlib.compress(b"abc"), 1)))
        assert (await connection.until(DATA, 1))[1] == message(b"abc")


async def test_a_method_adds_metadata_to_a_successful_response() -> None:
    async with bare() as one, channel(one) as client:
        call = client.unary_unary("/test/Described")(b"abc", timeout=WAIT_S)
        assert await call == b"abc"
        assert dict(iter(await call.initial_metadata())) == {"first": "1", "first-bin": b"\0"}
        assert dict(iter(await call.trailing_metadata())) == {"last": "2"}


async def test_an_abort_delivers_its_message_and_trailers() -> None:
    async with bare() as one, channel(one) as client:
        call = client.unary_unary("/test/Refuse")(b"", timeout=WAIT_S)
        assert await call.code() == StatusCode.ABORTED
        assert await call.details() == "100 % naïve\n\N{SNOWMAN}"
        assert dict(iter(await call.trailing_metadata())) == {"why-bin": b"\0\xff\x01", "hint": "1"}


async def test_an_unexpected_exception_is_internal_and_reveals_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with bare() as one, channel(one) as client:
        call = client.unary_unary("/test/Fail")(b"", timeout=WAIT_S)
        assert (await call.code(), await call.details()) == (StatusCode.INTERNAL, "internal error")
    assert "a secret" in caplog.text


async def test_metadata_arrives_as_it_was_sent() -> None:
    async with bare() as one, channel(one) as client:
        sent = (("x-text", "some, text"), ("x-bytes-bin", b"\0\xff"))
        await client.unary_unary("/test/Echo")(b"", timeout=WAIT_S, metadata=sent)
        assert set(sent) <= set(one.metadata)


async def test_a_deadline_ends_the_call_on_both_sides() -> None:
    async with bare() as one, raw(one, HELLO) as connection:
        sent = headers(path="/test/Never", grpc_timeout="50m")
        connection.send(frame(HEADERS, END_HEADERS, 1, sent), BODY)
        flags, payload = await connection.until(HEADERS, 1)
        assert b"grpc-status\x014" in payload
        assert one.cancelled.is_set()


async def test_a_deadline_that_passes_before_the_method_starts_is_answered() -> None:
    async with bare() as one, raw(one, HELLO) as connection:
        sent = headers(path="/test/Never", grpc_timeout="0m")
        connection.send(frame(HEADERS, END_HEADERS, 1, sent))
        _, payload = await connection.until(HEADERS, 1)
        assert b"grpc-status\x014" in payload
        assert not one.started.is_set()


async def test_calls_that_would_start_too_late_are_refused_at_once() -> None:
    """Each call blocks the loop for 1 ms. A hundred without deadline show the server this. Of a
    hundred with 40 ms it starts only the calls that can finish in time."""

    def some(first: int, **deadline: Any) -> bytes:
        sent = headers(path="/test/Busy", **deadline)
        return b"".join(
            frame(HEADERS, END_HEADERS, n, sent) + frame(DATA, END_STREAM, n, message(b""))
            for n in range(first, first + 200, 2)
        )

    async def statuses(connection: Raw) -> Counter[bytes]:
        found: Counter[bytes] = Counter()
        while found.total() < 100:
            flags, payload = await connection.until(HEADERS)
            if flags & END_STREAM:
                found[payload.partition(b"grpc-status")[2][1:2]] += 1
        return found

    async with bare() as one, raw(one, HELLO) as connection:
        connection.send(some(1))
        assert await statuses(connection) == {b"0": 100}
        connection.send(some(1001, grpc_timeout="40m"))
        found = await statuses(connection)
        assert found[b"8"] > 50
        assert found[b"0"] > 0
        await connection.echoes(2001)


async def test_a_connection_with_few_calls_is_not_refused_for_the_load_of_another() -> None:
    """Forty streams of the other connection wait to be started, so the loop is late."""
    async with bare() as one, raw(one, HELLO) as busy, raw(one, HELLO) as modest:
        for stream in range(1, 81, 2):
            busy.send(frame(HEADERS, END_HEADERS, stream, headers(path="/test/Each")))
        await busy.alive()
        one.server._calls.loop_lag = cast(
            LoopLag,
            SimpleNamespace(wait_s=1.0, task_queued=lambda: None, task_started=lambda: None),
        )
        sent = headers(path="/test/Busy", grpc_timeout="1S")
        for connection, status in ((busy, b"8"), (modest, b"0")):
            connection.send(
                frame(HEADERS, END_HEADERS, 101, sent),
                frame(DATA, END_STREAM, 101, message(b"")),
            )
            while True:
                flags, payload = await connection.until(HEADERS, 101)
                if flags & END_STREAM:
                    break
            assert b"grpc-status\x01" + status in payload
        one.server._calls.loop_lag = LoopLag()


async def test_an_early_refusal_resets_a_stream_whose_body_still_arrives() -> None:
    """A stream whose request is complete is not reset."""
    async with bare() as one, raw(one, HELLO) as connection:
        one.server._calls.loop_lag = cast(LoopLag, SimpleNamespace(wait_s=1.0))
        sent = headers(path="/test/Busy", grpc_timeout="40m")
        half = frame(HEADERS, END_HEADERS, 1, sent) + frame(DATA, 0, 1, message(b"")[:3])
        connection.send(half, frame(HEADERS, END_HEADERS, 3, sent), frame(DATA, END_STREAM, 3))
        connection.send(frame(HEADERS, END_HEADERS | END_STREAM, 5, sent))
        found: list[tuple[int, int]] = []
        while len(found) < 4:
            kind, flags, stream, payload = await connection.frame()
            if kind == HEADERS:
                assert flags & END_STREAM
                assert b"grpc-status\x018" in payload
            if kind in (HEADERS, RST_STREAM):
                found.append((kind, stream))
        assert found == [(HEADERS, 1), (HEADERS, 3), (HEADERS, 5), (RST_STREAM, 1)]
        assert payload == NO_ERROR.to_bytes(4, "big")
        connection.send(frame(DATA, END_STREAM, 1, message(b"")[3:]))
        await connection.alive()


@pytest.mark.parametrize("timeout", ["1", "m", "123456789m", "-1S", "1s", "\N{DIGIT ONE}x"])
async def test_an_invalid_timeout_is_an_error(timeout: str) -> None:
    async with bare() as one, raw(one, HELLO) as connection:
        sent = headers(grpc_timeout=timeout)
        connection.send(frame(HEADERS, END_HEADERS, 1, sent), BODY)
        _, payload = await connection.until(HEADERS, 1)
        assert b"grpc-status\x013" in payload
        assert b"grpc-timeout: is" in payload


async def test_a_cancelled_call_cancels_its_method() -> None:
    async with bare() as one, channel(one) as client:
        call = client.unary_unary("/test/Never")(b"")
        await one.started.wait()
        call.cancel()
        await one.cancelled.wait()


async def test_large_streams_are_answered_in_order() -> None:
    sizes = [0, 1, 100_000, 3_000_000, 5, 1_500_000]

    async def requests() -> AsyncIterator[bytes]:
        for size in sizes:
            yield bytes(size)

    async with bare() as one, channel(one) as client:
        call = client.stream_stream("/test/Each")(requests(), timeout=WAIT_S)
        assert [len(data) async for data in call] == sizes
        assert await call.code() == StatusCode.OK


async def test_a_method_that_does_not_read_blocks_only_its_own_client() -> None:
    size, count = 300_000, 20

    async def requests() -> AsyncIterator[bytes]:
        for _ in range(count):
            yield bytes(size)

    async with bare() as one, channel(one) as client:
        call = client.stream_stream("/test/Deaf")(requests(), timeout=WAIT_S)
        for _ in range(50):
            assert await client.unary_unary("/test/Echo")(bytes(100_000)) == bytes(100_000)
        assert one.server.receiving_bytes < http2.STREAM_WINDOW + size
        one.started.set()
        assert [int(data) async for data in call] == [size] * (count - 1)


async def test_many_calls_on_one_connection_each_get_their_own_response() -> None:
    async with bare() as one, channel(one) as client:
        echo = client.unary_unary("/test/Echo")
        sent = [str(n).encode() * (n % 7 * 1000 + 1) for n in range(1000)]
        for at in range(0, len(sent), 90):
            some = sent[at : at + 90]
            assert await asyncio.gather(*(echo(data, timeout=WAIT_S) for data in some)) == some
