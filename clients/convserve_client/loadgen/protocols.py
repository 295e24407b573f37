"""How a server is asked, by protocol: requests serialised beforehand, and what an answer tells.

`classify` is this project's own contract. `oip` is the Open Inference Protocol (v2) over gRPC, as
Triton, OpenVINO Model Server, KServe and MLServer speak it: the tensors are those that the server's
own metadata names.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import grpc
import numpy as np

from convserve_client.async_client import AsyncClient
from convserve_client.error_translation import translate
from convserve_client.loadgen import open_inference as oip
from convserve_client.loadgen.images import (
    Pixels,
    files,
    in_turn,
    pixels,
)
from convserve_client.loadgen.plan import Kind, Plan
from convserve_client.stubs import classify_pb2 as pb

CLASSIFY = "/convserve.v1.Classifier/Classify"
MODEL_INFER = "/inference.GRPCInferenceService/ModelInfer"
MODEL_METADATA = "/inference.GRPCInferenceService/ModelMetadata"
METADATA_S = 10.0
LIBRARY = 128  # different pictures at most, where any number of samples is asked for

PHASES = ("decode", "queue", "compute", "total")
DTYPES: dict[str, Any] = {
    "BOOL": np.bool_,
    **{
        f"{kind}{bits}": np.dtype(f"{kind}{bits}".lower())
        for kind in ("UINT", "INT")
        for bits in (8, 16, 32, 64)
    },
    "FP16": np.float16,
    "FP32": np.float32,
    "FP64": np.float64,
}


class Unaskable(Exception):
    """The server can't be asked as the command line wants; the message says why."""


@dataclass(slots=True)
class ServerSide:
    """What the answers say of the server, added up."""

    answers: int = 0  # that told of themselves
    phases_ms: list[float] = field(default_factory=lambda: [0.0] * len(PHASES))
    answered_by: set[tuple[str, str, bool | None]] = field(default_factory=set)
    """Model, version, and whether it is trained, where the server tells."""

    def add(self, other: ServerSide) -> None:
        self.answers += other.answers
        self.phases_ms = [sum(both) for both in zip(self.phases_ms, other.phases_ms, strict=True)]
        self.answered_by |= other.answered_by


Request = Callable[[Sequence[int]], bytes]  # the call for these samples of a library


class Asked(Protocol):
    """A protocol, as the sender uses it."""

    method: str

    async def prepared(self, plan: Plan, kind: Kind) -> list[bytes]:
        """The requests of a kind, to be sent in turn.

        Raises ClassifierError where the server can't be asked about the model, and Unaskable,
        OSError or ImportError where there is nothing to ask.
        """

    async def library(self, plan: Plan, kind: Kind, samples: int) -> Request:
        """Makes a call for any of so many samples, of which several may have the same content;
        a call brings at most `kind.images`. Raises as `prepared` does."""

    def read(self, answer: bytes, server: ServerSide) -> float:
        """Notes what an answer tells, and returns the mean rows of its batches; 0: unknown.

        Raises DecodeError where it is none.
        """


class Classify:
    """convserve.v1.Classifier."""

    method = CLASSIFY

    async def prepared(self, plan: Plan, kind: Kind) -> list[bytes]:
        async with AsyncClient(plan.target) as client:
            info = await client.get_model(kind.model, kind.version)
        return classify_requests(plan, kind, info.input_shape)

    async def library(self, plan: Plan, kind: Kind, samples: int) -> Request:
        async with AsyncClient(plan.target) as client:
            info = await client.get_model(kind.model, kind.version)
        return classify_library(plan, kind, info.input_shape, samples)

    def read(self, answer: bytes, server: ServerSide) -> float:
        response = pb.ClassifyResponse.FromString(answer)
        timing = response.timing
        server.answers += 1
        phases_ms = server.phases_ms
        phases_ms[0] += timing.decode_ms
        phases_ms[1] += timing.queue_ms
        phases_ms[2] += timing.compute_ms
        phases_ms[3] += timing.total_ms
        server.answered_by.add((response.model, str(response.version), response.trained))
        rows = timing.batch_rows
        return sum(rows) / len(rows) if rows else 0.0


def classify_requests(plan: Plan, kind: Kind, shape: tuple[int, int, int]) -> list[bytes]:
    """Requests for a model of that input shape [H, W, C]. Raises OSError or ImportError."""
    request = pb.ClassifyRequest(model=kind.model, version=kind.version, priority=kind.priority)
    prepared = []
    if plan.input == "raw" or plan.raw:
        height, width, channels = shape
        for group in in_turn(pixels(plan.input, kind.images, *shape), kind.images):
            request.pixels.CopyFrom(
                pb.RawImages(
                    count=kind.images,
                    height=height,
                    width=width,
                    channels=channels,
                    data=np.stack(group).tobytes(),
                )
            )
            prepared.append(request.SerializeToString())
        return prepared
    for group in in_turn(files(plan.input, kind.images), kind.images):
        del request.images[:]
        for content in group:
            request.images.add(encoded=content)
        prepared.append(request.SerializeToString())
    return prepared


def classify_library(plan: Plan, kind: Kind, shape: tuple[int, int, int], samples: int) -> Request:
    """See `Asked.library`. Raises OSError or ImportError."""
    usual = pb.ClassifyRequest(model=kind.model, version=kind.version, priority=kind.priority)
    head = usual.SerializeToString()
    distinct = min(samples, LIBRARY)
    if plan.input == "raw" or plan.raw:
        height, width, channels = shape
        rows = [one.tobytes() for one in pixels(plan.input, distinct, *shape)]

        def raw(indices: Sequence[int]) -> bytes:
            data = b"".join([rows[index % len(rows)] for index in indices])
            images = pb.RawImages(
                count=len(indices), height=height, width=width, channels=channels, data=data
            )
            return head + pb.ClassifyRequest(pixels=images).SerializeToString()

        return raw
    contents = [
        pb.ClassifyRequest(images=[pb.Image(encoded=content)]).SerializeToString()
        for content in files(plan.input, distinct)
    ]
    # Messages written one after the other are one message with the fields of all.
    return lambda indices: head + b"".join([contents[n % len(contents)] for n in indices])


class OpenInference:
    """inference.GRPCInferenceService, whoever serves it."""

    method = MODEL_INFER

    def __init__(self) -> None:
        self._told = 0

    async def prepared(self, plan: Plan, kind: Kind) -> list[bytes]:
        version = str(kind.version) if kind.version else ""
        asked = oip.ModelMetadataRequest(name=kind.model, version=version)
        async with grpc.aio.insecure_channel(plan.target) as channel:
            rpc: Any = channel.unary_unary(
                MODEL_METADATA, None, oip.ModelMetadataResponse.FromString
            )
            try:
                metadata = await rpc(asked.SerializeToString(), timeout=METADATA_S)
            except grpc.aio.AioRpcError as failure:
                connected = failure.code() is not grpc.StatusCode.UNAVAILABLE
                raise translate(failure, connected=connected) from None
        return infer_requests(plan, kind, metadata)

    async def library(self, plan: Plan, kind: Kind, samples: int) -> Request:
        if kind.images != 1:
            raise Unaskable("--scenario by --protocol oip sends one image a call")
        contents = await self.prepared(plan, kind)
        return lambda indices: contents[indices[0] % len(contents)]

    def read(self, answer: bytes, server: ServerSide) -> float:
        self._told += 1
        # A parser would spend on a thousand probabilities what nobody reads: of the 1st, 2nd, 4th,
        # 8th ... alone, which is enough to tell who answers.
        if self._told & (self._told - 1) == 0:
            response = oip.ModelInferResponse.FromString(answer)
            trained = (
                response.parameters["trained"].bool_param
                if "trained" in response.parameters
                else None
            )
            server.answered_by.add((response.model_name, response.model_version, trained))
        return 0.0


def infer_requests(plan: Plan, kind: Kind, metadata: oip.ModelMetadataResponse) -> list[bytes]:
    """Requests with a tensor for each input that the metadata names. Raises Unaskable, OSError."""
    shapes = dict(plan.shapes)
    inputs = list(metadata.inputs)
    if {tensor.name for tensor in inputs} == {"image", "encoded"}:  # ours: one of the two
        wanted = "image" if plan.input == "raw" or plan.raw else "encoded"
        inputs = [tensor for tensor in inputs if tensor.name == wanted]
    if not inputs:
        raise Unaskable(f"{kind.model} names no inputs in its metadata")
    for name in shapes.keys() - {tensor.name for tensor in inputs}:
        named = ", ".join(tensor.name for tensor in inputs)
        raise Unaskable(f"--shape {name}: {kind.model} has no such input; it has {named}")
    request = oip.ModelInferRequest(
        model_name=kind.model, model_version=str(kind.version) if kind.version else ""
    )
    if kind.priority:
        request.parameters["priority"].int64_param = kind.priority
    for name in plan.outputs:
        request.outputs.add(name=name)
    series = []
    for tensor in inputs:
        shape = shapes.get(tensor.name) or _with_batch(tensor, kind)
        request.inputs.add(name=tensor.name, datatype=tensor.datatype, shape=shape)
        series.append(_contents(plan, kind, tensor, shape))
    prepared = []
    for number in range(max(map(len, series))):
        del request.raw_input_contents[:]
        request.raw_input_contents.extend(contents[number % len(contents)] for contents in series)
        prepared.append(request.SerializeToString())
    return prepared


def _with_batch(tensor: Any, kind: Kind) -> tuple[int, ...]:
    """The shape to send, the first dimension being the batch."""
    first, *rest = tensor.shape
    if first not in (-1, kind.images) or -1 in rest:
        raise Unaskable(
            f"{kind.model} takes {tensor.name} of shape {list(tensor.shape)}, which can't be "
            f"filled with {kind.images} images; say --shape {tensor.name}:D,D,... or "
            "--images-per-call"
        )
    return (kind.images, *rest)


def _contents(plan: Plan, kind: Kind, tensor: Any, shape: tuple[int, ...]) -> list[bytes]:
    """What to send as the tensor, in turn: pictures where its shape is that of pictures."""
    count = math.prod(shape)
    if tensor.datatype == "BYTES":
        if plan.input == "raw":
            raise Unaskable(f"{tensor.name} takes image files; say --input jpeg, or another source")
        return [
            b"".join(struct.pack("<I", len(content)) + content for content in group)
            for group in in_turn(files(plan.input, count), count)
        ]
    if tensor.datatype not in DTYPES:
        raise Unaskable(
            f"{tensor.name} is of type {tensor.datatype}; {', '.join(DTYPES)} and BYTES can be sent"
        )
    dtype = np.dtype(DTYPES[tensor.datatype])
    return [_cast(group, dtype, shape).tobytes() for group in _pictures(plan, kind.images, shape)]


def _pictures(plan: Plan, images: int, shape: Sequence[int]) -> list[Pixels]:
    """uint8 of that shape: [N, H, W, C] or [N, C, H, W] pictures, or else noise."""
    if len(shape) == 4 and (shape[3] in (1, 3) or shape[1] in (1, 3)):
        first = shape[3] not in (1, 3)
        height, width, channels = (*shape[2:], shape[1]) if first else shape[1:]
        groups = in_turn(pixels(plan.input, shape[0], height, width, channels), shape[0])
        stacked = [np.stack(group) for group in groups]
        return [group.transpose(0, 3, 1, 2) if first else group for group in stacked]
    noise = np.random.default_rng(plan.seed).integers(0, 256, size=tuple(shape), dtype=np.uint8)
    return [noise]


def _cast(values: Pixels, dtype: np.dtype[Any], shape: Sequence[int]) -> Pixels:
    """As the tensor's type has it: numbers with a point go from 0 to 1."""
    scaled = values / 255 if dtype.kind == "f" else values
    return np.ascontiguousarray(scaled.reshape(shape), dtype=dtype)


def protocol(plan: Plan) -> Asked:
    return OpenInference() if plan.protocol == "oip" else cast(Asked, Classify())
