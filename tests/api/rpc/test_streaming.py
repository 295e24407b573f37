"""Responses of a stream that its client does not read count as bytes in progress."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from server.api.in_flight import InFlightLimits
from server.api.rpc.streaming import answer_in_order, counted_stream
from server.security.principal import LOCAL_CALLER
from server.transport.methods import Abort


class SlowReader:
    """A call whose client reads nothing until `reads` is set."""

    def __init__(self) -> None:
        self.reads = asyncio.Event()
        self.written: list[bytes] = []

    async def write(self, message: bytes) -> None:
        await self.reads.wait()
        self.written.append(message)


async def requests() -> AsyncIterator[bytes]:
    for number in range(10):
        yield bytes([number])


async def respond(data: bytes) -> bytes:
    return 100 * data


async def stream(limits: InFlightLimits, call: Any) -> None:
    with counted_stream("Stream", limits, LOCAL_CALLER) as unsent:
        await answer_in_order(requests(), call, respond, asyncio.Event(), unsent)


async def test_they_count_until_they_are_written() -> None:
    limits = InFlightLimits(max_fields=10, max_calls=10, max_bytes=10_000)
    call = SlowReader()
    running = asyncio.create_task(stream(limits, call))
    async with asyncio.timeout(20):
        while limits.held_bytes < 1000:
            await asyncio.sleep(0)
        assert (limits.held_bytes, limits.calls) == (1000, 1)
        call.reads.set()
        await running
    assert call.written == [100 * bytes([number]) for number in range(10)]
    assert (limits.held_bytes, limits.calls) == (0, 0)


async def test_a_stream_with_too_many_of_them_ends() -> None:
    limits = InFlightLimits(max_fields=10, max_calls=10, max_bytes=500)
    call = SlowReader()
    call.reads.set()
    with pytest.raises(Abort):
        await stream(limits, call)
    assert (limits.held_bytes, limits.calls) == (0, 0)


async def test_a_cancelled_stream_holds_nothing() -> None:
    limits = InFlightLimits(max_fields=10, max_calls=10, max_bytes=10_000)
    running = asyncio.create_task(stream(limits, SlowReader()))
    async with asyncio.timeout(20):
        while limits.held_bytes < 1000:
            await asyncio.sleep(0)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
    assert (limits.held_bytes, limits.calls) == (0, 0)
