"""Turns a failed gRPC call into one of the client's errors."""

from __future__ import annotations

import math
import re
from typing import Any, cast

import grpc
from google.protobuf.message import DecodeError

from convserve_client.errors import (
    ERRORS,
    ClassifierError,
    InvalidInput,
    Overloaded,
    QuotaExceeded,
    ServerUnreachable,
    TlsError,
    Violation,
)
from convserve_client.security.connection_errors import connection_failure, tls_failure
from convserve_client.security.tls import TlsOptions
from convserve_client.standard_messages import BadRequest, RetryInfo, Status

# The message of RESOURCE_EXHAUSTED if a request or an answer is too large: grpcio's, the server's.
TOO_LARGE = re.compile(r"message larger than max|is (more than )?[\d,]+ bytes\b.* allowed")

NOT_CONNECTED = "failed to connect"  # start of grpcio's message
REFUSAL = "convserve-refusal"  # trailer: "quota" or "overloaded"
MAX_PUSHBACK_DIGITS = 9  # of grpc-retry-pushback-ms; a longer one forbids a retry


def translate(
    failure: grpc.aio.AioRpcError,
    *,
    connected: bool,
    target: str = "the server",
    tls: TlsOptions | None = None,
) -> ClassifierError:
    """The client's error for a failed call; `connected` says if the channel is still connected."""
    code = failure.code()
    message = failure.details() or code.name.lower()
    status = _status_details(failure)
    retry_after_s = _retry_after_s(failure, status)
    if code is grpc.StatusCode.INVALID_ARGUMENT:
        violations = tuple(
            Violation(violation.field, violation.description)
            for bad_request in _unpack(status, BadRequest)
            for violation in bad_request.field_violations
        )
        return InvalidInput(message, code=code, retry_after_s=retry_after_s, violations=violations)
    error_class = ERRORS.get(code, ClassifierError)
    if code is grpc.StatusCode.UNAVAILABLE and not connected and not status.details:
        if (why := tls_failure(message, target, tls)) is not None:
            return TlsError(why, code=code)
        error_class = ServerUnreachable
        if message.startswith(NOT_CONNECTED):
            message = connection_failure(message, target, tls) or message
    elif error_class is Overloaded and _refusal(failure) == "quota":
        error_class = QuotaExceeded
    elif error_class is Overloaded and retry_after_s is None and TOO_LARGE.search(message):
        error_class = InvalidInput  # the same status, but the load is not the reason
    elif error_class is ClassifierError:
        message = f"{code.name}: {message}"
    return error_class(message, code=code, retry_after_s=retry_after_s)


def _trailing_metadata(failure: grpc.aio.AioRpcError) -> list[tuple[str, str | bytes]]:
    return list(cast(Any, failure.trailing_metadata()) or ())


def _refusal(failure: grpc.aio.AioRpcError) -> str | bytes | None:
    """Why the server refused the call: a word for programs."""
    return next((value for key, value in _trailing_metadata(failure) if key == REFUSAL), None)


def _status_details(failure: grpc.aio.AioRpcError) -> Any:
    """The google.rpc.Status of the failure; empty if there is none or it cannot be decoded."""
    for key, value in _trailing_metadata(failure):
        if key == "grpc-status-details-bin" and isinstance(value, bytes):
            try:
                return Status.FromString(value)
            except DecodeError:
                break
    return Status()


def _unpack(status: Any, message_class: Any) -> list[Any]:
    """The details of that class; details that cannot be decoded are skipped."""
    found = []
    for detail in status.details:
        if detail.type_url.rpartition("/")[2] == message_class.DESCRIPTOR.full_name:
            try:
                found.append(message_class.FromString(detail.value))
            except DecodeError:
                continue
    return found


def _retry_after_s(failure: grpc.aio.AioRpcError, status: Any) -> float | None:
    """Seconds that the server asks to wait: the longer of RetryInfo and gRPC's own pushback."""
    waits_s = [
        max(0.0, info.retry_delay.seconds + info.retry_delay.nanos / 1e9)
        for info in _unpack(status, RetryInfo)
    ]
    for key, value in _trailing_metadata(failure):
        if key == "grpc-retry-pushback-ms":
            # gRPC's retry design: a negative value, or text, means "do not retry".
            text = value.decode("latin-1") if isinstance(value, bytes) else value
            is_number = text.isascii() and text.isdigit() and len(text) <= MAX_PUSHBACK_DIGITS
            waits_s.append(int(text) / 1000 if is_number else math.inf)
    return max(waits_s, default=None)
