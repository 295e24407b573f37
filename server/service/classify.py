"""The Classifier service: a message in, the pixels to the host, its rows back as classes."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from typing import Any, cast

import numpy as np

from proto import classify_pb2 as pb
from server.catalog import Catalog, Ready, Status
from server.engines import Outputs, Pixels
from server.errors import InvalidInput, Overloaded
from server.host import clock
from server.images import ImageLimits, InputSpec, batch_from_pixels, decode, from_pixels
from server.schedule import PRIORITIES
from server.service.rpc import Call

log = logging.getLogger(__name__)

DEFAULT_TOP_K = 5
REQUEST_ID_LIMIT = 128

_Work = tuple[int, Callable[..., Pixels], tuple[Any, ...]]  # a place, and what to call for it


class Classifier:
    """The methods of convserve.v1.Classifier; see server.service.rpc for how they are called."""

    def __init__(
        self,
        catalog: Catalog,
        decoders: Executor,
        limits: ImageLimits,
        *,
        max_images: int,
        max_decoding: int,
    ) -> None:
        self._catalog = catalog
        self._decoders = decoders
        self._limits = limits
        self._max_images = max_images
        self._max_decoding = max_decoding
        self._decoding = 0  # images handed to the decoders and not back yet
        self._decode_s = 0.0  # lately, for one image, while others are decoded too

    async def Classify(self, request: pb.ClassifyRequest, call: Call) -> pb.ClassifyResponse:
        model = self._catalog.find(request.model, request.version)
        call.model, call.version = model.name, model.version_text
        top_k = _top_k(request.top_k, model.manifest.top_k)
        if len(request.request_id) > REQUEST_ID_LIMIT:
            raise InvalidInput(
                "request_id",
                f"has {len(request.request_id)} characters; at most {REQUEST_ID_LIMIT} are allowed",
            )
        if request.priority not in PRIORITIES:
            raise InvalidInput(
                "priority", f"is {request.priority}; 0, the usual, to {PRIORITIES[-1]} are allowed"
            )
        place = model.host.admit(
            model.key,
            self._count(request),
            deadline_s=call.deadline_s,
            priority=request.priority,
        )
        try:
            pixels = await self._pixels(request, model)
        except BaseException:
            place.leave()
            raise
        decoded_s = clock()
        call.stage = "queue"
        try:
            answer = await place.answer(pixels)
        finally:
            if place.started:
                call.stage = "compute"
        response = _response(request, model, answer.outputs, top_k)
        ended_s = clock()
        response.timing.decode_ms = (decoded_s - call.arrived_s) * 1e3
        response.timing.queue_ms = answer.queue_s * 1e3
        response.timing.compute_ms = answer.compute_s * 1e3
        response.timing.total_ms = (ended_s - call.arrived_s) * 1e3
        response.timing.batch_rows.extend(answer.batch_rows)
        model.host.way_back.learn(ended_s - answer.done_s)
        call.after(
            model.metrics.answered,
            len(pixels),
            decoded_s - call.arrived_s,
            answer.queue_s,
            answer.compute_s,
            ended_s - answer.done_s,
        )
        if log.isEnabledFor(logging.DEBUG):
            log.debug(
                "classified",
                extra={
                    "model": model.name,
                    "version": model.manifest.version,
                    "images": len(pixels),
                    "total_ms": response.timing.total_ms,
                    "request_id": request.request_id,
                },
            )
        return response

    async def ListModels(self, request: pb.ListModelsRequest, call: Call) -> pb.ListModelsResponse:
        return pb.ListModelsResponse(models=map(_model, self._catalog.statuses()))

    async def GetModel(self, request: pb.GetModelRequest, call: Call) -> pb.Model:
        status = self._catalog.status(request.model, request.version)
        call.model, call.version = status.model, str(status.version)
        return _model(status, status.ready.labels if status.ready else ())

    async def _pixels(self, request: pb.ClassifyRequest, model: Ready) -> Pixels:
        """[N, H, W, C] of the model's input."""
        if request.HasField("pixels"):
            return await self._from_batch(request.pixels, model.spec)
        images = request.images
        found: list[Pixels | None] = [None] * len(images)
        later: list[_Work] = []
        for index, image in enumerate(images):
            field = f"images[{index}]"
            match image.WhichOneof("content"):
                case "encoded":
                    encoded = (image.encoded, model.spec, self._limits, f"{field}.encoded")
                    later.append((index, decode, encoded))
                case "raw":
                    raw = image.raw
                    size = (raw.height, raw.width, raw.channels)
                    pixels = (raw.data, *size, model.spec, self._limits, f"{field}.raw")
                    if _as_it_is(raw, model.spec):
                        found[index] = from_pixels(*pixels)
                    else:
                        later.append((index, from_pixels, pixels))
                case _:
                    raise InvalidInput(field, "is empty; give encoded or raw")
        if later:
            await self._decode(later, found)
        rows = cast(list[Pixels], found)
        return rows[0][np.newaxis] if len(rows) == 1 else np.stack(rows)

    async def _from_batch(self, raw: pb.RawImages, spec: InputSpec) -> Pixels:
        size = (raw.count, raw.height, raw.width, raw.channels)
        arguments = (raw.data, *size, spec, self._limits, "pixels")
        if _as_it_is(raw, spec):
            return batch_from_pixels(*arguments)
        found: list[Pixels | None] = [None]
        await self._decode([(0, batch_from_pixels, arguments)], found, raw.count)
        return cast(Pixels, found[0])

    async def _decode(
        self, work: list[_Work], found: list[Pixels | None], images: int | None = None
    ) -> None:
        """Runs the work on the decoders' threads and puts each result at its place in `found`."""
        images = images or len(work)
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

    def _count(self, request: pb.ClassifyRequest) -> int:
        """How many images the call brings."""
        field, images = "images", len(request.images)
        if request.HasField("pixels"):
            if images:
                raise InvalidInput("pixels", "is given, and images too; give one of them")
            field, images = "pixels.count", request.pixels.count
        if not 1 <= images <= self._max_images:
            raise InvalidInput(field, f"is {images}; a call brings 1 to {self._max_images} images")
        return images


def _as_it_is(raw: pb.RawImage | pb.RawImages, spec: InputSpec) -> bool:
    """Whether the pixels need no work: then a thread would cost more than it spares."""
    return (raw.height, raw.width, raw.channels) == (spec.height, spec.width, spec.channels)


def _top_k(asked: int, largest: int) -> int:
    if asked > largest:
        raise InvalidInput(
            "top_k", f"is {asked}; this model gives 1 to {largest}, or 0 for the usual"
        )
    return asked or min(DEFAULT_TOP_K, largest)


def _response(
    request: pb.ClassifyRequest, model: Ready, outputs: Outputs, top_k: int
) -> pb.ClassifyResponse:
    labels = model.labels
    response = pb.ClassifyResponse(
        model=model.name,
        version=model.manifest.version,
        trained=model.manifest.weights.trained,
        request_id=request.request_id,
    )
    results = response.results
    # One conversion for all rows: asking numpy for single numbers costs ten times as much.
    for classes, scores in zip(
        outputs.classes[:, :top_k].tolist(), outputs.scores[:, :top_k].tolist(), strict=True
    ):
        add = results.add().classes.add
        for index, score in zip(classes, scores, strict=True):
            add(index=index, label=labels[index], probability=score)
    return response


def _model(status: Status, labels: Sequence[str] = ()) -> pb.Model:
    message = pb.Model(
        name=status.model,
        version=status.version,
        state=pb.Model.State.Value(status.state.name),
        reason=status.reason,
        labels=labels,
    )
    manifest = status.manifest
    if manifest is not None:
        message.architecture = manifest.architecture
        message.trained = manifest.weights.trained
        message.weights = manifest.weights.source
        message.height = manifest.input.height
        message.width = manifest.input.width
        message.channels = manifest.input.channels
        message.classes = manifest.classes
        message.top_k = manifest.top_k
    if status.ready is not None:
        message.max_batch = status.ready.engine.max_batch
        message.backend = status.ready.record.backend
        message.precision = status.ready.record.precision
    return message
