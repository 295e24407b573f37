"""grpc.health.v1: whether a model, or the server as a whole, answers requests."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import TypeVar

from google.protobuf.message import DecodeError, Message
from grpc import StatusCode
from grpc_health.v1 import health_pb2
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse

from server.api.in_flight import InFlightLimits
from server.api.rpc.streaming import counted_stream
from server.security.principal import Principal
from server.transport.methods import Abort, Method, StreamingMethod, UnaryMethod, WireCall

HEALTH = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name

MAX_REQUEST_BYTES = 4096  # a request holds one name, and a watch keeps it for its whole life

M = TypeVar("M", bound=Message)


class ServingState:
    """Whether the server accepts new requests. It stops once, at the beginning of a shutdown."""

    def __init__(self) -> None:
        self._is_accepting = True

    @property
    def is_accepting(self) -> bool:
        return self._is_accepting

    def stop_accepting(self) -> None:
        self._is_accepting = False


class Health:
    """Check and Watch. `is_serving` says whether a name serves a caller.

    It returns None for a name that is unknown to the caller.

    grpcio's own health servicer forgets all watchers of a name when one of them leaves (seen in
    1.76). Used on the event loop's thread only.
    """

    def __init__(self, is_serving: Callable[[Principal, str], bool | None]) -> None:
        self._is_serving = is_serving
        self._change = asyncio.Event()
        self._is_retired = False
        self._is_stopped = False

    def on_change(self) -> None:
        """Lets every watcher check again."""
        self._change.set()
        self._change = asyncio.Event()

    def retire(self) -> None:
        """Reports NOT_SERVING for every known name from now on, to watchers too."""
        self._is_retired = True
        self.on_change()

    def stop(self) -> None:
        """Retires, and ends all watches: otherwise one watcher would delay the shutdown."""
        self._is_stopped = True
        self.retire()

    def check(self, request: HealthCheckRequest, principal: Principal) -> HealthCheckResponse:
        """Raises Abort for an unknown name."""
        status = self._status(request.service, principal)
        if status == HealthCheckResponse.SERVICE_UNKNOWN:
            raise Abort(StatusCode.NOT_FOUND, "neither a service nor a model has this name")
        return HealthCheckResponse(status=status)

    async def watch(
        self, request: HealthCheckRequest, principal: Callable[[], Principal]
    ) -> AsyncIterator[HealthCheckResponse]:
        """Yields the status now, and after each change. The principal may change too."""
        sent = None
        while True:
            # Read before the status: changes that come while a response is sent are not missed.
            change, is_stopped = self._change, self._is_stopped
            status = self._status(request.service, principal())
            if status != sent:
                sent = status
                yield HealthCheckResponse(status=status)
            if is_stopped:
                return
            await change.wait()

    def _status(self, name: str, principal: Principal) -> HealthCheckResponse.ServingStatus:
        is_serving = self._is_serving(principal, name)
        if is_serving is None:
            return HealthCheckResponse.SERVICE_UNKNOWN
        if is_serving and not self._is_retired:
            return HealthCheckResponse.SERVING
        return HealthCheckResponse.NOT_SERVING


def health_methods(health: Health, in_flight: InFlightLimits) -> dict[str, Method]:
    """The methods of grpc.health.v1 by path.

    A Watch counts as a call in progress. A Check does not: it holds no memory, and a busy server
    must not look dead.
    """

    async def check(data: bytes, call: WireCall) -> bytes:
        request = parse_small(HealthCheckRequest, data)
        response: Message = health.check(request, call.caller.principal)
        return response.SerializeToString()

    async def watch(requests: AsyncIterator[bytes], call: WireCall) -> None:
        with counted_stream("Watch", in_flight, call.caller.principal):
            async for data in requests:  # there is exactly one
                request = parse_small(HealthCheckRequest, data)
                async for response in health.watch(request, lambda: call.caller.principal):
                    await call.write(response.SerializeToString())
                return

    return {f"/{HEALTH}/Check": UnaryMethod(check), f"/{HEALTH}/Watch": StreamingMethod(watch)}


def parse_small(request_class: type[M], data: bytes) -> M:
    """Parses a request of at most MAX_REQUEST_BYTES. Raises Abort."""
    try:
        if len(data) <= MAX_REQUEST_BYTES:
            return request_class.FromString(data)
    except DecodeError:
        pass
    name = request_class.DESCRIPTOR.full_name
    raise Abort(
        StatusCode.INVALID_ARGUMENT,
        f"request: {len(data):,} bytes are not a {name} of at most {MAX_REQUEST_BYTES:,} bytes",
    )
