"""Bodies are read within limits of bytes and time."""

from __future__ import annotations

import asyncio
import gzip
import random
import zlib
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from server.api.http import body
from tests.api.http.rest_calls import client_of, image, problem
from tests.api.v2.tensor_calls import png, rows
from tests.support.serving import (
    publish,
)

CLASSIFY = "/v1/models/tiny:classify"
INFER = "/v2/models/tiny/infer"


async def test_a_large_body_is_refused_before_it_is_read(tmp_path: Path) -> None:
    publish(tmp_path)
    limits = {"max_image_bytes": 1000, "max_message_bytes": 5000, "max_bytes_in_progress": 5000}
    async with client_of(tmp_path, **limits) as (served, client):
        for path, limit in ((CLASSIFY, 1000), (INFER, 5000)):
            reader, writer = await asyncio.open_connection("127.0.0.1", served.server.http_port)
            head = f"POST {path} HTTP/1.1\r\nHost: here\r\nContent-Length: {limit + 1}\r\n"
            writer.write(head.encode() + b"Expect: 100-continue\r\n\r\n")
            assert (await reader.readline()).startswith(b"HTTP/1.1 413 ")
            writer.close()
            await writer.wait_closed()

            async def chunks() -> AsyncIterator[bytes]:
                for _ in range(10):
                    yield 600 * b"x"

            response = await client.post(path, content=chunks())  # without Content-Length
            assert (response.status_code, problem(response)["status"]) == (413, 413)
            assert f"more than {limit:,} bytes" in response.text
        # No bytes are still counted as in flight.
        answer = await client.post(INFER, json=image(rows(1)))
        assert answer.status_code == 200


async def test_a_body_that_does_not_arrive_times_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(tmp_path)
    monkeypatch.setattr(body, "MAX_BODY_S", 0.05)
    async with client_of(tmp_path) as (served, _):
        reader, writer = await asyncio.open_connection("127.0.0.1", served.server.http_port)
        writer.write(
            f"POST {CLASSIFY} HTTP/1.1\r\nHost: here\r\nContent-Length: 9\r\n\r\n".encode()
        )
        assert await reader.readline() == b"HTTP/1.1 408 Request Timeout\r\n"
        writer.close()
        await writer.wait_closed()


async def test_a_stopping_server_waits_for_a_body_that_is_arriving(tmp_path: Path) -> None:
    publish(tmp_path)
    file = png(3)
    async with client_of(tmp_path, grace_s=20.0) as (served, _):
        reader, writer = await asyncio.open_connection("127.0.0.1", served.server.http_port)
        lines = f"Host: here\r\nExpect: 100-continue\r\nContent-Length: {len(file)}\r\n\r\n"
        writer.write(f"POST {CLASSIFY} HTTP/1.1\r\n{lines}".encode())
        assert await reader.readline() == b"HTTP/1.1 100 Continue\r\n", (
            "the server waits for the body"
        )
        assert await reader.readline() == b"\r\n"
        writer.write(file[:9])

        async def rest() -> bytes:
            while served.server.accepting:
                await asyncio.sleep(0)
            await asyncio.sleep(0.1)  # the server is stopping
            writer.write(file[9:])
            return await reader.read()

        coming = asyncio.create_task(rest())
    assert (await coming).startswith(b"HTTP/1.1 200 ")
    writer.close()


async def test_a_stopping_server_refuses_a_body_that_does_not_arrive(
    tmp_path: Path,
) -> None:
    publish(tmp_path)
    async with client_of(tmp_path, grace_s=0.1) as (served, _):
        reader, writer = await asyncio.open_connection("127.0.0.1", served.server.http_port)
        lines = "Host: here\r\nExpect: 100-continue\r\nContent-Length: 9\r\n\r\n"
        writer.write(f"POST {CLASSIFY} HTTP/1.1\r\n{lines}".encode())
        assert await reader.readline() == b"HTTP/1.1 100 Continue\r\n"
        assert await reader.readline() == b"\r\n"
    answer = await reader.read()
    assert answer.startswith(b"HTTP/1.1 503 ")
    assert b"the server has stopped" in answer
    writer.close()


async def test_compressed_bodies_are_read_up_to_the_limit(tmp_path: Path) -> None:
    publish(tmp_path)
    file = png(3)
    async with client_of(tmp_path, max_image_bytes=10_000) as (_, client):

        async def post(body: bytes, encoding: str) -> httpx.Response:
            return await client.post(CLASSIFY, content=body, headers={"content-encoding": encoding})

        for encoding in ("gzip", "GZIP", "Identity"):
            body = file if encoding == "Identity" else gzip.compress(file)
            assert (await post(body, encoding)).json()["classes"][0]["index"] == 3
        for body, encoding, status, words in (
            (
                gzip.compress(bytes(1 << 20)),
                "gzip",
                413,
                "more than 10,000 bytes when decompressed",
            ),
            (file, "gzip", 400, "is not valid gzip"),
            (gzip.compress(file)[:-1], "gzip", 400, "its gzip ends too early"),
            (gzip.compress(file), "br", 415, "'br'; identity, gzip, deflate are understood"),
            (zlib.compress(file) + b"more", "deflate", 400, "continues after its end"),
        ):
            refused = await post(body, encoding)
            assert refused.status_code == status
            assert words in problem(refused)["detail"]
        assert (await post(gzip.compress(file), "gzip")).status_code == 200


async def test_an_inflated_body_counts_as_in_progress_while_it_grows(tmp_path: Path) -> None:
    publish(tmp_path)
    limit = 1 << 20
    limits = {"max_image_bytes": limit, "max_message_bytes": limit, "max_bytes_in_progress": limit}
    noise = gzip.compress(random.Random(5).randbytes(600_000), mtime=0)
    async with client_of(tmp_path, **limits) as (_, client):
        for _ in range(3):  # the bytes of a refused body do not stay counted
            answer = await client.post(
                CLASSIFY, content=noise, headers={"content-encoding": "gzip"}
            )
            assert answer.status_code == 429
            assert "requests in progress hold" in problem(answer)["detail"]
        answer = await client.post(CLASSIFY, content=noise)
        assert answer.status_code == 400  # it is no image


async def test_a_refused_expect_100_continue_closes_the_connection(tmp_path: Path) -> None:
    """The client may still send the body; it would be read as the next request."""
    publish(tmp_path)
    head = f"POST {CLASSIFY} HTTP/1.1\r\nhost: x\r\nexpect: 100-continue\r\n"
    async with client_of(tmp_path) as (served, _):
        for line, status in (("content-length: 99999999", 413), ("content-encoding: br", 415)):
            reader, writer = await asyncio.open_connection("127.0.0.1", served.server.http_port)
            length = "" if "length" in line else "content-length: 9\r\n"
            writer.write(f"{head}{line}\r\n{length}\r\n".encode())
            answer = (await reader.read()).decode()
            assert answer.startswith(f"HTTP/1.1 {status} ")
            assert "connection: close" in answer.lower()
            writer.close()
            await writer.wait_closed()
