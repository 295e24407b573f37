"""The Open Inference Protocol: Classify for clients that were not written for convserve.

A call's tensor goes to the host as it came, and gets the host's arrays back as they are;
proto/open_inference.proto says what the tensors mean.
"""

from __future__ import annotations

import logging
import math
import struct
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from functools import partial
from importlib import metadata
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from server.api.handlers import Call, InFlightLimits
from server.api.inference import (
    REQUEST_ID_LIMIT,
    Inference,
    best_classes,
    check_request_id,
)
from server.api.stubs import open_inference_pb2 as pb
from server.api.v2.json_tensors import files_from_json, numbers_from_json
from server.api.v2.shared_memory import Regions, Window, WindowRows
from server.engines.base import Outputs, RowSource
from server.errors import InvalidInput, ModelNotFound
from server.images.decode import batch_from_pixels, decode
from server.images.input_spec import Pixels
from server.models.registry import ModelRegistry
from server.models.state import State
from server.models.version import LoadedModel, ModelVersion
from server.models.watcher import RepositoryWatcher
from server.repository.manifest import LABELS_FILE
from server.repository.serving_config import VERSION_LABELS
from server.scheduling.base import PRIORITIES

log = logging.getLogger(__name__)

SERVER = "convserve"
# Triton's names.
MODEL_REPOSITORY = "model_repository"  # served only where callers may load and unload
SHARED_MEMORY = "system_shared_memory"  # served only where regions are
SHARED_MEMORY_METHODS = frozenset(
    f"SystemSharedMemory{action}" for action in ("Status", "Register", "Unregister")
)
EXTENSIONS = (
    *("binary_tensor_data", "classification", "model_configuration", "schedule_policy"),
    "statistics",
)

IMAGE, ENCODED = "image", "encoded"
INPUTS = {IMAGE: "UINT8", ENCODED: "BYTES"}
CLASSES, SCORES, PROBABILITIES = "classes", "scores", "probabilities"
OUTPUTS = {CLASSES: "INT32", SCORES: "FP32", PROBABILITIES: "FP32"}
OUTPUT_BYTES = 4  # of a number of any of them
FINAL = "triton_final_response"  # of an answer in a stream: there is no other to its request
PASSED_OVER = "passed_over"  # of an answer: the input that was not looked at
CLASSIFICATION = "classification"  # the parameter of an output
CLASSIFIABLE = (SCORES, PROBABILITIES)

VERSION_DIGITS = 18  # of a number that fits into 64 bits
NAME_LIMIT = 80  # of a caller's text in an error

# Parameters that would change the meaning of a call; others that nobody here knows are passed over.
REFUSED = {
    "sequence_id": "sequences are not served: images do not depend on each other",
    "sequence_start": "sequences are not served: images do not depend on each other",
    "sequence_end": "sequences are not served: images do not depend on each other",
}
REGION, REGION_OFFSET, REGION_BYTES = (
    f"shared_memory_{part}" for part in ("region", "offset", "byte_size")
)
MOST_U64 = (1 << 64) - 1
INDEX_STATE = {  # Triton's names, of which there are fewer
    State.READY: "READY",
    State.LOADING: "LOADING",
    State.CHECKING: "LOADING",
    State.DRAINING: "UNLOADING",
}

_Tensor = pb.ModelInferRequest.InferInputTensor
_Parameters = Mapping[str, pb.InferParameter]
_Name = pb.ModelMetadataRequest | pb.ModelConfigRequest | pb.ModelStatisticsRequest


class Elements(NamedTuple):
    """Where the elements of the input stand."""

    field: str  # what that is called
    data: bytes | memoryview | Window
    text: bool = False  # JSON, instead of raw bytes


class Wanted(NamedTuple):
    """An output to be answered."""

    name: str
    best: int = 0  # so many classes as texts; 0 is the tensor itself
    window: Window | None = None  # where to put it, instead of into the response


class OpenInference:
    """The methods of inference.GRPCInferenceService; server.api.handlers says how they are called.

    `accepting` says whether the server takes calls; without `regions` there is
    no shared memory, and the methods for it must not be called; `rollout` loads and unloads where
    callers may ask for that.
    """

    def __init__(
        self,
        registry: ModelRegistry,
        inference: Inference,
        accepting: Callable[[], bool],
        intake: InFlightLimits,
        regions: Regions | None = None,
        rollout: RepositoryWatcher | None = None,
    ) -> None:
        self._registry = registry
        self._inference = inference
        self._accepting = accepting
        self._intake = intake
        self._regions = regions
        self._rollout = rollout
        beyond = {SHARED_MEMORY: regions, MODEL_REPOSITORY: rollout}
        self._extensions = (*EXTENSIONS, *(name for name, there in beyond.items() if there))
        self._version = _version_of_server()

    async def ServerLive(self, request: pb.ServerLiveRequest, call: Call) -> pb.ServerLiveResponse:
        return pb.ServerLiveResponse(live=True)

    async def ServerReady(
        self, request: pb.ServerReadyRequest, call: Call
    ) -> pb.ServerReadyResponse:
        return pb.ServerReadyResponse(ready=self._accepting() and self._registry.is_ready)

    async def ModelReady(self, request: pb.ModelReadyRequest, call: Call) -> pb.ModelReadyResponse:
        version = version_or_label("version", request.version)
        try:
            status = self._registry.version(request.name, *version)
        except ModelNotFound:  # Triton's clients ask whether one is there, and expect no error
            return pb.ModelReadyResponse(ready=False)
        return pb.ModelReadyResponse(ready=status.ready_model is not None and self._accepting())

    async def ServerMetadata(
        self, request: pb.ServerMetadataRequest, call: Call
    ) -> pb.ServerMetadataResponse:
        return pb.ServerMetadataResponse(
            name=SERVER, version=self._version, extensions=self._extensions
        )

    async def ModelMetadata(
        self, request: pb.ModelMetadataRequest, call: Call
    ) -> pb.ModelMetadataResponse:
        model = self._named(request, call)
        tensor = pb.ModelMetadataResponse.TensorMetadata
        dimensions = _dimensions(model)
        return pb.ModelMetadataResponse(
            name=model.name,
            versions=[
                str(status.number)
                for status in self._registry.versions()
                if status.model_name == model.name and status.ready_model is not None
            ],
            platform=_platform(model),
            inputs=[
                tensor(name=name, datatype=datatype, shape=[-1, *dimensions[name]])
                for name, datatype in INPUTS.items()
            ],
            outputs=[
                tensor(name=name, datatype=datatype, shape=[-1, *dimensions[name]])
                for name, datatype in OUTPUTS.items()
            ],
        )

    async def ModelInfer(self, request: pb.ModelInferRequest, call: Call) -> pb.ModelInferResponse:
        return await self.infer(request, call)

    async def ModelStreamInfer(
        self, request: pb.ModelInferRequest, call: Call
    ) -> pb.ModelStreamInferResponse:
        call.request_id = request.id
        response = await self.infer(request, call)
        response.parameters[FINAL].bool_param = True
        return pb.ModelStreamInferResponse(infer_response=response)

    async def infer(
        self, request: pb.ModelInferRequest, call: Call, beside: Elements | None = None
    ) -> pb.ModelInferResponse:
        """ModelInfer; `beside` are the elements where the message does not hold them itself."""
        model = self._registry.route(
            request.model_name,
            *version_or_label("model_version", request.model_version),
            request.id,
        )
        call.model, call.version = model.name, model.version_text
        check_request_id("id", request.id)
        windows: list[Window] = []
        try:
            return await self._infer(request, call, model, beside, windows)
        finally:
            for window in windows:
                window.close()

    async def _infer(
        self,
        request: pb.ModelInferRequest,
        call: Call,
        model: LoadedModel,
        beside: Elements | None,
        windows: list[Window],
    ) -> pb.ModelInferResponse:
        """Adds the windows of shared memory that it uses to `windows`."""
        wanted = self._wanted(request.outputs, model, windows)
        priority, timeout_s = _schedule(request.parameters)
        chosen = looked_at(request)
        images, pixels = self._input(request, chosen, model, beside, windows)
        for position, output in enumerate(wanted):
            _check_room(f"outputs[{position}]", output, images, model)
        classified = await self._inference.classify(
            model,
            call,
            images,
            pixels,
            deadline_s=min(call.deadline_s, call.arrived_s + timeout_s),
            priority=priority,
        )
        response = pb.ModelInferResponse(
            model_name=model.name, model_version=model.version_text, id=request.id
        )
        response.parameters["trained"].bool_param = model.manifest.weights.trained
        if len(request.inputs) > 1:
            response.parameters[PASSED_OVER].string_param = request.inputs[1 - chosen].name
        try:
            for output in wanted:
                _add(response, output, classified.answer.outputs, model.labels)
        except InvalidInput:  # it has no place any more where the caller wants it
            classified.spoiled()
            raise
        ended_s = classified.made()
        if log.isEnabledFor(logging.DEBUG):
            log.debug(
                "inferred",
                extra={
                    "model": model.name,
                    "version": model.manifest.version,
                    "images": images,
                    "total_ms": (ended_s - call.arrived_s) * 1e3,
                    "request_id": request.id,
                },
            )
        return response

    async def ModelConfig(
        self, request: pb.ModelConfigRequest, call: Call
    ) -> pb.ModelConfigResponse:
        return pb.ModelConfigResponse(
            config=_config(self._named(request, call), self._inference.max_images)
        )

    async def ModelStatistics(
        self, request: pb.ModelStatisticsRequest, call: Call
    ) -> pb.ModelStatisticsResponse:
        models = self._registry.serving_models()
        if request.name:
            asked = self._named(request, call)
            models = [model for model in models if model.name == asked.name]
            if request.version:
                models = [asked]
        return pb.ModelStatisticsResponse(model_stats=map(_statistics, models))

    async def RepositoryIndex(
        self, request: pb.RepositoryIndexRequest, call: Call
    ) -> pb.RepositoryIndexResponse:
        _check_repository(request.repository_name)
        entry = pb.RepositoryIndexResponse.ModelIndex
        return pb.RepositoryIndexResponse(
            models=[
                entry(
                    name=status.model_name,
                    version=str(status.number),
                    state=INDEX_STATE.get(status.state, "UNAVAILABLE"),
                    reason=_index_reason(status),
                )
                for status in self._registry.versions()
                if status.ready_model is not None or not request.ready
            ]
        )

    async def RepositoryModelLoad(
        self, request: pb.RepositoryModelLoadRequest, call: Call
    ) -> pb.RepositoryModelLoadResponse:
        await self._control(request, allowed=()).load(request.model_name)
        return pb.RepositoryModelLoadResponse()

    async def RepositoryModelUnload(
        self, request: pb.RepositoryModelUnloadRequest, call: Call
    ) -> pb.RepositoryModelUnloadResponse:
        await self._control(request, allowed=("unload_dependents",)).unload(request.model_name)
        return pb.RepositoryModelUnloadResponse()

    def _control(
        self,
        request: pb.RepositoryModelLoadRequest | pb.RepositoryModelUnloadRequest,
        allowed: Sequence[str],
    ) -> RepositoryWatcher:
        """What loads and unloads, where the request may ask for it. Raises InvalidInput."""
        _check_repository(request.repository_name)
        for name in sorted(request.parameters):
            if name not in allowed:
                raise InvalidInput(
                    f"parameters[{name[:NAME_LIMIT]}]",
                    "is not allowed: what a model is stands in its folder of the repository",
                )
        if self._rollout is None:
            raise InvalidInput(
                "model_name",
                "can't be loaded or unloaded by request: that takes a server started with "
                "--model-control explicit",
            )
        return self._rollout

    async def SystemSharedMemoryStatus(
        self, request: pb.SystemSharedMemoryStatusRequest, call: Call
    ) -> pb.SystemSharedMemoryStatusResponse:
        response = pb.SystemSharedMemoryStatusResponse()
        for region in self._shared().status(request.name):
            response.regions[region.name].MergeFrom(
                pb.SystemSharedMemoryStatusResponse.RegionStatus(
                    name=region.name,
                    key=region.key,
                    offset=region.offset,
                    byte_size=region.byte_size,
                )
            )
        return response

    async def SystemSharedMemoryRegister(
        self, request: pb.SystemSharedMemoryRegisterRequest, call: Call
    ) -> pb.SystemSharedMemoryRegisterResponse:
        self._shared().register(request.name, request.key, request.offset, request.byte_size)
        return pb.SystemSharedMemoryRegisterResponse()

    async def SystemSharedMemoryUnregister(
        self, request: pb.SystemSharedMemoryUnregisterRequest, call: Call
    ) -> pb.SystemSharedMemoryUnregisterResponse:
        self._shared().unregister(request.name)
        return pb.SystemSharedMemoryUnregisterResponse()

    def _shared(self) -> Regions:
        assert self._regions is not None, "its methods are served only with regions"
        return self._regions

    def _window(self, field: str, parameters: _Parameters, windows: list[Window]) -> Window | None:
        """The window that the parameters of a tensor name; None where they name none."""
        if REGION not in parameters:
            if half := sorted(parameters.keys() & {REGION_OFFSET, REGION_BYTES}):
                raise InvalidInput(f"{field}[{half[0]}]", f"is given without {REGION}")
            return None
        place = f"{field}[{REGION}]"
        if self._regions is None:
            raise InvalidInput(
                place, "is given; shared memory is not served without --allow-shared-memory"
            )
        if REGION_BYTES not in parameters:
            raise InvalidInput(f"{field}[{REGION_BYTES}]", "is missing")
        byte_size = _number(f"{field}[{REGION_BYTES}]", parameters[REGION_BYTES], 0, MOST_U64)
        offset = 0
        if REGION_OFFSET in parameters:
            offset = _number(f"{field}[{REGION_OFFSET}]", parameters[REGION_OFFSET], 0, MOST_U64)
        name = parameters[REGION].string_param
        windows.append(self._regions.window(place, name, offset, byte_size))
        return windows[-1]

    def _named(self, request: _Name, call: Call) -> LoadedModel:
        """The version asked about. Raises what `ModelRegistry.shown` does."""
        model = self._registry.resolve(request.name, *version_or_label("version", request.version))
        call.model, call.version = model.name, model.version_text
        return model

    def _wanted(
        self,
        outputs: Sequence[pb.ModelInferRequest.InferRequestedOutputTensor],
        model: LoadedModel,
        windows: list[Window],
    ) -> list[Wanted]:
        """What is to be answered, in the order asked; all where nothing is named."""
        if not outputs:
            return [Wanted(name) for name in OUTPUTS]
        wanted: list[Wanted] = []
        for position, output in enumerate(outputs):
            field = f"outputs[{position}]"
            if output.name not in OUTPUTS:
                raise InvalidInput(
                    f"{field}.name",
                    f"is {output.name[:NAME_LIMIT]!r}; {', '.join(OUTPUTS)} are allowed",
                )
            if any(output.name == other.name for other in wanted):
                raise InvalidInput(
                    f"{field}.name", f"is {output.name!r}, which is asked for already"
                )
            parameters = output.parameters
            _refuse_parameters(f"{field}.parameters", parameters)
            best = 0
            if CLASSIFICATION in parameters:
                place = f"{field}.parameters[{CLASSIFICATION}]"
                if output.name not in CLASSIFIABLE:
                    allowed = " or ".join(CLASSIFIABLE)
                    raise InvalidInput(place, f"is asked of {output.name!r}; {allowed} can give it")
                most = model.manifest.top_k if output.name == SCORES else model.manifest.classes
                best = _number(place, parameters[CLASSIFICATION], 1, most)
            window = self._window(f"{field}.parameters", parameters, windows)
            if window is not None and best:
                raise InvalidInput(
                    f"{field}.parameters[{REGION}]",
                    f"is given, and {CLASSIFICATION} too, which goes into the response only",
                )
            wanted.append(Wanted(output.name, best, window))
        return wanted

    def _input(
        self,
        request: pb.ModelInferRequest,
        position: int,
        model: LoadedModel,
        beside: Elements | None,
        windows: list[Window],
    ) -> tuple[int, Callable[[], Awaitable[Pixels | RowSource]]]:
        """How many images a call brings in the input at that position, and what makes their pixels.
        Raises InvalidInput."""
        tensor, field = request.inputs[position], f"inputs[{position}]"
        _refuse_parameters(f"{field}.parameters", tensor.parameters)
        needed = INPUTS[tensor.name]
        if tensor.datatype != needed:
            raise _wrong(tensor, f"{field}.datatype", f"{tensor.datatype[:NAME_LIMIT]!r}", needed)
        shape = tuple(tensor.shape)
        dimensions = _dimensions(model)[tensor.name]
        allowed = (dimensions, ()) if tensor.name == ENCODED else (dimensions,)
        if shape[1:] not in allowed or not shape:
            needed = " or ".join(
                f"[{', '.join(map(str, ('images', *sizes)))}]" for sizes in reversed(allowed)
            )
            raise _wrong(tensor, f"{field}.shape", _brief(shape), needed)
        self._inference.check_count(f"{field}.shape[0]", shape[0])
        window = self._window(f"{field}.parameters", tensor.parameters, windows)
        if window is not None:
            elements: Elements | None = _elements_in(window, request, position, beside)
        else:
            elements = beside or _elements(request, position)
        make = self._from_files if tensor.name == ENCODED else self._from_pixels
        return shape[0], partial(make, tensor, field, elements, model)

    async def _from_pixels(
        self, tensor: _Tensor, place: str, elements: Elements | None, model: LoadedModel
    ) -> Pixels | RowSource:
        count = tensor.shape[0]
        needed = count * math.prod(model.spec.shape)
        if elements is None:
            place = f"{place}.contents"
            _check_only(tensor, place, "uint_contents", needed)
            flat = await self._inference.made(count, _small_numbers, tensor.contents, place)
            return flat.reshape(count, *model.spec.shape)
        field, data, text = elements
        if text:
            assert not isinstance(data, Window)
            shape = tuple(tensor.shape)
            return await self._inference.made(count, numbers_from_json, data, shape, field)
        size = data.byte_size if isinstance(data, Window) else len(data)
        if size != needed:
            raise _wrong_size(field, "bytes", size, tensor, needed)
        if isinstance(data, Window):
            return WindowRows(data, tuple(tensor.shape))
        limits = self._inference.limits  # the array holds the bytes: there is no copy
        return batch_from_pixels(data, count, *model.spec.shape, model.spec, limits, IMAGE)

    async def _from_files(
        self, tensor: _Tensor, place: str, elements: Elements | None, model: LoadedModel
    ) -> Pixels:
        count = tensor.shape[0]
        files: Sequence[bytes]
        if elements is None:
            field = f"{place}.contents.bytes_contents"
            _check_only(tensor, f"{place}.contents", "bytes_contents", count)
            files = tensor.contents.bytes_contents
        else:
            field, data, text = elements
            if isinstance(data, Window):
                return await self._from_lent_files(tensor, field, data, model)
            if text:
                files = files_from_json(data, field, nested=len(tensor.shape) > 1)
                if len(files) != count:
                    raise _wrong_size(field, "elements", len(files), tensor, count)
            else:
                files = _files(data, count, field, tensor)
        work = [
            (index, decode, (file, model.spec, self._inference.limits, f"{field}[{index}]"))
            for index, file in enumerate(files)
        ]
        return await self._inference.decoded([None] * count, work)

    async def _from_lent_files(
        self, tensor: _Tensor, field: str, window: Window, model: LoadedModel
    ) -> Pixels:
        """Files are read whole before they are decoded, and held as if the message had brought
        them."""
        held = 0
        most = tensor.shape[0] * (self._inference.limits.encoded_bytes + 4)
        if window.byte_size > most:
            raise _wrong_size(field, "bytes", window.byte_size, tensor, most, "at most ")
        try:
            held = window.byte_size
            self._intake.hold(held)
            return await self._from_files(tensor, "", Elements(field, window.read()), model)
        finally:
            self._intake.drop(held)


def stream_refusal(call: Call, why: str) -> pb.ModelStreamInferResponse:
    """What a stream answers to a request that failed."""
    request_id = call.request_id if len(call.request_id) <= REQUEST_ID_LIMIT else ""
    return pb.ModelStreamInferResponse(
        error_message=why, infer_response=pb.ModelInferResponse(id=request_id)
    )


def _version_of_server() -> str:
    try:
        return metadata.version(SERVER)
    except metadata.PackageNotFoundError:  # run from its folder
        return "unknown"


def _check_repository(name: str) -> None:
    if name:
        raise InvalidInput(
            "repository_name", "must be empty: there is one repository, and it has no name"
        )


def _index_reason(status: ModelVersion) -> str:
    """The reason, with the state's own name where the index has none for it."""
    if status.state in (State.CHECKING, State.UNLOADED, State.FAILED):
        return f"{status.state.name}: {status.reason}" if status.reason else status.state.name
    return status.reason


def version_or_label(field: str, text: str) -> tuple[int, str]:
    """Version and label as the registry takes them: 0 and "" where none is named. Raises
    InvalidInput."""
    if not text:
        return 0, ""
    if text in VERSION_LABELS:
        return 0, text
    if not (text.isascii() and text.isdecimal() and len(text) <= VERSION_DIGITS and int(text)):
        raise InvalidInput(
            field,
            f"is {text[:NAME_LIMIT]!r}; a whole number from 1 is allowed, "
            f"{' or '.join(VERSION_LABELS)}, "
            "or nothing for the one that answers",
        )
    return int(text), ""


def _platform(model: LoadedModel) -> str:
    return f"{SERVER}_{model.record.backend}"


def _dimensions(model: LoadedModel) -> dict[str, tuple[int, ...]]:
    """Of each tensor, those after the batch."""
    manifest = model.manifest
    return {
        IMAGE: model.spec.shape,
        ENCODED: (1,),  # perf_analyzer takes a tensor without dimensions for none
        CLASSES: (manifest.top_k,),
        SCORES: (manifest.top_k,),
        PROBABILITIES: (manifest.classes,),
    }


def _schedule(parameters: _Parameters) -> tuple[int, float]:
    """The scheduler's priority, and the seconds within which an answer is of use."""
    _refuse_parameters("parameters", parameters)
    priority, timeout_s = 0, math.inf
    if "priority" in parameters:
        urgent = PRIORITIES[-1]
        asked = _number("parameters[priority]", parameters["priority"], 0, urgent)
        # 1 is the most urgent there, the highest is so here; 0 is the usual in both.
        priority = urgent + 1 - asked if asked else 0
    if "timeout" in parameters:
        timeout_us = _number("parameters[timeout]", parameters["timeout"], 0, (1 << 63) - 1)
        timeout_s = timeout_us / 1e6 or math.inf
    return priority, timeout_s


def _number(field: str, parameter: pb.InferParameter, least: int, most: int) -> int:
    kind = parameter.WhichOneof("parameter_choice")
    if kind not in ("int64_param", "uint64_param"):
        raise InvalidInput(field, "must be a whole number, as int64_param or uint64_param")
    value: int = getattr(parameter, kind)
    if not least <= value <= most:
        raise InvalidInput(field, f"is {value}; {least} to {most} is allowed")
    return value


def _refuse_parameters(field: str, names: Iterable[str]) -> None:
    for name in names:
        if name in REFUSED:
            raise InvalidInput(f"{field}[{name}]", REFUSED[name])


def looked_at(request: pb.ModelInferRequest) -> int:
    """The position of the input to classify: the only one, or the pixels where both are there.

    Metadata names both inputs, and clients that fill every input it names, as perf_analyzer does
    with random bytes, would else get nothing but errors. Raises InvalidInput.
    """
    names = [given.name for given in request.inputs]
    for position, name in enumerate(names):
        if name not in INPUTS:
            raise InvalidInput(
                f"inputs[{position}].name",
                f"is {name[:NAME_LIMIT]!r}; {IMAGE} or {ENCODED} is allowed",
            )
    if len(names) == 1:
        return 0
    if sorted(names) != sorted(INPUTS):
        raise InvalidInput(
            "inputs", f"has {len(names)} tensors; one is needed: {IMAGE} or {ENCODED}"
        )
    return names.index(IMAGE)


def _wrong(tensor: _Tensor, field: str, given: str, needed: str) -> InvalidInput:
    return InvalidInput(field, f"of {tensor.name!r} is {given}; {needed} is needed")


def _wrong_size(
    field: str, what: str, given: int, tensor: _Tensor, needed: int, limit: str = ""
) -> InvalidInput:
    shape = list(tensor.shape)
    return InvalidInput(
        field, f"has {given:,} {what}; {tensor.name!r} of shape {shape} needs {limit}{needed:,}"
    )


def _brief(shape: Sequence[int]) -> str:
    """Short enough for an error, whatever came."""
    first = ", ".join(map(str, shape[:8]))
    return f"[{first}{', ...' if len(shape) > 8 else ''}]"


def _check_only(tensor: _Tensor, place: str, field: str, elements: int) -> None:
    """Raises InvalidInput unless the typed contents are so many elements in that field alone."""
    contents = tensor.contents
    for descriptor, _ in contents.ListFields():
        if descriptor.name != field:
            raise InvalidInput(
                f"{place}.{descriptor.name}",
                f"is given; {tensor.name!r} is {tensor.datatype}, which comes in {field}",
            )
    given = len(getattr(contents, field))
    if given != elements:
        raise _wrong_size(f"{place}.{field}", "elements", given, tensor, elements)


def _small_numbers(contents: pb.InferTensorContents, place: str) -> NDArray[np.uint8]:
    """The values of uint_contents, which must be all there is; raises InvalidInput above 255.

    Read from the message's bytes, where a number below 128 is one byte, and one below 256 is that
    byte and a 1: asking for one number after the other holds up all threads four times as long.
    """
    contents.DiscardUnknownFields()  # they would stand there too
    data = contents.SerializeToString()
    begin = 1  # behind the tag stands the length, in bytes of which only the last is below 128
    while data[begin] >= 128:
        begin += 1
    packed = np.frombuffer(data, np.uint8, offset=begin + 1)
    follows = np.zeros(len(packed), np.bool_)
    np.greater_equal(packed[:-1], 128, out=follows[1:])
    if (packed[follows] != 1).any():
        raise InvalidInput(f"{place}.uint_contents", "has a number above 255")
    return packed[~follows]


def _elements(request: pb.ModelInferRequest, position: int) -> Elements | None:
    """The raw elements of an input; None where they are typed. Raises InvalidInput."""
    if not request.raw_input_contents and request.inputs[position].HasField("contents"):
        return None
    holders = _raw_holders(request)
    entry = holders.index(position)
    return Elements(f"raw_input_contents[{entry}]", request.raw_input_contents[entry])


def _raw_holders(request: pb.ModelInferRequest) -> Sequence[int]:
    """The positions of the inputs whose elements are entries of raw_input_contents, in order.

    An input's elements are in one place, and all are typed or all are raw, but for what stands in
    shared memory. Raises InvalidInput, also for an input that is not looked at: what it holds is
    nobody's business, but whose an entry is must be certain.
    """
    raw = len(request.raw_input_contents)
    holders = []
    for index, given in enumerate(request.inputs):
        region, typed = REGION in given.parameters, given.HasField("contents")
        if typed and (region or raw):
            field = f"inputs[{index}].parameters[{REGION}]" if region else "raw_input_contents"
            raise InvalidInput(
                field, f"is given, and the contents of {given.name!r} too; give one of them"
            )
        if not region and not typed:
            holders.append(index)
    if raw == len(holders):
        return holders
    names = " and ".join(repr(request.inputs[index].name) for index in holders)
    needed = (
        "none is needed, all is in shared memory",
        f"one is needed, for {names}",
        f"two are needed, for {names}",
    )[len(holders)]
    raise InvalidInput("raw_input_contents", f"has {raw} entries; {needed}")


def _elements_in(
    window: Window, request: pb.ModelInferRequest, position: int, beside: Elements | None
) -> Elements:
    field = f"inputs[{position}].parameters[{REGION}]"
    if beside is not None:
        name = request.inputs[position].name
        raise InvalidInput(field, f"is given, and the data of {name!r} too; give one of them")
    if request.raw_input_contents or any(given.HasField("contents") for given in request.inputs):
        _raw_holders(request)  # none of them is this input's, but all must have their places
    return Elements(field, window)


def _check_room(field: str, output: Wanted, images: int, model: LoadedModel) -> None:
    """Raises InvalidInput where a tensor will not fit into its window."""
    if output.window is None:
        return
    needed = images * math.prod(_dimensions(model)[output.name]) * OUTPUT_BYTES
    if needed > output.window.byte_size:
        raise InvalidInput(
            f"{field}.parameters[{REGION_BYTES}]",
            f"is {output.window.byte_size:,}; {output.name!r} of {images} images needs {needed:,}",
        )


def _files(data: bytes | memoryview, count: int, field: str, tensor: _Tensor) -> list[bytes]:
    """The elements of a BYTES tensor, each behind its length as four bytes. Raises InvalidInput."""
    found: list[bytes] = []
    position = 0
    while position < len(data) and len(found) <= count:
        begin = position + 4
        if begin > len(data):
            raise InvalidInput(field, f"ends within the length of element {len(found)}")
        (length,) = struct.unpack_from("<I", data, position)
        position = begin + length
        if position > len(data):
            raise InvalidInput(
                field,
                f"has {len(data) - begin:,} bytes left for element {len(found)}; "
                f"its length says {length:,}",
            )
        found.append(bytes(data[begin:position]))
    if len(found) != count:  # one more is enough to know
        raise _wrong_size(field, "or more elements", len(found), tensor, count)
    return found


def _add(
    response: pb.ModelInferResponse, output: Wanted, outputs: Outputs, labels: Sequence[str]
) -> None:
    """Adds a tensor to the response, with its bytes there or in its window."""
    if output.best:
        count = len(outputs.classes)
        data: bytes | memoryview = _texts(outputs, output.best, labels)
        tensor = response.outputs.add(
            name=output.name, datatype="BYTES", shape=(count, output.best)
        )
    else:
        values: NDArray[Any] = np.ascontiguousarray(getattr(outputs, output.name))
        data = values.data.cast("B")
        tensor = response.outputs.add(
            name=output.name, datatype=OUTPUTS[output.name], shape=values.shape
        )
    if output.window is None:
        response.raw_output_contents.append(bytes(data))
        return
    output.window.write(memoryview(data))
    tensor.parameters[REGION].string_param = output.window.name
    tensor.parameters[REGION_OFFSET].int64_param = output.window.offset
    tensor.parameters[REGION_BYTES].int64_param = len(data)
    response.raw_output_contents.append(b"")  # clients count them


def _texts(outputs: Outputs, best: int, labels: Sequence[str]) -> bytes:
    """The best classes of each row as a BYTES tensor of "score:index:label"."""
    if best > outputs.classes.shape[1]:  # more than engines sort
        order = np.argsort(-outputs.probabilities, axis=1, kind="stable")
        classes = order.astype(np.int32)
        scores = np.take_along_axis(outputs.probabilities, classes, axis=1)
        outputs = outputs._replace(classes=classes, scores=scores)
    found = bytearray()
    for row in best_classes(outputs, best):
        for index, score in row:
            text = f"{score:f}:{index}:{labels[index]}".encode()
            found += struct.pack("<I", len(text)) + text
    return bytes(found)


def _config(model: LoadedModel, max_images: int) -> pb.ModelConfig:
    """The configuration, calls bringing up to `max_images`."""
    manifest = model.manifest
    dimensions = _dimensions(model)
    facts = {
        "architecture": manifest.architecture,
        "weights": manifest.weights.source,
        "trained": str(manifest.weights.trained).lower(),
        "precision": model.record.precision,
        "engine_max_batch": str(model.engine.max_batch),
    }
    return pb.ModelConfig(
        name=model.name,
        platform=_platform(model),
        backend=model.record.backend,
        max_batch_size=max_images,
        input=[
            pb.ModelInput(
                name=IMAGE,
                data_type=pb.TYPE_UINT8,
                format=pb.ModelInput.FORMAT_NHWC,
                dims=dimensions[IMAGE],
                optional=True,
            ),
            pb.ModelInput(
                name=ENCODED, data_type=pb.TYPE_STRING, dims=dimensions[ENCODED], optional=True
            ),
        ],
        output=[
            pb.ModelOutput(
                name=name,
                data_type=pb.TYPE_INT32 if datatype == "INT32" else pb.TYPE_FP32,
                dims=dimensions[name],
                label_filename=LABELS_FILE if name in CLASSIFIABLE else "",
            )
            for name, datatype in OUTPUTS.items()
        ],
        dynamic_batching=pb.ModelDynamicBatching(),
        parameters={name: pb.ModelParameter(string_value=value) for name, value in facts.items()},
    )


def _statistics(model: LoadedModel) -> pb.ModelStatistics:
    totals = model.metrics.totals
    decode, queue, compute, respond = (
        _duration(totals.calls, seconds) for seconds in totals.phases_s
    )
    return pb.ModelStatistics(
        name=model.name,
        version=model.version_text,
        last_inference=round(totals.last_s * 1e3),
        inference_count=totals.images,
        execution_count=sum(batches for batches, _ in totals.batches.values()),
        inference_stats=pb.InferStatistics(
            success=_duration(totals.calls, sum(totals.phases_s)),
            fail=_duration(totals.failed_calls, totals.failed_s),
            queue=queue,
            compute_input=decode,
            compute_infer=compute,
            compute_output=respond,
        ),
        batch_stats=[
            pb.InferBatchStatistics(batch_size=rows, compute_infer=_duration(*spent))
            for rows, spent in sorted(totals.batches.items())
        ],
    )


def _duration(count: int, seconds: float) -> pb.StatisticDuration:
    return pb.StatisticDuration(count=count, ns=round(seconds * 1e9))
