"""A caller without permission is refused before its body comes."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from grpc import StatusCode

from tests.security.guarded import (
    SEEN,
    guarded,
    path_of,
)
from tests.support.http2_peers import DATA, ECHO, END_HEADERS, END_STREAM, HELLO, Raw, frame, plain
from tests.support.http2_peers import HEADERS as HEADERS_FRAME
from tests.support.http2_peers import headers as header_block

INFER = f"/v2/models/{SEEN}/infer"
UNAUTHENTICATED = StatusCode.UNAUTHENTICATED


async def answer_to_head(port: int, head: str) -> str:
    """The start of the response to a request whose body never comes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(head.replace("\n", "\r\n").encode())
        return (await reader.readuntil(b"\r\n\r\n")).decode()
    finally:
        writer.close()


@pytest.mark.parametrize(
    "more",
    ["Content-Length: 1000000000", "Transfer-Encoding: chunked", "Content-Encoding: gzip"],
)
async def test_http_refuses_before_the_body_comes(tmp_path: Path, more: str) -> None:
    if "Length" not in more and "chunked" not in more:
        more += "\nContent-Length: 100"
    async with guarded(tmp_path) as one:
        head = f"POST {INFER} HTTP/1.1\nHost: x\n{more}\n\n"
        answer = await answer_to_head(one.served.server.http_port, head)
        assert answer.startswith("HTTP/1.1 401 ")


async def test_a_client_that_asks_first_is_refused_without_a_continue(tmp_path: Path) -> None:
    async with guarded(tmp_path) as one:
        head = (
            f"POST {INFER} HTTP/1.1\nHost: x\nContent-Length: 1000\nExpect: 100-continue\n"
            "Authorization: Bearer wrong\n\n"
        )
        answer = await answer_to_head(one.served.server.http_port, head)
        assert answer.startswith("HTTP/1.1 401 ")
        assert "connection: close" in answer.lower()


async def test_grpc_refuses_before_the_body_comes(tmp_path: Path) -> None:
    async with guarded(tmp_path) as one:
        reader, writer = await asyncio.open_connection("127.0.0.1", one.served.server.port)
        connection = Raw(reader, writer)
        block = header_block(ECHO, path=path_of("Classify"))
        connection.send(HELLO, frame(HEADERS_FRAME, END_HEADERS, 1, block))
        flags, fields = await connection.until(HEADERS_FRAME, 1)
        assert flags & END_STREAM
        assert plain([(b"grpc-status", b"16")]) in fields
        # The body that comes nevertheless is not kept, and the connection lives on.
        body = bytes(16_000)
        connection.send(frame(DATA, 0, 1, body), frame(DATA, 0, 1, body))
        await connection.alive()
        writer.close()
        assert one.count("missing") == 1
