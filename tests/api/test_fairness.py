"""A server process with a real engine, and a principal that sends four times what it can answer."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
from grpc import StatusCode

from server.api.stubs import classify_pb2 as pb
from server.security.identity.tokens import new_token
from tests.security.credentials import token_lines
from tests.support.server_process import CLASSIFY, next_event, server_process

FLOOD, MODEST = new_token(), new_token()
AUTH = f"""
[principals.flood]
roles = ["classify"]

[principals.modest]
roles = ["classify"]

{token_lines("flood", FLOOD)}
{token_lines("modest", MODEST)}
"""

FLOOD_IMAGES = 8  # in one call
FLOOD_CALLS = 30  # in progress: four times the work that fits into the deadline
DEADLINE_ROWS = 60  # the deadline allows for so many images, one after the other
MODEST_CALLS = 20


class Caller:
    """Calls as one principal, over a connection of its own."""

    def __init__(self, port: int, token: str, images: int) -> None:
        self.statuses: Counter[StatusCode] = Counter()
        self._metadata = [("authorization", f"Bearer {token}")]
        self._channel = grpc.aio.insecure_channel(f"127.0.0.1:{port}")
        size = 224 * 224 * 3
        pixels = pb.RawImages(
            count=images, height=224, width=224, channels=3, data=bytes(size * images)
        )
        self._request = pb.ClassifyRequest(model="resnet18", pixels=pixels).SerializeToString()

    async def call(self, deadline_s: float) -> StatusCode:
        try:
            unary: Any = self._channel.unary_unary
            await unary(CLASSIFY)(self._request, metadata=self._metadata, timeout=deadline_s)
            status = StatusCode.OK
        except grpc.aio.AioRpcError as error:
            status = error.code()
        self.statuses[status] += 1
        return status

    async def flood(self, deadline_s: float) -> None:
        """Calls again and again, after a refusal with a short pause."""
        while True:
            if await self.call(deadline_s) != StatusCode.OK:
                await asyncio.sleep(deadline_s / 20)

    async def close(self) -> None:
        await self._channel.close(None)


@asynccontextmanager
async def flooded(caller: Caller, deadline_s: float) -> AsyncIterator[None]:
    """The caller floods the server, and has been refused already."""
    tasks = [asyncio.create_task(caller.flood(deadline_s)) for _ in range(FLOOD_CALLS)]
    try:
        while not caller.statuses[StatusCode.RESOURCE_EXHAUSTED]:
            await asyncio.sleep(0.01)
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def test_beside_a_flood_a_principal_gets_its_answers(
    built_repository: Path, tmp_path: Path
) -> None:
    auth = tmp_path / "auth.toml"
    auth.touch(0o600)
    auth.write_text(AUTH)
    options = (f"--repo={built_repository}", "--models=resnet18", "--threads=1", f"--auth={auth}")
    async with server_process(*options) as server:
        port = (await next_event(server, "listening"))["port"]
        await next_event(server, "version_loaded")
        flood = Caller(port, FLOOD.text, FLOOD_IMAGES)
        modest = Caller(port, MODEST.text, 1)
        while await modest.call(60.0) != StatusCode.OK:
            await asyncio.sleep(0.01)
        began_s = time.monotonic()
        for _ in range(5):
            assert await flood.call(60.0) == StatusCode.OK
        row_s = (time.monotonic() - began_s) / 5 / FLOOD_IMAGES
        deadline_s = max(DEADLINE_ROWS * row_s, 0.3)
        modest.statuses.clear()
        async with flooded(flood, deadline_s):
            for _ in range(MODEST_CALLS):
                await modest.call(deadline_s)
        await modest.close()
        await flood.close()
    assert modest.statuses[StatusCode.OK] >= 0.95 * MODEST_CALLS, modest.statuses
    assert flood.statuses[StatusCode.OK] > 5, "what the other leaves is lent"
