"""gRPC server reflection: clients such as grpcurl ask for the services and their messages."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from typing import Any

from google.protobuf.descriptor_pool import Default as default_pool
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_reflection.v1alpha.reflection import SERVICE_NAME as REFLECTION
from grpc_reflection.v1alpha.reflection import aio  # type: ignore[attr-defined]
from grpc_reflection.v1alpha.reflection_pb2 import (
    ServerReflectionRequest,
    ServerReflectionResponse,
)

from server.api.health import parse_small
from server.api.in_flight import InFlightLimits
from server.api.streaming import counted_stream
from server.api.stubs.pool import POOL
from server.transport.methods import Method, StreamingMethod, WireCall


class Reflection(aio.ReflectionServicer):  # type: ignore[misc, name-defined]
    """grpcio's reflection service. Its streams end when `stopping` is set."""

    def __init__(self, services: Sequence[str], stopping: asyncio.Event) -> None:
        super().__init__([*services, REFLECTION], pool=_DescriptorPools((default_pool(), POOL)))
        self._stopping = stopping

    async def answer(
        self, requests: AsyncIterator[ServerReflectionRequest]
    ) -> AsyncIterator[ServerReflectionResponse]:
        responses = self.ServerReflectionInfo(requests, None)
        stopping = asyncio.create_task(self._stopping.wait())
        tasks: set[asyncio.Task[Any]] = {stopping}
        try:
            while True:
                response = asyncio.create_task(_next_or_none(responses))
                tasks = {response, stopping}
                await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                if not response.done() or response.result() is None:
                    return
                yield response.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


class _DescriptorPools:
    """Several descriptor pools that are searched in order, with the methods that grpcio uses.

    The messages of package `inference` are in a pool of their own; see server.api.stubs.pool.
    """

    def __init__(self, pools: Sequence[DescriptorPool]) -> None:
        self._pools = pools

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def search(*arguments: Any) -> Any:
            for pool in self._pools[:-1]:
                with suppress(KeyError):
                    return getattr(pool, name)(*arguments)
            return getattr(self._pools[-1], name)(*arguments)

        return search


def reflection_methods(reflection: Reflection, in_flight: InFlightLimits) -> dict[str, Method]:
    """The method of the reflection service by path. A stream counts as a call in progress."""

    async def info(requests: AsyncIterator[bytes], call: WireCall) -> None:
        with counted_stream("ServerReflectionInfo", in_flight):
            parsed = (parse_small(ServerReflectionRequest, data) async for data in requests)
            async for response in reflection.answer(parsed):
                await call.write(response.SerializeToString())

    return {f"/{REFLECTION}/ServerReflectionInfo": StreamingMethod(info)}


async def _next_or_none(responses: AsyncIterator[Any]) -> Any:
    """The next response; None after the last one."""
    return await anext(responses, None)
