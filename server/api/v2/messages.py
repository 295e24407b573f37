"""ModelInfer messages of gRPC <-> the plain values of server.api.v2.tensors."""

from __future__ import annotations

from collections.abc import Awaitable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from server.api.decoders import Decoders
from server.api.stubs import open_inference_pb2 as pb
from server.api.v2.tensors import (
    REGION,
    REGION_BYTES,
    REGION_OFFSET,
    InputTensor,
    OutputRequest,
    OutputTensor,
    Parameter,
    TensorData,
    TensorRequest,
    TensorResponse,
    check_size,
    decode_files,
)
from server.errors import InvalidInput
from server.images.input_spec import InputSpec, Pixels

MAX_DIMENSIONS = 32  # of a shape; a packed field of 8 MiB may have millions


class TypedContents(TensorData):
    """Elements in the typed fields of a message."""

    __slots__ = ("_contents", "_field")

    NOUN = "contents"

    def __init__(self, field: str, contents: pb.InferTensorContents) -> None:
        self._field = field
        self._contents = contents

    def pixels(self, tensor: InputTensor, spec: InputSpec, decoders: Decoders) -> Awaitable[Pixels]:
        return self._read_pixels(tensor, decoders)

    def decode(self, tensor: InputTensor, spec: InputSpec, decoders: Decoders) -> Awaitable[Pixels]:
        self._check("bytes_contents", tensor, tensor.shape[0])
        files = self._contents.bytes_contents
        return decode_files(files, f"{self._field}.bytes_contents", spec, decoders)

    async def _read_pixels(self, tensor: InputTensor, decoders: Decoders) -> Pixels:
        self._check("uint_contents", tensor, int(np.prod(tensor.shape, dtype=object)))
        flat = await decoders.batch(tensor.shape[0], small_numbers, self._contents, self._field)
        return flat.reshape(tensor.shape)

    def _check(self, name: str, tensor: InputTensor, elements: int) -> None:
        """Raises InvalidInput unless exactly that field is set, with that many elements."""
        for descriptor, _ in self._contents.ListFields():
            if descriptor.name != name:
                raise InvalidInput(
                    f"{self._field}.{descriptor.name}",
                    f"is given; {tensor.name!r} is {tensor.datatype}, which comes in {name}",
                )
        given = len(getattr(self._contents, name))
        check_size(f"{self._field}.{name}", "elements", given, tensor, elements)


def tensor_request(message: pb.ModelInferRequest) -> TensorRequest:
    return TensorRequest(
        message.model_name,
        message.model_version,
        message.id,
        _plain_parameters(message.parameters),
        [_input(f"inputs[{index}]", tensor) for index, tensor in enumerate(message.inputs)],
        [
            OutputRequest(output.name, _plain_parameters(output.parameters))
            for output in message.outputs
        ],
        message.raw_input_contents,
    )


def infer_response(response: TensorResponse) -> pb.ModelInferResponse:
    model = response.inference.model
    message = pb.ModelInferResponse(
        model_name=model.name,
        model_version=model.version_text,
        id=response.inference.request_id,
    )
    for name, value in response.parameters.items():
        _set_parameter(message.parameters[name], value)
    for output in response.outputs:
        _add_output(message, output)
    return message


def small_numbers(contents: pb.InferTensorContents, field: str) -> NDArray[np.uint8]:
    """The values of uint_contents, the only field that is set. Raises InvalidInput above 255.

    Reads the message's bytes: a number below 128 is one byte, and one below 256 is that byte and a
    1. Reading the numbers one by one would hold up all threads four times as long.
    """
    contents.DiscardUnknownFields()  # otherwise their bytes would follow
    data = contents.SerializeToString()
    begin = 1  # the length follows the tag; only its last byte is below 128
    while data[begin] >= 128:
        begin += 1
    packed = np.frombuffer(data, np.uint8, offset=begin + 1)
    is_second = np.zeros(len(packed), np.bool_)
    np.greater_equal(packed[:-1], 128, out=is_second[1:])
    if (packed[is_second] != 1).any():
        raise InvalidInput(f"{field}.uint_contents", "has a number above 255")
    return packed[~is_second]


def _input(field: str, tensor: pb.ModelInferRequest.InferInputTensor) -> InputTensor:
    data = None
    if tensor.HasField("contents"):
        data = TypedContents(f"{field}.contents", tensor.contents)
    shape = tuple(tensor.shape[: MAX_DIMENSIONS + 1])  # one too many is enough to know
    return InputTensor(
        tensor.name, tensor.datatype, shape, _plain_parameters(tensor.parameters), data
    )


def _plain_parameters(parameters: Mapping[str, pb.InferParameter]) -> dict[str, Parameter]:
    return {name: _plain(parameter) for name, parameter in parameters.items()}


def _plain(parameter: pb.InferParameter) -> Parameter:
    kind = parameter.WhichOneof("parameter_choice")
    value: Parameter = getattr(parameter, kind) if kind else ""
    return value


def _set_parameter(parameter: pb.InferParameter, value: Parameter) -> None:
    if isinstance(value, bool):
        parameter.bool_param = value
    elif isinstance(value, int):
        parameter.int64_param = value
    elif isinstance(value, float):
        parameter.double_param = value
    else:
        parameter.string_param = value


def _add_output(message: pb.ModelInferResponse, output: OutputTensor) -> None:
    tensor = message.outputs.add(name=output.name, datatype=output.datatype, shape=output.shape)
    # Clients expect one entry for each output, an empty one for shared memory.
    message.raw_output_contents.append(output.raw() if output.region is None else b"")
    if output.region is not None:
        parameters: Sequence[tuple[str, Parameter]] = (
            (REGION, output.region.name),
            (REGION_OFFSET, output.region.offset),
            (REGION_BYTES, output.region.byte_size),
        )
        for name, value in parameters:
            _set_parameter(tensor.parameters[name], value)
