"""The load generator's calls on the wire: what any server of gRPC may send, and what it may break.

The other ends are our server, grpcio's, h2, which raises where the protocol is not kept to, and
frames made by hand.
"""

from __future__ import annotations

import asyncio
import random
import time
from base64 import b64encode
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import grpc
import pytest
from google.rpc import status_pb2
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import DataReceived, RequestReceived, StreamEnded, StreamReset
from h2.settings import SettingCodes, Settings
from hpack import Decoder, Encoder

from convserve_client import ServerUnreachable
from convserve_client.loadgen import calls, http2
from convserve_client.loadgen.calls import (
    CODES,
    Call,
    Channel,
    ask,
)
from convserve_client.loadgen.headers import (
    Head,
    Heads,
    request_block,
    timeout,
)
from convserve_client.loadgen.http2 import (
    ACK,
    CANCEL,
    CONTINUATION,
    DATA,
    END_HEADERS,
    END_STREAM,
    GOAWAY,
    HEADERS,
    PADDED,
    PING,
    PREFACE,
    PUSH_PROMISE,
    RST_STREAM,
    SETTINGS,
    WINDOW_UPDATE,
    WITH_PRIORITY,
)
from tests.support.http2_peers import (
    Raw,
    bare,
    ended_with,
    frame,
    message,
)
from tests.support.scripted_classifier import retry_info

WAIT_S = 20
ECHO = "/test/Echo"
HEAD = [(":status", "200"), ("content-type", "application/grpc")]
FINE = [("grpc-status", "0")]


def plain(fields: list[tuple[str, str]]) -> bytes:
    """A block that no table is needed for."""
    return b"".join(
        b"\0" + bytes((len(name),)) + name.encode() + bytes((len(value),)) + value.encode()
        for name, value in fields
    )


def answer(stream: int, data: bytes = b"word") -> bytes:
    return (
        frame(HEADERS, END_HEADERS, stream, plain(HEAD))
        + frame(DATA, 0, stream, message(data))
        + frame(HEADERS, END_HEADERS | END_STREAM, stream, plain(FINE))
    )


def refusal(stream: int, *fields: tuple[str, str]) -> bytes:
    return frame(HEADERS, END_HEADERS | END_STREAM, stream, plain([*HEAD, *fields]))


@dataclass
class Peer:
    """A server of bytes."""

    port: int = 0
    accepted: asyncio.Queue[Raw] = field(default_factory=asyncio.Queue)

    @property
    def target(self) -> str:
        return f"127.0.0.1:{self.port}"

    async def greeted(self, settings: bytes = b"") -> Raw:
        """The next connection, with the greetings exchanged."""
        connection = await self.accepted.get()
        assert await connection.reader.readexactly(len(PREFACE)) == PREFACE
        connection.send(frame(SETTINGS, 0, 0, settings))
        return connection


@asynccontextmanager
async def peer() -> AsyncIterator[Peer]:
    one, writers = Peer(), []

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        one.accepted.put_nowait(Raw(reader, writer))

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    one.port = server.sockets[0].getsockname()[1]
    try:
        async with asyncio.timeout(60):
            yield one
    finally:
        server.close()
        for writer in writers:
            writer.close()


@asynccontextmanager
async def channel_to(target: str, method: str = ECHO) -> AsyncIterator[Channel]:
    channel = Channel(target, method)
    await channel.connect()
    try:
        yield channel
    finally:
        await channel.close()


@asynccontextmanager
async def met(settings: bytes = b"") -> AsyncIterator[tuple[Peer, Channel, Raw]]:
    """A server by hand, a channel to it, and the connection between them."""
    async with peer() as one:
        channel = Channel(one.target, ECHO)
        connecting = asyncio.create_task(channel.connect())
        connection = await one.greeted(settings)
        await connecting
        try:
            yield one, channel, connection
        finally:
            await channel.close()


def asked(channel: Channel, data: bytes = b"word", timeout_s: float = WAIT_S) -> asyncio.Task[Call]:
    return asyncio.create_task(ask(channel, data, timeout_s))


def status(call: Call) -> str:
    return CODES[call.code].name


# --- other servers ---------------------------------------------------------------------------


@asynccontextmanager
async def grpcio() -> AsyncIterator[str]:
    """The target of a server by grpcio."""

    async def echo(data: bytes, context: Any) -> bytes:
        return data

    async def never(data: bytes, context: Any) -> bytes:
        await asyncio.Event().wait()
        raise AssertionError

    async def refuse(data: bytes, context: Any) -> bytes:
        trailing = (("why-bin", b"\0\xff\x01"), ("hint", "1"))
        await context.abort(grpc.StatusCode.ABORTED, "100 % naïve\n\N{SNOWMAN}", trailing)
        raise AssertionError

    server = grpc.aio.server(options=[("grpc.max_receive_message_length", -1)])
    methods = {
        name: grpc.unary_unary_rpc_method_handler(method)
        for name, method in (("Echo", echo), ("Never", never), ("Refuse", refuse))
    }
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("test", methods)])
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with asyncio.timeout(60):
            yield f"127.0.0.1:{port}"
    finally:
        await server.stop(None)


@asynccontextmanager
async def ours() -> AsyncIterator[str]:
    async with bare() as one:
        yield f"127.0.0.1:{one.port}"


SERVERS = {"ours": ours, "grpcio": grpcio}
every_server = pytest.mark.parametrize("server", SERVERS)


@every_server
async def test_messages_of_all_sizes_come_back_as_they_went(server: str) -> None:
    sizes = [0, 1, 4, 16_379, 16_380, 65_531, 70_000, 1 << 20, 3_000_000]
    messages = [random.Random(size).randbytes(size) for size in sizes]
    async with SERVERS[server]() as target, channel_to(target) as channel:
        for _ in range(3):
            found = await asyncio.gather(*(ask(channel, data, WAIT_S) for data in messages[:-1]))
            found.append(await ask(channel, messages[-1], WAIT_S))
            assert [status(call) for call in found] == ["OK"] * len(sizes)
            assert [call.answer for call in found] == messages


@every_server
async def test_many_calls_at_once_each_get_their_own_answer(server: str) -> None:
    async with SERVERS[server]() as target, channel_to(target) as channel:
        for _ in range(2):  # ours allows a hundred streams
            found = await asyncio.gather(
                *(ask(channel, str(number).encode(), WAIT_S) for number in range(500))
            )
            assert [call.answer for call in found] == [b"%d" % number for number in range(500)]


@every_server
async def test_a_refusal_is_told_with_its_words_and_trailers(server: str) -> None:
    async with SERVERS[server]() as target, channel_to(target, "/test/Refuse") as channel:
        call = await ask(channel, b"", WAIT_S)
    failure = call.failure()
    assert (failure.code(), failure.details()) == (
        grpc.StatusCode.ABORTED,
        "100 % naïve\n\N{SNOWMAN}",
    )
    found = dict(list(cast(Any, failure.trailing_metadata())))
    assert (found["why-bin"], found["hint"]) == (b"\0\xff\x01", "1")


@every_server
async def test_a_deadline_ends_a_call_and_harms_no_other(server: str) -> None:
    async with SERVERS[server]() as target, channel_to(target, "/test/Never") as channel:
        began_s = time.monotonic()
        found = await asyncio.gather(*(ask(channel, b"", n / 100) for n in (20, 5, 10, 5)))
        assert [status(call) for call in found] == ["DEADLINE_EXCEEDED"] * 4
        assert time.monotonic() - began_s >= 0.2


@every_server
async def test_a_method_that_is_not_there_is_unimplemented(server: str) -> None:
    async with SERVERS[server]() as target, channel_to(target, "/test/Nothing") as channel:
        assert status(await ask(channel, b"", WAIT_S)) == "UNIMPLEMENTED"


async def test_a_server_that_stops_answers_what_came_and_the_next_one_takes_over() -> None:
    async with bare() as one, channel_to(f"127.0.0.1:{one.port}") as channel:
        assert status(await ask(channel, b"", WAIT_S)) == "OK"
        stopping = asyncio.create_task(one.server.stop(WAIT_S))
        await stopping
        assert status(await ask(channel, b"", WAIT_S)) == "UNAVAILABLE"


# --- h2 --------------------------------------------------------------------------------------


class Strict(asyncio.Protocol):
    """A server of echoes by h2, which raises where a client breaks the protocol."""

    def __init__(self, options: dict[str, int]) -> None:
        self.h2 = H2Connection(H2Configuration(client_side=False, header_encoding="utf-8"))
        self.h2.local_settings = Settings(
            client=False,
            initial_values={getattr(SettingCodes, name): v for name, v in options.items()},
        )
        self.h2.max_inbound_frame_size = options.get("MAX_FRAME_SIZE", http2.USUAL_FRAME)
        self.bodies: dict[int, bytearray] = {}
        self.headers: list[Any] = []
        self.most = 0
        self.resets: list[int] = []
        self.errors: list[Exception] = []
        self.transport: Any = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        self.h2.initiate_connection()
        self.transport.write(self.h2.data_to_send())

    def data_received(self, data: bytes) -> None:
        try:
            for event in self.h2.receive_data(data):
                self.take(event)
            self.transport.write(self.h2.data_to_send())
        except Exception as error:
            self.errors.append(error)
            self.transport.abort()

    def take(self, event: Any) -> None:
        if isinstance(event, RequestReceived):
            self.headers.append(list(event.headers))
            self.bodies[event.stream_id] = bytearray()
            self.most = max(self.most, len(self.bodies))
        elif isinstance(event, DataReceived):
            self.bodies[event.stream_id] += event.data
            if size := event.flow_controlled_length:
                self.h2.increment_flow_control_window(size)
                if event.stream_ended is None:
                    self.h2.increment_flow_control_window(size, event.stream_id)
        elif isinstance(event, StreamReset):
            self.resets.append(event.error_code)
        elif isinstance(event, StreamEnded):
            stream = event.stream_id
            body = bytes(self.bodies.pop(stream))
            # It answers in the next turn, so that as many streams are open as the client will open.
            asyncio.get_running_loop().call_later(0.001, self.answer, stream, body)
            self.bodies[stream] = bytearray()

    def answer(self, stream: int, body: bytes) -> None:
        del self.bodies[stream]
        if self.transport.is_closing():
            return
        self.h2.send_headers(stream, HEAD)
        for at in range(0, len(body), 1000):  # in several frames
            self.h2.send_data(stream, body[at : at + 1000], pad_length=at % 7 or None)
        self.h2.send_headers(stream, FINE, end_stream=True)
        self.transport.write(self.h2.data_to_send())


@asynccontextmanager
async def strict(**options: int) -> AsyncIterator[tuple[str, Strict]]:
    one = Strict(options)
    server = await asyncio.get_running_loop().create_server(lambda: one, "127.0.0.1", 0)
    try:
        async with asyncio.timeout(60):
            yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}", one
    finally:
        server.close()
    assert one.errors == []


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"INITIAL_WINDOW_SIZE": 1000},
        {"INITIAL_WINDOW_SIZE": 1 << 20, "MAX_FRAME_SIZE": 1 << 20},
        {"INITIAL_WINDOW_SIZE": 2**31 - 1},
        {"MAX_CONCURRENT_STREAMS": 2},
        {"MAX_CONCURRENT_STREAMS": 1, "INITIAL_WINDOW_SIZE": 17, "HEADER_TABLE_SIZE": 0},
        {"HEADER_TABLE_SIZE": 0},
        {"HEADER_TABLE_SIZE": 100},
        {"HEADER_TABLE_SIZE": 65_536},
    ],
    ids=str,
)
async def test_windows_frames_streams_and_tables_are_kept_to(options: dict[str, int]) -> None:
    sizes = [0, 100, 30_000, 100_000, 5, 3000]
    messages = [random.Random(size).randbytes(size) for size in sizes]
    async with strict(**options) as (target, server), channel_to(target) as channel:
        for _ in range(2):
            found = await asyncio.gather(*(ask(channel, data, WAIT_S) for data in messages))
            assert [status(call) for call in found] == ["OK"] * len(sizes)
            assert [call.answer for call in found] == messages
        assert server.most == min(len(sizes), options.get("MAX_CONCURRENT_STREAMS", len(sizes)))


async def test_a_request_says_all_that_grpc_asks_for() -> None:
    async with strict() as (target, server), channel_to(target) as channel:
        await ask(channel, b"", 2.5)
    assert server.headers == [
        [
            (":method", "POST"),
            (":scheme", "http"),
            (":path", ECHO),
            (":authority", target),
            ("te", "trailers"),
            ("grpc-timeout", "2500000u"),
            ("content-type", "application/grpc"),
            ("user-agent", "convserve-bench"),
        ]
    ]


async def test_a_window_may_shrink_below_nothing_and_grow_again() -> None:
    data = bytes(200_000)
    async with strict(INITIAL_WINDOW_SIZE=50_000) as (target, server), channel_to(target) as way:
        calling = asked(way, data)
        while not server.bodies:
            await asyncio.sleep(0)
        server.h2.update_settings({SettingCodes.INITIAL_WINDOW_SIZE: 10})
        server.h2.update_settings({SettingCodes.INITIAL_WINDOW_SIZE: 300_000})
        server.transport.write(server.h2.data_to_send())
        assert (await calling).answer == data


async def test_what_waits_for_a_stream_ends_at_its_deadline_too() -> None:
    one_at_a_time = http2._setting.pack(http2.MOST_STREAMS, 1)
    async with met(one_at_a_time) as (_, channel, connection):
        first = asked(channel)
        await connection.until(DATA, 1)
        second, third = asked(channel, timeout_s=0.05), asked(channel, b"third")
        assert status(await second) == "DEADLINE_EXCEEDED"
        connection.send(answer(1))
        assert (await first).answer == b"word"
        assert (await connection.until(DATA, 3))[1] == message(b"third")
        connection.send(answer(3))
        assert status(await third) == "OK"


# --- frames by hand --------------------------------------------------------------------------


async def test_an_answer_may_come_byte_by_byte() -> None:
    encoder = Encoder()
    async with met() as (_, channel, connection):
        for stream, data in ((1, b"first"), (3, bytes(300))):
            calling = asked(channel)
            await connection.until(DATA, stream)
            whole = b"".join(
                [
                    frame(PING, 0, 0, b"01234567"),
                    frame(HEADERS, END_HEADERS, stream, plain([(":status", "103")])),
                    frame(HEADERS, 0, stream, encoder.encode(HEAD)),
                    frame(CONTINUATION, END_HEADERS, stream, b""),
                    frame(DATA, 0, stream, message(data)[:3]),
                    frame(DATA, PADDED, stream, b"\4" + message(data)[3:] + bytes(4)),
                    frame(77, 0, stream, b"an extension"),
                    frame(
                        HEADERS,
                        END_HEADERS | END_STREAM | PADDED | WITH_PRIORITY,
                        stream,
                        b"\1" + bytes(5) + encoder.encode(FINE) + b"\0",
                    ),
                ]
            )
            for at in range(len(whole)):
                connection.send(whole[at : at + 1])
                await asyncio.sleep(0)
            assert (await calling).answer == data
            assert await connection.until(PING) == (ACK, b"01234567")


async def test_headers_by_huffman_and_by_a_table_that_changes_are_read() -> None:
    encoder = Encoder()
    async with met() as (_, channel, connection):
        for number in range(40):
            calling = asked(channel)
            stream = 2 * number + 1
            await connection.until(DATA, stream)
            if number == 20:
                encoder.header_table_size = 200
            head = [*HEAD, ("x-turn", str(number // 3)), ("long", "ü" * 40)]
            refused = [("grpc-status", "8"), ("grpc-message", f"turn {number // 2}")]
            fine = number % 4
            connection.send(
                frame(HEADERS, END_HEADERS, stream, encoder.encode(head)),
                frame(DATA, 0, stream, message(b"%d" % number)) if fine else b"",
                frame(
                    HEADERS,
                    END_HEADERS | END_STREAM,
                    stream,
                    encoder.encode(FINE if fine else refused),
                ),
            )
            call = await calling
            if fine:
                assert (status(call), call.answer) == ("OK", b"%d" % number)
            else:
                assert (status(call), call.message) == ("RESOURCE_EXHAUSTED", f"turn {number // 2}")


async def test_a_refusal_with_nothing_before_it_says_when_to_come_back() -> None:
    details = status_pb2.Status(code=8)
    details.details.add().Pack(retry_info(0.25))
    encoded = plain([("grpc-status-details-bin", "")])[:-1]
    value = b64encode(details.SerializeToString()).rstrip(b"=")
    with_details = plain([*HEAD, ("grpc-status", "8")]) + encoded + bytes((len(value),)) + value
    async with met() as (_, channel, connection):
        hints = []
        for number, sent in enumerate(
            [
                refusal(1, ("grpc-status", "8"), ("grpc-retry-pushback-ms", "120")),
                refusal(3, ("grpc-status", "8"), ("grpc-retry-pushback-ms", "-1")),
                frame(HEADERS, END_HEADERS | END_STREAM, 5, with_details),
                refusal(7, ("grpc-status", "8"), ("grpc-message", "caf%C3%A9 100%25")),
            ]
        ):
            calling = asked(channel)
            await connection.until(DATA, 2 * number + 1)
            connection.send(sent)
            call = await calling
            assert status(call) == "RESOURCE_EXHAUSTED"
            hints.append(call.hint())
    assert hints == [0.12, -1.0, 0.25, -1.0]
    assert call.message == "café 100%"


WRONG = {
    "HTTP's 404": ([(":status", "404")], b"", None, "UNIMPLEMENTED"),
    "HTTP's 503": ([(":status", "503"), ("content-type", "text/html")], b"x", None, "UNAVAILABLE"),
    "HTTP's 418": ([(":status", "418")], b"", None, "UNKNOWN"),
    "HTTP's 503, but gRPC's own": (
        [(":status", "503"), ("grpc-status", "5")],
        b"",
        [],
        "NOT_FOUND",
    ),
    "another type": ([(":status", "200"), ("content-type", "text/html")], b"x", None, "UNKNOWN"),
    "no status": (HEAD, message(b""), None, "UNKNOWN"),
    "trailers without a status": (HEAD, message(b""), [("a", "b")], "UNKNOWN"),
    "a status that is none": (HEAD, message(b""), [("grpc-status", "fine")], "UNKNOWN"),
    "a status of tomorrow": (HEAD, message(b""), [("grpc-status", "99")], "UNKNOWN"),
    "a success without an answer": (HEAD, b"", FINE, "INTERNAL"),
    "two answers": (HEAD, message(b"a") + message(b"b"), FINE, "INTERNAL"),
    "half an answer": (HEAD, message(b"abc")[:-1], FINE, "INTERNAL"),
    "a compressed answer": (HEAD, message(b"a", compressed=1), FINE, "INTERNAL"),
}


@pytest.mark.parametrize("wrong", WRONG)
async def test_an_answer_that_is_none_has_a_status_that_says_so(wrong: str) -> None:
    head, body, trailers, wanted = WRONG[wrong]
    async with met() as (_, channel, connection):
        calling = asked(channel)
        await connection.until(DATA, 1)
        parts = [frame(HEADERS, END_HEADERS, 1, plain(head))]
        if trailers == []:
            parts = [frame(HEADERS, END_HEADERS | END_STREAM, 1, plain(head))]
        elif trailers is None:
            parts += [frame(DATA, END_STREAM, 1, body)]
        else:
            parts += [frame(DATA, 0, 1, body)]
            parts += [frame(HEADERS, END_HEADERS | END_STREAM, 1, plain(trailers))]
        connection.send(*parts)
        call = await calling
        assert (status(call), call.answer) == (wanted, b"")
        assert call.message or trailers == []
        calling = asked(channel)
        connection.send(answer(3))
        assert status(await calling) == "OK"


@pytest.mark.parametrize(
    ("code", "wanted"),
    [
        (http2.NO_ERROR, "INTERNAL"),
        (http2.REFUSED_STREAM, "UNAVAILABLE"),
        (http2.CANCEL, "CANCELLED"),
        (http2.ENHANCE_YOUR_CALM, "RESOURCE_EXHAUSTED"),
        (http2.INADEQUATE_SECURITY, "PERMISSION_DENIED"),
        (12345, "INTERNAL"),
    ],
)
async def test_a_stream_that_was_reset_has_the_status_of_its_code(code: int, wanted: str) -> None:
    async with met() as (_, channel, connection):
        calling, other = asked(channel), asked(channel)
        await connection.until(DATA, 3)
        connection.send(frame(RST_STREAM, 0, 1, code.to_bytes(4, "big")))
        assert status(await calling) == wanted
        connection.send(answer(3))
        assert status(await other) == "OK"


async def test_an_answer_before_all_of_the_request_ends_the_sending() -> None:
    async with met() as (_, channel, connection):
        calling = asked(channel, bytes(1_000_000))
        await connection.until(DATA, 1)
        connection.send(refusal(1, ("grpc-status", "8")))
        assert status(await calling) == "RESOURCE_EXHAUSTED"
        assert (await connection.until(RST_STREAM, 1))[1] == CANCEL.to_bytes(4, "big")


async def test_a_deadline_is_not_early_and_the_server_is_told() -> None:
    async with met() as (_, channel, connection):
        began_s = time.monotonic()
        late, other = asked(channel, timeout_s=0.05), asked(channel)
        assert status(await late) == "DEADLINE_EXCEEDED"
        assert time.monotonic() - began_s >= 0.05
        assert (await connection.until(RST_STREAM, 1))[1] == CANCEL.to_bytes(4, "big")
        connection.send(answer(1), answer(3))  # the first crossed our word
        assert (await other).answer == b"word"


async def test_a_caller_that_leaves_cancels_its_call() -> None:
    async with met() as (_, channel, connection):
        calling = asked(channel)
        await connection.until(DATA, 1)
        calling.cancel()
        assert (await connection.until(RST_STREAM, 1))[1] == CANCEL.to_bytes(4, "big")


async def test_what_the_server_says_it_never_saw_is_unavailable_and_the_next_goes_elsewhere() -> (
    None
):
    async with met() as (one, channel, connection):
        first, second = asked(channel), asked(channel)
        await connection.until(DATA, 3)
        connection.send(frame(GOAWAY, 0, 0, (1).to_bytes(4, "big") + bytes(4)))
        assert status(await second) == "UNAVAILABLE"
        third = asked(channel, b"third")
        other = await one.greeted()
        assert (await other.until(DATA, 1))[1] == message(b"third")
        other.send(answer(1, b"other"))
        assert (await third).answer == b"other"
        connection.send(answer(1))
        assert (await first).answer == b"word"
        assert await ended_with(connection) == http2.NO_ERROR  # nobody needs it any more
        calling = asked(channel)
        await other.until(DATA, 3)
        other.send(answer(3))
        assert status(await calling) == "OK"


async def test_a_connection_that_is_lost_fails_what_was_on_it_and_another_is_made() -> None:
    async with met() as (one, channel, connection):
        calling = [asked(channel) for _ in range(3)]
        await connection.until(DATA, 5)
        connection.writer.transport.abort()
        assert [status(call) for call in await asyncio.gather(*calling)] == ["UNAVAILABLE"] * 3
        again = asked(channel)
        other = await one.greeted()
        await other.until(DATA, 1)
        other.send(answer(1))
        assert status(await again) == "OK"


async def test_calls_fail_at_once_while_nobody_is_there_and_look_again_after_a_while(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with peer() as one:
        channel, port = Channel(one.target, ECHO), one.port
    monkeypatch.setattr(calls, "RECONNECT_S", 0.2)
    found = [await ask(channel, b"", WAIT_S) for _ in range(3)]
    assert [status(call) for call in found] == ["UNAVAILABLE"] * 3
    assert f"127.0.0.1:{port} can't be reached" in found[0].message
    assert f"127.0.0.1:{port} is not there" in found[1].message
    await asyncio.sleep(0.2)
    call = await ask(channel, b"", WAIT_S)
    assert "can't be reached" in call.message  # it tried again
    await channel.close()


async def test_who_never_greets_is_unreachable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "CONNECT_S", 0.1)
    async with peer() as one:
        channel = Channel(one.target, ECHO)
        with pytest.raises(ServerUnreachable, match="does not greet as HTTP/2 does"):
            await channel.connect()
        await channel.close()


async def test_streams_that_run_out_are_opened_on_another_connection(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(http2, "LAST_STREAM", 7)
    async with bare() as one, channel_to(f"127.0.0.1:{one.port}") as channel:
        for _ in range(3):
            found = await asyncio.gather(*(ask(channel, b"%d" % n, WAIT_S) for n in range(10)))
            assert [call.answer for call in found] == [b"%d" % n for n in range(10)]


async def test_the_servers_windows_are_granted_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """A long answer, and many answers, more than the first windows hold."""
    monkeypatch.setattr(http2, "STREAM_WINDOW", 100_000)
    monkeypatch.setattr(http2, "CONNECTION_WINDOW", 150_000)
    async with bare() as one, channel_to(f"127.0.0.1:{one.port}", "/test/Large") as channel:
        sizes = [b"1000000", b"400000", b"30000"] * 3
        found = await asyncio.gather(*(ask(channel, size, WAIT_S) for size in sizes))
        assert [len(call.answer) for call in found] == [int(size) for size in sizes]


async def test_an_answer_too_long_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "MESSAGE_LIMIT", 50_000)
    async with bare() as one, channel_to(f"127.0.0.1:{one.port}", "/test/Large") as channel:
        assert status(await ask(channel, b"100000", WAIT_S)) == "RESOURCE_EXHAUSTED"
        assert status(await ask(channel, b"1000", WAIT_S)) == "OK"


SETTING = http2._setting.pack
FAULTS = {
    "a frame too long": (frame(77, 0, 0, bytes(16_385)), http2.FRAME_SIZE_ERROR),
    "settings of a stream": (frame(SETTINGS, 0, 1), http2.PROTOCOL_ERROR),
    "half a setting": (frame(SETTINGS, 0, 0, b"123"), http2.FRAME_SIZE_ERROR),
    "a window too wide": (
        frame(SETTINGS, 0, 0, SETTING(http2.FIRST_WINDOW, 1 << 31)),
        http2.FLOW_CONTROL_ERROR,
    ),
    "frames too short": (
        frame(SETTINGS, 0, 0, SETTING(http2.FRAME_LIMIT, 100)),
        http2.PROTOCOL_ERROR,
    ),
    "a short ping": (frame(PING, 0, 0, b"1"), http2.FRAME_SIZE_ERROR),
    "a ping of a stream": (frame(PING, 0, 1, bytes(8)), http2.PROTOCOL_ERROR),
    "a push": (frame(PUSH_PROMISE, END_HEADERS, 1, bytes(4)), http2.PROTOCOL_ERROR),
    "data of a stream that never was": (frame(DATA, 0, 9, b""), http2.PROTOCOL_ERROR),
    "headers of a stream of its own": (
        frame(HEADERS, END_HEADERS, 2, plain(HEAD)),
        http2.PROTOCOL_ERROR,
    ),
    "too much padding": (frame(DATA, PADDED, 1, b"\5abc"), http2.PROTOCOL_ERROR),
    "headers that make no sense": (
        frame(HEADERS, END_HEADERS, 1, b"\xff\xff\xff\xff\xff"),
        http2.COMPRESSION_ERROR,
    ),
    "headers that do not go on": (
        frame(HEADERS, 0, 1, b"") + frame(DATA, 0, 1, b""),
        http2.PROTOCOL_ERROR,
    ),
    "a continuation of nothing": (frame(CONTINUATION, END_HEADERS, 1), http2.PROTOCOL_ERROR),
    "headers without an end": (
        frame(HEADERS, 0, 1, b"") + frame(CONTINUATION, 0, 1, bytes(16_000)) * 5,
        http2.ENHANCE_YOUR_CALM,
    ),
    "a window of nothing": (frame(WINDOW_UPDATE, 0, 0, bytes(4)), http2.PROTOCOL_ERROR),
    "a window past the end": (
        frame(WINDOW_UPDATE, 0, 0, b"\x7f\xff\xff\xff"),
        http2.FLOW_CONTROL_ERROR,
    ),
    "a short word of the end": (frame(GOAWAY, 0, 0, b""), http2.FRAME_SIZE_ERROR),
}


@pytest.mark.parametrize("fault", FAULTS)
async def test_what_breaks_the_protocol_ends_the_connection_and_says_why(fault: str) -> None:
    sent, code = FAULTS[fault]
    async with met() as (_, channel, connection):
        calling = asked(channel)
        await connection.until(DATA, 1)
        connection.send(sent)
        assert await ended_with(connection) == code
        call = await calling
        assert status(call) == "UNAVAILABLE"
        assert "broke HTTP/2" in call.message


async def test_a_stream_that_breaks_the_protocol_ends_alone() -> None:
    upper = plain([(":status", "200"), ("Content-Type", "application/grpc")])
    late = plain([("content-type", "application/grpc"), (":status", "200")])
    async with met() as (_, channel, connection):
        calling = [asked(channel) for _ in range(5)]
        await connection.until(DATA, 9)
        connection.send(frame(HEADERS, END_HEADERS, 1, upper))
        connection.send(frame(HEADERS, END_HEADERS, 3, late))
        connection.send(frame(WINDOW_UPDATE, 0, 5, bytes(4)))
        connection.send(frame(HEADERS, END_HEADERS, 7, plain(HEAD)) * 2)
        connection.send(answer(9))
        found = await asyncio.gather(*calling)
    assert [status(call) for call in found] == ["INTERNAL"] * 4 + ["OK"]


async def test_no_bytes_at_all_leave_a_call_without_an_end() -> None:
    rng = random.Random(5)
    kinds = (DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION, 77)
    usual = (0, END_STREAM, END_HEADERS, END_HEADERS | END_STREAM)

    def noise() -> bytes:
        flags = rng.choice((*usual, rng.randrange(256)))
        payload = rng.choice((plain(HEAD), plain(FINE), message(b"x"), rng.randbytes(5)))
        return frame(rng.choice(kinds), flags, rng.choice((0, 1, 1, 3)), payload)

    for _ in range(150):
        async with met() as (_, channel, connection):
            calling = [asked(channel, timeout_s=0.02) for _ in range(2)]
            connection.send(*(noise() for _ in range(6)))
            async with asyncio.timeout(WAIT_S):
                await asyncio.gather(*calling)


# --- headers ---------------------------------------------------------------------------------


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
def test_a_timeout_is_never_shorter_than_was_asked(seconds: float, text: str) -> None:
    assert timeout(seconds) == text


def test_a_long_name_fits_into_a_requests_headers() -> None:
    path = "/" + "m" * 20_000
    block = request_block(path, "h:1", 1.0)
    found: dict[Any, Any] = dict(Decoder(max_header_list_size=1 << 20).decode(block))
    assert (found[":path"], found["te"]) == (path, "trailers")


def test_the_same_bytes_are_read_anew_when_the_table_has_changed() -> None:
    heads, encoder = Heads(), Encoder()
    first = encoder.encode([("a", "1")])
    again = encoder.encode([("a", "1")])
    assert heads.read(first).fields == heads.read(again).fields == ((b"a", b"1"),)
    assert heads.read(again) is heads.read(again)
    heads.read(encoder.encode([("b", "2")]))
    assert heads.read(again).fields == ((b"b", b"2"),)  # the same index means the newest one now


def test_metadata_in_bytes_may_be_joined_and_may_be_none() -> None:
    head = Head(fields=((b"a-bin", b"AAE, Ag"), (b"b-bin", b"!"), (b"c", b"x")))
    assert head.metadata() == [
        ("a-bin", b"\0\1"),
        ("a-bin", b"\2"),
        ("b-bin", b"!"),
        ("c", "x"),
    ]
