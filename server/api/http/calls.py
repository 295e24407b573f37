"""Calls by HTTP: timed, counted and refused like the gRPC method of the same name.

A client sets its deadline in the header `Grpc-Timeout`, because HTTP has no header for it. gRPC
defines its form ("500m" is half a second), and gateways from HTTP to gRPC read it too. A call whose
client disconnects, or whose deadline passes, is cancelled.
"""

from __future__ import annotations

import asyncio
import math
from asyncio import FIRST_COMPLETED
from collections.abc import Callable, Coroutine
from typing import Any

from grpc import StatusCode
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from server.api.context import CallContext, DeferredCallbacks
from server.api.http.access import HttpAccess, refusal
from server.api.http.body import BodyReader
from server.api.http.problem import http_problem, problem
from server.api.in_flight import InFlightLimits
from server.api.method_metrics import MethodMetrics
from server.api.status import INTERNAL_ERROR, REFUSALS, STATUS, message_of, shortened
from server.api.v2.versions import MAX_QUOTED
from server.errors import InvalidInput, ModelNotReady, Overloaded, QuotaExceeded, ServingError
from server.telemetry.clock import clock
from server.telemetry.metrics import Metrics
from server.transport.calls.fair_starts import FairStarts
from server.transport.compression import Inflater
from server.transport.metadata import timeout_s

DEADLINE = "Grpc-Timeout"
HTTP_REFUSAL = "Convserve-Refusal"
STOP_CHECK_S = 0.2  # between checks of what is still in progress when the server stops

Answer = Callable[[Request, bytes, CallContext], Coroutine[Any, Any, Response]]
Respond = Callable[[Request, CallContext], Coroutine[Any, Any, Response]]


class HttpCalls:
    """Makes routes for calls, and stops them. Used on the event loop's thread only."""

    def __init__(
        self,
        metrics: Metrics,
        in_flight: InFlightLimits,
        after_response: DeferredCallbacks,
        inflater: Inflater,
        access: HttpAccess,
        starts: FairStarts,
    ) -> None:
        self._metrics = metrics
        self._after_response = after_response
        self._access = access
        self._starts = starts
        self._bodies = BodyReader(in_flight, inflater)
        self._working: set[asyncio.Task[Response]] = set()
        self._is_stopping = False
        self._is_stopped = False  # calls in progress get no more time

    def get(self, path: str, method: str, answer: Answer) -> Route:
        """A route without a body that is answered from memory. No limit refuses it."""
        metrics = MethodMetrics(method, self._metrics)

        async def respond(request: Request, context: CallContext) -> Response:
            try:
                response = await answer(request, b"", context)
            except Exception as error:
                return _failure(error, context, metrics, method)
            metrics.succeeded(context, clock() - context.arrived_s)
            return response

        return self._route(path, "GET", method, metrics, respond)

    def post(
        self, path: str, method: str, answer: Answer, limit: int | Callable[[Request], int]
    ) -> Route:
        """A route with a body of at most `limit` bytes."""
        metrics = MethodMetrics(method, self._metrics)

        async def respond(request: Request, context: CallContext) -> Response:
            try:
                if self._is_stopping:
                    raise ModelNotReady("the server is stopping")
                context.deadline_s = context.arrived_s + _timeout(request.headers.get(DEADLINE))
                most = limit if isinstance(limit, int) else limit(request)
                async with self._bodies.read(request, most, context) as body:
                    work = self._in_turn(answer, request, body, context)
                    response = await self._run(request, work, context.deadline_s)
            except TimeoutError:
                metrics.cancelled(context, expired=True)
                return problem(StatusCode.DEADLINE_EXCEEDED, "the deadline has passed")
            except ClientDisconnect:
                metrics.cancelled(context, expired=False)
                return Response()  # no client reads it
            except Exception as error:
                return _failure(error, context, metrics, method)
            seconds = clock() - context.arrived_s
            context.after_response(metrics.succeeded, context, seconds)
            return response

        return self._route(path, "POST", method, metrics, respond)

    def _route(
        self, path: str, verb: str, method: str, metrics: MethodMetrics, respond: Respond
    ) -> Route:
        """A route that refuses callers without permission before it reads their body."""

        async def endpoint(request: Request) -> Response:
            arrived_s = clock()
            try:
                caller = self._access.admit(request, method)
            except ServingError as error:
                metrics.rejected(STATUS[type(error)])
                return refusal(request, error, method)
            context = CallContext(arrived_s, math.inf, self._after_response, caller)
            return await respond(request, context)

        return Route(path, endpoint, methods=[verb], name=method)

    async def stop(self, grace_s: float | None) -> None:
        """Refuses new calls and waits for those in progress, at most `grace_s`; then ends them.

        May be called again with None, which waits no longer.
        """
        self._is_stopping = True
        ends_s = clock() + (grace_s or 0)
        while not self._is_stopped and (left_s := ends_s - clock()) > 0:
            if not (busy := {*self._working, *self._bodies.receiving}):
                break
            # A task that has received its body becomes a working one.
            await asyncio.wait(busy, timeout=min(left_s, STOP_CHECK_S))
        self._is_stopped = True
        self._bodies.stop()
        for task in self._working:
            task.cancel()

    async def _in_turn(
        self, answer: Answer, request: Request, body: bytes, context: CallContext
    ) -> Response:
        await self._starts.turn(context.caller.principal, len(body))
        return await answer(request, body, context)

    async def _run(
        self, request: Request, work: Coroutine[Any, Any, Response], deadline_s: float
    ) -> Response:
        """Runs the work; cancels it if the client disconnects or the deadline passes.

        Raises what the work raises, TimeoutError, ClientDisconnect, and ModelNotReady when the
        server stops.
        """
        if self._is_stopped:
            work.close()
            raise ModelNotReady("the server has stopped")
        working = asyncio.create_task(work)
        gone = asyncio.create_task(_disconnected(request))
        self._working.add(working)
        left_s = None if deadline_s == math.inf else max(0.0, deadline_s - clock())
        try:
            await asyncio.wait({working, gone}, timeout=left_s, return_when=FIRST_COMPLETED)
            if not working.done():
                raise ClientDisconnect if gone.done() else TimeoutError
        finally:
            gone.cancel()
            if not working.done():
                working.cancel()
                await asyncio.wait({working})
            self._working.discard(working)
        if working.cancelled():
            raise ModelNotReady("the server has stopped")
        return working.result()


def _failure(
    error: Exception, context: CallContext, metrics: MethodMetrics, method: str
) -> Response:
    """The response to a call that failed; counts it too."""
    if isinstance(error, ServingError):
        metrics.failed(context, error)
        members: dict[str, Any] = {}
        headers: dict[str, str] = {}
        if isinstance(error, InvalidInput):
            members["field"] = shortened(error.field)
        elif isinstance(error, (Overloaded, QuotaExceeded)):
            members["retry_after_ms"] = math.ceil(error.retry_after_s * 1e3)
            headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_s)))
            headers[HTTP_REFUSAL] = REFUSALS[type(error)]
        return problem(STATUS[type(error)], message_of(error, method), members, headers)
    if isinstance(error, HTTPException):
        metrics.count(context, StatusCode.INVALID_ARGUMENT)
        return http_problem(error)
    metrics.crashed(context)
    return problem(StatusCode.INTERNAL, INTERNAL_ERROR)


def _timeout(text: str | None) -> float:
    """Seconds to the deadline; infinite without one. Raises InvalidInput."""
    if text is None:
        return math.inf
    seconds = timeout_s(text)
    if seconds is None:
        raise InvalidInput(
            DEADLINE,
            f"is {text[:MAX_QUOTED]!r}; up to 8 digits and one of H, M, S, m, u, n are needed: "
            "500m is half a second",
        )
    return seconds


async def _disconnected(request: Request) -> None:
    """Returns when the client disconnects. The body must have been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
