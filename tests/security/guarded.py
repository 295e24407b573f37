"""A server with an auth file: one model that team-a may use, and one that it may not."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import httpx
from google.protobuf.message import Message
from grpc import StatusCode

from server.api.stubs import classify_pb2 as pb
from server.api.stubs import open_inference_pb2 as oip
from tests.security.credentials import Header, auth_file
from tests.support.serving import Mirror, Served, loading, publish, serve

CLASSIFIER = "/convserve.v1.Classifier/"
OPEN_INFERENCE = "/inference.GRPCInferenceService/"

SEEN, HIDDEN, MISSING = "tiny", "secret", "absent"


@dataclass
class Guarded:
    served: Served
    http: httpx.AsyncClient
    auth_path: Path

    async def call(
        self, path: str, request: Message, headers: Sequence[Header] = ()
    ) -> tuple[StatusCode, str, bytes]:
        """Status, details and response of a unary call."""
        unary: Any = self.served.channel.unary_unary
        call = unary(path)(request.SerializeToString(), metadata=as_metadata(headers), timeout=20)
        try:
            data = await call
        except grpc.aio.AioRpcError as error:
            return error.code(), error.details() or "", b""
        return StatusCode.OK, "", data

    async def rest(
        self, verb: str, path: str, headers: Sequence[Header] = (), **body: Any
    ) -> httpx.Response:
        given = [(name.encode(), value) for name, value in headers]
        return await self.http.request(verb, path, headers=given, **body)

    def count(self, reason: str) -> float:
        """Failures by reason."""
        value = self.served.server.metrics.registry.get_sample_value(
            "convserve_auth_failures_total", {"reason": reason}
        )
        return value or 0.0


def as_metadata(headers: Sequence[Header]) -> list[tuple[str, str]]:
    return [(name, value.decode("ascii")) for name, value in headers]


def publish_both(repo: Path) -> None:
    for model in (SEEN, HIDDEN):
        publish(repo, model)


@asynccontextmanager
async def guarded(folder: Path, text: str | None = None, **options: Any) -> AsyncIterator[Guarded]:
    """The server; `text` replaces the auth file, an empty one serves without it."""
    repo, auth_path = folder / "repo", folder / "auth.toml"
    repo.mkdir(exist_ok=True)
    publish_both(repo)
    auth_path.touch(0o600)
    auth_path.write_text(auth_file() if text is None else text)
    defaults: dict[str, Any] = {"load": loading(Mirror), "model_control": "explicit"}
    if text != "":
        defaults["auth"] = str(auth_path)
    async with (
        serve(repo, **defaults | options) as served,
        httpx.AsyncClient(base_url=served.http, timeout=20) as client,
    ):
        yield Guarded(served, client, auth_path)


def classify_request(model: str = SEEN) -> pb.ClassifyRequest:
    pixels = pb.RawImages(count=1, height=8, width=6, channels=3, data=bytes(8 * 6 * 3))
    return pb.ClassifyRequest(model=model, pixels=pixels)


def infer_request(model: str = SEEN) -> oip.ModelInferRequest:
    request = oip.ModelInferRequest(model_name=model)
    request.inputs.add(name="image", datatype="UINT8", shape=[1, 8, 6, 3])
    request.raw_input_contents.append(bytes(8 * 6 * 3))
    return request


def infer_json(size: int = 8 * 6 * 3) -> dict[str, Any]:
    tensor = {"name": "image", "datatype": "UINT8", "shape": [1, 8, 6, 3], "data": [0] * size}
    return {"inputs": [tensor]}


def path_of(method: str) -> str:
    return (CLASSIFIER if method in ("Classify", "ListModels", "GetModel") else OPEN_INFERENCE) + (
        method
    )
