"""The messages of the Open Inference Protocol as JSON, with Triton's binary tensors behind it.

A request for inference becomes the message that gRPC would have brought, its elements beside it; an
answer is written from the message that gRPC would send. So both protocols mean the same.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import msgspec
import numpy as np
from google.protobuf.message import Message

from server.api.stubs import open_inference_pb2 as pb
from server.api.v2.service import (
    OUTPUTS,
    REGION,
    Elements,
    looked_at,
)
from server.errors import InvalidInput

BINARY_SIZE = "binary_data_size"  # parameters of the protocol, of tensors
BINARY = "binary_data"
BINARY_OUTPUT = "binary_data_output"  # and of a call

SHAPE_BYTES = 256  # of a shape as JSON; an honest one is shorter
TYPES = {"INT32": np.dtype("<i4"), "FP32": np.dtype("<f4")}

Parameter = bool | int | float | str


class InputTensor(msgspec.Struct):
    """An input, its shape and its elements as they came."""

    name: str
    datatype: str
    shape: msgspec.Raw
    parameters: dict[str, Parameter] = {}
    data: msgspec.Raw = msgspec.Raw()


class OutputTensor(msgspec.Struct):
    """An output asked for."""

    name: str
    parameters: dict[str, Parameter] = {}


class InferRequest(msgspec.Struct):
    """The JSON of a call."""

    inputs: list[InputTensor]
    id: str = ""
    parameters: dict[str, Parameter] = {}
    outputs: list[OutputTensor] = []


class Inferring(NamedTuple):
    """A call, as `OpenInference.infer` takes it."""

    request: pb.ModelInferRequest
    elements: Elements | None
    binary: frozenset[str]  # outputs to be sent as bytes


_REQUEST = msgspec.json.Decoder(InferRequest)


def decoded(decoder: msgspec.json.Decoder[Any], text: bytes | memoryview) -> Any:
    """What the text is, for a type of msgspec's. Raises InvalidInput, naming the field."""
    try:
        return decoder.decode(text)
    except msgspec.ValidationError as error:
        what, _, path = str(error).partition(" - at `")
        raise InvalidInput(path.rstrip("`").removeprefix("$.") or "body", what) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidInput("body", str(error)) from None
    except RecursionError:
        raise InvalidInput("body", "is JSON nested too deep") from None


def infer_request(
    model: str, version: str, body: bytes, header_bytes: int, max_fields: int
) -> Inferring:
    """The call in a body, of which the first `header_bytes` are JSON. Raises InvalidInput."""
    view = memoryview(body)
    text, binary = view[:header_bytes], view[header_bytes:]
    # Each costs some hundred bytes of memory and a fifth of a microsecond on the event loop.
    objects, quotes = body.count(b"{", 0, header_bytes), body.count(b'"', 0, header_bytes)
    if objects > max_fields or quotes > 4 * max_fields:
        raise InvalidInput("body", f"has more than {max_fields:,} fields; no request needs as many")
    asked: InferRequest = decoded(_REQUEST, text)
    try:
        request = pb.ModelInferRequest(
            model_name=model,
            model_version=version,
            id=asked.id,
            parameters=_parameters("parameters", asked.parameters),
        )
        for index, tensor in enumerate(asked.inputs):
            request.inputs.add(
                name=tensor.name,
                datatype=tensor.datatype,
                shape=_shape(f"inputs[{index}].shape", tensor.shape),
                parameters=_parameters(f"inputs[{index}].parameters", tensor.parameters),
            )
        for index, output in enumerate(asked.outputs):
            request.outputs.add(
                name=output.name,
                parameters=_parameters(f"outputs[{index}].parameters", output.parameters),
            )
    except (ValueError, UnicodeError) as error:  # half of a surrogate pair in a text
        raise InvalidInput("body", str(error)) from None
    return Inferring(request, _elements(request, asked.inputs, binary), _wanted_as_bytes(asked))


def infer_response(response: pb.ModelInferResponse, binary: frozenset[str]) -> tuple[bytes, int]:
    """The body of an answer, and how many of its bytes are JSON."""
    tensors, behind = [], []
    for output, raw in zip(response.outputs, response.raw_output_contents, strict=True):
        tensor: dict[str, Any] = {
            "name": output.name,
            "datatype": output.datatype,
            "shape": list(output.shape),
        }
        if REGION in output.parameters:
            pass  # Triton's clients take an output that has parameters for a binary one
        elif output.name in binary:
            tensor["parameters"] = {BINARY_SIZE: len(raw)}
            behind.append(raw)
        else:
            tensor["data"] = list(_elements_of(output.datatype, raw))
        tensors.append(tensor)
    answer: dict[str, Any] = {
        "model_name": response.model_name,
        "model_version": response.model_version,
    }
    if response.id:
        answer["id"] = response.id
    answer["parameters"] = {name: _value(value) for name, value in response.parameters.items()}
    answer["outputs"] = tensors
    header = msgspec.json.encode(answer)
    return b"".join([header, *behind]), len(header)


def plain(message: Message) -> dict[str, Any]:
    """A message for JSON with the names of its fields, numbers as numbers; absent parts are left
    out. (Protobuf's own JSON has whole numbers of 64 bits as texts, which Triton's has not.)"""
    found: dict[str, Any] = {}
    for field in message.DESCRIPTOR.fields:
        value = getattr(message, field.name)
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            found[field.name] = {
                key: plain(part) if isinstance(part, Message) else part
                for key, part in value.items()
            }
        elif field.is_repeated:
            found[field.name] = [_plain(field, part) for part in value]
        elif not field.has_presence or message.HasField(field.name):
            found[field.name] = _plain(field, value)
    return found


def _plain(field: Any, value: Any) -> Any:
    if field.message_type is not None:
        return plain(value)
    if field.enum_type is not None:
        return field.enum_type.values_by_number[value].name
    return value


def _shape(field: str, text: msgspec.Raw) -> list[int]:
    given = bytes(text)
    if len(given) <= SHAPE_BYTES:
        try:
            shape = msgspec.json.decode(given, type=list[int])
        except msgspec.ValidationError:
            pass
        else:
            if all(-(1 << 63) <= size < 1 << 63 for size in shape):
                return shape
    raise InvalidInput(field, "must be an array of a few whole numbers")


def _parameters(field: str, given: Mapping[str, Parameter]) -> dict[str, pb.InferParameter]:
    return {name: _parameter(f"{field}[{name[:80]}]", value) for name, value in given.items()}


def _parameter(field: str, value: Parameter) -> pb.InferParameter:
    if isinstance(value, bool):
        return pb.InferParameter(bool_param=value)
    if isinstance(value, float):
        return pb.InferParameter(double_param=value)
    if isinstance(value, str):
        return pb.InferParameter(string_param=value)
    if -(1 << 63) <= value < 1 << 63:
        return pb.InferParameter(int64_param=value)
    if 0 <= value < 1 << 64:
        return pb.InferParameter(uint64_param=value)
    raise InvalidInput(field, "is a number of more than 64 bits")


def _value(parameter: pb.InferParameter) -> Parameter:
    kind = parameter.WhichOneof("parameter_choice")
    value: Parameter = getattr(parameter, kind) if kind else ""
    return value


def _elements(
    request: pb.ModelInferRequest, inputs: list[InputTensor], binary: memoryview
) -> Elements | None:
    """Where the elements of the input to classify are; None where none are beside the message.

    Each input's bytes stand behind those of the one before it. Raises InvalidInput.
    """
    try:
        chosen = looked_at(request)
    except InvalidInput:
        return None  # for the service to say, once it has found the model
    found: Elements | None = None
    left = binary
    for index, tensor in enumerate(inputs):
        size = tensor.parameters.get(BINARY_SIZE)
        field = f"inputs[{index}].parameters[{BINARY_SIZE}]"
        last = index == len(inputs) - 1
        data = memoryview(tensor.data)
        elements: Elements | None = None
        if size is None:
            if last and left:
                raise InvalidInput(field, f"is missing; {len(left):,} bytes stand behind the JSON")
            if data:
                elements = Elements(f"inputs[{index}].data", data, text=True)
            elif index == chosen and REGION not in tensor.parameters:
                raise InvalidInput(f"inputs[{index}].data", f"of {tensor.name!r} is missing")
        elif data:
            raise InvalidInput(field, "is given, and data too; give one of them")
        else:
            if (
                not isinstance(size, int)
                or isinstance(size, bool)
                or not 0 <= size <= len(left)
                or (last and size < len(left))
            ):
                behind = f"{len(left):,} bytes stand behind the JSON"
                raise InvalidInput(field, f"is {size!r}; {behind}{' for it' if index else ''}")
            elements = Elements(f"inputs[{index}]", left[:size])
            left = left[size:]
        if index == chosen:
            found = elements
    return found


def _wanted_as_bytes(asked: InferRequest) -> frozenset[str]:
    usual = _switch("parameters", asked.parameters, BINARY_OUTPUT, False)
    if not asked.outputs:
        return frozenset(OUTPUTS) if usual else frozenset()
    return frozenset(
        output.name
        for index, output in enumerate(asked.outputs)
        if _switch(f"outputs[{index}].parameters", output.parameters, BINARY, usual)
    )


def _switch(field: str, parameters: Mapping[str, Parameter], name: str, usual: bool) -> bool:
    value = parameters.get(name, usual)
    if not isinstance(value, bool):
        raise InvalidInput(f"{field}[{name}]", "must be true or false")
    return value


def _elements_of(datatype: str, raw: bytes) -> Iterator[Any]:
    """The elements of a tensor as JSON has them, one after the other."""
    if datatype in TYPES:
        yield from np.frombuffer(raw, TYPES[datatype]).tolist()
        return
    position = 0
    while position < len(raw):
        (length,) = struct.unpack_from("<I", raw, position)
        position += 4 + length
        yield raw[position - length : position].decode()
