"""HTTP connections: how long idle ones stay open, and which web pages may use them."""

from __future__ import annotations

import asyncio
from pathlib import Path

import httpx
import pytest

from server.api.http.protocol import connection as http
from server.settings import Settings
from tests.api.http.rest_calls import client_of
from tests.api.v2.tensor_calls import png
from tests.support.serving import (
    Mirrors,
    loading,
    publish,
    serve,
)

CLASSIFY = "/v1/models/tiny:classify"
ONE = b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n"


@pytest.mark.parametrize("sent", [ONE[:-4], ONE + ONE[:9], b"\r\n"])
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


@pytest.mark.parametrize("sent", [b"", ONE, ONE + ONE])
async def test_an_idle_connection_stays_open_for_the_keep_alive_time(
    sent: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one without any request: proxies open connections in advance."""
    monkeypatch.setattr(http, "HEAD_S", 0.1)
    publish(tmp_path)
    async with serve(tmp_path, http_keep_alive_s=1.0) as served:
        reader, writer = await asyncio.open_connection("127.0.0.1", served.server.http_port)
        writer.write(sent)
        await asyncio.sleep(0.5)  # longer than an incomplete head may take
        writer.write(ONE)
        answer = await reader.read()  # until the server closes the idle connection
        writer.close()
        await writer.wait_closed()
    assert answer.count(b"200 OK") == sent.count(ONE) + 1


def test_the_default_keep_alive_is_longer_than_the_idle_timeout_of_usual_load_balancers() -> None:
    idle_s = {"nginx": 60, "AWS ALB": 60, "Azure": 240, "Google Cloud": 600, "Envoy": 3600}
    assert Settings().http_keep_alive_s > max(idle_s.values())


async def test_a_draining_server_closes_connections_with_a_response(tmp_path: Path) -> None:
    """A connection that is closed while it is idle may lose a request that is on its way."""
    publish(tmp_path)
    async with serve(tmp_path) as served:
        reader, writer = await asyncio.open_connection("127.0.0.1", served.server.http_port)
        writer.write(ONE)
        head = await reader.readuntil(b"\r\n\r\n")
        assert b"connection: close" not in head.lower()
        assert await reader.readexactly(3) == b"ok\n"
        served.server.state.stop_accepting()
        writer.write(ONE)
        answer = await reader.read()
        assert answer.startswith(b"HTTP/1.1 200 OK")
        assert b"connection: close" in answer.lower()
        writer.close()
        await writer.wait_closed()


async def test_pages_of_the_chosen_origins_may_call_the_server(tmp_path: Path) -> None:
    publish(tmp_path)
    page = {"Origin": "https://app.example"}
    ask = {
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "grpc-timeout",
    }
    origins = "https://other.example/, HTTPS://App.example"
    async with client_of(tmp_path, cors_origin=origins) as (_, client):
        allowed = await client.options(CLASSIFY, headers=page | ask)
        assert allowed.status_code == 200
        assert allowed.headers["access-control-allow-origin"] == "https://app.example"
        assert "grpc-timeout" in allowed.headers["access-control-allow-headers"]
        for content in (png(3), b"no image"):  # errors must be readable too
            called = await client.post(CLASSIFY, content=content, headers=page)
            assert called.headers["access-control-allow-origin"] == "https://app.example"
        refused = await client.options(CLASSIFY, headers=ask | {"Origin": "https://evil.example"})
        assert "access-control-allow-origin" not in refused.headers
    async with client_of(tmp_path, cors_origin="*") as (_, client):
        called = await client.post(CLASSIFY, content=png(3), headers=page)
        assert called.headers["access-control-allow-origin"] == "*"
    async with client_of(tmp_path) as (_, client):
        called = await client.post(CLASSIFY, content=png(3), headers=page)
        assert "access-control-allow-origin" not in called.headers


@pytest.mark.parametrize("origin", ["app.example", "https://app.example/path", "https://a b"])
def test_an_origin_that_no_browser_sends_is_refused(origin: str) -> None:
    with pytest.raises(ValueError, match="an origin is scheme://host"):
        Settings(cors_origin=origin)
