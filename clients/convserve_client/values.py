"""Values that the client returns: answers and descriptions of models."""

from __future__ import annotations

from dataclasses import dataclass

from convserve_client.stubs import classify_pb2 as pb


@dataclass(frozen=True, slots=True)
class Prediction:
    """One class and its probability for an image."""

    index: int
    label: str
    probability: float


@dataclass(frozen=True, slots=True)
class Timing:
    """Time of a call in the server, by phase. The fields are those of the contract."""

    decode_ms: float
    queue_ms: float
    compute_ms: float
    total_ms: float
    batch_rows: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Answer:
    """Predictions for each image, in the order of the request. The best class comes first."""

    results: tuple[tuple[Prediction, ...], ...]
    model: str
    version: int
    trained: bool  # False: the parameters are random numbers and the classes mean nothing
    timing: Timing
    request_id: str


@dataclass(frozen=True, slots=True)
class EvaluationInfo:
    """How well a version classified labelled images. The fields are those of the contract."""

    created: str
    data: str
    engine: str
    images: int
    top1: float
    top1_low: float
    top1_high: float
    top5: float | None
    calibration_error: float


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """One version of a model. The fields are those of the contract."""

    name: str
    version: int
    state: str  # name of a Model.State in the contract, for example "READY"
    reason: str
    architecture: str
    trained: bool
    weights: str
    input_shape: tuple[int, int, int]  # height, width, channels
    classes: int
    top_k: int
    max_batch: int
    backend: str
    precision: str
    labels: tuple[str, ...]  # names of the classes; empty in a list of models
    version_labels: tuple[str, ...]  # labels that point to this version: "stable", "canary"
    activation: str  # "softmax", or "sigmoid": then an image may have several classes or none
    evaluation: EvaluationInfo | None = None  # None: none was recorded

    @property
    def is_ready(self) -> bool:
        return self.state == "READY"


def answer_from(response: pb.ClassifyResponse) -> Answer:
    timing = response.timing
    return Answer(
        results=tuple(
            tuple(Prediction(c.index, c.label, c.probability) for c in result.classes)
            for result in response.results
        ),
        model=response.model,
        version=response.version,
        trained=response.trained,
        timing=Timing(
            decode_ms=timing.decode_ms,
            queue_ms=timing.queue_ms,
            compute_ms=timing.compute_ms,
            total_ms=timing.total_ms,
            batch_rows=tuple(timing.batch_rows),
        ),
        request_id=response.request_id,
    )


def model_info_from(model: pb.Model) -> ModelInfo:
    states = pb.Model.State
    return ModelInfo(
        name=model.name,
        version=model.version,
        state=states.Name(model.state) if model.state in states.values() else str(model.state),
        reason=model.reason,
        architecture=model.architecture,
        trained=model.trained,
        weights=model.weights,
        input_shape=(model.height, model.width, model.channels),
        classes=model.classes,
        top_k=model.top_k,
        max_batch=model.max_batch,
        backend=model.backend,
        precision=model.precision,
        labels=tuple(model.labels),
        version_labels=tuple(model.version_labels),
        activation=model.activation,
        evaluation=_evaluation_from(model.evaluation) if model.HasField("evaluation") else None,
    )


def _evaluation_from(message: pb.Evaluation) -> EvaluationInfo:
    return EvaluationInfo(
        created=message.created,
        data=message.data,
        engine=message.engine,
        images=message.images,
        top1=message.top1,
        top1_low=message.top1_low,
        top1_high=message.top1_high,
        top5=message.top5 if message.HasField("top5") else None,
        calibration_error=message.calibration_error,
    )
