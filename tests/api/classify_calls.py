"""Requests of Classify, and what its responses and errors say."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from io import BytesIO
from typing import Any

import grpc
import numpy as np
import pytest
from google.rpc.error_details_pb2 import BadRequest
from google.rpc.status_pb2 import Status
from grpc import StatusCode
from PIL import Image
from prometheus_client import CollectorRegistry

from server.api.stubs import classify_pb2 as pb
from tests.support.serving import (
    SHAPE,
    Served,
)

HEIGHT, WIDTH, CHANNELS = SHAPE


def row(index: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Pixels that a Mirror assigns to that class."""
    pixels = np.zeros(SHAPE, np.uint8)
    pixels[0, 0, 0] = index
    return pixels


def png(index: int) -> bytes:
    file = BytesIO()
    Image.fromarray(row(index)).save(file, "PNG")
    return file.getvalue()


def raw_image(index: int) -> pb.Image:
    data = row(index).tobytes()
    image = pb.RawImage(height=HEIGHT, width=WIDTH, channels=CHANNELS, data=data)
    return pb.Image(raw=image)


def best(response: pb.ClassifyResponse) -> list[int]:
    """The best class of each image."""
    return [result.classes[0].index for result in response.results]


async def failure(call: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value


async def eventually(condition: Callable[[], bool]) -> None:
    """Waits until the condition holds; the test's time limit ends the wait."""
    while not condition():
        await asyncio.sleep(0.001)


def metric(registry: CollectorRegistry, name: str, **labels: str) -> float:
    return registry.get_sample_value(name, labels) or 0.0


def trailers(error: grpc.aio.AioRpcError) -> dict[str, Any]:
    metadata: Any = error.trailing_metadata()
    return dict(iter(metadata))  # grpcio before 1.80 has `keys`, but nothing to use them with


def details(error: grpc.aio.AioRpcError) -> Status:
    return Status.FromString(trailers(error)["grpc-status-details-bin"])


def violation(error: grpc.aio.AioRpcError) -> tuple[str, str]:
    """The field that a BadRequest names, and its description."""
    request = BadRequest()
    assert details(error).details[0].Unpack(request)
    (one,) = request.field_violations
    return one.field, one.description


async def refused(served: Served, request: pb.ClassifyRequest | bytes) -> tuple[str, str]:
    """The error of a request that must be an INVALID_ARGUMENT."""
    error = await failure(served.call("Classify", request))
    assert error.code() == StatusCode.INVALID_ARGUMENT
    field, description = violation(error)
    assert error.details() == f"{field}: {description}"
    return field, description
