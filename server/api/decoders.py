"""Makes pixels in threads, within limits on the images that wait and on the memory they take."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar, cast

import numpy as np

from server.api.decode_time import Data, DecodeBacklog, DecodeTimes
from server.errors import Overloaded
from server.images.fair_threads import FairThreads
from server.images.input_spec import ImageLimits, Pixels
from server.images.memory import UNLIMITED, MemoryNeeded
from server.security.fair_limit import FairLimit
from server.security.principal import ANONYMOUS, LOCAL_CALLER, Principal
from server.telemetry.clock import clock

T = TypeVar("T")

Work = tuple[int, Callable[..., Any], tuple[Any, ...]]  # index of a row, function, arguments


class DecoderQueue:
    """The images that are decoded, or wait for a thread or for memory.

    Principals share the threads and the room. Used on the event loop's thread only.
    """

    def __init__(
        self, executor: Executor, limits: ImageLimits, *, threads: int, max_waiting: int
    ) -> None:
        """`threads` is the number of the executor's threads."""
        self.limits = limits
        self.reserved = replace(limits, memory=UNLIMITED)  # for work that holds its memory already
        self.threads = FairThreads(executor)
        self.backlog = DecodeBacklog(threads)
        self._waiting = FairLimit(max_waiting)
        self._image_s = 0.0  # moving average for one image while all threads are busy
        self._of_everybody = Decoders(self, LOCAL_CALLER)

    def of(self, principal: Principal) -> Decoders:
        """The decoders as a principal uses them."""
        if principal.name == ANONYMOUS:
            return self._of_everybody
        return Decoders(self, principal)

    def begin(self, principal: Principal, images: int) -> None:
        """Counts images that wait. Raises Overloaded if there are too many."""
        waiting = self._waiting
        held = waiting.used if principal.name == ANONYMOUS else waiting.held(principal)
        if held and not waiting.fits(principal, images):
            raise Overloaded(
                f"{held} images are already waiting to be decoded; at most {waiting.limit} may",
                retry_after_s=self._image_s * held,
            )
        waiting.add(principal, images)

    def end(self, principal: Principal, images: int) -> None:
        self._waiting.remove(principal, images)

    def measured(self, seconds: float) -> None:
        """Images were decoded in `seconds`, together with all that waited."""
        self._image_s += 0.1 * (seconds / self._waiting.used - self._image_s)


class Decoders:
    """Makes the pixels of one principal's images. Used on the event loop's thread only."""

    __slots__ = ("_principal", "_queue")

    def __init__(self, queue: DecoderQueue, principal: Principal) -> None:
        self._queue = queue
        self._principal = principal

    @property
    def limits(self) -> ImageLimits:
        return self._queue.limits

    def ready_in_s(self, work: Sequence[Data]) -> float:
        """Seconds until the pixels of such images would be there."""
        return self._queue.backlog.ready_in_s(self._principal.name, work)

    async def rows(self, rows: list[Pixels | None], work: Sequence[Work]) -> Pixels:
        """[N, H, W, C] from the rows; `work` makes those that are None. Raises Overloaded."""
        if work:
            await self._run(work, rows, len(work))
        made = cast(list[Pixels], rows)
        return made[0][np.newaxis] if len(made) == 1 else np.stack(made)

    async def batch(self, images: int, function: Callable[..., T], *arguments: Any) -> T:
        """Calls the function in a thread; it works on `images` images. Raises Overloaded."""
        made: list[T | None] = [None]
        await self._run([(0, function, arguments)], made, images)
        return cast(T, made[0])

    async def _run(self, work: Sequence[Work], rows: list[Any], images: int) -> None:
        """Runs the work in threads and stores each result in `rows`."""
        queue, principal = self._queue, self._principal
        queue.begin(principal, images)
        began_s = clock()
        backlog = queue.backlog
        sources = [_source(arguments) for _, _, arguments in work]
        waiting_s = backlog.add(principal.name, sources)
        futures = [
            asyncio.wrap_future(
                queue.threads.submit(
                    principal, _measured, backlog.times, source, function, *arguments
                )
            )
            for source, (_, function, arguments) in zip(sources, work, strict=True)
        ]
        try:
            for (index, function, arguments), future in zip(work, futures, strict=True):
                try:
                    rows[index] = await future
                except MemoryNeeded as error:
                    rows[index] = await self._run_later(error.needed, function, arguments)
            queue.measured(clock() - began_s)
        finally:
            queue.end(principal, images)
            backlog.remove(principal.name, waiting_s)
            for future in futures:  # not needed if one failed, or if the caller cancelled
                if not future.cancel() and not future.cancelled():
                    future.exception()

    async def _run_later(
        self, needed: int, function: Callable[..., Any], arguments: tuple[Any, ...]
    ) -> Any:
        """Waits for memory, then runs the work in a thread. If the caller leaves, both end."""
        queue, loop = self._queue, asyncio.get_running_loop()
        memory = queue.limits.memory
        granted = asyncio.Event()
        waiter = memory.wait(needed, partial(loop.call_soon_threadsafe, granted.set))
        try:
            await granted.wait()
        except BaseException:
            memory.leave(waiter)
            raise
        # The work runs with limits that do not reserve the memory a second time.
        arguments = tuple(queue.reserved if given is queue.limits else given for given in arguments)
        running = queue.threads.submit(self._principal, function, *arguments)
        running.add_done_callback(lambda _: memory.release(needed))  # also if it never starts
        return await asyncio.wrap_future(running)


def _source(arguments: tuple[Any, ...]) -> Data:
    """What a piece of work decodes; empty if that is a message."""
    first = arguments[0]
    return first if isinstance(first, (bytes, memoryview)) else b""


def _measured(times: DecodeTimes, source: Data, function: Callable[..., T], *arguments: Any) -> T:
    """Calls the function in a thread, and records how long it takes."""
    began_s = clock()
    result = function(*arguments)
    times.record(source, clock() - began_s)
    return result
