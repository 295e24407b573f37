"""Silent HTTP connections are closed."""

from __future__ import annotations

import asyncio
from pathlib import Path

import httpx
import pytest

from server.api.http import app as http
from tests.api.v2.tensor_calls import png
from tests.support.serving import (
    Mirrors,
    loading,
    publish,
    serve,
)

ONE = b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n"


@pytest.mark.parametrize("sent", [b"", ONE[:-4], ONE + ONE[:9], b"\r\n"])
async def test_a_connection_without_a_complete_head_is_closed(
    sent: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http, "HEAD_S", 0.2)
    publish(tmp_path)
    async with serve(tmp_path) as served:
        reader, writer = await asyncio.open_connection("127.0.0.1", served.server.http_port)
        writer.write(sent)
        answer = await reader.read()
        writer.close()
        await writer.wait_closed()
    assert answer.count(b"200 OK") == sent.count(ONE)


async def test_a_request_in_progress_does_not_count_as_silence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http, "HEAD_S", 0.05)
    publish(tmp_path)
    engines = Mirrors(held=True)
    async with (
        serve(tmp_path, load=loading(engines)) as served,
        httpx.AsyncClient(base_url=served.http, timeout=20) as client,
    ):
        call = asyncio.create_task(client.post("/v1/models/tiny:classify", content=png(3)))
        await engines.made[0].started.wait()
        await asyncio.sleep(0.1)  # twice the timeout for silent connections
        engines.made[0].release()
        assert (await call).status_code == 200
