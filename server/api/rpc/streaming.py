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


class UnsentResponses:
    """The bytes of a stream's responses that its client has not read. They count as in progress."""

    def __init__(self, in_flight: InFlightLimits, principal: Principal) -> None:
        self.size = 0
        self._in_flight = in_flight
        self._principal = principal

    def add(self, response: bytes) -> bytes:
        """Counts a response. Raises Overloaded; it is counted anyway, until the stream ends."""
        self.size += len(response)
        self._in_flight.add_bytes(self._principal, len(response))
        return response

    def remove(self, response: bytes) -> None:
        self.size -= len(response)
        self._in_flight.remove_bytes(self._principal, len(response))


@contextmanager
def counted_stream(
    method: str, in_flight: InFlightLimits, principal: Principal
) -> Iterator[UnsentResponses]:
    """Counts a stream as one call in progress while it lasts. Raises Abort above the limit."""
    unsent = UnsentResponses(in_flight, principal)
    try:
        in_flight.begin(principal)
        yield unsent
    except (Overloaded, QuotaExceeded) as error:
        raise abort_for(error, method) from None
    finally:
        in_flight.end(principal, unsent.size)


async def answer_in_order(
    requests: AsyncIterator[bytes],
    call: WireCall,
    respond: Callable[[bytes], Coroutine[Any, Any, bytes]],
    stopping: asyncio.Event,
    unsent: UnsentResponses,
    depth: int | None = None,
) -> None:
    """Writes the response to each request of a stream, in the order of the requests.

    Up to `depth` requests are in progress: being answered, or with a response that is not written.
    After `stopping` it reads no more requests, answers those that it has read, and raises Abort.
    Raises Overloaded if too many bytes of responses wait for the client.
    """
    answers: asyncio.Queue[asyncio.Task[bytes] | None] = asyncio.Queue()  # None is the end
    free_slots = asyncio.Semaphore(depth or STREAM_DEPTH)
    tasks: set[asyncio.Task[Any]] = set()

    async def counted(data: bytes) -> bytes:
        return unsent.add(await respond(data))

    async def read() -> None:
        try:
            await free_slots.acquire()
            async for data in requests:
                task = asyncio.create_task(counted(data))
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
            response = await task
            await call.write(response)
            unsent.remove(response)
            free_slots.release()
        if reader.cancelled():
            raise Abort(StatusCode.UNAVAILABLE, STOPPING)
        reader.result()  # raises if reading failed
    finally:
        unfinished = list(tasks)
        for other in unfinished:
            other.cancel()
        await asyncio.gather(*unfinished, return_exceptions=True)
