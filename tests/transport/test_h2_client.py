"""A client built on h2, which raises if the server violates the protocol."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any

import pytest
from h2.events import (
    DataReceived,
    PingAckReceived,
    ResponseReceived,
    StreamEnded,
    StreamReset,
)
from h2.exceptions import StreamClosedError
from h2.settings import SettingCodes

from tests.support.http2_peers import (
    ACK,
    BODY,
    CANCEL,
    DATA,
    ECHO,
    END_HEADERS,
    GOAWAY,
    HEADERS,
    HELLO,
    NO_ERROR,
    PING,
    RST_STREAM,
    WAIT_S,
    ask,
    bare,
    frame,
    h2_client,
    headers,
    message,
    raw,
)


@pytest.mark.parametrize("window", [0, 100, 1000, 65_535, 1 << 20])
async def test_the_server_respects_the_clients_windows(window: int) -> None:
    """h2 raises if the server exceeds a window or the maximum frame size."""
    sizes = [0, 1, 16_384, 16_385, 100_000, 70_000]
    async with bare() as one, h2_client(one, initial_window_size=window) as client:
        found = {ask(client, "/test/Large", str(size).encode()): bytearray() for size in sizes}
        if not window:
            for stream in found:
                client.h2.increment_flow_control_window(30_000, stream)
            client.flush()
        left = set(found)
        async for event in client.events():
            if isinstance(event, DataReceived):
                found[event.stream_id] += event.data
                if size := event.flow_controlled_length:
                    client.h2.increment_flow_control_window(size)
                    with suppress(StreamClosedError):  # this data ended the stream
                        client.h2.increment_flow_control_window(size, event.stream_id)
            elif isinstance(event, StreamEnded):
                left.discard(event.stream_id)
            if not left:
                break
        assert [bytes(data) for data in found.values()] == [message(bytes(n)) for n in sizes]


async def test_a_window_may_become_negative_and_grow_again() -> None:
    async with bare() as one, h2_client(one, initial_window_size=50_000) as client:
        stream = ask(client, "/test/Large", b"200000")
        received = 0
        async for event in client.events():
            if isinstance(event, DataReceived):
                received += len(event.data)
                if received == 50_000:
                    client.h2.update_settings({SettingCodes.INITIAL_WINDOW_SIZE: 10})
                    client.h2.update_settings({SettingCodes.INITIAL_WINDOW_SIZE: 300_000})
                client.h2.increment_flow_control_window(len(event.data))
            elif isinstance(event, StreamEnded):
                break
        assert (received, stream) == (200_005, 1)


async def test_a_client_may_cancel_while_its_response_waits_for_the_window() -> None:
    async with bare() as one, h2_client(one, initial_window_size=10) as client:
        first = ask(client, "/test/Large", b"100000")
        async for event in client.events():
            if isinstance(event, DataReceived):
                break
        client.h2.reset_stream(first)
        second = ask(client, "/test/Echo", b"abc")
        async for event in client.events():
            if isinstance(event, DataReceived) and event.stream_id == second:
                assert event.data == message(b"abc")
                break


async def test_a_stopping_server_sends_goaway_and_answers_calls_in_progress() -> None:
    async with bare() as one, raw(one, HELLO) as connection:
        never = frame(HEADERS, END_HEADERS, 1, headers(path="/test/Never"))
        connection.send(never, BODY)
        await one.started.wait()
        stopping = asyncio.create_task(one.server.stop(WAIT_S))
        _, payload = await connection.until(GOAWAY)
        assert payload == (2**31 - 1).to_bytes(4, "big") + bytes(4)
        await connection.echoes(3)  # sent before the GOAWAY arrived
        connection.send(frame(PING, ACK, 0, b"retiring"))
        _, payload = await connection.until(GOAWAY)
        assert payload == (3).to_bytes(4, "big") + bytes(4)
        connection.send(frame(HEADERS, END_HEADERS, 5, headers()), frame(DATA, 0, 5, b"late"))
        stopping_now = asyncio.create_task(one.server.stop(None))
        _, payload = await connection.until(HEADERS, 1)
        assert b"grpc-status\x0214" in payload
        assert await connection.reader.read() == b""
        await asyncio.gather(stopping, stopping_now)
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection("127.0.0.1", one.port)


@pytest.mark.parametrize("size", [0, 100, 4095, 65_536])
async def test_a_client_with_a_small_header_table_gets_a_table_size_update(size: int) -> None:
    async with bare() as one, h2_client(one, header_table_size=size) as client:
        for path in ("/test/Echo", "/test/Refuse", "/test/Echo"):
            stream = ask(client, path, b"abc")
            async for event in client.events():
                if isinstance(event, StreamEnded):
                    assert event.stream_id == stream
                    break


@pytest.mark.parametrize("how", ["deadline", "stop"])
async def test_a_stream_that_the_client_does_not_read_ends_too(how: str) -> None:
    async with bare() as one, raw(one, HELLO) as connection:
        timeout = {"grpc_timeout": "100m"} if how == "deadline" else {}
        sent: Any = {"path": "/test/Each", **timeout}
        connection.send(frame(HEADERS, END_HEADERS, 1, headers(**sent)))
        connection.send(frame(DATA, 0, 1, message(bytes(50_000))))
        connection.send(frame(DATA, 0, 1, message(bytes(50_000))))  # windows hold 65,535 bytes
        received = 0
        while received < 65_535:
            received += len((await connection.until(DATA, 1))[1])
        if how == "deadline":
            _, payload = await connection.until(RST_STREAM, 1)
            assert int.from_bytes(payload, "big") == CANCEL
        await one.server.stop(0.1)


async def test_calls_after_the_grace_period_are_refused() -> None:
    async with bare() as one, raw(one, HELLO) as connection:
        never = frame(HEADERS, END_HEADERS, 1, headers(path="/test/Stubborn"))
        connection.send(never, BODY)
        await one.started.wait()
        stopping = asyncio.create_task(one.server.stop(0.01))
        await one.cancelled.wait()
        connection.send(frame(HEADERS, END_HEADERS, 3, headers()))  # its body never arrives
        _, payload = await connection.until(HEADERS, 3)
        assert b"grpc-status\x0214" in payload
        one.released.set()
        await stopping


async def test_unread_messages_of_a_reset_stream_are_released_once() -> None:
    async with bare() as one, raw(one, HELLO) as connection:
        for stream in range(1, 41, 2):
            connection.send(
                frame(HEADERS, END_HEADERS, stream, headers(path="/test/Tasks")),
                frame(DATA, 0, stream, message(bytes(15_000))),
                frame(RST_STREAM, 0, stream, bytes(4)),
            )
        await connection.echoes(41)
        assert one.server.receiving_bytes == 0


async def test_a_request_may_continue_after_its_response() -> None:
    """Its first bytes were refused. The rest is ignored, but counts against the windows."""
    async with bare() as one, h2_client(one) as client:
        stream = client.h2.get_next_available_stream_id()
        client.h2.send_headers(stream, ECHO)
        client.h2.send_data(stream, b"\0\x7f\xff\xff\xff")
        client.flush()
        async for event in client.events():
            if isinstance(event, StreamReset):
                assert (event.stream_id, event.error_code) == (stream, NO_ERROR)
                break
        client.h2.ping(b"12345678")
        client.flush()
        async for event in client.events():
            if isinstance(event, PingAckReceived):
                break


async def test_trailers_fit_the_header_limit_of_the_client() -> None:
    async with bare() as one, h2_client(one, max_header_list_size=200) as client:
        stream = ask(client, "/test/Refuse", b"")
        async for event in client.events():
            if isinstance(event, ResponseReceived):
                found: dict[Any, Any] = dict(event.headers)
                assert found["grpc-status"] == "10"
                assert sum(len(name) + len(value) + 32 for name, value in event.headers) <= 200
            elif isinstance(event, StreamEnded):
                assert event.stream_id == stream
                break
