"""What a client of the HTTP port may send, how fast, and on how many connections."""

from __future__ import annotations

import asyncio
import re
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.api.http import body, metrics_page
from server.api.http.protocol import connection
from server.telemetry.metrics import Metrics
from tests.api.http.rest_calls import client_of, problem
from tests.api.v2.tensor_calls import png
from tests.support.serving import Mirrors, Served, loading, publish, serve

CLASSIFY = "/v1/models/tiny:classify"
POST = b"POST /v1/models/tiny:classify HTTP/1.1\r\nhost: x\r\n"
CHUNKED = b"transfer-encoding: chunked\r\n"
GET = b"GET /healthz HTTP/1.1\r\nhost: x\r\n"
SMUGGLED = b"GET /v2 HTTP/1.1\r\nhost: x\r\n\r\n"


@asynccontextmanager
async def connected(
    served: Served,
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection("127.0.0.1", served.server.http_port)
    try:
        yield reader, writer
    finally:
        writer.close()


async def exchange(served: Served, *pieces: bytes) -> bytes:
    """All that the server answers until it closes the connection."""
    async with connected(served) as (reader, writer):
        writer.writelines(pieces)
        try:
            return await reader.read()
        except ConnectionResetError:  # the server closed before it had read all
            return b""


def responses(answer: bytes) -> int:
    return len(re.findall(rb"HTTP/1\.1 \d{3} ", answer))


def cuts(served: Served, reason: str) -> float:
    registry = served.server.metrics.registry
    labels = {"port": "http", "reason": reason}
    return registry.get_sample_value("convserve_connections_cut_total", labels) or 0.0


INVALID = [
    (400, POST + b"content-length: 5\r\n" + CHUNKED + b"\r\n0\r\n\r\n" + SMUGGLED),
    (400, POST + b"content-length: 5\r\ncontent-length: 6\r\n\r\n12345" + SMUGGLED),
    (400, POST + b"content-length: +5\r\n\r\n12345" + SMUGGLED),
    (400, POST + b"content-length: 0x5\r\n\r\n12345" + SMUGGLED),
    (400, POST + b"content-length : 5\r\n\r\n12345" + SMUGGLED),
    (400, POST.replace(b"1.1", b"1.0") + CHUNKED + b"\r\n0\r\n\r\n" + SMUGGLED),
    (501, POST + CHUNKED + CHUNKED + b"\r\n0\r\n\r\n" + SMUGGLED),
    (501, POST + b"transfer-encoding: chunked, gzip\r\n\r\n" + SMUGGLED),
    (501, POST + b"transfer-encoding: xchunked\r\n\r\n" + SMUGGLED),
    (400, GET + b"a: b\rc\r\n\r\n" + SMUGGLED),
    (400, GET + b"a: b\0c\r\n\r\n" + SMUGGLED),
    (400, GET + b"host: y\r\n\r\n" + SMUGGLED),
    (400, b"GET /healthz HTTP/1.1\r\n\r\n" + SMUGGLED),
    (400, b"GET /healthz\r\n\r\n" + SMUGGLED),
    (505, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
    (431, GET + b"a: b\r\n" * 100 + b"\r\n" + SMUGGLED),
    (431, GET + b"a: " + b"b" * 20_000 + b"\r\n\r\n" + SMUGGLED),
    (431, GET + b"a:\r\n" * 4000 + SMUGGLED),
    (431, b"GET /" + b"a" * 20_000 + b" HTTP/1.1\r\n\r\n" + SMUGGLED),
]
BROKEN_CHUNKS = [b"5\r\n12345XX", b"-1\r\n", b"0x5\r\n12345\r\n", b"g\r\n", b"f" * 30]
CHUNKS_WITHOUT_END = [b"5;" + b"a" * 20_000, b"f" * 20_000, b"0\r\n" + b"a: b\r\n" * 3000]


async def test_a_request_that_is_not_plain_http_is_refused_and_closes_the_connection(
    tmp_path: Path,
) -> None:
    publish(tmp_path)
    async with serve(tmp_path) as served:
        for count, (status, sent) in enumerate(INVALID, 1):
            answer = await exchange(served, sent)
            assert answer.startswith(b"HTTP/1.1 %d " % status), (sent[:99], answer)
            assert responses(answer) == 1, sent[:99]
            assert b"application/problem+json" in answer
            assert cuts(served, "invalid_request") == count, sent[:99]


async def test_a_broken_chunk_ends_the_connection(tmp_path: Path) -> None:
    publish(tmp_path)
    async with serve(tmp_path) as served:
        for count, chunk in enumerate(BROKEN_CHUNKS + CHUNKS_WITHOUT_END, 1):
            answer = await exchange(served, POST + CHUNKED + b"\r\n" + chunk, b"\r\n\r\n", SMUGGLED)
            assert responses(answer) <= 1, chunk[:99]
            assert cuts(served, "invalid_request") == count, chunk[:99]
        answer = await exchange(served, GET + b"connection: close\r\n\r\n")
        assert answer.endswith(b"ok\n")


async def test_requests_with_many_headers_and_chunks_of_usual_size_pass(tmp_path: Path) -> None:
    publish(tmp_path)
    file = png(3)

    async def chunks() -> AsyncIterator[bytes]:
        for begin in range(0, len(file), 7):
            yield file[begin : begin + 7]

    async with client_of(tmp_path) as (served, client):
        headers = {f"x-{number}": "v" * 100 for number in range(90)}
        assert (await client.get("/healthz", headers=headers)).status_code == 200
        answer = await client.post(CLASSIFY, content=chunks())
        assert answer.json()["classes"][0]["index"] == 3

        async def large() -> AsyncIterator[bytes]:
            for _ in range(3000):
                yield 500 * b"x"

        answer = await client.post(CLASSIFY, content=large())
        assert answer.status_code == 400  # no image
        assert cuts(served, "invalid_request") == cuts(served, "small_chunks") == 0


async def test_a_body_of_tiny_chunks_is_cut(tmp_path: Path) -> None:
    publish(tmp_path)
    async with serve(tmp_path) as served:
        answer = await exchange(served, POST + CHUNKED + b"\r\n", b"1\r\na\r\n" * 5000)
        assert b"chunks of less than 32 bytes" in answer or not answer
        assert cuts(served, "small_chunks") == 1


async def test_many_pipelined_requests_are_answered_in_order(tmp_path: Path) -> None:
    publish(tmp_path)
    async with serve(tmp_path) as served:
        requests = [b"GET /v2/models/m%d HTTP/1.1\r\nhost: x\r\n\r\n" % n for n in range(500)]
        last = GET + b"connection: close\r\n\r\n"
        answer = await exchange(served, *requests, last)
    places = [answer.find(b"'m%d'" % n) for n in range(500)]
    assert places == sorted(places)
    assert min(places) > 0
    assert answer.endswith(b"ok\n")


async def test_a_body_that_is_larger_than_the_buffers_arrives_whole(tmp_path: Path) -> None:
    publish(tmp_path)
    async with client_of(tmp_path) as (_, client):
        for size in (1 << 16, (1 << 20) + 1, 5_000_000):
            answer = await client.post(CLASSIFY, content=bytes(size))
            assert f"the file of {size:,} bytes" in problem(answer)["detail"]


async def test_one_peer_has_a_limited_number_of_connections(tmp_path: Path) -> None:
    publish(tmp_path)
    close = GET + b"connection: close\r\n\r\n"
    async with serve(tmp_path, max_connections_per_peer=4) as served:
        async with AsyncExitStack() as opened:
            for _ in range(4):  # the connection of gRPC may count too
                await opened.enter_async_context(connected(served))
            answer = await exchange(served, close)
            assert answer.startswith(b"HTTP/1.1 503 Service Unavailable\r\n")
            assert b"max_connections_per_peer" in answer
            assert cuts(served, "max_connections_per_peer") in (1, 2)
        while not (await exchange(served, close)).endswith(b"ok\n"):
            pass  # the server has not seen yet that the others have left
    trusted: dict[str, Any] = {"max_connections_per_peer": 1, "trusted_peers": "127.0.0.0/8"}
    async with serve(tmp_path, **trusted) as served, connected(served), connected(served):
        assert (await exchange(served, close)).endswith(b"ok\n")


async def test_a_client_that_does_not_read_its_responses_is_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "STALL_S", 0.2)
    monkeypatch.setattr(metrics_page, "INTERVAL_S", 0.0)
    publish(tmp_path)
    async with serve(tmp_path) as served:
        with socket.socket() as unread:
            unread.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            unread.setblocking(False)
            loop = asyncio.get_running_loop()
            await loop.sock_connect(unread, ("127.0.0.1", served.server.http_port))
            request = GET.replace(b"/healthz", b"/metrics") + b"\r\n"
            try:
                while not cuts(served, "unread_response"):
                    async with asyncio.timeout(0.1):
                        await loop.sock_sendall(unread, 100 * request)
            except (TimeoutError, ConnectionError):
                while not cuts(served, "unread_response"):
                    await asyncio.sleep(0.01)


async def test_the_rest_of_a_refused_body_is_read_for_a_limited_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not cut at once: a client that is sending would lose the response."""
    monkeypatch.setattr(connection, "DISCARD_S", 0.3)
    publish(tmp_path)
    async with serve(tmp_path) as served, connected(served) as (reader, writer):
        writer.write(POST + b"content-length: 99999999\r\n\r\n" + bytes(100_000))
        assert await reader.readline() == b"HTTP/1.1 413 Request Entity Too Large\r\n"
        writer.write(bytes(100_000))
        with suppress(ConnectionResetError):
            while await reader.read(1000):
                pass
        assert cuts(served, "unread_body") == 1


async def test_a_connection_stays_open_after_a_body_that_came_too_late(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "HEAD_S", 0.2)
    monkeypatch.setattr(connection, "DISCARD_S", 0.2)
    publish(tmp_path)
    async with serve(tmp_path) as served, connected(served) as (reader, writer):
        writer.write(b"POST /nothing HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\n")
        assert await reader.readline() == b"HTTP/1.1 404 Not Found\r\n"
        writer.write(b"too late.")
        await asyncio.sleep(0.5)  # longer than both limits
        writer.write(GET + b"connection: close\r\n\r\n")
        assert (await reader.read()).endswith(b"ok\n")
        assert cuts(served, "slow_head") == cuts(served, "unread_body") == 0


async def test_slow_bodies_do_not_take_the_calls_of_others(tmp_path: Path) -> None:
    publish(tmp_path)
    async with (
        client_of(tmp_path, max_calls=1) as (served, client),
        connected(served) as first,
        connected(served) as second,
    ):
        for reader, writer in (first, second):
            writer.write(POST + b"expect: 100-continue\r\ncontent-length: 9\r\n\r\n")
            assert await reader.readline() == b"HTTP/1.1 100 Continue\r\n"
        assert (await client.post(CLASSIFY, content=png(3))).status_code == 200


async def test_a_large_body_may_take_longer_if_it_keeps_its_pace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(body, "MAX_BODY_S", 0.3)
    monkeypatch.setattr(body, "MIN_BYTES_PER_S", 1000)
    publish(tmp_path)

    async def slow() -> AsyncIterator[bytes]:
        for _ in range(4):
            await asyncio.sleep(0.15)
            yield bytes(5000)

    async with client_of(tmp_path) as (_, client):
        answer = await client.post(CLASSIFY, content=slow())
        assert answer.status_code == 400  # it came whole, and is no image
        monkeypatch.setattr(body, "MIN_BYTES_PER_S", 1_000_000)
        answer = await client.post(CLASSIFY, content=slow())
        assert answer.status_code == 408
        assert "1 s for each 1,000,000 bytes" in problem(answer)["detail"]


async def test_many_readers_of_the_metrics_share_a_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(tmp_path)
    pages: list[str] = []
    render = Metrics.render_for

    def counting(self: Metrics, accept: str) -> tuple[bytes, str]:
        pages.append(accept)
        return render(self, accept)

    monkeypatch.setattr(Metrics, "render_for", counting)
    open_metrics = {"accept": "application/openmetrics-text; version=1.0.0"}
    async with client_of(tmp_path) as (_, client):
        answers = await asyncio.gather(
            *(client.get("/metrics", headers=open_metrics if n % 2 else {}) for n in range(40))
        )
    assert {answer.status_code for answer in answers} == {200}
    types = [answer.headers["content-type"].partition(";")[0] for answer in answers]
    assert set(types[::2]) == {"text/plain"}
    assert set(types[1::2]) == {"application/openmetrics-text"}
    assert len(pages) < 20


async def test_a_request_in_progress_does_not_hold_up_the_end_of_its_connection(
    tmp_path: Path,
) -> None:
    """A broken chunk comes while the request is being answered."""
    publish(tmp_path)
    engines = Mirrors(held=True)
    async with (
        serve(tmp_path, load=loading(engines)) as served,
        httpx.AsyncClient(base_url=served.http, timeout=20) as client,
    ):
        call = asyncio.create_task(client.post(CLASSIFY, content=png(3)))
        await engines.made[0].started.wait()
        answer = await exchange(served, GET + CHUNKED + b"\r\n" + b"5\r\n12345XX\r\n\r\n")
        assert responses(answer) <= 1
        engines.made[0].release()
        assert (await call).status_code == 200


async def test_a_connection_ends_at_its_maximum_age_with_a_response(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "OLD_IDLE_S", 60.0)
    publish(tmp_path)
    async with (
        serve(tmp_path, max_connection_age_s=0.5) as served,
        connected(served) as (reader, writer),
    ):
        answers: list[bytes] = []
        while not reader.at_eof():
            writer.write(GET + b"\r\n")
            with suppress(asyncio.IncompleteReadError):  # it was closed after the answer before
                head = await reader.readuntil(b"\r\n\r\n")
                answers.append(head.lower())
                assert await reader.readexactly(3) == b"ok\n"
            await asyncio.sleep(0.05)
    assert b"connection: close" in answers[-1]
    assert not any(b"connection: close" in head for head in answers[:-1])


async def test_an_idle_connection_ends_after_its_maximum_age(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "OLD_IDLE_S", 0.1)
    publish(tmp_path)
    async with (
        serve(tmp_path, max_connection_age_s=0.1) as served,
        connected(served) as (reader, _),
    ):
        assert await reader.read() == b""


async def test_a_long_query_is_refused(tmp_path: Path) -> None:
    publish(tmp_path)
    async with client_of(tmp_path) as (_, client):
        answer = await client.post(f"{CLASSIFY}?{'a&' * 2000}", content=png(3))
        assert (answer.status_code, problem(answer)["field"]) == (400, "query")
