"""What every gRPC server is asked for: grpc.health.v1 and reflection.

Streams that would never end by themselves end here when the server stops, so that one watcher does
not hold it up for the whole grace. Messages are parsed here: what gRPC can't parse it logs with a
stack and answers with UNKNOWN, though it is the caller's mistake.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any, TypeVar

import grpc
from google.protobuf.message import DecodeError, Message
from grpc_health.v1 import health_pb2
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_reflection.v1alpha.reflection import SERVICE_NAME as REFLECTION
from grpc_reflection.v1alpha.reflection import aio  # type: ignore[attr-defined]
from grpc_reflection.v1alpha.reflection_pb2 import (
    ServerReflectionRequest,
    ServerReflectionResponse,
)

from server.service.rpc import Intake, counted

HEALTH = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name

REQUEST_LIMIT_BYTES = 4096  # a name is all there is in one, and a watch keeps it while it lasts

M = TypeVar("M", bound=Message)

_Context = grpc.aio.ServicerContext[Any, Any]


class Health:
    """Check and Watch of whatever `serving` knows: True, False, or None for an unknown name.

    grpcio's own one forgets all other watchers of a name when one of them leaves (seen in 1.76).
    Used on the event loop's thread only.
    """

    def __init__(self, serving: Callable[[str], bool | None]) -> None:
        self._serving = serving
        self._changed = asyncio.Event()
        self._retired = False
        self._stopped = False

    def changed(self) -> None:
        """Lets every watcher look again."""
        self._changed.set()
        self._changed = asyncio.Event()

    def retire(self) -> None:
        """From now on nothing is serving, for whoever asks; watchers are told so."""
        self._retired = True
        self.changed()

    def stop(self) -> None:
        """The same, and the watchers' calls end."""
        self._stopped = True
        self.retire()

    async def check(
        self, request: HealthCheckRequest | None, context: _Context
    ) -> HealthCheckResponse:
        request = await _sound(request, context)
        status = self._status(request.service)
        if status == HealthCheckResponse.SERVICE_UNKNOWN:
            await context.abort(
                grpc.StatusCode.NOT_FOUND, "neither a service nor a model has this name"
            )
        return HealthCheckResponse(status=status)

    async def watch(
        self, request: HealthCheckRequest | None, context: _Context
    ) -> AsyncIterator[HealthCheckResponse]:
        request = await _sound(request, context)
        told = None
        while True:
            # Taken before looking, so that no change is missed: much may happen while one is sent.
            changed, stopped = self._changed, self._stopped
            status = self._status(request.service)
            if status != told:
                told = status
                yield HealthCheckResponse(status=status)
            if stopped:
                return
            await changed.wait()

    def _status(self, name: str) -> HealthCheckResponse.ServingStatus:
        serving = self._serving(name)
        if serving is None:
            return HealthCheckResponse.SERVICE_UNKNOWN
        serving = serving and not self._retired
        return HealthCheckResponse.SERVING if serving else HealthCheckResponse.NOT_SERVING


class Reflection(aio.ReflectionServicer):  # type: ignore[misc, name-defined]
    """The reflection service, until `stopping` is set."""

    def __init__(self, services: list[str], stopping: asyncio.Event) -> None:
        super().__init__([*services, REFLECTION])
        self._stopping = stopping

    async def ServerReflectionInfo(
        self, requests: AsyncIterator[ServerReflectionRequest | None], context: _Context
    ) -> AsyncIterator[ServerReflectionResponse]:
        sound = (await _sound(request, context) async for request in requests)
        answers = super().ServerReflectionInfo(sound, context)
        stopping = asyncio.create_task(self._stopping.wait())
        waiting: set[asyncio.Task[Any]] = {stopping}
        try:
            while True:
                answer = asyncio.create_task(_next(answers))
                waiting = {answer, stopping}
                await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                if not answer.done() or answer.result() is None:
                    return
                yield answer.result()
        finally:
            for task in waiting:
                task.cancel()


def register(
    server: grpc.aio.Server, health: Health, reflection: Reflection, intake: Intake
) -> None:
    """Adds both services to a server that has not started.

    Streams count among the calls of `intake`. A Check does not: it holds nothing, and a server
    that has much to do must not be taken for dead.
    """
    request, response = _parser(HealthCheckRequest), HealthCheckResponse.SerializeToString
    watch = _counted("Watch", health.watch, intake)
    methods: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
        "Check": grpc.unary_unary_rpc_method_handler(health.check, request, response),
        "Watch": grpc.unary_stream_rpc_method_handler(watch, request, response),
    }
    info: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
        "ServerReflectionInfo": grpc.stream_stream_rpc_method_handler(
            _counted("ServerReflectionInfo", reflection.ServerReflectionInfo, intake),
            _parser(ServerReflectionRequest),
            ServerReflectionResponse.SerializeToString,
        )
    }
    server.add_generic_rpc_handlers(
        [
            grpc.method_handlers_generic_handler(HEALTH, methods),
            grpc.method_handlers_generic_handler(REFLECTION, info),
        ]
    )


def _counted(method: str, stream: Any, intake: Intake) -> Any:
    async def answer(request: Any, context: _Context) -> AsyncIterator[Any]:
        async with counted(context, method, intake):
            async for response in stream(request, context):
                yield response

    return answer


def _parser(request_class: type[M]) -> Callable[[bytes], M | None]:
    """Bytes to a message; None where they are none, or more than an honest one has."""

    def parse(data: bytes) -> M | None:
        if len(data) > REQUEST_LIMIT_BYTES:
            return None
        try:
            return request_class.FromString(data)
        except DecodeError:
            return None

    return parse


async def _sound(request: M | None, context: _Context) -> M:
    if request is None:
        message = f"this is no request of {REQUEST_LIMIT_BYTES} bytes at most"
        await context.abort(grpc.StatusCode.INVALID_ARGUMENT, message)
        raise AssertionError("abort raises")
    return request


async def _next(answers: AsyncIterator[Any]) -> Any:
    """The next one; None at the end."""
    return await anext(answers, None)
