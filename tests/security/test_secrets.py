"""Nothing that the server writes has a token, metadata or an image of a caller.

A server process logs at level DEBUG and traces every call. A caller puts a mark into tokens,
metadata and images. The mark must not be in the server's output, metrics, traces and errors. The
header `tracestate` has no mark: it is there to become a part of traces.
"""

from __future__ import annotations

import asyncio
import base64
import json
import re
import struct
import sys
import zlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from grpc_health.v1.health_pb2 import HealthCheckRequest

from server.api.stubs import classify_pb2 as pb
from server.api.stubs import open_inference_pb2 as oip
from tests.security.credentials import OBSERVER, OPERATOR, TEAM_A, auth_file, bearer
from tests.security.guarded import (
    CLASSIFIER,
    OPEN_INFERENCE,
    SEEN,
    as_metadata,
    infer_json,
    infer_request,
    publish_both,
)
from tests.support.server_process import ROOT
from tests.telemetry.test_tracing import collecting

MARK = "Zq7Xw9Kv3Jm5"  # in images, metadata and wrong credentials
SECRETS = [
    MARK,
    base64.b64encode(MARK.encode()).decode(),
    MARK.encode().hex(),
    *(token.text.rpartition("_")[2] for token in (TEAM_A, OPERATOR, OBSERVER)),
    *(token.sha256 for token in (TEAM_A, OPERATOR, OBSERVER)),
]
TIMEOUT_S = 20

Headers = list[tuple[str, bytes]]


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def images() -> dict[str, bytes]:
    """Files that are damaged in ways which a decoder's error could quote."""
    mark = MARK.encode()
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 4, 4, 8, 2, 0, 0, 0))
    png = b"\x89PNG\r\n\x1a\n"
    return {
        "text": mark * 40,
        "png": png + head + chunk(b"tEXt", b"Comment\0" + mark) + chunk(mark[:4], mark) + mark,
        "png data": png + head + chunk(b"IDAT", mark * 4) + chunk(b"IEND", b""),
        "jpeg": b"\xff\xd8\xff\xe0\x00\x10JFIF\0\x01\x01\0\0\x01\0\x01\0\0" + mark * 9,
        "gif": b"GIF89a\x04\0\x04\0\x80\0\0" + mark * 9,
        "webp": b"RIFF" + struct.pack("<I", 100) + b"WEBPVP8 " + mark * 9,
        "bmp": b"BM" + mark * 9,
    }


def wrong_credentials() -> list[Headers]:
    """Credentials with the mark or with parts of right tokens."""
    texts = (
        f"Bearer {MARK}",
        f"Bearer cs_{TEAM_A.id}_{MARK}",
        f"Basic {base64.b64encode(MARK.encode()).decode()}",
        f"{MARK} {MARK}",
        MARK,
        f"Bearer {TEAM_A.text}{MARK}",
        f"Bearer {TEAM_A.text[:-1]}",
        f"Bearer {TEAM_A.text.upper()}",
    )
    return [
        *([("authorization", text.encode())] for text in texts),
        [bearer(TEAM_A), bearer(OPERATOR)],
        [("x-forwarded-user", MARK.encode())],
        [("proxy-authorization", MARK.encode())],
    ]


EXTRA: Headers = [
    ("x-api-key", MARK.encode()),
    ("cookie", f"session={MARK}".encode()),
    ("user-agent", f"agent/{MARK}".encode()),
    ("baggage", f"user={MARK}".encode()),
    ("traceparent", b"00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"),
    ("referer", f"https://x.example/{MARK}".encode()),
    ("x-forwarded-for", MARK.encode()),
]


@asynccontextmanager
async def serving(
    folder: Path, log_format: str, endpoint: str
) -> AsyncIterator[tuple[int, int, Path]]:
    """gRPC and HTTP ports of a server process, and the file with all that it writes."""
    repo, auth, output = folder / "repo", folder / "auth.toml", folder / "output.txt"
    repo.mkdir()
    publish_both(repo)
    auth.write_text(auth_file())
    options = {
        "repo": repo,
        "auth": auth,
        "host": "127.0.0.1",
        "port": 0,
        "http-port": 0,
        "model-control": "explicit",
        "allow-shared-memory": "true",
        "log-format": log_format,
        "log-level": "debug",
        "trace-endpoint": endpoint,
        "trace-ratio": 1,
    }
    arguments = [f"--{name}={value}" for name, value in options.items()]
    with output.open("wb") as file:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "server", *arguments), cwd=ROOT, stdout=file, stderr=file
        )
    try:
        while not (found := re.search(PORTS[log_format], output.read_text())):
            assert process.returncode is None, output.read_text()
            await asyncio.sleep(0.05)
        yield int(found[1]), int(found[2]), output
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()


PORTS = {
    "text": r" listening .*\bport=(\d+) http_port=(\d+)",
    "json": r'"event": "listening".*"port": (\d+), "http_port": (\d+)',
}


async def call_grpc(port: int) -> list[str]:
    """Calls that succeed and calls that fail; returns the texts of the failures."""
    texts: list[str] = []
    options = [("grpc.primary_user_agent", MARK)]
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=options) as channel:
        unary: Any = channel.unary_unary

        async def call(path: str, data: bytes, headers: Headers) -> None:
            metadata = [*as_metadata([*headers, *EXTRA]), ("mark-bin", MARK.encode())]
            try:
                await unary(path)(data, metadata=metadata, timeout=TIMEOUT_S)
            except grpc.aio.AioRpcError as error:
                texts.append(f"{error.details()} {error.trailing_metadata()}")

        classify = CLASSIFIER + "Classify"
        right = [bearer(TEAM_A)]
        pixels = pb.RawImages(
            count=1, height=8, width=6, channels=3, data=(MARK.encode() * 12)[:144]
        )
        whole = pb.ClassifyRequest(model=SEEN, pixels=pixels).SerializeToString()
        health = HealthCheckRequest().SerializeToString()
        while True:  # until the models are loaded
            before = len(texts)
            await call(classify, whole, right)
            if len(texts) == before:
                break
            await asyncio.sleep(0.05)
        for headers in (*wrong_credentials(), [], right):
            await call(classify, whole, headers)
            await call("/grpc.health.v1.Health/Check", health, headers)
            await call(OPEN_INFERENCE + "RepositoryModelLoad", whole, headers)
        for data in images().values():
            image = pb.Image(encoded=data)
            request = pb.ClassifyRequest(model=SEEN, images=[image])
            await call(classify, request.SerializeToString(), right)
        short = pb.RawImage(height=8, width=6, channels=3, data=MARK.encode())
        request = pb.ClassifyRequest(model=SEEN, images=[pb.Image(raw=short)])
        await call(classify, request.SerializeToString(), right)
        await call(classify, MARK.encode() * 3, right)  # not a message
        infer = infer_request()
        infer.raw_input_contents[0] = MARK.encode()
        await call(OPEN_INFERENCE + "ModelInfer", infer.SerializeToString(), right)
        load = oip.RepositoryModelLoadRequest(model_name=SEEN).SerializeToString()
        await call(OPEN_INFERENCE + "RepositoryModelLoad", load, [bearer(OPERATOR)])
    return texts


async def call_rest(port: int) -> list[str]:
    """Requests that succeed and requests that fail; returns all responses, metrics included."""
    texts = []
    address = f"http://127.0.0.1:{port}"
    async with httpx.AsyncClient(base_url=address, timeout=TIMEOUT_S) as client:

        async def send(verb: str, path: str, headers: Headers, **body: Any) -> None:
            given = [(name.encode(), value) for name, value in (*headers, *EXTRA)]
            answer = await client.request(verb, path, headers=given, **body)
            texts.append(f"{answer.headers} {answer.text}")

        classify, infer = f"/v1/models/{SEEN}:classify", f"/v2/models/{SEEN}/infer"
        right = [bearer(TEAM_A)]
        for headers in (*wrong_credentials(), [], [("authorization", MARK.encode() + b"\xff")]):
            for path in ("/metrics", "/readyz", "/healthz", "/v2", "/nothing"):
                await send("GET", path, headers)
            await send("POST", infer, headers, json=infer_json())
            await send("POST", f"/v2/repository/models/{SEEN}/load", headers)
        for data in images().values():
            await send("POST", classify, right, content=data)
            await send("POST", classify, right, files={"image": ("x.png", data)})
            texts_in = [base64.b64encode(data).decode()]
            tensor = {"name": "encoded", "datatype": "BYTES", "shape": [1], "data": texts_in}
            await send("POST", infer, right, json={"inputs": [tensor]})
        wrong_data: tuple[Any, ...] = ([MARK], [[MARK]], MARK, {"a": MARK})
        for wrong in wrong_data:
            for name, kind, shape in (("encoded", "BYTES", [1]), ("image", "UINT8", [1, 8, 6, 3])):
                tensor = {"name": name, "datatype": kind, "shape": shape, "data": wrong}
                await send("POST", infer, right, json={"inputs": [tensor]})
        await send("POST", infer, right, content=MARK)
        await send("POST", infer, right, content=b'{"inputs": [' + MARK.encode())
        gzip = [("content-encoding", b"gzip"), *right]
        await send("POST", classify, gzip, content=MARK.encode())
        for token in (OBSERVER, OPERATOR):
            await send("GET", "/metrics", [bearer(token)])
            await send("GET", "/metrics", [bearer(token), ("accept", METRICS_WITH_EXEMPLARS)])
    return texts


METRICS_WITH_EXEMPLARS = b"application/openmetrics-text"


async def send_nonsense(port: int) -> None:
    """Bytes that are neither HTTP/1.1 nor HTTP/2."""
    for data in (
        MARK.encode() * 20 + b"\r\n\r\n",
        f"GET / HTTP/1.1\r\nAuthorization: Bearer {MARK}\r\n{MARK}\r\n\r\n".encode(),
        f"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n{MARK * 20}".encode(),
    ):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(data)
        writer.write_eof()
        await reader.read()
        writer.close()


@pytest.mark.parametrize("log_format", ["text", "json"])
async def test_no_secret_leaves_the_server(tmp_path: Path, log_format: str) -> None:
    async with asyncio.timeout(100), collecting() as (collector, endpoint):
        async with serving(tmp_path, log_format, endpoint) as (grpc_port, http_port, output):
            texts = await call_grpc(grpc_port)
            texts += await call_rest(http_port)
            await send_nonsense(grpc_port)
            await send_nonsense(http_port)
        log = output.read_text()
        # All sources have something to look at.
        assert len(texts) > 100
        assert any("convserve_auth_failures_total" in text for text in texts)
        assert log.count("request_answered") >= 2
        assert "admin_action" in log
        assert "access_denied" in log
        assert collector.named("Classify")
        written = {"log": log, "traces": str(collector.spans), "answers": "\n".join(texts)}
        for place, text in written.items():
            for secret in SECRETS:
                at = text.lower().find(secret.lower())
                assert at < 0, f"{place}: {text[max(0, at - 200) : at + 100]}"
        if log_format == "json":
            assert all(json.loads(line) for line in log.splitlines())
