"""Inference requests and responses of REST: JSON, with Triton's binary tensors after it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import msgspec

from server.api.v2.json_tensors import JsonData
from server.api.v2.tensors import (
    OUTPUTS,
    REGION,
    InputTensor,
    OutputRequest,
    Parameter,
    RawData,
    TensorRequest,
    TensorResponse,
    input_to_classify,
)
from server.api.v2.versions import MAX_QUOTED
from server.errors import InvalidInput

BINARY_SIZE = "binary_data_size"  # parameter of a tensor
BINARY = "binary_data"  # parameter of a requested output
BINARY_OUTPUT = "binary_data_output"  # parameter of a request

# Decoding holds up the event loop by 2 ns a byte. An image of 20 MiB in base64 fits, and so do 53
# images of 224 x 224 as numbers.
MAX_JSON_BYTES = 32 << 20
MAX_SHAPE_BYTES = 256  # of a shape in JSON; real ones are shorter

NULL = b"null"

# Clients that fill every field of a class, such as KServe's, send null for a field that is absent.
GivenParameters = dict[str, Parameter | None] | None


class JsonInput(msgspec.Struct):
    """An input; its shape and its data are still JSON."""

    name: str
    datatype: str
    shape: msgspec.Raw
    parameters: GivenParameters = None
    data: msgspec.Raw = msgspec.Raw()


class JsonOutput(msgspec.Struct):
    """An output that the request asks for."""

    name: str
    parameters: GivenParameters = None


class JsonRequest(msgspec.Struct):
    """The JSON part of a request."""

    inputs: list[JsonInput]
    id: str | None = None
    parameters: GivenParameters = None
    outputs: list[JsonOutput] | None = None


class DecodedRequest(NamedTuple):
    """A request, and the names of the outputs that its response has as binary data."""

    request: TensorRequest
    binary_outputs: frozenset[str]


_REQUEST = msgspec.json.Decoder(JsonRequest)


def decode_json(decoder: msgspec.json.Decoder[Any], text: bytes | memoryview) -> Any:
    """Decodes JSON to a type of msgspec. Raises InvalidInput, naming the field."""
    try:
        return decoder.decode(text)
    except msgspec.ValidationError as error:
        message, _, path = str(error).partition(" - at `")
        raise InvalidInput(path.rstrip("`").removeprefix("$.") or "body", message) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidInput("body", str(error)) from None
    except RecursionError:
        raise InvalidInput("body", "is JSON nested too deep") from None


def decode_request(
    model: str, version: str, body: bytes, json_bytes: int, max_fields: int
) -> DecodedRequest:
    """Decodes a body whose first `json_bytes` are JSON. Raises InvalidInput."""
    if json_bytes > MAX_JSON_BYTES:
        raise InvalidInput(
            "body",
            f"has {json_bytes:,} bytes of JSON; at most {MAX_JSON_BYTES:,} are allowed: send large "
            "tensors as binary data after the JSON",
        )
    view = memoryview(body)
    text, binary = view[:json_bytes], view[json_bytes:]
    # Each object or text costs some hundred bytes of memory and 0.2 us on the event loop.
    objects, quotes = body.count(b"{", 0, json_bytes), body.count(b'"', 0, json_bytes)
    if objects > max_fields or quotes > 4 * max_fields:
        raise InvalidInput("body", f"has more than {max_fields:,} fields; no request needs more")
    given: JsonRequest = decode_json(_REQUEST, text)
    parameters = present("parameters", given.parameters)
    outputs = [
        OutputRequest(output.name, present(f"outputs[{index}].parameters", output.parameters))
        for index, output in enumerate(given.outputs or ())
    ]
    request = TensorRequest(
        model,
        version,
        given.id or "",
        parameters,
        _inputs(given.inputs, binary),
        outputs,
    )
    return DecodedRequest(request, _binary_outputs(parameters, outputs))


def encode_response(response: TensorResponse, binary_outputs: frozenset[str]) -> tuple[bytes, int]:
    """The body of a response, and how many of its bytes are JSON."""
    tensors: list[dict[str, Any]] = []
    binary: list[bytes] = []
    for output in response.outputs:
        tensor: dict[str, Any] = {
            "name": output.name,
            "datatype": output.datatype,
            "shape": list(output.shape),
        }
        if output.region is not None:
            pass  # no parameters: Triton's clients would expect binary data
        elif output.name in binary_outputs:
            binary.append(output.raw())
            tensor["parameters"] = {BINARY_SIZE: len(binary[-1])}
        else:
            tensor["data"] = output.flat()
        tensors.append(tensor)
    model = response.inference.model
    answer: dict[str, Any] = {"model_name": model.name, "model_version": model.version_text}
    if response.inference.request_id:
        answer["id"] = response.inference.request_id
    answer["parameters"] = response.parameters
    answer["outputs"] = tensors
    header = msgspec.json.encode(answer)
    return b"".join([header, *binary]), len(header)


def present(field: str, given: GivenParameters) -> dict[str, Parameter]:
    """The parameters that are not null. Raises InvalidInput for a number of more than 64 bits."""
    found = {name: value for name, value in (given or {}).items() if value is not None}
    for name, value in found.items():
        if isinstance(value, int) and not -(1 << 63) <= value < 1 << 64:
            raise InvalidInput(f"{field}[{name[:MAX_QUOTED]}]", "is a number of more than 64 bits")
    return found


def _inputs(given: Sequence[JsonInput], binary: memoryview) -> list[InputTensor]:
    """The inputs. The binary data of each follows that of the input before. Raises InvalidInput."""
    tensors = []
    for index, one in enumerate(given):
        shape = _shape(f"inputs[{index}].shape", one.shape)
        parameters = present(f"inputs[{index}].parameters", one.parameters)
        tensors.append(InputTensor(one.name, one.datatype, shape, parameters))
    try:
        chosen = input_to_classify([tensor.name for tensor in tensors])
    except InvalidInput:
        return tensors  # the error is raised once the model is known
    left = binary
    for index, (tensor, one) in enumerate(zip(tensors, given, strict=True)):
        is_last = index == len(tensors) - 1
        has_data = bool(one.data) and memoryview(one.data) != NULL
        size = _binary_size(index, tensor, len(left), has_data=has_data, is_last=is_last)
        if size is not None:
            tensor.data = RawData(f"inputs[{index}]", left[:size])
            left = left[size:]
        elif has_data:
            tensor.data = JsonData(f"inputs[{index}].data", memoryview(one.data))
        elif index == chosen and REGION not in tensor.parameters:
            raise InvalidInput(f"inputs[{index}].data", f"of {tensor.name!r} is missing")
    return tensors


def _binary_size(
    index: int, tensor: InputTensor, left: int, *, has_data: bool, is_last: bool
) -> int | None:
    """How many of the bytes that are left belong to an input; None if it has no binary data.

    Raises InvalidInput.
    """
    size = tensor.parameters.get(BINARY_SIZE)
    field = f"inputs[{index}].parameters[{BINARY_SIZE}]"
    if size is None:
        if is_last and left:
            raise InvalidInput(field, f"is missing; {left:,} bytes follow the JSON")
        return None
    if has_data:
        raise InvalidInput(field, "is given, and data too; give one of them")
    if (
        not isinstance(size, int)
        or isinstance(size, bool)
        or not 0 <= size <= left
        or (is_last and size < left)
    ):
        where = "follow the data of the inputs before" if index else "follow the JSON"
        raise InvalidInput(field, f"is {size!r}; {left:,} bytes {where}")
    return size


def _shape(field: str, text: msgspec.Raw) -> tuple[int, ...]:
    given = bytes(text)
    if len(given) <= MAX_SHAPE_BYTES:
        try:
            shape = msgspec.json.decode(given, type=list[int])
        except msgspec.ValidationError:
            pass
        else:
            if all(-(1 << 63) <= size < 1 << 63 for size in shape):
                return tuple(shape)
    raise InvalidInput(field, "must be an array of a few whole numbers")


def _binary_outputs(
    parameters: Mapping[str, Parameter], outputs: Sequence[OutputRequest]
) -> frozenset[str]:
    """The names of the outputs that the response has as binary data."""
    default = _boolean("parameters", parameters, BINARY_OUTPUT, default=False)
    if not outputs:
        return frozenset(OUTPUTS) if default else frozenset()
    return frozenset(
        output.name
        for index, output in enumerate(outputs)
        if _boolean(f"outputs[{index}].parameters", output.parameters, BINARY, default=default)
    )


def _boolean(field: str, parameters: Mapping[str, Parameter], name: str, *, default: bool) -> bool:
    value = parameters.get(name, default)
    if not isinstance(value, bool):
        raise InvalidInput(f"{field}[{name}]", "must be true or false")
    return value
