"""Servers that a test can stop: in a task of its own, or as `python -m server`."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import httpx
from grpc import StatusCode

from server.app.lifecycle import Running, running
from server.models.loader import Loader
from server.settings import Settings
from tests.support.serving import SERVICE, Served, raw

CLASSIFY = SERVICE + "Classify"
ROOT = Path(__file__).resolve().parent.parent.parent


def local_settings(repo: Path, **options: Any) -> Settings:
    """Settings for free ports of the loopback interface."""
    defaults: dict[str, Any] = {"host": "127.0.0.1", "port": 0, "http_port": 0}
    return Settings(repo=repo, **defaults | options)


class Stoppable(NamedTuple):
    """A server in a task of its own, and a channel that stays open when it stops."""

    served: Served
    stop: asyncio.Event
    task: asyncio.Task[None]


@asynccontextmanager
async def stoppable(repo: Path, loader: Loader, **options: Any) -> AsyncIterator[Stoppable]:
    stop = asyncio.Event()
    started: asyncio.Future[Running] = asyncio.get_running_loop().create_future()

    async def run() -> None:
        async with running(local_settings(repo, **options), loader=loader) as server:
            started.set_result(server)
            await stop.wait()

    async with asyncio.timeout(100), asyncio.TaskGroup() as tasks:
        task = tasks.create_task(run())
        server = await started
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            yield Stoppable(Served(server, channel), stop, task)


@asynccontextmanager
async def server_process(
    *arguments: str, run: Sequence[str] = ("-m", "server"), **environment: str
) -> AsyncIterator[asyncio.subprocess.Process]:
    """`python -m server` on free ports of the loopback interface, with JSON logs."""
    options = ("--host=127.0.0.1", "--port=0", "--http-port=0", "--log-format=json")
    started = await asyncio.create_subprocess_exec(
        sys.executable,
        *(*run, *options, *arguments),
        cwd=ROOT,
        env=environment,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(100):
            yield started
    finally:
        if started.returncode is None:
            started.kill()
            await started.wait()


async def next_event(started: asyncio.subprocess.Process, name: str) -> dict[str, Any]:
    """The next event with this name in the log of the process."""
    assert started.stderr is not None
    async for text in started.stderr:
        line: dict[str, Any] = json.loads(text)
        if line["event"] == name:
            return line
    raise AssertionError(f"the log ended without {name}")


async def get(address: str) -> httpx.Response:
    async with httpx.AsyncClient() as client:
        return await client.get(address)


async def wait_until_not_ready(http: str) -> Any:
    """The body of the first response of /readyz that is not 200."""
    async with httpx.AsyncClient() as client:
        while (response := await client.get(http + "/readyz")).status_code == 200:
            pass
    return response.json()


async def code_for_new_client(target: str) -> StatusCode:
    """The status of a request on a new connection."""
    options = [("grpc.use_local_subchannel_pool", 1)]
    async with grpc.aio.insecure_channel(target, options=options) as channel:
        unary: Any = channel.unary_unary
        code: StatusCode = await unary(CLASSIFY)(raw(1).SerializeToString(), timeout=20).code()
        return code
