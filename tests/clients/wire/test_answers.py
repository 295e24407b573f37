"""Every answer, reset and lost connection ends a call with the right status."""

from __future__ import annotations

import asyncio
import time
from base64 import b64encode

import pytest
from google.rpc import status_pb2
from hpack import Encoder

from convserve_client import ServerUnreachable
from convserve_client.loadgen.wire import channel as channel_module
from convserve_client.loadgen.wire.channel import Channel, call_and_wait
from tests.clients.wire.peers import (
    ECHO,
    INADEQUATE_SECURITY,
    MAX_CONCURRENT_STREAMS,
    OK_TRAILERS,
    RESPONSE_HEADERS,
    TIMEOUT_S,
    answer_frames,
    connected,
    plain_block,
    raw_server,
    refusal_frames,
    setting,
    start_call,
    status_of,
)
from tests.support.http2_peers import (
    ACK,
    CANCEL,
    CONTINUATION,
    DATA,
    END_HEADERS,
    END_STREAM,
    ENHANCE_YOUR_CALM,
    GOAWAY,
    HEADERS,
    NO_ERROR,
    PADDED,
    PING,
    REFUSED_STREAM,
    RST_STREAM,
    WITH_PRIORITY,
    frame,
    message,
)
from tests.support.scripted_classifier import retry_info


async def test_a_call_that_waits_for_a_stream_ends_at_its_deadline() -> None:
    one_at_a_time = setting(MAX_CONCURRENT_STREAMS, 1)
    async with connected(one_at_a_time) as (_, channel, connection):
        first = start_call(channel)
        await connection.until(DATA, 1)
        second, third = start_call(channel, timeout_s=0.05), start_call(channel, b"third")
        assert status_of(await second) == "DEADLINE_EXCEEDED"
        connection.send(answer_frames(1))
        assert (await first).answer == b"word"
        assert (await connection.until(DATA, 3))[1] == message(b"third")
        connection.send(answer_frames(3))
        assert status_of(await third) == "OK"


async def test_an_answer_may_arrive_byte_by_byte() -> None:
    encoder = Encoder()
    async with connected() as (_, channel, connection):
        for stream, data in ((1, b"first"), (3, bytes(300))):
            calling = start_call(channel)
            await connection.until(DATA, stream)
            whole = b"".join(
                [
                    frame(PING, 0, 0, b"01234567"),
                    frame(HEADERS, END_HEADERS, stream, plain_block([(":status", "103")])),
                    frame(HEADERS, 0, stream, encoder.encode(RESPONSE_HEADERS)),
                    frame(CONTINUATION, END_HEADERS, stream, b""),
                    frame(DATA, 0, stream, message(data)[:3]),
                    frame(DATA, PADDED, stream, b"\4" + message(data)[3:] + bytes(4)),
                    frame(77, 0, stream, b"an extension"),
                    frame(
                        HEADERS,
                        END_HEADERS | END_STREAM | PADDED | WITH_PRIORITY,
                        stream,
                        b"\1" + bytes(5) + encoder.encode(OK_TRAILERS) + b"\0",
                    ),
                ]
            )
            for at in range(len(whole)):
                connection.send(whole[at : at + 1])
                await asyncio.sleep(0)
            assert (await calling).answer == data
            assert await connection.until(PING) == (ACK, b"01234567")


async def test_headers_with_huffman_coding_and_a_changing_table_are_decoded() -> None:
    encoder = Encoder()
    async with connected() as (_, channel, connection):
        for number in range(40):
            calling = start_call(channel)
            stream = 2 * number + 1
            await connection.until(DATA, stream)
            if number == 20:
                encoder.header_table_size = 200
            head = [*RESPONSE_HEADERS, ("x-turn", str(number // 3)), ("long", "ü" * 40)]
            refused = [("grpc-status", "8"), ("grpc-message", f"turn {number // 2}")]
            fine = number % 4
            connection.send(
                frame(HEADERS, END_HEADERS, stream, encoder.encode(head)),
                frame(DATA, 0, stream, message(b"%d" % number)) if fine else b"",
                frame(
                    HEADERS,
                    END_HEADERS | END_STREAM,
                    stream,
                    encoder.encode(OK_TRAILERS if fine else refused),
                ),
            )
            call = await calling
            if fine:
                assert (status_of(call), call.answer) == ("OK", b"%d" % number)
            else:
                assert (status_of(call), call.message) == (
                    "RESOURCE_EXHAUSTED",
                    f"turn {number // 2}",
                )


async def test_a_refusal_without_a_body_says_when_to_retry() -> None:
    details = status_pb2.Status(code=8)
    details.details.add().Pack(retry_info(0.25))
    encoded = plain_block([("grpc-status-details-bin", "")])[:-1]
    value = b64encode(details.SerializeToString()).rstrip(b"=")
    with_details = (
        plain_block([*RESPONSE_HEADERS, ("grpc-status", "8")])
        + encoded
        + bytes((len(value),))
        + value
    )
    async with connected() as (_, channel, connection):
        waits_s = []
        for number, sent in enumerate(
            [
                refusal_frames(1, ("grpc-status", "8"), ("grpc-retry-pushback-ms", "120")),
                refusal_frames(3, ("grpc-status", "8"), ("grpc-retry-pushback-ms", "-1")),
                frame(HEADERS, END_HEADERS | END_STREAM, 5, with_details),
                refusal_frames(7, ("grpc-status", "8"), ("grpc-retry-pushback-ms", "9" * 100)),
                refusal_frames(9, ("grpc-status", "8"), ("grpc-message", "caf%C3%A9 100%25")),
            ]
        ):
            calling = start_call(channel)
            await connection.until(DATA, 2 * number + 1)
            connection.send(sent)
            call = await calling
            assert status_of(call) == "RESOURCE_EXHAUSTED"
            waits_s.append(call.retry_after_s())
    assert waits_s == [0.12, -1.0, 0.25, -1.0, -1.0]
    assert call.message == "café 100%"


INVALID_ANSWERS = {
    "HTTP 404": ([(":status", "404")], b"", None, "UNIMPLEMENTED"),
    "HTTP 503": ([(":status", "503"), ("content-type", "text/html")], b"x", None, "UNAVAILABLE"),
    "HTTP 418": ([(":status", "418")], b"", None, "UNKNOWN"),
    "HTTP 503 with a gRPC status": (
        [(":status", "503"), ("grpc-status", "5")],
        b"",
        [],
        "NOT_FOUND",
    ),
    "another content type": (
        [(":status", "200"), ("content-type", "text/html")],
        b"x",
        None,
        "UNKNOWN",
    ),
    "no status": (RESPONSE_HEADERS, message(b""), None, "UNKNOWN"),
    "trailers without a status": (RESPONSE_HEADERS, message(b""), [("a", "b")], "UNKNOWN"),
    "a status that is not a number": (
        RESPONSE_HEADERS,
        message(b""),
        [("grpc-status", "fine")],
        "UNKNOWN",
    ),
    "an unknown status": (RESPONSE_HEADERS, message(b""), [("grpc-status", "99")], "UNKNOWN"),
    "a success without an answer": (RESPONSE_HEADERS, b"", OK_TRAILERS, "INTERNAL"),
    "two answers": (RESPONSE_HEADERS, message(b"a") + message(b"b"), OK_TRAILERS, "INTERNAL"),
    "half an answer": (RESPONSE_HEADERS, message(b"abc")[:-1], OK_TRAILERS, "INTERNAL"),
    "a compressed answer": (RESPONSE_HEADERS, message(b"a", compressed=1), OK_TRAILERS, "INTERNAL"),
}


@pytest.mark.parametrize("wrong", INVALID_ANSWERS)
async def test_an_invalid_answer_gets_the_right_status(wrong: str) -> None:
    head, body, trailers, wanted = INVALID_ANSWERS[wrong]
    async with connected() as (_, channel, connection):
        calling = start_call(channel)
        await connection.until(DATA, 1)
        parts = [frame(HEADERS, END_HEADERS, 1, plain_block(head))]
        if trailers == []:
            parts = [frame(HEADERS, END_HEADERS | END_STREAM, 1, plain_block(head))]
        elif trailers is None:
            parts += [frame(DATA, END_STREAM, 1, body)]
        else:
            parts += [frame(DATA, 0, 1, body)]
            parts += [frame(HEADERS, END_HEADERS | END_STREAM, 1, plain_block(trailers))]
        connection.send(*parts)
        call = await calling
        assert (status_of(call), call.answer) == (wanted, b"")
        assert call.message or trailers == []
        calling = start_call(channel)
        await connection.until(DATA, 3)
        connection.send(answer_frames(3))
        assert status_of(await calling) == "OK"


@pytest.mark.parametrize(
    ("code", "wanted"),
    [
        (NO_ERROR, "INTERNAL"),
        (REFUSED_STREAM, "UNAVAILABLE"),
        (CANCEL, "CANCELLED"),
        (ENHANCE_YOUR_CALM, "RESOURCE_EXHAUSTED"),
        (INADEQUATE_SECURITY, "PERMISSION_DENIED"),
        (12345, "INTERNAL"),
    ],
)
async def test_a_reset_stream_gets_the_status_of_its_error_code(code: int, wanted: str) -> None:
    async with connected() as (_, channel, connection):
        calling, other = start_call(channel), start_call(channel)
        await connection.until(DATA, 3)
        connection.send(frame(RST_STREAM, 0, 1, code.to_bytes(4, "big")))
        assert status_of(await calling) == wanted
        connection.send(answer_frames(3))
        assert status_of(await other) == "OK"


async def test_an_early_answer_stops_sending_the_request() -> None:
    async with connected() as (_, channel, connection):
        calling = start_call(channel, bytes(1_000_000))
        await connection.until(DATA, 1)
        connection.send(refusal_frames(1, ("grpc-status", "8")))
        assert status_of(await calling) == "RESOURCE_EXHAUSTED"
        assert (await connection.until(RST_STREAM, 1))[1] == CANCEL.to_bytes(4, "big")


async def test_a_deadline_is_not_early_and_resets_the_stream() -> None:
    async with connected() as (_, channel, connection):
        began_s = time.monotonic()
        late, other = start_call(channel, timeout_s=0.05), start_call(channel)
        assert status_of(await late) == "DEADLINE_EXCEEDED"
        assert time.monotonic() - began_s >= 0.05
        assert (await connection.until(RST_STREAM, 1))[1] == CANCEL.to_bytes(4, "big")
        connection.send(
            answer_frames(1), answer_frames(3)
        )  # the server answered before it saw the reset
        assert (await other).answer == b"word"


def late_answer(stream: int) -> bytes:
    return frame(HEADERS, END_HEADERS, stream, plain_block(RESPONSE_HEADERS)) + frame(
        HEADERS, END_HEADERS | END_STREAM, stream, plain_block(OK_TRAILERS)
    )


async def test_thousands_of_late_answers_do_not_end_the_connection() -> None:
    calls = 6000  # the library's default limit ends the connection after 5,000
    async with connected() as (_, channel, connection):
        for first in range(0, calls, 500):
            calling = [start_call(channel, b"") for _ in range(500)]
            await connection.until(HEADERS, 2 * (first + 500) - 1)
            for one in calling:
                one.cancel()
            await asyncio.gather(*calling, return_exceptions=True)
            await connection.until(RST_STREAM, 2 * (first + 500) - 1)
            connection.send(*(late_answer(2 * number + 1) for number in range(first, first + 500)))
        calling = [start_call(channel)]
        await connection.until(DATA, 2 * calls + 1)
        connection.send(answer_frames(2 * calls + 1))
        assert status_of(await calling[0]) == "OK"


async def test_cancelling_the_caller_resets_the_stream() -> None:
    async with connected() as (_, channel, connection):
        calling = start_call(channel)
        await connection.until(DATA, 1)
        calling.cancel()
        assert (await connection.until(RST_STREAM, 1))[1] == CANCEL.to_bytes(4, "big")


async def test_after_goaway_new_calls_use_another_connection() -> None:
    async with connected() as (one, channel, connection):
        first, second = start_call(channel), start_call(channel)
        await connection.until(DATA, 3)
        connection.send(frame(GOAWAY, 0, 0, (1).to_bytes(4, "big") + bytes(4)))
        assert status_of(await second) == "UNAVAILABLE"
        third = start_call(channel, b"third")
        other = await one.accept()
        assert (await other.until(DATA, 1))[1] == message(b"third")
        other.send(answer_frames(1, b"other"))
        assert (await third).answer == b"other"
        connection.send(answer_frames(1))
        assert (await first).answer == b"word"
        while await connection.reader.read(1 << 16):
            pass  # the client closes a connection without calls
        calling = start_call(channel)
        await other.until(DATA, 3)
        other.send(answer_frames(3))
        assert status_of(await calling) == "OK"


async def test_a_lost_connection_fails_its_calls_and_is_replaced() -> None:
    async with connected() as (one, channel, connection):
        calling = [start_call(channel) for _ in range(3)]
        await connection.until(DATA, 5)
        connection.writer.transport.abort()
        assert [status_of(call) for call in await asyncio.gather(*calling)] == ["UNAVAILABLE"] * 3
        again = start_call(channel)
        other = await one.accept()
        await other.until(DATA, 1)
        other.send(answer_frames(1))
        assert status_of(await again) == "OK"


async def test_calls_to_an_unreachable_server_fail_at_once_until_the_next_attempt(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with raw_server() as one:
        channel, port = Channel(one.target, ECHO), one.port
    monkeypatch.setattr(channel_module, "RECONNECT_DELAY_S", 0.2)
    found = [await call_and_wait(channel, b"", TIMEOUT_S) for _ in range(3)]
    assert [status_of(call) for call in found] == ["UNAVAILABLE"] * 3
    assert f"127.0.0.1:{port} cannot be reached" in found[0].message
    assert f"127.0.0.1:{port} is unreachable" in found[1].message
    await asyncio.sleep(0.2)
    call = await call_and_wait(channel, b"", TIMEOUT_S)
    assert "cannot be reached" in call.message  # a new attempt
    await channel.close()


async def test_a_server_that_never_sends_settings_is_unreachable(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(channel_module, "CONNECT_TIMEOUT_S", 0.1)
    async with raw_server() as one:
        channel = Channel(one.target, ECHO)
        with pytest.raises(ServerUnreachable, match="does not speak HTTP/2"):
            await channel.connect()
        await channel.close()
