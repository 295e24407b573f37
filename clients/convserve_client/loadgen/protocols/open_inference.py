"""Adapter for the Open Inference Protocol (v2) over gRPC.

Triton, OpenVINO Model Server, KServe and MLServer speak it too. The tensors to send come from the
server's own metadata of the model.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from typing import Any

import grpc
import numpy as np

from convserve_client.async_client import MAX_MESSAGE_BYTES
from convserve_client.channel import metadata_for, open_channel
from convserve_client.error_translation import translate
from convserve_client.loadgen.images import Pixels, in_turn, load_files, load_pixels
from convserve_client.loadgen.plan import Plan, RequestClass
from convserve_client.loadgen.protocols import open_inference_messages as oip
from convserve_client.loadgen.protocols.adapter import (
    AnswerTotals,
    RequestBuilder,
    UnsupportedModel,
)

MODEL_INFER = "/inference.GRPCInferenceService/ModelInfer"
MODEL_METADATA = "/inference.GRPCInferenceService/ModelMetadata"
METADATA_TIMEOUT_S = 10.0

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


class OpenInferenceAdapter:
    """Sends tensors to inference.GRPCInferenceService/ModelInfer."""

    method = MODEL_INFER

    def __init__(self) -> None:
        self._answers = 0

    async def prepare_requests(self, plan: Plan, request_class: RequestClass) -> list[bytes]:
        request = oip.ModelMetadataRequest(
            name=request_class.model, version=_version_text(request_class)
        )
        tls, token = plan.access.tls, plan.access.token or None
        async with open_channel(plan.target, MAX_MESSAGE_BYTES, tls) as channel:
            rpc: Any = channel.unary_unary(
                MODEL_METADATA, None, oip.ModelMetadataResponse.FromString
            )
            try:
                metadata = await rpc(
                    request.SerializeToString(),
                    timeout=METADATA_TIMEOUT_S,
                    metadata=metadata_for(token),
                )
            except grpc.aio.AioRpcError as failure:
                connected = failure.code() is not grpc.StatusCode.UNAVAILABLE
                raise translate(failure, connected=connected, target=plan.target, tls=tls) from None
        return infer_requests(plan, request_class, metadata)

    async def sample_library(
        self, plan: Plan, request_class: RequestClass, samples: int
    ) -> RequestBuilder:
        if request_class.images != 1:
            raise UnsupportedModel(
                f"--images-per-call {request_class.images}: --scenario with the protocol oip"
                " sends 1 image per call"
            )
        contents = await self.prepare_requests(plan, request_class)
        return lambda indices: contents[indices[0] % len(contents)]

    def read_answer(self, answer: bytes, totals: AnswerTotals) -> float:
        self._answers += 1
        # Parsing all probabilities of every answer would cost CPU time for nothing. Answers number
        # 1, 2, 4, 8, ... are enough to know which model answers.
        if self._answers & (self._answers - 1) == 0:
            response = oip.ModelInferResponse.FromString(answer)
            trained = (
                response.parameters["trained"].bool_param
                if "trained" in response.parameters
                else None
            )
            totals.answered_by.add((response.model_name, response.model_version, trained))
        return 0.0


def infer_requests(
    plan: Plan, request_class: RequestClass, metadata: oip.ModelMetadataResponse
) -> list[bytes]:
    """Requests with a tensor for each input in the metadata. Raises UnsupportedModel, OSError."""
    shapes = dict(plan.shapes)
    inputs = _inputs_to_send(plan, request_class, metadata)
    request = oip.ModelInferRequest(
        model_name=request_class.model, model_version=_version_text(request_class)
    )
    if request_class.priority:
        request.parameters["priority"].int64_param = request_class.priority
    for name in plan.outputs:
        request.outputs.add(name=name)
    contents_by_input = []
    for tensor in inputs:
        shape = shapes.get(tensor.name) or _with_batch(tensor, request_class)
        request.inputs.add(name=tensor.name, datatype=tensor.datatype, shape=shape)
        contents_by_input.append(_tensor_contents(plan, request_class, tensor, shape))
    requests = []
    for number in range(max(map(len, contents_by_input))):
        del request.raw_input_contents[:]
        request.raw_input_contents.extend(
            contents[number % len(contents)] for contents in contents_by_input
        )
        requests.append(request.SerializeToString())
    return requests


def _inputs_to_send(
    plan: Plan, request_class: RequestClass, metadata: oip.ModelMetadataResponse
) -> list[Any]:
    inputs = list(metadata.inputs)
    if {tensor.name for tensor in inputs} == {"image", "encoded"}:  # convserve takes one of them
        wanted = "image" if plan.input == "raw" or plan.raw else "encoded"
        inputs = [tensor for tensor in inputs if tensor.name == wanted]
    if not inputs:
        raise UnsupportedModel(f"the metadata of {request_class.model} lists no inputs")
    for name in dict(plan.shapes).keys() - {tensor.name for tensor in inputs}:
        available = ", ".join(tensor.name for tensor in inputs)
        raise UnsupportedModel(
            f"--shape {name}: {request_class.model} has no such input; it has {available}"
        )
    return inputs


def _version_text(request_class: RequestClass) -> str:
    return str(request_class.version) if request_class.version else ""


def _with_batch(tensor: Any, request_class: RequestClass) -> tuple[int, ...]:
    """Shape to send. The first dimension is the batch."""
    images = request_class.images
    first, *rest = tensor.shape
    if first not in (-1, images) or -1 in rest:
        raise UnsupportedModel(
            f"{tensor.name} of {request_class.model} has the shape {list(tensor.shape)}, which"
            f" does not fit {images} images; use --shape {tensor.name}:D,D,... or"
            " --images-per-call"
        )
    return (images, *rest)


def _tensor_contents(
    plan: Plan, request_class: RequestClass, tensor: Any, shape: tuple[int, ...]
) -> list[bytes]:
    """Contents of the tensor, to be sent in turn: images if it has the shape of images."""
    count = math.prod(shape)
    if tensor.datatype == "BYTES":
        if plan.input == "raw":
            raise UnsupportedModel(
                f"--input raw: {tensor.name} takes image files; use --input jpeg or another source"
            )
        return [
            b"".join(struct.pack("<I", len(content)) + content for content in group)
            for group in in_turn(load_files(plan.input, count), count)
        ]
    if tensor.datatype not in DTYPES:
        raise UnsupportedModel(
            f"{tensor.name} has the type {tensor.datatype}; {', '.join(DTYPES)} and BYTES can be"
            " sent"
        )
    dtype = np.dtype(DTYPES[tensor.datatype])
    return [_convert(group, dtype, shape).tobytes() for group in _pixel_groups(plan, shape)]


def _pixel_groups(plan: Plan, shape: Sequence[int]) -> list[Pixels]:
    """uint8 arrays of that shape: images for [N, H, W, C] or [N, C, H, W], otherwise noise."""
    if len(shape) == 4 and (shape[3] in (1, 3) or shape[1] in (1, 3)):
        channels_first = shape[3] not in (1, 3)
        height, width, channels = (*shape[2:], shape[1]) if channels_first else shape[1:]
        groups = in_turn(load_pixels(plan.input, shape[0], height, width, channels), shape[0])
        stacked = [np.stack(group) for group in groups]
        return [group.transpose(0, 3, 1, 2) if channels_first else group for group in stacked]
    noise = np.random.default_rng(plan.seed).integers(0, 256, size=tuple(shape), dtype=np.uint8)
    return [noise]


def _convert(values: Pixels, dtype: np.dtype[Any], shape: Sequence[int]) -> Pixels:
    """Values in the tensor's type; floats are scaled to 0 to 1."""
    scaled = values / 255 if dtype.kind == "f" else values
    return np.ascontiguousarray(scaled.reshape(shape), dtype=dtype)
