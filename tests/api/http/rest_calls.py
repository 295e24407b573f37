"""Requests of REST, and what its responses and metrics say."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx

from server.images.input_spec import Pixels
from tests.support.serving import (
    Mirror,
    Served,
    loading,
    serve,
)


@asynccontextmanager
async def client_of(repo: Path, **options: Any) -> AsyncIterator[tuple[Served, httpx.AsyncClient]]:
    """A server with Mirror engines, and a client of its HTTP port."""
    defaults: dict[str, Any] = {"load": loading(Mirror)}
    async with (
        serve(repo, **defaults | options) as served,
        httpx.AsyncClient(base_url=served.http, timeout=20) as client,
    ):
        yield served, client


def image(pixels: Pixels, data: Any = None, **fields: Any) -> dict[str, Any]:
    """The JSON of a request with those pixels."""
    numbers = pixels.reshape(-1).tolist() if data is None else data
    tensor = {"name": "image", "datatype": "UINT8", "shape": list(pixels.shape), "data": numbers}
    return {"inputs": [tensor], **fields}


def encoded(*files: bytes, nested: bool = False) -> dict[str, Any]:
    texts: list[Any] = [base64.b64encode(file).decode() for file in files]
    tensor = {"name": "encoded", "datatype": "BYTES", "shape": [len(files)], "data": texts}
    if nested:
        tensor |= {"shape": [len(files), 1], "data": [[text] for text in texts]}
    return {"inputs": [tensor]}


def counted(served: Served, method: str, code: str) -> float:
    """Calls of that method with that status, for all models."""
    return sum(
        sample.value
        for family in served.server.metrics.registry.collect()
        for sample in family.samples
        if sample.name == "convserve_requests_total"
        and (sample.labels["method"], sample.labels["code"]) == (method, code)
    )


async def until_counted(served: Served, method: str, code: str) -> None:
    while not counted(served, method, code):
        await asyncio.sleep(0.001)


def problem(response: httpx.Response) -> dict[str, Any]:
    assert response.headers["content-type"] == "application/problem+json"
    found: dict[str, Any] = response.json()
    assert found["status"] == response.status_code
    assert found["error"] == found["detail"]
    return found
