"""States of a server's model versions, and clients that send requests while versions change."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

from server.api.stubs import classify_pb2 as pb
from server.repository.manifest import MANIFEST_FILE
from tests.support.serving import Served, raw


async def states(served: Served, model: str = "tiny") -> dict[int, str]:
    """The state of every version of a model, by version."""
    listing = await served.call("ListModels", pb.ListModelsRequest())
    return {m.version: pb.Model.State.Name(m.state) for m in listing.models if m.name == model}


async def reasons(served: Served, model: str = "tiny") -> dict[int, str]:
    listing = await served.call("ListModels", pb.ListModelsRequest())
    return {m.version: m.reason for m in listing.models if m.name == model}


async def wait_for_states(served: Served, expected: dict[int, str], model: str = "tiny") -> None:
    """Polls until the versions are in these states; the server's time limit ends the wait."""
    while True:
        found = await states(served, model)
        if found.items() >= expected.items():
            return


@dataclass
class RequestLog:
    """Results of the requests that the clients sent so far."""

    codes: Counter[str] = field(default_factory=Counter)
    answered_by: Counter[int] = field(default_factory=Counter)  # by version
    messages: list[str] = field(default_factory=list)


@asynccontextmanager
async def under_load(served: Served, clients: int = 4) -> AsyncIterator[RequestLog]:
    """Clients that each send one request after the other."""
    results = RequestLog()
    stop = asyncio.Event()

    async def send_requests() -> None:
        while not stop.is_set():
            try:
                answer = await served.classify(raw(0, 0))
            except grpc.aio.AioRpcError as error:
                results.codes[error.code().name] += 1
                results.messages.append(error.details() or "")
            else:
                results.codes["OK"] += 1
                results.answered_by[answer.version] += 1

    async with asyncio.TaskGroup() as tasks:
        for _ in range(clients):
            tasks.create_task(send_requests())
        try:
            yield results
        finally:
            stop.set()


async def wait_for_requests(results: RequestLog, more: int = 20) -> None:
    """Waits until `more` requests have ended."""
    enough = results.codes.total() + more
    while results.codes.total() < enough:
        await asyncio.sleep(0.001)


def metric(served: Served, line: str) -> float:
    """The value of a series, 0 if it does not exist."""
    for text in served.server.metrics.render().decode().splitlines():
        if text.startswith(line + " "):
            return float(text.rpartition(" ")[2])
    return 0.0


def change_manifest(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Changes the manifest of a published version."""
    path = folder / MANIFEST_FILE
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))
