"""Scripted server: speaks the contract on a real socket and follows the script of a test."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health, health_pb2_grpc

from convserve_client import Answer, Prediction, Timing
from convserve_client.stubs import classify_pb2 as pb
from convserve_client.stubs import classify_pb2_grpc

Context = grpc.aio.ServicerContext[Any, Any]
Step = Callable[[pb.ClassifyRequest, Context], Awaitable[pb.ClassifyResponse]]
Servicer: Any = classify_pb2_grpc.ClassifierServicer  # protoc generates no types
HealthServicer: Any = vars(health)["aio"].HealthServicer  # the stubs do not have it

SMALL = pb.Model(
    name="small",
    version=3,
    state=pb.Model.READY,
    architecture="lenet5",
    trained=True,
    weights="digits",
    height=8,
    width=6,
    channels=1,
    classes=2,
    top_k=2,
    max_batch=4,
    backend="null",
    precision="f32",
    labels=["cat", "dog"],
)
ANSWER = pb.ClassifyResponse(
    results=[
        pb.Classification(
            classes=[
                pb.Class(index=1, label="dog", probability=0.75),
                pb.Class(index=0, label="cat", probability=0.25),
            ]
        )
    ],
    model="small",
    version=3,
    trained=True,
    timing=pb.Timing(decode_ms=1, queue_ms=2, compute_ms=4, total_ms=8, batch_rows=[2, 3]),
    request_id="mine",
)
EXPECTED_ANSWER = Answer(  # what the client returns for ANSWER
    results=((Prediction(1, "dog", 0.75), Prediction(0, "cat", 0.25)),),
    model="small",
    version=3,
    trained=True,
    timing=Timing(decode_ms=1, queue_ms=2, compute_ms=4, total_ms=8, batch_rows=(2, 3)),
    request_id="mine",
)


class ScriptedClassifier(Servicer):  # type: ignore[misc]
    """Takes one step of its script for each Classify call, and repeats the last step."""

    def __init__(self, *script: Step, models: tuple[pb.Model, ...] = (SMALL,)) -> None:
        self._script = list(script) or [answer]
        self._models = models
        self.requests: list[pb.ClassifyRequest] = []
        self.time_left_s: list[float] = []  # until the deadline of each call, when it arrived
        self.health = HealthServicer()

    async def Classify(self, request: pb.ClassifyRequest, context: Context) -> pb.ClassifyResponse:
        self.requests.append(request)
        self.time_left_s.append(context.time_remaining())
        step = self._script.pop(0) if len(self._script) > 1 else self._script[0]
        return await step(request, context)

    async def ListModels(self, request: pb.ListModelsRequest, context: Context) -> Message:
        return pb.ListModelsResponse(models=self._models)

    async def GetModel(self, request: pb.GetModelRequest, context: Context) -> pb.Model:
        for model in self._models:
            if model.name == request.model:
                return model
        await context.abort(grpc.StatusCode.NOT_FOUND, f"no model {request.model!r}")
        raise AssertionError


async def answer(request: pb.ClassifyRequest, context: Context) -> pb.ClassifyResponse:
    return ANSWER


def refuse(
    code: grpc.StatusCode,
    message: str = "no",
    *details: Message,
    trailing: tuple[tuple[str, str | bytes], ...] = (),
) -> Step:
    """A step that fails the call with a status, its details packed into a google.rpc.Status."""
    if details:
        status = status_pb2.Status(code=code.value[0], message=message)
        for detail in details:
            status.details.add().Pack(detail)
        trailing = (("grpc-status-details-bin", status.SerializeToString()), *trailing)

    async def step(request: pb.ClassifyRequest, context: Context) -> pb.ClassifyResponse:
        await context.abort(code, message, trailing)
        raise AssertionError

    return step


def retry_info(delay_s: float) -> error_details_pb2.RetryInfo:
    delay = Duration()
    delay.FromNanoseconds(int(delay_s * 1e9))
    return error_details_pb2.RetryInfo(retry_delay=delay)


class Silence:
    """A step that never answers. It signals when a call arrives and when its caller leaves."""

    def __init__(self) -> None:
        self.entered = asyncio.Event()
        self.left = asyncio.Event()

    async def __call__(self, request: pb.ClassifyRequest, context: Context) -> pb.ClassifyResponse:
        self.entered.set()
        try:
            await asyncio.Event().wait()
        finally:
            self.left.set()
        raise AssertionError


@asynccontextmanager
async def serving(
    service: ScriptedClassifier,
    *,
    port: int = 0,
    max_message_bytes: int = 2**26,
    tls: grpc.ServerCredentials | None = None,
) -> AsyncIterator[str]:
    """Address of the running service. A test that takes 30 s is stuck and fails."""
    server = grpc.aio.server(options=[("grpc.max_receive_message_length", max_message_bytes)])
    add_service: Any = classify_pb2_grpc.add_ClassifierServicer_to_server
    add_service(service, server)
    add_service = health_pb2_grpc.add_HealthServicer_to_server
    add_service(service.health, server)
    address = f"127.0.0.1:{port}"
    port = server.add_secure_port(address, tls) if tls else server.add_insecure_port(address)
    await server.start()
    try:
        async with asyncio.timeout(30):
            yield f"127.0.0.1:{port}"
    finally:
        await server.stop(None)
