"""What every gRPC server is asked for: grpc.health.v1 and reflection.

Streams that would never end by themselves end here when the server stops, so that one watcher does
not hold it up for the whole grace.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from typing import Any, TypeVar

from google.protobuf.descriptor_pool import Default as default_pool
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message import DecodeError, Message
from grpc import StatusCode
from grpc_health.v1 import health_pb2
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_reflection.v1alpha.reflection import SERVICE_NAME as REFLECTION
from grpc_reflection.v1alpha.reflection import aio  # type: ignore[attr-defined]
from grpc_reflection.v1alpha.reflection_pb2 import (
    ServerReflectionRequest,
    ServerReflectionResponse,
)

from server.api.handlers import InFlightLimits, counted
from server.api.stubs.pool import POOL
from server.transport.methods import Abort, Method, StreamingMethod, UnaryMethod, WireCall

HEALTH = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name

REQUEST_LIMIT_BYTES = 4096  # a name is all there is in one, and a watch keeps it while it lasts

M = TypeVar("M", bound=Message)


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

    def check(self, request: HealthCheckRequest) -> HealthCheckResponse:
        """Raises Abort."""
        status = self._status(request.service)
        if status == HealthCheckResponse.SERVICE_UNKNOWN:
            raise Abort(StatusCode.NOT_FOUND, "neither a service nor a model has this name")
        return HealthCheckResponse(status=status)

    async def watch(self, request: HealthCheckRequest) -> AsyncIterator[HealthCheckResponse]:
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


class _Pools:
    """Several descriptor pools, asked in turn: as much of a pool as reflection uses."""

    def __init__(self, pools: Sequence[DescriptorPool]) -> None:
        self._pools = pools

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def find(*arguments: Any) -> Any:
            for pool in self._pools[:-1]:
                with suppress(KeyError):
                    return getattr(pool, name)(*arguments)
            return getattr(self._pools[-1], name)(*arguments)

        return find


class Reflection(aio.ReflectionServicer):  # type: ignore[misc, name-defined]
    """The reflection service, until `stopping` is set."""

    def __init__(self, services: list[str], stopping: asyncio.Event) -> None:
        super().__init__([*services, REFLECTION], pool=_Pools((default_pool(), POOL)))
        self._stopping = stopping

    async def answer(
        self, requests: AsyncIterator[ServerReflectionRequest]
    ) -> AsyncIterator[ServerReflectionResponse]:
        answers = self.ServerReflectionInfo(requests, None)
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
            await asyncio.gather(*waiting, return_exceptions=True)


def methods(health: Health, reflection: Reflection, intake: InFlightLimits) -> dict[str, Method]:
    """Both services, by path.

    Streams count among the calls of `intake`. A Check does not: it holds nothing, and a server
    that has much to do must not be taken for dead.
    """

    async def check(data: bytes, wire: WireCall) -> bytes:
        response: Message = health.check(_parsed(HealthCheckRequest, data))
        return response.SerializeToString()

    async def watch(requests: AsyncIterator[bytes], wire: WireCall) -> None:
        with counted("Watch", intake):
            async for data in requests:  # there is one
                await _write(health.watch(_parsed(HealthCheckRequest, data)), wire)
                return

    async def info(requests: AsyncIterator[bytes], wire: WireCall) -> None:
        with counted("ServerReflectionInfo", intake):
            asked = (_parsed(ServerReflectionRequest, data) async for data in requests)
            await _write(reflection.answer(asked), wire)

    return {
        f"/{HEALTH}/Check": UnaryMethod(check),
        f"/{HEALTH}/Watch": StreamingMethod(watch),
        f"/{REFLECTION}/ServerReflectionInfo": StreamingMethod(info),
    }


async def _write(responses: AsyncIterator[Message], wire: WireCall) -> None:
    async for response in responses:
        await wire.write(response.SerializeToString())


def _parsed(request_class: type[M], data: bytes) -> M:
    """Raises Abort where the bytes are no message, or more than an honest one has."""
    try:
        if len(data) <= REQUEST_LIMIT_BYTES:
            return request_class.FromString(data)
    except DecodeError:
        pass
    message = f"this is no request of {REQUEST_LIMIT_BYTES} bytes at most"
    raise Abort(StatusCode.INVALID_ARGUMENT, message)


async def _next(answers: AsyncIterator[Any]) -> Any:
    """The next one; None at the end."""
    return await anext(answers, None)
