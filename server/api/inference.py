"""The way of a call that brings images, whatever protocol it came by: place, pixels, answer."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from server.api.handlers import Call
from server.engines.base import Outputs, RowSource
from server.errors import InvalidInput, Overloaded
from server.execution.pending_request import ExecutionResult
from server.images.input_spec import ImageLimits, Pixels
from server.models.version import LoadedModel
from server.telemetry.clock import clock

REQUEST_ID_LIMIT = 128

Work = tuple[int, Callable[..., Pixels], tuple[Any, ...]]  # a place, and what to call for it


@dataclass(slots=True)
class Classified:
    """The answer to a call, to be put into its protocol's words and then `made`."""

    answer: ExecutionResult
    decoded_s: float  # when its pixels were there, on `telemetry.clock`
    _model: LoadedModel
    _call: Call
    _images: int

    def made(self) -> float:
        """The response is made: counts its phases. Returns the time on `telemetry.clock`."""
        ended_s = clock()
        model, call, answer = self._model, self._call, self.answer
        respond_s = ended_s - answer.done_s
        model.executor.response_delay.record(respond_s, ended_s)
        decode_s = self.decoded_s - call.arrived_s
        phases_s = (decode_s, answer.queue_s, answer.compute_s, respond_s)
        call.after(model.metrics.answered, self._images, *phases_s)
        if call.trace is not None:
            call.trace.phases(model.name, self._images, *phases_s)
        return ended_s

    def spoiled(self) -> None:
        """No response could be made: has the call counted among those that failed."""
        self._call.after(self._model.metrics.failed, clock() - self._call.arrived_s)


class Inference:
    """What the services share that classify. Used on the event loop's thread only."""

    def __init__(
        self, decoders: Executor, limits: ImageLimits, *, max_images: int, max_decoding: int
    ) -> None:
        self.limits = limits
        self._decoders = decoders
        self.max_images = max_images
        self._max_decoding = max_decoding
        self._decoding = 0  # images handed to the decoders and not back yet
        self._decode_s = 0.0  # lately, for one image, while others are decoded too

    def check_count(self, field: str, images: int) -> None:
        """Raises InvalidInput where a call may not bring so many images."""
        if not 1 <= images <= self.max_images:
            raise InvalidInput(field, f"is {images}; a call brings 1 to {self.max_images} images")

    async def classify(
        self,
        model: LoadedModel,
        call: Call,
        images: int,
        pixels: Callable[[], Pixels | RowSource | Awaitable[Pixels | RowSource]],
        *,
        deadline_s: float,
        priority: int,
    ) -> Classified:
        """Admits the call, has its pixels made, and waits for the answer.

        `pixels` gives as many rows as `images` says, [N, H, W, C] of the model's input, or what to
        await for them; it is asked only once the call has its reservation. Raises what
        `DeviceExecutor.admit`, `Reservation.run` and `pixels` do.
        """
        try:
            reservation = model.executor.admit(
                model.key, images, deadline_s=deadline_s, priority=priority, trace=call.trace
            )
            try:
                found = pixels()
                rows = found if isinstance(found, (np.ndarray, RowSource)) else await found
            except BaseException:
                reservation.release()
                raise
            decoded_s = clock()
            call.stage = "queue"
            try:
                answer = await reservation.run(rows)
            finally:
                if reservation.has_started:
                    call.stage = "compute"
        except BaseException:
            call.after(model.metrics.failed, clock() - call.arrived_s)
            raise
        return Classified(answer, decoded_s, model, call, images)

    async def decoded(self, rows: list[Pixels | None], work: Sequence[Work]) -> Pixels:
        """[N, H, W, C] of the rows, those that are missing made by the work."""
        if work:
            await self._decode(work, rows, len(work))
        found = cast(list[Pixels], rows)
        return found[0][np.newaxis] if len(found) == 1 else np.stack(found)

    async def made(self, images: int, function: Callable[..., Pixels], *arguments: Any) -> Pixels:
        """What the function gives, called on a decoder's thread; it is work for so many images."""
        found: list[Pixels | None] = [None]
        await self._decode([(0, function, arguments)], found, images)
        return cast(Pixels, found[0])

    async def _decode(self, work: Sequence[Work], found: list[Pixels | None], images: int) -> None:
        """Runs the work on the decoders' threads and puts each result at its place in `found`."""
        if self._decoding and self._decoding + images > self._max_decoding:
            raise Overloaded(
                f"{self._decoding} images are already waiting to be decoded; "
                f"at most {self._max_decoding} may",
                retry_after_s=self._decode_s * self._decoding,
            )
        loop = asyncio.get_running_loop()
        self._decoding += images
        began_s = clock()
        futures = [
            loop.run_in_executor(self._decoders, function, *arguments)
            for _, function, arguments in work
        ]
        try:
            for (index, _, _), future in zip(work, futures, strict=True):
                found[index] = await future
            # What an image takes while all threads are at it: how fast the line before them moves.
            self._decode_s += 0.1 * ((clock() - began_s) / self._decoding - self._decode_s)
        finally:
            self._decoding -= images
            for future in futures:  # where one was refused, or the caller left, spare the others
                if not future.cancel() and not future.cancelled():
                    future.exception()


def best_classes(outputs: Outputs, count: int) -> Iterator[Iterable[tuple[int, float]]]:
    """For each row its `count` best classes with their scores, best first."""
    # One conversion for all rows: asking numpy for single numbers costs ten times as much.
    for classes, scores in zip(
        outputs.classes[:, :count].tolist(), outputs.scores[:, :count].tolist(), strict=True
    ):
        yield zip(classes, scores, strict=True)


def check_request_id(field: str, text: str) -> None:
    """Raises InvalidInput where it is too long to come back and stand in the log."""
    if len(text) > REQUEST_ID_LIMIT:
        raise InvalidInput(
            field, f"has {len(text)} characters; at most {REQUEST_ID_LIMIT} are allowed"
        )
