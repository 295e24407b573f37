"""gRPC service convserve.v1.Classifier."""

from __future__ import annotations

from collections.abc import Sequence

from server.api.content import (
    Content,
    EmptyImage,
    ImageFile,
    ImageList,
    InvalidContent,
    PixelBatch,
    RawImage,
)
from server.api.context import CallContext
from server.api.inference import (
    DEFAULT_TOP_K,
    Inference,
    InferenceRequest,
    InferenceResponse,
    best_classes,
)
from server.api.stubs import classify_pb2 as pb
from server.api.visible_models import VisibleModels
from server.errors import InvalidInput
from server.models.version import ModelVersion
from server.repository.evaluation import EvaluationRecord


class Classifier:
    """The RPCs of convserve.v1.Classifier, called as server.api.rpc.handlers describes."""

    def __init__(self, models: VisibleModels, inference: Inference) -> None:
        self._models = models
        self._inference = inference

    async def Classify(
        self, request: pb.ClassifyRequest, context: CallContext
    ) -> pb.ClassifyResponse:
        response = await self._inference.infer(
            InferenceRequest(
                request.model,
                request.version,
                request.label,
                request.request_id,
                _content(request),
                context.deadline_s,
                request.priority,
                request.top_k,
            ),
            context,
        )
        message = _response(response, request.top_k)
        total_s = self._inference.complete(response, context)
        timing = message.timing
        timing.decode_ms = response.decode_s * 1e3
        timing.queue_ms = response.queue_s * 1e3
        timing.compute_ms = response.compute_s * 1e3
        timing.total_ms = total_s * 1e3
        timing.batch_rows.extend(response.batch_rows)
        return message

    async def ListModels(
        self, request: pb.ListModelsRequest, context: CallContext
    ) -> pb.ListModelsResponse:
        return pb.ListModelsResponse(
            models=map(self._model, self._models.versions(context.caller.principal))
        )

    async def GetModel(self, request: pb.GetModelRequest, context: CallContext) -> pb.Model:
        version = self._models.version(context.caller.principal, request.model, request.version)
        context.set_model(version.model_name, str(version.number))
        return self._model(version, version.ready_model.labels if version.ready_model else ())

    def _model(self, version: ModelVersion, labels: Sequence[str] = ()) -> pb.Model:
        return _model(version, labels, self._models.labels(version))


def _content(request: pb.ClassifyRequest) -> Content:
    if not request.HasField("pixels"):
        return ImageList([_image(index, image) for index, image in enumerate(request.images)])
    if request.images:
        error = InvalidInput("pixels", "is given, and images too; give one of them")
        return InvalidContent(error)
    batch = request.pixels
    return PixelBatch(batch.data, batch.count, batch.height, batch.width, batch.channels)


def _image(index: int, image: pb.Image) -> ImageFile | RawImage | EmptyImage:
    match image.WhichOneof("content"):
        case "encoded":
            return ImageFile(image.encoded, f"images[{index}].encoded")
        case "raw":
            raw = image.raw
            field = f"images[{index}].raw"
            return RawImage(raw.data, raw.height, raw.width, raw.channels, field)
    return EmptyImage(f"images[{index}]")


def _response(response: InferenceResponse, top_k: int) -> pb.ClassifyResponse:
    model = response.model
    manifest, labels = model.manifest, model.labels
    message = pb.ClassifyResponse(
        model=model.name,
        version=manifest.version,
        trained=manifest.weights.trained,
        request_id=response.request_id,
    )
    results = message.results
    for row in best_classes(response.outputs, top_k or min(DEFAULT_TOP_K, manifest.top_k)):
        add = results.add().classes.add
        for index, score in row:
            add(index=index, label=labels[index], probability=score)
    return message


def _model(version: ModelVersion, labels: Sequence[str], version_labels: Sequence[str]) -> pb.Model:
    message = pb.Model(
        name=version.model_name,
        version=version.number,
        state=pb.Model.State.Value(version.state.name),
        reason=version.reason,
        labels=labels,
        version_labels=version_labels,
    )
    manifest = version.manifest
    if manifest is not None:
        message.architecture = manifest.architecture
        message.trained = manifest.weights.trained
        message.weights = manifest.weights.source
        message.height = manifest.input.height
        message.width = manifest.input.width
        message.channels = manifest.input.channels
        message.classes = manifest.classes
        message.top_k = manifest.top_k
        message.activation = manifest.activation
    if version.ready_model is not None:
        message.max_batch = version.ready_model.engine.max_batch
        message.backend = version.ready_model.record.backend
        message.precision = version.ready_model.record.precision
    if (found := version.evaluation) is not None:
        message.evaluation.CopyFrom(_evaluation(found))
    return message


def _evaluation(record: EvaluationRecord) -> pb.Evaluation:
    return pb.Evaluation(
        created=record.created,
        data=record.data,
        engine=record.engine,
        images=record.images,
        top1=record.top1,
        top1_low=record.top1_low,
        top1_high=record.top1_high,
        top5=record.top5,
        calibration_error=record.calibration_error,
    )
