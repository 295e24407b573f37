"""Messages of both protocols: parsed in this process, and called on a real server."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any, cast

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from grpc import StatusCode

from server.api.rpc.field_limit import SMALL_BYTES, MessageCheck, max_fields
from server.api.rpc.handlers import _parse
from server.api.stubs import classify_pb2, open_inference_pb2
from server.api.v2.messages import tensor_request
from server.errors import InvalidInput
from tests.fuzz.mutate import sometimes_mutated
from tests.fuzz.target import Feed, Target, parser
from tests.support.serving import SHAPE, publish, raw
from tests.transport.attacks.attack import CLASSIFY, INFER
from tests.transport.attacks.processes import convserve
from tests.transport.attacks.victim import GrpcVictim

MAX_FIELDS = max_fields(256)
MAX_FRAME_BYTES = 16_000
NUMBERS = (0, 1, 2, 3, 6, 8, 144, 255, 256, 2**31 - 1, 2**32 - 1, 2**63 - 1, -1, -(2**63))
TEXTS = (
    "", "tiny", "1", "image", "encoded", "classes", "scores", "probabilities", "UINT8", "BYTES",
    "FP32", "binary_data", "classification", "priority", "timeout", "sequence_id", "stable",
    "canary", "é", "x" * 200, "shared_memory_region", "shared_memory_byte_size", "../..", "\0",
)  # fmt: skip
PIXELS = bytes(SHAPE[0] * SHAPE[1] * SHAPE[2])
OPEN_INFERENCE = open_inference_pb2.ModelInferRequest(
    model_name="tiny",
    inputs=[
        open_inference_pb2.ModelInferRequest.InferInputTensor(
            name="image", datatype="UINT8", shape=(1, *SHAPE)
        )
    ],
    raw_input_contents=[PIXELS],
)
CLASSIFY_REQUESTS = (
    raw(1),
    raw(1, 2, top_k=3, request_id="a", priority=9),
    classify_pb2.ClassifyRequest(
        model="tiny",
        images=[
            classify_pb2.Image(encoded=b"GIF89a"),
            classify_pb2.Image(raw=classify_pb2.RawImage()),
        ],
    ),
)


def changed(message: Any, draw: Random, depth: int = 0) -> None:
    """Changes one field of a message, or of a message in it."""
    field: FieldDescriptor = draw.choice(message.DESCRIPTOR.fields)
    repeated = field.is_repeated
    if field.message_type is None:
        value = _value(field, draw)
        if not repeated:
            setattr(message, field.name, value)
        elif draw.random() < 0.3:
            message.ClearField(field.name)
        else:
            getattr(message, field.name).extend([value] * draw.choice((1, 1, 5, 40)))
    elif draw.random() < 0.2:
        message.ClearField(field.name)
    elif field.message_type.GetOptions().map_entry:
        changed(getattr(message, field.name)[draw.choice(TEXTS)], draw, depth + 1)
    elif not repeated:
        changed(getattr(message, field.name), draw, depth + 1)
    else:
        items = getattr(message, field.name)
        changed(
            draw.choice(items) if items and draw.random() < 0.7 else items.add(), draw, depth + 1
        )


def _value(field: FieldDescriptor, draw: Random) -> Any:
    match field.cpp_type:
        case FieldDescriptor.CPPTYPE_STRING:
            if field.type == FieldDescriptor.TYPE_BYTES:
                return draw.choice((b"", PIXELS, PIXELS * 2, draw.randbytes(20)))
            return draw.choice(TEXTS)
        case FieldDescriptor.CPPTYPE_BOOL:
            return draw.random() < 0.5
        case FieldDescriptor.CPPTYPE_FLOAT | FieldDescriptor.CPPTYPE_DOUBLE:
            return draw.choice((0.0, -1.0, 255.0, 0.5, 1e30, float("nan"), float("inf")))
        case FieldDescriptor.CPPTYPE_UINT32:
            return draw.choice(NUMBERS) % (1 << 32)
        case FieldDescriptor.CPPTYPE_UINT64:
            return draw.choice(NUMBERS) % (1 << 64)
        case FieldDescriptor.CPPTYPE_INT32 | FieldDescriptor.CPPTYPE_ENUM:
            return draw.choice((0, 1, 2, 255, 2**31 - 1, -1))
    return draw.choice(NUMBERS)


def maker(*valid: Message) -> Callable[[Random], bytes]:
    """Makes messages by changes of valid ones."""

    def make(draw: Random) -> bytes:
        message = type(first := draw.choice(valid))()
        message.CopyFrom(first)
        for _ in range(draw.choice((0, 1, 1, 2, 4))):
            changed(message, draw)
        return sometimes_mutated(message.SerializeToString(), draw, 0.3)

    return make


def _checked(kind: type[Message], data: bytes) -> Message:
    """Parses a message as the handlers do, without turns of the event loop."""
    if len(data) > SMALL_BYTES:
        MessageCheck(data, cast(Descriptor, kind.DESCRIPTOR), MAX_FIELDS).read(MAX_FIELDS + 1)
    return _parse(kind, data)


def parse(kind: type[Message]) -> Callable[[bytes], object]:
    return lambda data: _checked(kind, data)


def parse_tensors(data: bytes) -> object:
    message = _checked(open_inference_pb2.ModelInferRequest, data)
    return tensor_request(cast(open_inference_pb2.ModelInferRequest, message))


ALLOWED = {
    code.value[0]
    for code in (
        StatusCode.OK,
        StatusCode.INVALID_ARGUMENT,
        StatusCode.NOT_FOUND,
        StatusCode.RESOURCE_EXHAUSTED,
        StatusCode.DEADLINE_EXCEEDED,
        StatusCode.UNIMPLEMENTED,
    )
}


class WrongStatus(AssertionError):
    """A response says that the server failed, and not its client."""


def calls(path: str) -> Callable[[], Any]:
    """Each input is a call of a real server."""

    @contextmanager
    def opened() -> Iterator[Feed]:
        with tempfile.TemporaryDirectory() as folder:
            publish(Path(folder))
            with convserve(Path(folder)) as server:
                client = GrpcVictim(server.port)

                def feed(data: bytes) -> bool:
                    status = int(client.status(path, data[:MAX_FRAME_BYTES]))
                    if status not in ALLOWED:
                        raise WrongStatus(f"status {status} of {path}")
                    return status == 0

                try:
                    yield feed
                finally:
                    client.close()

    return opened


make_classify = maker(*CLASSIFY_REQUESTS)
make_infer = maker(OPEN_INFERENCE)

TARGETS = (
    Target(
        "classify-messages",
        make_classify,
        parser(parse(classify_pb2.ClassifyRequest), InvalidInput),
        0.15,
    ),
    Target("infer-messages", make_infer, parser(parse_tensors, InvalidInput), 0.15),
    Target("classify-calls", make_classify, calls(CLASSIFY), 0.02),
    Target("infer-calls", make_infer, calls(INFER), 0.02),
)
