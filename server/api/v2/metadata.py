"""Metadata of the server and its models, as the Open Inference Protocol and Triton define them.

All values are plain: gRPC makes messages of the same fields from them, REST makes JSON.
"""

from __future__ import annotations

from importlib import metadata

from msgspec import Struct

from server.api.context import CallContext
from server.api.rpc.health import ServingState
from server.api.v2.outputs import CLASSIFIABLE
from server.api.v2.tensors import ENCODED, IMAGE, INPUTS, OUTPUTS, dimensions
from server.api.v2.versions import parse_version
from server.api.visible_models import VisibleModels
from server.errors import InvalidInput, ModelNotFound
from server.models.state import State
from server.models.version import LoadedModel, ModelVersion
from server.repository.manifest import LABELS_FILE

SERVER = "convserve"
# Triton's names of extensions.
MODEL_REPOSITORY = "model_repository"  # only if callers may load and unload models
SHARED_MEMORY = "system_shared_memory"  # only if shared memory is served
EXTENSIONS = (
    *("binary_tensor_data", "classification", "model_configuration", "schedule_policy"),
    "statistics",
)
INDEX_STATE = {  # Triton has fewer states
    State.READY: "READY",
    State.LOADING: "LOADING",
    State.CHECKING: "LOADING",
    State.DRAINING: "UNLOADING",
}
DATA_TYPE = {"UINT8": "TYPE_UINT8", "BYTES": "TYPE_STRING", "INT32": "TYPE_INT32"}


class ServerMetadata(Struct):
    name: str
    version: str
    extensions: list[str]


class TensorMetadata(Struct):
    name: str
    datatype: str
    shape: list[int]


class ModelMetadata(Struct):
    name: str
    versions: list[str]
    platform: str
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]


class ModelInput(Struct):
    name: str
    data_type: str
    format: str
    dims: list[int]
    optional: bool


class ModelOutput(Struct):
    name: str
    data_type: str
    dims: list[int]
    label_filename: str


class DynamicBatching(Struct):
    """Its presence means that requests share batches."""


class ConfigParameter(Struct):
    string_value: str


class ModelConfig(Struct):
    name: str
    platform: str
    max_batch_size: int
    input: list[ModelInput]
    output: list[ModelOutput]
    dynamic_batching: DynamicBatching
    parameters: dict[str, ConfigParameter]
    backend: str


class Duration(Struct):
    count: int
    ns: int


class PhaseStatistics(Struct):
    success: Duration
    fail: Duration
    queue: Duration
    compute_input: Duration
    compute_infer: Duration
    compute_output: Duration


class BatchStatistics(Struct):
    batch_size: int
    compute_infer: Duration


class ModelStatistics(Struct):
    name: str
    version: str
    last_inference: int
    inference_count: int
    execution_count: int
    inference_stats: PhaseStatistics
    batch_stats: list[BatchStatistics]


class IndexEntry(Struct):
    name: str
    version: str
    state: str
    reason: str


class Metadata:
    """Answers questions about the server and its models. Used on the event loop's thread only."""

    def __init__(
        self,
        models: VisibleModels,
        state: ServingState,
        *,
        max_images: int,
        has_shared_memory: bool = False,
        has_model_control: bool = False,
    ) -> None:
        self._models = models
        self._state = state
        self._max_images = max_images
        self._server = ServerMetadata(
            SERVER,
            _server_version(),
            [
                *EXTENSIONS,
                *([SHARED_MEMORY] if has_shared_memory else []),
                *([MODEL_REPOSITORY] if has_model_control else []),
            ],
        )

    def server(self) -> ServerMetadata:
        return self._server

    def is_ready(self) -> bool:
        """Whether loading has finished, some model answers, and the server is not stopping."""
        return self._state.is_accepting and self._models.is_ready

    def is_model_ready(self, name: str, version: str, context: CallContext) -> bool:
        """Whether a model answers. An unknown one is no error: Triton's clients ask for it."""
        choice = parse_version("version", version)
        try:
            found = self._models.version(context.caller.principal, name, *choice)
        except ModelNotFound:
            return False
        return found.ready_model is not None and self._state.is_accepting

    def model(self, name: str, version: str, context: CallContext) -> ModelMetadata:
        model = self._loaded(name, version, context)
        sizes = dimensions(model)
        return ModelMetadata(
            model.name,
            [
                str(known.number)
                for known in self._models.versions(context.caller.principal)
                if known.model_name == model.name and known.ready_model is not None
            ],
            _platform(model),
            [TensorMetadata(tensor, kind, [-1, *sizes[tensor]]) for tensor, kind in INPUTS.items()],
            [
                TensorMetadata(tensor, kind, [-1, *sizes[tensor]])
                for tensor, kind in OUTPUTS.items()
            ],
        )

    def config(self, name: str, version: str, context: CallContext) -> ModelConfig:
        return _config(self._loaded(name, version, context), self._max_images)

    def statistics(self, name: str, version: str, context: CallContext) -> list[ModelStatistics]:
        """Of one version, of all versions of a model, or of all models if no name is given."""
        models = self._models.serving_models(context.caller.principal)
        if name:
            chosen = self._loaded(name, version, context)
            models = [model for model in models if model.name == chosen.name]
            if version:
                models = [chosen]
        return [_statistics(model) for model in models]

    def index(
        self, repository_name: str, context: CallContext, *, only_ready: bool
    ) -> list[IndexEntry]:
        """Every version that the caller sees. Raises InvalidInput for a repository name."""
        check_repository(repository_name)
        return [
            IndexEntry(
                version.model_name,
                str(version.number),
                INDEX_STATE.get(version.state, "UNAVAILABLE"),
                _index_reason(version),
            )
            for version in self._models.versions(context.caller.principal)
            if version.ready_model is not None or not only_ready
        ]

    def _loaded(self, name: str, version: str, context: CallContext) -> LoadedModel:
        """The version that a question is about. Raises as the registry does."""
        choice = parse_version("version", version)
        model = self._models.resolve(context.caller.principal, name, *choice)
        context.set_model(model.name, model.version_text)
        return model


def check_repository(name: str) -> None:
    """Raises InvalidInput for a repository name."""
    if name:
        raise InvalidInput(
            "repository_name", "must be empty: there is one repository, and it has no name"
        )


def _server_version() -> str:
    try:
        return metadata.version(SERVER)
    except metadata.PackageNotFoundError:  # not installed, started from the source tree
        return "unknown"


def _platform(model: LoadedModel) -> str:
    return f"{SERVER}_{model.record.backend}"


def _index_reason(version: ModelVersion) -> str:
    """The reason. It begins with the name of the state if Triton has no such state."""
    if version.state in (State.CHECKING, State.UNLOADED, State.FAILED):
        name = version.state.name
        return f"{name}: {version.reason}" if version.reason else name
    return version.reason


def _config(model: LoadedModel, max_images: int) -> ModelConfig:
    manifest = model.manifest
    sizes = dimensions(model)
    facts = {
        "architecture": manifest.architecture,
        "weights": manifest.weights.source,
        "trained": str(manifest.weights.trained).lower(),
        "precision": model.record.precision,
        "activation": manifest.activation,
        "engine_max_batch": str(model.engine.max_batch),
    }
    formats = {IMAGE: "FORMAT_NHWC", ENCODED: "FORMAT_NONE"}
    return ModelConfig(
        name=model.name,
        platform=_platform(model),
        max_batch_size=max_images,
        input=[
            ModelInput(name, DATA_TYPE[kind], formats[name], [*sizes[name]], optional=True)
            for name, kind in INPUTS.items()
        ],
        output=[
            ModelOutput(
                name,
                DATA_TYPE.get(kind, "TYPE_FP32"),
                [*sizes[name]],
                LABELS_FILE if name in CLASSIFIABLE else "",
            )
            for name, kind in OUTPUTS.items()
        ],
        dynamic_batching=DynamicBatching(),
        parameters={name: ConfigParameter(value) for name, value in facts.items()},
        backend=model.record.backend,
    )


def _statistics(model: LoadedModel) -> ModelStatistics:
    totals = model.metrics.totals
    decode, queue, compute, respond = (
        _duration(totals.calls, seconds) for seconds in totals.phases_s
    )
    return ModelStatistics(
        name=model.name,
        version=model.version_text,
        last_inference=round(totals.last_s * 1e3),
        inference_count=totals.images,
        execution_count=sum(batches for batches, _ in totals.batches.values()),
        inference_stats=PhaseStatistics(
            success=_duration(totals.calls, sum(totals.phases_s)),
            fail=_duration(totals.failed_calls, totals.failed_s),
            queue=queue,
            compute_input=decode,
            compute_infer=compute,
            compute_output=respond,
        ),
        batch_stats=[
            BatchStatistics(rows, _duration(*spent))
            for rows, spent in sorted(totals.batches.items())
        ],
    )


def _duration(count: int, seconds: float) -> Duration:
    return Duration(count, round(seconds * 1e9))
