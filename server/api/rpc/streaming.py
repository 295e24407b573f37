"""Streams of requests: several are answered at a time, and the answers keep the requests' order."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any

from grpc import StatusCode

from server.api.in_flight import InFlightLimits
from server.api.status import abort_for
from server.errors import Overloaded, QuotaExceeded
from server.security.principal import Principal
from server.transport.methods import STOPPING, Abort, WireCall

STREAM_DEPTH = 64  # requests of one stream in progress; the next one is not read yet


@contextmanager
def counted_stream(method: str, in_flight: InFlightLimits, principal: Principal) -> Iterator[None]:
    """Counts a stream as one call in progress while it lasts. Raises Abort above the limit."""
    try:
        in_flight.begin(principal)
        yield
    except (Overloaded, QuotaExceeded) as error:
        raise abort_for(error, method) from None
    finally:
        in_flight.end(principal)


async def answer_in_order(
    requests: AsyncIterator[bytes],
    call: WireCall,
    respond: Callable[[bytes], Coroutine[Any, Any, bytes]],
    stopping: asyncio.Event,
    depth: int | None = None,
) -> None:
    """Writes the response to each request of a stream, in the order of the requests.

    Up to `depth` requests are in progress: being answered, or with a response that is not written.
    After `stopping` it reads no more requests, answers those that it has read, and raises Abort.
    """
    answers: asyncio.Queue[asyncio.Task[bytes] | None] = asyncio.Queue()  # None is the end
    free_slots = asyncio.Semaphore(depth or STREAM_DEPTH)
    tasks: set[asyncio.Task[Any]] = set()

    async def read() -> None:
        try:
            await free_slots.acquire()
            async for data in requests:
                task = asyncio.create_task(respond(data))
                tasks.add(task)
                task.add_done_callback(tasks.discard)
                answers.put_nowait(task)
                await free_slots.acquire()
        finally:
            answers.put_nowait(None)

    async def stop_reading() -> None:
        await stopping.wait()
        reader.cancel()

    reader, stopper = asyncio.create_task(read()), asyncio.create_task(stop_reading())
    tasks |= {reader, stopper}
    try:
        while (task := await answers.get()) is not None:
            await call.write(await task)
            free_slots.release()
        if reader.cancelled():
            raise Abort(StatusCode.UNAVAILABLE, STOPPING)
        reader.result()  # raises if reading failed
    finally:
        unfinished = list(tasks)
        for other in unfinished:
            other.cancel()
        await asyncio.gather(*unfinished, return_exceptions=True)
