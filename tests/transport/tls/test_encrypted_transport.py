"""Data after the handshake: whole, in order, bounded in memory and in time, on both event loops."""

from __future__ import annotations

import asyncio
import socket
import ssl
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
import uvloop

from server.security.peer import Peer, peer_of
from server.transport.http2.reading import TURN_BUDGET_S
from server.transport.tls.encrypted_transport import MAX_WITHOUT_DATA
from tests.support.tls_files import HOST
from tests.transport.tls.blocking_client import BlockingClient
from tests.transport.tls.echo_server import Echo, EchoServer, echo_server

Main = Callable[[], Coroutine[Any, Any, None]]

LOOPS = {"asyncio": asyncio.run, "uvloop": uvloop.run}
both_loops = pytest.mark.parametrize("loop", LOOPS)


@both_loops
@pytest.mark.parametrize("size", [1, 16_384, 16_385, 20_000_000])
def test_data_comes_back_whole(tmp_path: Path, loop: str, size: int) -> None:
    data = bytes(range(251)) * (size // 251) + bytes(size % 251)

    async def main() -> None:
        async with echo_server(tmp_path) as server:
            reader, writer = await server.open()
            writer.write(data)
            assert await reader.readexactly(size) == data
            writer.transport.abort()

    LOOPS[loop](main())


@both_loops
def test_data_that_comes_with_the_end_of_the_handshake_is_read(tmp_path: Path, loop: str) -> None:
    """A part of a record comes with it, too."""

    async def main() -> None:
        async with echo_server(tmp_path) as server:

            def talk() -> bytes:
                client = BlockingClient(server.port)
                whole, cut = client.records(b"hello"), client.records(b"again")
                client.tcp.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                client.tcp.sendall(client.records() + whole + cut[:7])
                first = client.receive(5)
                client.tcp.sendall(cut[7:])
                answer = first + client.receive(5)
                client.tcp.close()
                return answer

            assert await asyncio.to_thread(talk) == b"helloagain"

    LOOPS[loop](main())


@both_loops
def test_the_protocol_knows_its_peer_and_its_transport(tmp_path: Path, loop: str) -> None:
    async def main() -> None:
        async with echo_server(tmp_path) as server:
            reader, writer = await server.open()
            writer.write(b"hello")
            await reader.readexactly(5)
            transport = server.protocols[0].transport
            assert peer_of(transport) == Peer(HOST, True, None)
            assert isinstance(transport.get_extra_info("sslcontext"), ssl.SSLContext)
            assert transport.get_extra_info("peername")[0] == HOST
            assert transport.is_reading()
            writer.transport.abort()

    LOOPS[loop](main())


@both_loops
def test_a_client_that_does_not_read_stops_the_server_from_reading(
    tmp_path: Path, loop: str
) -> None:
    """It has at most the buffers of the sockets and of the transport filled."""

    async def main() -> None:
        async with echo_server(tmp_path) as server:
            reader, writer = await server.open(limit=1 << 10)
            writer.transport.pause_reading()  # type: ignore[attr-defined]
            writer.write(bytes(64 << 20))
            await server.ended("done")
            protocol = server.protocols[0]
            while protocol.transport.is_reading():
                await asyncio.sleep(0.001)
            assert protocol.transport.get_write_buffer_size() < 4 << 20
            assert protocol.received < 32 << 20
            writer.transport.abort()

    LOOPS[loop](main())


@both_loops
def test_the_end_of_a_client_ends_the_connection(tmp_path: Path, loop: str) -> None:
    """Both the end of TLS and that of TCP; what came before is delivered."""

    async def main() -> None:
        async with echo_server(tmp_path) as server:

            def talk(has_tls_end: bool) -> bytes:
                client = BlockingClient(server.port)
                data = client.records(b"hello")
                if has_tls_end:
                    with pytest.raises(ssl.SSLWantReadError):
                        client.tls.unwrap()
                    client.tcp.sendall(data + client.records())
                else:
                    client.tcp.sendall(data)
                    client.tcp.shutdown(socket.SHUT_WR)
                answer = client.receive(5)
                while client.tcp.recv(65_536):
                    pass
                client.tcp.close()
                return answer

            for has_tls_end in (True, False):
                assert await asyncio.to_thread(talk, has_tls_end) == b"hello"
                await server.protocols[-1].lost.wait()
                assert server.protocols[-1].has_eof

    LOOPS[loop](main())


@both_loops
def test_the_server_s_end_is_seen_by_the_client(tmp_path: Path, loop: str) -> None:
    async def main() -> None:
        async with echo_server(tmp_path) as server:
            reader, writer = await server.open()
            writer.write(b"hello")
            await reader.readexactly(5)
            server.protocols[0].transport.write(b"bye")
            server.protocols[0].transport.close()
            server.protocols[0].transport.write(b"lost")
            assert await reader.read() == b"bye"  # a cut connection would raise
            writer.close()
            await writer.wait_closed()

    LOOPS[loop](main())


@both_loops
def test_a_half_closed_connection_still_receives(tmp_path: Path, loop: str) -> None:
    """So a client that is cut can read why, while it sends."""

    async def main() -> None:
        async with echo_server(tmp_path) as server:

            def talk() -> bytes:
                client = BlockingClient(server.port)
                client.tcp.sendall(client.records(b"hello"))
                answer = client.receive(100)
                client.tcp.sendall(client.records(b"more"))
                client.tcp.close()
                return answer

            talking = asyncio.create_task(asyncio.to_thread(talk))
            await server.ended("done")
            protocol = server.protocols[0]
            while not protocol.received:
                await asyncio.sleep(0.001)
            protocol.transport.write(b"bye")
            assert protocol.transport.can_write_eof()
            protocol.transport.write_eof()
            protocol.transport.write(b"lost")
            assert await talking == b"hellobye"
            await protocol.lost.wait()
            assert protocol.received == 9

    LOOPS[loop](main())


@both_loops
def test_changed_bytes_end_the_connection(tmp_path: Path, loop: str) -> None:
    async def main() -> None:
        async with echo_server(tmp_path) as server:

            def talk() -> None:
                client = BlockingClient(server.port)
                record = bytearray(client.records(b"hello"))
                record[-1] ^= 1
                client.tcp.sendall(record)
                with pytest.raises(ssl.SSLError, match="BAD_RECORD_MAC"):
                    client.receive(5)
                client.tcp.close()

            await asyncio.to_thread(talk)
            await server.protocols[0].lost.wait()
            assert server.protocols[0].received == 0
            assert server.cut("tls_error") == 1

    LOOPS[loop](main())


class Timed(Echo):
    """Notes the times of its data, and answers nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.times_s: list[float] = []

    def data_received(self, data: bytes) -> None:
        self.times_s.append(time.monotonic())
        self.received += len(data)


@both_loops
def test_records_of_a_byte_do_not_hold_the_loop(tmp_path: Path, loop: str) -> None:
    """They are read for the budget of a turn, then other work of the loop has its turn."""
    count = 20_000

    async def main() -> None:
        async with echo_server(tmp_path, make=Timed) as server:

            def send() -> BlockingClient:
                client = BlockingClient(server.port)
                client.tcp.sendall(client.records(*[b"x"] * count))
                return client

            turns = 0

            async def count_turns() -> None:
                nonlocal turns
                while True:
                    turns += 1
                    await asyncio.sleep(0)

            counting = asyncio.create_task(count_turns())
            client = await asyncio.to_thread(send)
            await server.ended("done")
            protocol = server.protocols[0]
            while protocol.received < count:
                await asyncio.sleep(0)
            counting.cancel()
            assert isinstance(protocol, Timed)
            assert len(protocol.times_s) > 1
            assert protocol.received == count
            assert turns > len(protocol.times_s)
            client.tcp.close()

    LOOPS[loop](main())


def test_the_budget_is_that_of_http2() -> None:
    assert TURN_BUDGET_S <= 0.002


async def test_a_client_that_changes_its_keys_all_the_time_is_cut(tmp_path: Path) -> None:
    """OpenSSL's client does it for each line k. It answers a few as any server does."""
    async with echo_server(tmp_path) as server:
        client = await asyncio.create_subprocess_exec(
            *("openssl", "s_client", "-connect", f"{HOST}:{server.port}", "-tls1_3"),
            *("-alpn", "h2", "-quiet", "-no_ign_eof"),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
        )
        assert client.stdin is not None
        assert client.stdout is not None
        await server.ended("done")
        protocol = server.protocols[0]
        client.stdin.write(b"k\n")
        await asyncio.sleep(0.05)  # it takes one command from each read
        client.stdin.write(b"hello\n")
        assert await client.stdout.readexactly(6) == b"hello\n"
        changes = 0
        while not protocol.lost.is_set():
            changes += 1
            client.stdin.write(b"k\n")
            await asyncio.sleep(0.005)
        assert changes >= MAX_WITHOUT_DATA
        assert server.cut("tls_flood") == 1
        await client.wait()
        client.stdin.close()


class Hesitant(Echo):
    """Stops reading at each piece of data, until the test lets it go on."""

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self.transport.pause_reading()


@both_loops
def test_a_protocol_that_has_paused_gets_no_data(tmp_path: Path, loop: str) -> None:
    async def main() -> None:
        async with echo_server(tmp_path, make=Hesitant) as server:
            reader, writer = await server.open()
            protocol = await first(server, writer, reader)
            writer.write(b"second")
            for _ in range(20):
                await asyncio.sleep(0)
            assert protocol.received == 5
            protocol.transport.resume_reading()
            assert await reader.readexactly(6) == b"second"
            writer.transport.abort()

    LOOPS[loop](main())


async def first(
    server: EchoServer, writer: asyncio.StreamWriter, reader: asyncio.StreamReader
) -> Echo:
    writer.write(b"first")
    assert await reader.readexactly(5) == b"first"
    return server.protocols[0]
