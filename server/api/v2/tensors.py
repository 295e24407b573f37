"""Requests and responses of the Open Inference Protocol in plain values, for gRPC and REST."""

from __future__ import annotations

import math
import struct
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from server.api.decode_time import Data
from server.api.decoders import Decoders, Work
from server.api.inference import InferenceResponse
from server.api.v2.versions import MAX_QUOTED
from server.engines.base import RowSource
from server.errors import InvalidInput
from server.images.decode import decode
from server.images.input_spec import InputSpec, Pixels
from server.models.version import LoadedModel

IMAGE, ENCODED = "image", "encoded"
INPUTS = {IMAGE: "UINT8", ENCODED: "BYTES"}
CLASSES, SCORES, PROBABILITIES = "classes", "scores", "probabilities"
OUTPUTS = {CLASSES: "INT32", SCORES: "FP32", PROBABILITIES: "FP32"}
ELEMENT_BYTES = 4  # of every output

# Parameters of tensors (Triton's names).
REGION = "shared_memory_region"
REGION_OFFSET = "shared_memory_offset"
REGION_BYTES = "shared_memory_byte_size"

# These parameters would change the meaning of a request. Other unknown ones are ignored.
NO_SEQUENCES = "sequences are not served: images do not depend on each other"
REFUSED_PARAMETERS = {
    "sequence_id": NO_SEQUENCES,
    "sequence_start": NO_SEQUENCES,
    "sequence_end": NO_SEQUENCES,
}

Parameter = bool | int | float | str
Parameters = Mapping[str, Parameter]


class TensorData(ABC):
    """Elements of one input, in the form that its protocol uses."""

    __slots__ = ()

    NOUN = "data"  # its name in errors

    def thread_work(self, *, is_encoded: bool) -> Sequence[Data]:
        """The data that threads must decode to make the pixels; empty if there is none."""
        return ()

    @abstractmethod
    def pixels(
        self, tensor: InputTensor, spec: InputSpec, decoders: Decoders
    ) -> Pixels | RowSource | Awaitable[Pixels | RowSource]:
        """The rows of an `image` tensor, whose shape is checked. Raises InvalidInput."""

    @abstractmethod
    def decode(self, tensor: InputTensor, spec: InputSpec, decoders: Decoders) -> Awaitable[Pixels]:
        """The rows of an `encoded` tensor, whose shape is checked. Raises InvalidInput."""


@dataclass(slots=True)
class InputTensor:
    """An input. Its data is None if it is in shared memory or in the request's raw contents."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    parameters: Parameters
    data: TensorData | None = None


class OutputRequest(NamedTuple):
    """An output that a request asks for."""

    name: str
    parameters: Parameters


@dataclass(slots=True)
class TensorRequest:
    """A ModelInfer request."""

    model: str
    version: str
    request_id: str
    parameters: Parameters
    inputs: Sequence[InputTensor]
    outputs: Sequence[OutputRequest]
    raw_contents: Sequence[bytes] = ()  # data of the inputs without contents, in order


class RegionPart(NamedTuple):
    """The place of an output in shared memory."""

    name: str
    offset: int
    byte_size: int


@dataclass(slots=True)
class OutputTensor:
    """An output: numbers, texts, or the place in shared memory where its elements are now."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    elements: NDArray[Any] | Sequence[str] = ()
    region: RegionPart | None = None

    def raw(self) -> bytes:
        """The elements as little-endian bytes; each text follows its length in four bytes."""
        if isinstance(self.elements, np.ndarray):
            return self.elements.tobytes()
        packed = bytearray()
        for text in self.elements:
            encoded = text.encode()
            packed += struct.pack("<I", len(encoded)) + encoded
        return bytes(packed)

    def flat(self) -> list[Any]:
        """The elements one by one."""
        if isinstance(self.elements, np.ndarray):
            flat: list[Any] = self.elements.reshape(-1).tolist()
            return flat
        return list(self.elements)


@dataclass(slots=True)
class TensorResponse:
    """The response to a TensorRequest."""

    inference: InferenceResponse
    outputs: Sequence[OutputTensor]
    parameters: dict[str, Parameter] = field(default_factory=dict)


class RawData(TensorData):
    """Bytes of the elements, without gaps; each file follows its length in four bytes."""

    __slots__ = ("_bytes", "_field")

    def __init__(self, field: str, data: bytes | memoryview) -> None:
        self._field = field
        self._bytes = data

    def thread_work(self, *, is_encoded: bool) -> Sequence[Data]:
        return (self._bytes,) if is_encoded else ()

    def pixels(self, tensor: InputTensor, spec: InputSpec, decoders: Decoders) -> Pixels:
        check_size(self._field, "bytes", len(self._bytes), tensor, math.prod(tensor.shape))
        return np.frombuffer(self._bytes, np.uint8).reshape(tensor.shape)

    def decode(self, tensor: InputTensor, spec: InputSpec, decoders: Decoders) -> Awaitable[Pixels]:
        files = split_files(self._bytes, self._field, tensor)
        return decode_files(files, self._field, spec, decoders)


async def decode_files(
    files: Sequence[bytes], field: str, spec: InputSpec, decoders: Decoders
) -> Pixels:
    """[N, H, W, C] from image files. Raises InvalidInput, Overloaded."""
    work: list[Work] = [
        (index, decode, (file, spec, decoders.limits, f"{field}[{index}]"))
        for index, file in enumerate(files)
    ]
    return await decoders.rows([None] * len(files), work)


def split_files(data: bytes | memoryview, field: str, tensor: InputTensor) -> list[bytes]:
    """The elements of a BYTES tensor. Raises InvalidInput."""
    count = tensor.shape[0]
    files: list[bytes] = []
    position = 0
    while position < len(data) and len(files) <= count:  # one too many is enough to know
        begin = position + 4
        if begin > len(data):
            raise InvalidInput(field, f"ends within the length of element {len(files)}")
        (length,) = struct.unpack_from("<I", data, position)
        position = begin + length
        if position > len(data):
            raise InvalidInput(
                field,
                f"has {len(data) - begin:,} bytes left for element {len(files)}; "
                f"its length says {length:,}",
            )
        files.append(bytes(data[begin:position]))
    check_size(field, "or more elements", len(files), tensor, count)
    return files


def check_size(field: str, unit: str, given: int, tensor: InputTensor, needed: int) -> None:
    """Raises InvalidInput unless a tensor has as many bytes or elements as it needs."""
    if given != needed:
        raise InvalidInput(
            field,
            f"has {given:,} {unit}; {tensor.name!r} of shape {list(tensor.shape)} needs {needed:,}",
        )


def dimensions(model: LoadedModel) -> dict[str, tuple[int, ...]]:
    """The dimensions of each tensor after the batch."""
    manifest = model.manifest
    return {
        IMAGE: model.spec.shape,
        ENCODED: (1,),  # perf_analyzer ignores a tensor without dimensions
        CLASSES: (manifest.top_k,),
        SCORES: (manifest.top_k,),
        PROBABILITIES: (manifest.classes,),
    }


def whole_number(field: str, value: Parameter, least: int, most: int) -> int:
    """A parameter that must be a whole number. Raises InvalidInput."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise InvalidInput(field, "must be a whole number, as int64_param or uint64_param")
    if not least <= value <= most:
        raise InvalidInput(field, f"is {value}; {least} to {most} is allowed")
    return value


def refuse_parameters(field: str, names: Iterable[str]) -> None:
    """Raises InvalidInput for a parameter that would change the meaning of the request."""
    for name in names:
        if name in REFUSED_PARAMETERS:
            raise InvalidInput(f"{field}[{name}]", REFUSED_PARAMETERS[name])


def input_to_classify(names: Sequence[str]) -> int:
    """The position of the input to classify. If there are two, this is `image`.

    Metadata names both inputs. Clients such as perf_analyzer fill every input that it names, with
    random bytes, and would only get errors otherwise. Raises InvalidInput.
    """
    for position, name in enumerate(names):
        if name not in INPUTS:
            raise InvalidInput(
                f"inputs[{position}].name",
                f"is {name[:MAX_QUOTED]!r}; {IMAGE} or {ENCODED} is allowed",
            )
    if len(names) == 1:
        return 0
    if sorted(names) != sorted(INPUTS):
        raise InvalidInput(
            "inputs", f"has {len(names)} tensors; one is needed: {IMAGE} or {ENCODED}"
        )
    return names.index(IMAGE)
