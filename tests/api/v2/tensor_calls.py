"""Requests of GRPCInferenceService, by Triton's client and without it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from grpc import StatusCode
from PIL import Image

from server.api.stubs import open_inference_pb2 as pb
from server.images.input_spec import Pixels
from tests.support import triton_clients as triton
from tests.support.serving import (
    SHAPE,
    Mirror,
    Served,
    loading,
    serve,
)
from tests.support.triton_clients import (
    InferenceServerException,
    InferInput,
)

OPEN_INFERENCE = pb.DESCRIPTOR.services_by_name["GRPCInferenceService"]


def rows(*classes: int) -> Pixels:
    """Pixels that a Mirror assigns to those classes; other bytes have all values."""
    pixels = np.arange(len(classes) * np.prod(SHAPE), dtype=np.uint8).reshape(-1, *SHAPE)
    pixels[:, 0, 0, 0] = classes
    return pixels


def png(index: int) -> bytes:
    file = BytesIO()
    Image.fromarray(rows(index)[0]).save(file, "PNG")
    return file.getvalue()


def image(pixels: Any) -> list[InferInput]:
    tensor = InferInput("image", pixels.shape, "UINT8")
    tensor.set_data_from_numpy(pixels)
    return [tensor]


def encoded(*files: bytes) -> list[InferInput]:
    tensor = InferInput("encoded", [len(files)], "BYTES")
    tensor.set_data_from_numpy(np.array(files, dtype=object))
    return [tensor]


def typed(*classes: int, **fields: Any) -> Any:
    """A request with its pixels in uint_contents; Triton's client cannot make one."""
    pixels = rows(*classes)
    contents = pb.InferTensorContents(uint_contents=pixels.reshape(-1).tolist())
    tensor = pb.ModelInferRequest.InferInputTensor(
        name="image", datatype="UINT8", shape=pixels.shape, contents=contents
    )
    defaults: dict[str, Any] = {"model_name": "tiny", "inputs": [tensor]}
    return pb.ModelInferRequest(**defaults | fields)


def raw_bytes(data: bytes, shape: Sequence[int], name: str = "image", kind: str = "UINT8") -> Any:
    tensor = pb.ModelInferRequest.InferInputTensor(name=name, datatype=kind, shape=shape)
    return pb.ModelInferRequest(model_name="tiny", inputs=[tensor], raw_input_contents=[data])


async def send(served: Served, method: str, request: Any) -> Any:
    """Calls a method without a client library; returns the bytes of the response."""
    unary: Any = served.channel.unary_unary
    call = unary(f"/{OPEN_INFERENCE.full_name}/{method}")
    return await call(request.SerializeToString(), timeout=20)


async def infer(served: Served, request: Any) -> Any:
    return pb.ModelInferResponse.FromString(await send(served, "ModelInfer", request))


async def refused(served: Served, request: Any) -> str:
    """The error of a request that must be an INVALID_ARGUMENT."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await infer(served, request)
    assert caught.value.code() == StatusCode.INVALID_ARGUMENT
    return caught.value.details() or ""


async def failure(call: Any) -> tuple[str, str]:
    """Status and message of the error that Triton's client raises."""
    with pytest.raises(InferenceServerException) as caught:
        await call
    return caught.value.status().removeprefix("StatusCode."), caught.value.message()


@asynccontextmanager
async def triton_client_of(repo: Path, **options: Any) -> AsyncIterator[tuple[Served, Any]]:
    """A server with Mirror engines, and Triton's asyncio client for it."""
    defaults: dict[str, Any] = {"load": loading(Mirror)}
    async with (
        serve(repo, **defaults | options) as served,
        triton.aio.InferenceServerClient(served.target) as client,
    ):
        yield served, client


def labels(answer: Any) -> list[list[tuple[int, str]]]:
    """Index and label of each class of each image in Classify's answer."""
    return [[(c.index, c.label) for c in result.classes] for result in answer.results]
