"""The bench command over TLS, with a token, against convserve's contract and metrics."""

from __future__ import annotations

import asyncio
import json
import os
import ssl
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from convserve_client.loadgen import server_metrics
from convserve_client.loadgen.measure import metrics_access
from convserve_client.loadgen.server_metrics import NoMetrics, fetch
from convserve_client.security.access import Access
from convserve_client.stubs import classify_pb2 as pb
from tests.clients.bench_command import start_bench
from tests.clients.loadgen.plans import make_plan
from tests.clients.security.certificates import Authority, Files, client_tls, credentials
from tests.support.scripted_classifier import ANSWER, Context, ScriptedClassifier, serving


@pytest.mark.parametrize("processes", [1, 2])
async def test_the_command_measures_over_tls_with_a_token(tmp_path: Path, processes: int) -> None:
    heard: set[object] = set()

    async def note(request: pb.ClassifyRequest, context: Context) -> pb.ClassifyResponse:
        heard.update(
            value for key, value in context.invocation_metadata() or () if key == "authorization"
        )
        return ANSWER

    authority, token = Authority(tmp_path, "ca"), tmp_path / "token"
    token.write_text("cs_bench_secret\n")
    required = credentials(authority.issue("models.example.org"), authority.pem)
    files = authority.issue("bench")
    async with serving(ScriptedClassifier(note), tls=required) as target:
        process = await start_bench(
            f"--target={target}",
            "--model=small",
            f"--tls-ca={authority.file}",
            f"--tls-cert={files.cert}",
            f"--tls-key={files.key}",
            "--server-name=models.example.org",
            f"--token-file={token}",
            f"--processes={processes}",
            "--concurrency=4",
            "--warmup-s=0",
            "--duration-s=0.5",
            "--deadline-ms=20000",
            "--json=-",
            f"--report={tmp_path / 'report.html'}",
        )
        out, err = await process.communicate()
    assert process.returncode == 0, err.decode()
    found = json.loads(out)
    assert (found["tls"], found["connections"]) == (True, processes)
    assert found["counts"].keys() == {"OK"}
    assert heard == {"Bearer cs_bench_secret"}
    written = out + err + (tmp_path / "report.html").read_bytes()
    assert b"cs_bench_secret" not in written


class HttpsServer:
    """Answers each request with its Authorization header as a metric."""

    def __init__(self, files: Files | None, status: str = "200 OK", extra: str = "") -> None:
        self._context = None
        if files is not None:
            self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self._context.load_cert_chain(files.cert, files.key)
        self._status, self._extra = status, extra
        self.heard: list[str] = []

    async def __aenter__(self) -> str:
        self._server = await asyncio.start_server(self._answer, "127.0.0.1", 0, ssl=self._context)
        scheme = "https" if self._context else "http"
        return f"{scheme}://127.0.0.1:{self._server.sockets[0].getsockname()[1]}/metrics"

    async def __aexit__(self, *exception: object) -> None:
        self._server.close()
        await self._server.wait_closed()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        self.heard += [line for line in head.splitlines() if line.startswith("Authorization")]
        writer.write(
            f"HTTP/1.1 {self._status}\r\n{self._extra}Content-Length: 2\r\n\r\nup".encode()
        )
        await writer.drain()
        writer.close()


async def test_metrics_are_read_over_tls_with_the_token(tmp_path: Path) -> None:
    authority = Authority(tmp_path, "ca")
    server = HttpsServer(authority.issue("127.0.0.1"))
    async with server as url:
        access = Access(tls=client_tls(authority), token="cs_me_123")
        assert await asyncio.to_thread(fetch, url, access) == "up"
        stranger = Access(tls=client_tls(Authority(tmp_path, "other")))
        with pytest.raises(NoMetrics, match="certificate verify failed"):
            await asyncio.to_thread(fetch, url, stranger)
    assert server.heard == ["Authorization: Bearer cs_me_123"]


async def test_metrics_are_read_by_the_server_name(tmp_path: Path) -> None:
    authority = Authority(tmp_path, "ca")
    async with HttpsServer(authority.issue("models.example.org")) as url:
        named = Access(tls=client_tls(authority, server_name="models.example.org"))
        assert await asyncio.to_thread(fetch, url, named) == "up"
        with pytest.raises(NoMetrics, match="mismatch"):
            await asyncio.to_thread(fetch, url, Access(tls=client_tls(authority)))


async def test_an_endless_response_is_no_metrics(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_metrics, "MAX_METRICS_BYTES", 100_000)

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        with suppress(ConnectionError):
            while True:
                writer.write(bytes(10_000))
                await writer.drain()
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/metrics"
        with pytest.raises(NoMetrics, match="more than 100,000 bytes"):
            await asyncio.to_thread(fetch, url)


async def test_a_redirect_does_not_carry_the_token_away(tmp_path: Path) -> None:
    thief = HttpsServer(None)
    async with thief as elsewhere:
        server = HttpsServer(None, "302 Found", f"Location: {elsewhere}\r\n")
        async with server as url:
            with pytest.raises(NoMetrics, match="Found"):
                await asyncio.to_thread(fetch, url, Access(token="cs_me_123"))
    assert thief.heard == []


def test_the_token_is_not_sent_to_another_machine_in_plaintext() -> None:
    with pytest.raises(NoMetrics, match="unencrypted"):
        fetch("http://example.org:8000/metrics", Access(token="cs_me_123"))


async def test_a_token_in_plaintext_is_wrong_usage() -> None:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "clients/bench.py", "--model=small", "--target=example.org:8001"),
        cwd=Path(__file__).resolve().parent.parent.parent.parent,
        env=os.environ | {"CONVSERVE_TOKEN": "cs_me_123"},
        stderr=asyncio.subprocess.PIPE,
    )
    _, err = await process.communicate()
    assert process.returncode == 2
    assert b"unencrypted: use TLS" in b" ".join(err.split())
    assert b"cs_me_123" not in err


@pytest.mark.parametrize(
    ("target", "heard"),
    [("127.0.0.1:1", ["Authorization: Bearer cs_me_123"]), ("localhost:1", [])],
)
async def test_only_the_measured_host_gets_the_token_for_its_metrics(
    target: str, heard: list[str]
) -> None:
    server = HttpsServer(None)
    async with server as url:
        plan = make_plan(target, metrics_url=url, access=Access(token="cs_me_123"))
        await asyncio.to_thread(fetch, url, metrics_access(plan))
    assert server.heard == heard
