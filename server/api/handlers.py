"""How every RPC behaves: parsing, the clock, the counting, one table from errors to statuses.

An RPC is a coroutine `(request, call) -> response` that raises what it likes; `methods` makes the
transport's of all that a service's descriptor names, so none can be forgotten and none behaves
differently. Messages arrive as bytes and are parsed here.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Set
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, cast

from google.protobuf.descriptor import Descriptor, FieldDescriptor, ServiceDescriptor
from google.protobuf.duration_pb2 import Duration
from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass
from google.protobuf.unknown_fields import UnknownFieldSet
from google.rpc.error_details_pb2 import BadRequest, RetryInfo
from google.rpc.status_pb2 import Status
from grpc import StatusCode

from server.api.field_limit import has_more_fields
from server.errors import (
    DeadlineUnreachable,
    DeviceLost,
    EngineFailure,
    InvalidInput,
    ModelNotFound,
    ModelNotReady,
    Overloaded,
    ServingError,
)
from server.telemetry.clock import clock
from server.telemetry.metrics import Metrics
from server.telemetry.tracing import Trace, Tracing
from server.transport.grpc_call import BUSY_RETRY_S, STOPPING
from server.transport.methods import Abort, StreamingMethod, UnaryMethod, WireCall
from server.transport.methods import Method as WireMethod

log = logging.getLogger(__name__)

STATUS: dict[type[ServingError], StatusCode] = {
    InvalidInput: StatusCode.INVALID_ARGUMENT,
    ModelNotFound: StatusCode.NOT_FOUND,
    ModelNotReady: StatusCode.UNAVAILABLE,
    Overloaded: StatusCode.RESOURCE_EXHAUSTED,
    DeadlineUnreachable: StatusCode.DEADLINE_EXCEEDED,
    EngineFailure: StatusCode.INTERNAL,
    DeviceLost: StatusCode.INTERNAL,
}
REASON = {Overloaded: "overloaded", DeadlineUnreachable: "deadline_unreachable"}

# Of a message to a caller. It travels in a trailer, twice where there are details, and up to three
# bytes a character; gRPC clients refuse trailers of more than 8 KiB.
MESSAGE_LIMIT = 600

BUSY_STEP_S = 0.002  # what a hint is rounded up to

# A caller's own clock ends its call, and the word of it may come before the deadline we were told:
# gRPC sends the time left rounded up, by 1 % at most. (Of 1 to 3 s, by 9 ms.)
EARLY_S = 0.005
EARLY_SHARE = 0.01

STREAM_DEPTH = 64  # calls of one stream that are answered at a time; the next one is not read yet

Method = Callable[[Any, "Call"], Awaitable[Message]]


class Call:
    """What an RPC knows of the call it answers, and what the counting learns from it."""

    __slots__ = (
        "after",
        "arrived_s",
        "deadline_s",
        "model",
        "request_id",
        "stage",
        "trace",
        "version",
    )

    def __init__(self, arrived_s: float, deadline_s: float, after: DeferredCallbacks) -> None:
        self.arrived_s = arrived_s
        self.deadline_s = deadline_s  # on `telemetry.clock`; infinite where the caller set none
        self.model = ""  # set once it is known to exist
        self.version = ""
        self.request_id = ""  # set where a stream's answer is to bring it back
        self.stage = "decode"  # where it is: decode, queue or compute
        self.trace: Trace | None = None  # of a call that is traced
        self.after = after


class DeferredCallbacks:
    """Has things counted once the answers of this turn of the loop are on their way: counting is
    not what callers wait for.

    (Measured behind a ResNet-50, which leaves nothing of ours in the caches: 40 us.)
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._waiting: list[tuple[Callable[..., None], tuple[Any, ...]]] = []

    def __call__(self, record: Callable[..., None], *values: Any) -> None:
        if not self._waiting:  # answers are written within this turn, or at the end of the next
            self._loop.call_soon(self._loop.call_soon, self._run)
        self._waiting.append((record, values))

    def _run(self) -> None:
        waiting, self._waiting = self._waiting, []
        for record, values in waiting:
            try:
                record(*values)
            except Exception:
                log.exception("not_counted")


@dataclass(slots=True)
class InFlightLimits:
    """What is taken in before anything is known of a call. One for all RPCs of a server."""

    max_fields: int  # of one message, those within its parts included
    max_calls: int  # in progress, watches of the health included; the next one is refused
    max_bytes: int  # of all messages whose calls are in progress; the next call is refused
    calls: int = 0
    held_bytes: int = 0
    after: DeferredCallbacks = field(default_factory=DeferredCallbacks)

    def take(self, size: int = 0) -> None:
        """Counts a call of so many bytes until it has left, and raises Overloaded where it is one
        too many."""
        self.calls += 1
        self.held_bytes += size
        if self.calls > self.max_calls:
            why = f"{self.max_calls:,} calls are in progress, and no more are allowed"
        elif self.held_bytes > self.max_bytes:
            why = (
                f"the requests in progress hold {self.held_bytes:,} bytes, this one's included; "
                f"at most {self.max_bytes:,} are allowed"
            )
        else:
            return
        raise Overloaded(why, retry_after_s=BUSY_RETRY_S)

    def hold(self, size: int) -> None:
        """So many bytes more have come of a call that was taken. Raises as `take`, which it leaves
        counted."""
        self.calls -= 1
        self.take(size)

    def drop(self, size: int) -> None:
        """So many bytes of a call that goes on are held no longer."""
        self.held_bytes -= size

    def leave(self, size: int = 0) -> None:
        """The call is over; refused ones leave too."""
        self.calls -= 1
        self.held_bytes -= size


@dataclass(frozen=True, slots=True)
class Streams:
    """How streams are answered, whose every message is a call of its own."""

    refused: Callable[[Call, str], Message]  # the answer to a call that failed, and why
    stopping: asyncio.Event  # set, no more is read: what was read is answered, and the stream ends


def methods(
    service: ServiceDescriptor,
    implementation: object,
    metrics: Metrics,
    intake: InFlightLimits,
    *,
    streams: Streams | None = None,
    without: Set[str] = frozenset(),
    tracing: Tracing | None = None,
) -> dict[str, WireMethod]:
    """The methods of `service`, by path, from the coroutines of `implementation`; those it is to do
    `without` are UNIMPLEMENTED."""
    found: dict[str, WireMethod] = {}
    for method in service.methods:
        if method.name in without:
            continue
        answering = _Answering(
            method.name,
            GetMessageClass(method.input_type),
            getattr(implementation, method.name),
            MethodMetrics(method.name, metrics),
            intake,
        )
        if method.client_streaming:
            assert streams is not None, f"{method.name} needs to know how streams are answered"
            answer: WireMethod = _streaming(answering, streams)
        else:
            answer = _unary(answering, tracing)
        found[f"/{service.full_name}/{method.name}"] = answer
    return found


class MethodMetrics:
    """Counts the calls of one method, whatever brings them: each ends in one of these."""

    def __init__(self, method: str, metrics: Metrics) -> None:
        self._method = method
        self._metrics = metrics
        self._counters: dict[tuple[str, str, str], Any] = {}
        self._durations: dict[str, Any] = {}
        self._shed = metrics.requests.labels("", "", method, StatusCode.RESOURCE_EXHAUSTED.name)
        self._shed_reason = metrics.refused.labels("", REASON[Overloaded])

    def answered(self, call: Call, seconds: float) -> None:
        self.count(call, StatusCode.OK)
        duration = self._durations.get(call.model)
        if duration is None:
            duration = self._metrics.request_duration.labels(call.model, self._method)
            self._durations[call.model] = duration
        duration.observe(seconds, None if call.trace is None else call.trace.exemplar)

    def refused(self, call: Call, error: ServingError) -> None:
        self.count(call, STATUS[type(error)])
        # What was admitted and given up later was counted as missed, when it was given up.
        if call.stage == "decode" and (reason := REASON.get(type(error))):
            self._metrics.refused.labels(call.model, reason).inc()

    def shed(self) -> None:
        """Refused before anything was known of it, because too many others came first."""
        self._shed.inc()
        self._shed_reason.inc()

    def turned_away(self, code: StatusCode) -> None:
        """Ended by the transport, before there was a message to look at."""
        self._counter("", "", code).inc()

    def given_up(self, call: Call, *, late: bool) -> None:
        """By the caller, or because the deadline has passed."""
        self.count(call, StatusCode.DEADLINE_EXCEEDED if late else StatusCode.CANCELLED)
        if late and call.model:
            self._metrics.deadline_missed.labels(call.model, call.stage).inc()

    def broken(self, call: Call) -> None:
        """By an exception that nobody expected; it is being handled."""
        log.exception("call_failed", extra={"method": self._method, "model": call.model})
        self.count(call, StatusCode.INTERNAL)

    def count(self, call: Call, code: StatusCode) -> None:
        self._counter(call.model, call.version, code).inc()
        if call.trace is not None:
            call.trace.end(code.name)

    def _counter(self, model: str, version: str, code: StatusCode) -> Any:
        key = (model, version, code.name)
        counter = self._counters.get(key)
        if counter is None:
            counter = self._metrics.requests.labels(model, version, self._method, code.name)
            self._counters[key] = counter
        return counter


@dataclass(frozen=True, slots=True)
class _Answering:
    """One method, from the bytes of a request to those of its response."""

    name: str
    request_class: type[Message]
    method: Method
    tally: MethodMetrics
    intake: InFlightLimits

    async def response(self, data: bytes, call: Call, left_s: float | None) -> bytes:
        """Raises what the method does, or `_Unexpected`; all of it has been counted then."""
        try:
            self.intake.take(len(data))
            request = _request(self.request_class, data, self.intake.max_fields)
            response = await self.method(request, call)
            body = response.SerializeToString()
        except ServingError as error:
            self.tally.refused(call, error)
            raise
        except asyncio.CancelledError:  # by the caller, or because the deadline has passed
            early_s = EARLY_S if left_s is None else max(EARLY_S, EARLY_SHARE * left_s)
            self.tally.given_up(call, late=clock() >= call.deadline_s - early_s)
            raise
        except Exception:
            self.tally.broken(call)
            raise _Unexpected from None
        finally:
            self.intake.leave(len(data))
        call.after(self.tally.answered, call, clock() - call.arrived_s)
        return body


class _Unexpected(Exception):
    """Something that is in the log, and no caller's business."""

    MESSAGE = "internal error"


def _unary(answering: _Answering, tracing: Tracing | None) -> UnaryMethod:
    async def answer(data: bytes, wire: WireCall) -> bytes:
        arrived_s = clock()
        call = Call(arrived_s, wire.deadline_s, answering.intake.after)
        if tracing is not None:
            call.trace = tracing.begin(answering.name, wire.metadata(), arrived_s)
        try:
            return await answering.response(data, call, wire.time_remaining())
        except ServingError as error:
            raise refusal(error, answering.name) from None
        except _Unexpected:
            raise Abort(StatusCode.INTERNAL, _Unexpected.MESSAGE) from None

    def busy(wait_s: float) -> Abort:
        answering.tally.shed()
        return _busy(math.ceil(wait_s / BUSY_STEP_S))

    return UnaryMethod(answer, busy, answering.tally.turned_away)


@lru_cache(maxsize=1024)
def _busy(steps: int) -> Abort:
    """The same for all calls that would wait about as long: many are refused so in a short time."""
    wait_s = steps * BUSY_STEP_S
    why = (
        "no answer in time is possible: calls come faster than they can be begun, and "
        f"{wait_s * 1e3:.0f} ms of them wait"
    )
    return refusal(Overloaded(why, retry_after_s=wait_s), "")


def _streaming(answering: _Answering, streams: Streams) -> StreamingMethod:
    """Up to `STREAM_DEPTH` calls of a stream are answered at a time, and their answers are sent in
    the order of the requests. The stream itself counts as a call in progress too."""

    async def response(data: bytes, deadline_s: float, left_s: float | None) -> bytes:
        call = Call(clock(), deadline_s, answering.intake.after)
        try:
            return await answering.response(data, call, left_s)
        except ServingError as error:
            why = f"{STATUS[type(error)].name}: {told(error, answering.name)}"
        except _Unexpected:
            why = f"{StatusCode.INTERNAL.name}: {_Unexpected.MESSAGE}"
        return streams.refused(call, why).SerializeToString()

    async def stream(requests: AsyncIterator[bytes], wire: WireCall) -> None:
        left_s, deadline_s = wire.time_remaining(), wire.deadline_s
        answers: asyncio.Queue[asyncio.Task[bytes] | None] = asyncio.Queue()
        room = asyncio.Semaphore(STREAM_DEPTH)
        working: set[asyncio.Task[Any]] = set()

        async def read() -> None:
            try:
                await room.acquire()
                async for data in requests:
                    task = asyncio.create_task(response(data, deadline_s, left_s))
                    working.add(task)
                    task.add_done_callback(working.discard)
                    answers.put_nowait(task)
                    await room.acquire()
            finally:
                answers.put_nowait(None)

        async def end() -> None:
            await streams.stopping.wait()
            reading.cancel()

        reading, ending = asyncio.create_task(read()), asyncio.create_task(end())
        working |= {reading, ending}
        try:
            while (task := await answers.get()) is not None:
                await wire.write(await task)
                room.release()
            if reading.cancelled():
                raise Abort(StatusCode.UNAVAILABLE, STOPPING)
            reading.result()  # raises where it ended otherwise than by the end of the requests
        finally:
            tasks = list(working)
            for other in tasks:
                other.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def answer(requests: AsyncIterator[bytes], wire: WireCall) -> None:
        with counted(answering.name, answering.intake):
            await stream(requests, wire)

    return StreamingMethod(answer, answering.tally.turned_away)


@contextmanager
def counted(method: str, intake: InFlightLimits) -> Iterator[None]:
    """A stream, counting as a call in progress while it lasts; refused where it is one too many."""
    try:
        intake.take()
        yield
    except Overloaded as error:
        raise refusal(error, method) from None
    finally:
        intake.leave()


def _request(request_class: type[Message], data: bytes, max_fields: int) -> Message:
    """The message, unless it is none or costs too much to read. Raises InvalidInput."""
    if has_more_fields(data, cast(Descriptor, request_class.DESCRIPTOR), max_fields):
        raise InvalidInput(
            "request", f"has more than {max_fields:,} fields; no request needs as many"
        )
    try:
        return request_class.FromString(data)
    except DecodeError as error:
        raise _unreadable(request_class, data, error) from None


def refusal(error: ServingError, method: str) -> Abort:
    """The error's status, with what details it has."""
    code = STATUS[type(error)]
    message = told(error, method)
    if isinstance(error, Overloaded):
        return Abort.of_block(_overloaded(message, math.ceil(error.retry_after_s * 1e3)))
    trailers: list[tuple[str, str | bytes]] = []
    if isinstance(error, InvalidInput):
        status = Status(code=code.value[0], message=message)
        description = clipped(error.description)
        violation = BadRequest.FieldViolation(field=error.field, description=description)
        status.details.add().Pack(BadRequest(field_violations=[violation]))
        trailers.append(("grpc-status-details-bin", status.SerializeToString()))
    return Abort(code, message, trailers)


@lru_cache(maxsize=1024)  # who is refused has company: it takes 40 us to say it once
def _overloaded(message: str, wait_ms: int) -> bytes:
    code = STATUS[Overloaded]
    status = Status(code=code.value[0], message=message)
    wait = Duration()
    wait.FromMilliseconds(wait_ms)
    status.details.add().Pack(RetryInfo(retry_delay=wait))
    trailers: list[tuple[str, str | bytes]] = [
        ("grpc-retry-pushback-ms", str(wait_ms)),
        ("grpc-status-details-bin", status.SerializeToString()),
    ]
    return Abort(code, message, trailers).block


def told(error: ServingError, method: str) -> str:
    """What a caller is told of an error."""
    if isinstance(error, EngineFailure):
        log.debug("engine_failure", extra={"method": method, "error": str(error)})
        return "the engine failed; the request is not to blame"
    return clipped(str(error))


def clipped(text: str) -> str:
    return text if len(text) <= MESSAGE_LIMIT else text[: MESSAGE_LIMIT - 4] + " ..."


def _unreadable(request_class: type[Message], data: bytes, error: DecodeError) -> InvalidInput:
    """Names the text field that is not UTF-8, where that is what is wrong with a message."""
    descriptor = request_class.DESCRIPTOR
    try:
        present: Any = UnknownFieldSet(Empty.FromString(data))
        for entry in present:
            known = descriptor.fields_by_number.get(entry.field_number)
            if known is not None and known.type == FieldDescriptor.TYPE_STRING:
                try:
                    entry.data.decode("utf-8")
                except (UnicodeDecodeError, AttributeError):
                    return InvalidInput(known.name, "is text, and must be valid UTF-8")
    except DecodeError:
        pass
    return InvalidInput(
        "request", f"{len(data)} bytes that are not a {descriptor.full_name}: {error}"
    )
