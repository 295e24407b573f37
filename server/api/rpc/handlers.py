"""gRPC handlers: every RPC is parsed, timed, counted and refused in the same way.

An RPC is a coroutine `(request, context) -> response` that may raise. `grpc_methods` makes a
handler for each method in a service's descriptor, so no method can be forgotten.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Set
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

from google.protobuf.descriptor import Descriptor, ServiceDescriptor
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass
from grpc import StatusCode

from server.api.context import CallContext, DeferredCallbacks
from server.api.in_flight import InFlightLimits
from server.api.method_metrics import MethodMetrics
from server.api.rpc.field_limit import SMALL_BYTES, check_fields, text_that_is_not_utf8
from server.api.rpc.streaming import answer_in_order, counted_stream
from server.api.status import INTERNAL_ERROR, STATUS, abort_busy, abort_for, message_of
from server.api.turns import WorkTurns
from server.errors import InvalidInput, ServingError
from server.security.principal import Principal
from server.telemetry.clock import clock
from server.telemetry.metrics import Metrics
from server.telemetry.tracing import Tracing
from server.transport.methods import Abort, Method, StreamingMethod, UnaryMethod, WireCall

# The caller's own clock may cancel a call shortly before the deadline that we know. gRPC rounds the
# time left up, by 1 % at most. (9 ms were seen at deadlines of 1 to 3 s.)
EARLY_CANCEL_S = 0.005
EARLY_CANCEL_FRACTION = 0.01

Rpc = Callable[[Any, CallContext], Awaitable[Message]]


@dataclass(frozen=True, slots=True)
class CallSupport:
    """The objects that all handlers of a server share."""

    metrics: Metrics
    in_flight: InFlightLimits
    after_response: DeferredCallbacks
    turns: WorkTurns
    stopping: asyncio.Event  # when set, streams read no more requests and end
    tracing: Tracing | None = None


def grpc_methods(
    service: ServiceDescriptor,
    implementation: object,
    support: CallSupport,
    *,
    stream_error: Callable[[CallContext, str], Message] | None = None,
    without: Set[str] = frozenset(),
) -> dict[str, Method]:
    """The methods of a service by path, from the coroutines of `implementation`.

    `stream_error` makes the message that answers a failed request in a stream. Methods in `without`
    are UNIMPLEMENTED.
    """
    methods: dict[str, Method] = {}
    for descriptor in service.methods:
        if descriptor.name in without:
            continue
        handler = _Handler(
            descriptor.name,
            GetMessageClass(descriptor.input_type),
            getattr(implementation, descriptor.name),
            support,
        )
        if descriptor.client_streaming:
            assert stream_error is not None, f"{descriptor.name} needs an error message"
            stream = _StreamHandler(handler, stream_error)
            method: Method = StreamingMethod(stream.answer, handler.metrics.rejected)
        else:
            method = UnaryMethod(handler.answer, handler.refuse_busy, handler.metrics.rejected)
        methods[f"/{service.full_name}/{descriptor.name}"] = method
    return methods


class _UnexpectedError(Exception):
    """Replaces an exception that is logged already; callers get no details."""


class _Handler:
    """One RPC, from the bytes of a request to the bytes of its response."""

    def __init__(
        self, name: str, request_class: type[Message], rpc: Rpc, support: CallSupport
    ) -> None:
        self.name = name
        self.support = support
        self.metrics = MethodMetrics(name, support.metrics)
        self._request_class = request_class
        self._rpc = rpc
        self._in_flight = support.in_flight
        self._turns = support.turns
        self._after_response = support.after_response
        self._tracing = support.tracing

    async def answer(self, data: bytes, call: WireCall) -> bytes:
        """Answers a unary call. Raises Abort."""
        arrived_s = clock()
        trace = None
        if self._tracing is not None:
            trace = self._tracing.begin(self.name, call.metadata(), arrived_s)
        deadline_s = call.deadline_s
        context = CallContext(arrived_s, deadline_s, self._after_response, call.caller, trace)
        left_s = None if deadline_s == math.inf else deadline_s - arrived_s
        try:
            return await self.respond(data, context, left_s)
        except ServingError as error:
            raise abort_for(error, self.name) from None
        except _UnexpectedError:
            raise Abort(StatusCode.INTERNAL, INTERNAL_ERROR) from None

    def refuse_busy(self, principal: Principal, wait_s: float) -> Abort:
        """The status of a call that would wait too long for the event loop."""
        self.metrics.shed(principal.name)
        return abort_busy(wait_s)

    async def respond(self, data: bytes, context: CallContext, left_s: float | None) -> bytes:
        """Answers one request; `left_s` was the time to its deadline when the RPC began.

        Raises what the RPC raises, or _UnexpectedError. The call has been counted by then.
        """
        in_flight, principal = self._in_flight, context.caller.principal
        try:
            in_flight.begin(principal, len(data))
            if len(data) > SMALL_BYTES:
                descriptor = cast(Descriptor, self._request_class.DESCRIPTOR)
                await check_fields(data, descriptor, in_flight.max_fields, self._turns)
            request = _parse(self._request_class, data)
            response = await self._rpc(request, context)
            body = response.SerializeToString()
        except ServingError as error:
            self.metrics.failed(context, error)
            raise
        except asyncio.CancelledError:  # the caller cancelled, or the deadline has passed
            early_s = EARLY_CANCEL_S
            if left_s is not None:
                early_s = max(early_s, EARLY_CANCEL_FRACTION * left_s)
            self.metrics.cancelled(context, expired=clock() >= context.deadline_s - early_s)
            raise
        except Exception:
            self.metrics.crashed(context)
            raise _UnexpectedError from None
        finally:
            in_flight.end(principal, len(data))
        context.after_response(self.metrics.succeeded, context, clock() - context.arrived_s)
        return body


class _StreamHandler:
    """A stream. It counts as one call, and each of its requests as one more."""

    def __init__(
        self, handler: _Handler, error_message: Callable[[CallContext, str], Message]
    ) -> None:
        self._handler = handler
        self._error_message = error_message

    async def answer(self, requests: AsyncIterator[bytes], call: WireCall) -> None:
        support = self._handler.support
        principal = call.caller.principal
        with counted_stream(self._handler.name, support.in_flight, principal) as unsent:
            respond = partial(self._respond, call, call.time_remaining())
            await answer_in_order(requests, call, respond, support.stopping, unsent)

    async def _respond(self, call: WireCall, left_s: float | None, data: bytes) -> bytes:
        """Answers one request; a failure becomes a message too."""
        await call.turn(len(data))
        after_response = self._handler.support.after_response
        context = CallContext(clock(), call.deadline_s, after_response, call.caller)
        try:
            return await self._handler.respond(data, context, left_s)
        except ServingError as error:
            message = f"{STATUS[type(error)].name}: {message_of(error, self._handler.name)}"
        except _UnexpectedError:
            message = f"{StatusCode.INTERNAL.name}: {INTERNAL_ERROR}"
        return self._error_message(context, message).SerializeToString()


def _parse(request_class: type[Message], data: bytes) -> Message:
    """Raises InvalidInput for bytes that are not the message."""
    try:
        return request_class.FromString(data)
    except DecodeError as error:
        descriptor = cast(Descriptor, request_class.DESCRIPTOR)
        if name := text_that_is_not_utf8(data, descriptor):
            raise InvalidInput(name, "is text, and must be valid UTF-8") from None
        message = f"{len(data)} bytes that are not a {descriptor.full_name}: {error}"
        raise InvalidInput("request", message) from None
