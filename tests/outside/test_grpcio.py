"""grpcio, the gRPC of C core, with its two interfaces for Python."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
from grpc import StatusCode
from grpc_health.v1 import health_pb2_grpc
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse

from server.api.stubs import classify_pb2 as pb
from server.api.stubs import open_inference_pb2 as open_inference
from tests.outside.conftest import Digit, Service
from tests.transport.attacks.attack import CLASSIFY, STREAM_INFER

CALLS = 300
LARGE = (("x-large", "x" * 7_000),)


def request(digit: Digit, model: str = "lenet5") -> bytes:
    image = pb.Image(encoded=digit.path.read_bytes())
    return pb.ClassifyRequest(model=model, images=[image]).SerializeToString()


def connect(library: Any, service: Service) -> Any:
    """A channel of grpc or grpc.aio. Its type is not given: it would demand serializers."""
    if service.ca is None:
        return library.insecure_channel(service.target)
    encrypted = grpc.ssl_channel_credentials(service.ca.read_bytes())
    identified = grpc.access_token_call_credentials(service.token)
    both = grpc.composite_channel_credentials(encrypted, identified)
    return library.secure_channel(service.target, both)


def class_of(answer: bytes) -> int:
    return pb.ClassifyResponse.FromString(answer).results[0].classes[0].index


def test_a_client_with_threads_gets_what_the_contract_says(service: Service, digit: Digit) -> None:
    with connect(grpc, service) as channel:
        health: Any = health_pb2_grpc.HealthStub(channel)
        status = health.Check(HealthCheckRequest(), timeout=20).status
        assert status == HealthCheckResponse.SERVING
        classify = channel.unary_unary(CLASSIFY)
        assert class_of(classify(request(digit), timeout=20)) == digit.label
        assert class_of(classify(request(digit), timeout=20, metadata=LARGE)) == digit.label
        calls = [classify.future(request(digit), timeout=60) for _ in range(CALLS)]
        assert {class_of(call.result()) for call in calls} == {digit.label}
        missing = classify.future(request(digit, "none"), timeout=20)
        assert missing.exception().code() == StatusCode.NOT_FOUND
        late = classify.future(request(digit), timeout=-1)
        assert late.exception().code() == StatusCode.DEADLINE_EXCEEDED


async def test_a_client_with_coroutines_gets_what_the_contract_says(
    service: Service, digit: Digit
) -> None:
    async with connect(grpc.aio, service) as channel:
        classify = channel.unary_unary(CLASSIFY)
        answers = await asyncio.gather(
            *(classify(request(digit), timeout=60, metadata=LARGE) for _ in range(CALLS))
        )
        assert {class_of(answer) for answer in answers} == {digit.label}
        cancelled = classify(request(digit))
        cancelled.cancel()
        assert await cancelled.code() == StatusCode.CANCELLED
        stream = channel.stream_stream(STREAM_INFER)
        messages = [infer(number) for number in range(20)]
        ids = [
            open_inference.ModelStreamInferResponse.FromString(answer).infer_response.id
            async for answer in stream(iter(messages), timeout=20)
        ]
        assert ids == [str(number) for number in range(20)]


def infer(number: int) -> bytes:
    tensor = open_inference.ModelInferRequest.InferInputTensor(
        name="image", datatype="UINT8", shape=(1, 32, 32, 1)
    )
    return open_inference.ModelInferRequest(
        model_name="lenet5", id=str(number), inputs=[tensor], raw_input_contents=[bytes(1024)]
    ).SerializeToString()
