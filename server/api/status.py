"""Errors as callers see them: gRPC status, HTTP status, message and details."""

from __future__ import annotations

import logging
import math
from functools import lru_cache
from http import HTTPStatus

from google.protobuf.duration_pb2 import Duration
from google.rpc.error_details_pb2 import BadRequest, RetryInfo
from google.rpc.status_pb2 import Status
from grpc import StatusCode

from server.errors import (
    DeadlineUnreachable,
    DeviceLost,
    EngineFailure,
    Forbidden,
    InvalidInput,
    ModelNotFound,
    ModelNotReady,
    Overloaded,
    QuotaExceeded,
    ServingError,
    Unauthenticated,
)
from server.transport.metadata import Header
from server.transport.methods import OVERLOADED, REFUSAL, Abort

log = logging.getLogger(__name__)

STATUS: dict[type[ServingError], StatusCode] = {
    InvalidInput: StatusCode.INVALID_ARGUMENT,
    Unauthenticated: StatusCode.UNAUTHENTICATED,
    Forbidden: StatusCode.PERMISSION_DENIED,
    ModelNotFound: StatusCode.NOT_FOUND,
    ModelNotReady: StatusCode.UNAVAILABLE,
    Overloaded: StatusCode.RESOURCE_EXHAUSTED,
    QuotaExceeded: StatusCode.RESOURCE_EXHAUSTED,
    DeadlineUnreachable: StatusCode.DEADLINE_EXCEEDED,
    EngineFailure: StatusCode.INTERNAL,
    DeviceLost: StatusCode.INTERNAL,
}
HTTP_STATUS = {
    StatusCode.INVALID_ARGUMENT: HTTPStatus.BAD_REQUEST,
    StatusCode.UNAUTHENTICATED: HTTPStatus.UNAUTHORIZED,
    StatusCode.PERMISSION_DENIED: HTTPStatus.FORBIDDEN,
    StatusCode.NOT_FOUND: HTTPStatus.NOT_FOUND,
    StatusCode.RESOURCE_EXHAUSTED: HTTPStatus.TOO_MANY_REQUESTS,
    StatusCode.UNAVAILABLE: HTTPStatus.SERVICE_UNAVAILABLE,
    StatusCode.DEADLINE_EXCEEDED: HTTPStatus.GATEWAY_TIMEOUT,
    StatusCode.INTERNAL: HTTPStatus.INTERNAL_SERVER_ERROR,
}

# Tells proxies whether another server may have room: it has its own queue, but the same quota.
REFUSALS: dict[type[ServingError], str] = {Overloaded: OVERLOADED, QuotaExceeded: "quota"}

# An unexpected exception is logged in full. Callers get no details.
INTERNAL_ERROR = "internal error"

# Characters of a message to a caller. A trailer carries it, twice if there are details, with up to
# three bytes a character. gRPC clients reject trailers above 8 KiB.
MAX_MESSAGE = 600

BUSY_STEP_S = 0.002  # retry times are rounded up to a multiple


def abort_for(error: ServingError, method: str) -> Abort:
    """The gRPC status of an error, with google.rpc details if there are any."""
    code = STATUS[type(error)]
    message = message_of(error, method)
    if isinstance(error, (Overloaded, QuotaExceeded)):
        wait_ms = math.ceil(error.retry_after_s * 1e3)
        return Abort.of_trailers(_exhausted(message, wait_ms, REFUSALS[type(error)]))
    trailers: list[tuple[str, str | bytes]] = []
    if isinstance(error, InvalidInput):
        status = Status(code=code.value[0], message=message)
        description = shortened(error.description)
        violation = BadRequest.FieldViolation(field=error.field, description=description)
        status.details.add().Pack(BadRequest(field_violations=[violation]))
        trailers.append(("grpc-status-details-bin", status.SerializeToString()))
    return Abort(code, message, trailers)


def abort_busy(wait_s: float) -> Abort:
    """The gRPC status of a call that cannot begin in time: it would wait `wait_s` for the loop."""
    return _busy(math.ceil(wait_s / BUSY_STEP_S))


def message_of(error: ServingError, method: str) -> str:
    """The message that a caller gets. It has no details of an engine's failure."""
    if isinstance(error, EngineFailure):
        log.debug("engine_failure", extra={"method": method, "error": str(error)})
        return "the engine failed; the request is not to blame"
    return shortened(str(error))


def shortened(text: str) -> str:
    return text if len(text) <= MAX_MESSAGE else text[: MAX_MESSAGE - 4] + " ..."


# Overload refuses many calls with the same few messages. Building one takes 40 us.
@lru_cache(maxsize=1024)
def _exhausted(message: str, wait_ms: int, refusal: str) -> tuple[Header, ...]:
    code = STATUS[Overloaded]
    status = Status(code=code.value[0], message=message)
    wait = Duration()
    wait.FromMilliseconds(wait_ms)
    status.details.add().Pack(RetryInfo(retry_delay=wait))
    trailers: list[tuple[str, str | bytes]] = [
        ("grpc-retry-pushback-ms", str(wait_ms)),
        (REFUSAL, refusal),
        ("grpc-status-details-bin", status.SerializeToString()),
    ]
    return Abort(code, message, trailers).trailers


@lru_cache(maxsize=1024)
def _busy(steps: int) -> Abort:
    wait_s = steps * BUSY_STEP_S
    message = (
        "cannot answer in time: calls arrive faster than they can begin, and "
        f"{wait_s * 1e3:.0f} ms of them are waiting"
    )
    return abort_for(Overloaded(message, retry_after_s=wait_s), "")
