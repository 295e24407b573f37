"""The Classifier service: a message in, the pixels to the host, its rows back as classes."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Sequence
from functools import partial

from server.api.handlers import Call
from server.api.inference import (
    Inference,
    Work,
    best_classes,
    check_request_id,
)
from server.api.stubs import classify_pb2 as pb
from server.engines.base import Outputs
from server.errors import InvalidInput
from server.images.decode import batch_from_pixels, decode, from_pixels
from server.images.input_spec import InputSpec, Pixels
from server.models.registry import ModelRegistry
from server.models.version import LoadedModel, ModelVersion
from server.scheduling.base import PRIORITIES

log = logging.getLogger(__name__)

DEFAULT_TOP_K = 5


class Classifier:
    """The methods of convserve.v1.Classifier; see server.api.handlers for how they are called."""

    def __init__(self, registry: ModelRegistry, inference: Inference) -> None:
        self._registry = registry
        self._inference = inference

    async def Classify(self, request: pb.ClassifyRequest, call: Call) -> pb.ClassifyResponse:
        model = self._registry.route(
            request.model, request.version, request.label, request.request_id
        )
        call.model, call.version = model.name, model.version_text
        top_k = _top_k(request.top_k, model.manifest.top_k)
        check_request_id("request_id", request.request_id)
        if request.priority not in PRIORITIES:
            raise InvalidInput(
                "priority", f"is {request.priority}; 0, the usual, to {PRIORITIES[-1]} are allowed"
            )
        images = self._count(request)
        classified = await self._inference.classify(
            model,
            call,
            images,
            partial(self._pixels, request, model),
            deadline_s=call.deadline_s,
            priority=request.priority,
        )
        answer = classified.answer
        response = _response(request, model, answer.outputs, top_k)
        ended_s = classified.made()
        timing = response.timing
        timing.decode_ms = (classified.decoded_s - call.arrived_s) * 1e3
        timing.queue_ms = answer.queue_s * 1e3
        timing.compute_ms = answer.compute_s * 1e3
        timing.total_ms = total_ms = (ended_s - call.arrived_s) * 1e3
        timing.batch_rows.extend(answer.batch_rows)
        if log.isEnabledFor(logging.DEBUG):
            log.debug(
                "classified",
                extra={
                    "model": model.name,
                    "version": model.manifest.version,
                    "images": images,
                    "total_ms": total_ms,
                    "request_id": request.request_id,
                },
            )
        return response

    async def ListModels(self, request: pb.ListModelsRequest, call: Call) -> pb.ListModelsResponse:
        return pb.ListModelsResponse(models=map(self._model, self._registry.versions()))

    async def GetModel(self, request: pb.GetModelRequest, call: Call) -> pb.Model:
        status = self._registry.version(request.model, request.version)
        call.model, call.version = status.model_name, str(status.number)
        return self._model(status, status.ready_model.labels if status.ready_model else ())

    def _model(self, status: ModelVersion, labels: Sequence[str] = ()) -> pb.Model:
        return _model(status, labels, self._registry.labels(status))

    def _pixels(
        self, request: pb.ClassifyRequest, model: LoadedModel
    ) -> Pixels | Awaitable[Pixels]:
        """[N, H, W, C] of the model's input."""
        images, spec = request.images, model.spec
        # First where nothing is to be done with the pixels: those are most of the calls.
        if not images:
            batch = request.pixels
            if _as_it_is(batch, spec) and (found := spec.view(batch.data, batch.count)) is not None:
                return found
            return self._from_batch(batch, spec)
        if len(images) == 1:
            raw = images[0].raw
            if _as_it_is(raw, spec) and (found := spec.view(raw.data, 1)) is not None:
                return found
        return self._from_images(images, spec)

    async def _from_images(self, images: Sequence[pb.Image], spec: InputSpec) -> Pixels:
        limits = self._inference.limits
        found: list[Pixels | None] = [None] * len(images)
        later: list[Work] = []
        for index, image in enumerate(images):
            field = f"images[{index}]"
            match image.WhichOneof("content"):
                case "encoded":
                    encoded = (image.encoded, spec, limits, f"{field}.encoded")
                    later.append((index, decode, encoded))
                case "raw":
                    raw = image.raw
                    size = (raw.height, raw.width, raw.channels)
                    pixels = (raw.data, *size, spec, limits, f"{field}.raw")
                    if _as_it_is(raw, spec):
                        found[index] = from_pixels(*pixels)
                    else:
                        later.append((index, from_pixels, pixels))
                case _:
                    raise InvalidInput(field, "is empty; give encoded or raw")
        return await self._inference.decoded(found, later)

    async def _from_batch(self, raw: pb.RawImages, spec: InputSpec) -> Pixels:
        size = (raw.count, raw.height, raw.width, raw.channels)
        arguments = (raw.data, *size, spec, self._inference.limits, "pixels")
        if _as_it_is(raw, spec):
            return batch_from_pixels(*arguments)
        return await self._inference.made(raw.count, batch_from_pixels, *arguments)

    def _count(self, request: pb.ClassifyRequest) -> int:
        """How many images the call brings."""
        field, images = "images", len(request.images)
        if request.HasField("pixels"):
            if images:
                raise InvalidInput("pixels", "is given, and images too; give one of them")
            field, images = "pixels.count", request.pixels.count
        self._inference.check_count(field, images)
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
    request: pb.ClassifyRequest, model: LoadedModel, outputs: Outputs, top_k: int
) -> pb.ClassifyResponse:
    labels = model.labels
    response = pb.ClassifyResponse(
        model=model.name,
        version=model.manifest.version,
        trained=model.manifest.weights.trained,
        request_id=request.request_id,
    )
    results = response.results
    for row in best_classes(outputs, top_k):
        add = results.add().classes.add
        for index, score in row:
            add(index=index, label=labels[index], probability=score)
    return response


def _model(status: ModelVersion, labels: Sequence[str], version_labels: Sequence[str]) -> pb.Model:
    message = pb.Model(
        name=status.model_name,
        version=status.number,
        state=pb.Model.State.Value(status.state.name),
        reason=status.reason,
        labels=labels,
        version_labels=version_labels,
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
    if status.ready_model is not None:
        message.max_batch = status.ready_model.engine.max_batch
        message.backend = status.ready_model.record.backend
        message.precision = status.ready_model.record.precision
    return message
