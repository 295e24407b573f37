"""Errors of the client, named for what a caller can do about them.

ClassifierError
+-- InvalidInput        the request is wrong: correct it
+-- Unauthenticated     no valid credential: give a token or a certificate
+-- PermissionDenied    the caller may not do this: ask the operator
+-- ModelNotFound       no such model or version: choose another one
+-- ModelNotReady       the server runs, but the model does not: try again later
+-- ServerUnreachable   nothing answers at the target: check the address or wait
|   +-- TlsError        the TLS handshake failed: check certificates and names
+-- Overloaded          the server cannot answer in time: wait for `retry_after_s`
+-- QuotaExceeded       the caller's own quota is used up: wait for `retry_after_s`
+-- DeadlineExceeded    no answer within the timeout: allow more time or send less
+-- EngineFailure       the server failed: the input is not the cause
"""

from __future__ import annotations

from dataclasses import dataclass

import grpc


class ClassifierError(Exception):
    """Failure of a call. `code` is the gRPC status, or None if the request was never sent."""

    def __init__(
        self,
        message: str,
        *,
        code: grpc.StatusCode | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        """`retry_after_s` is the wait that the server asks for; infinite means "do not retry"."""
        super().__init__(message)
        self.code = code
        self.retry_after_s = retry_after_s


@dataclass(frozen=True, slots=True)
class Violation:
    """An error in one field of a request, for example in "images[3].raw"."""

    field: str
    description: str


class InvalidInput(ClassifierError):
    """The request is wrong. `violations` lists the fields and what is wrong with each."""

    def __init__(
        self,
        message: str,
        *,
        code: grpc.StatusCode | None = None,
        retry_after_s: float | None = None,
        violations: tuple[Violation, ...] = (),
    ) -> None:
        super().__init__(message, code=code, retry_after_s=retry_after_s)
        self.violations = violations


class Unauthenticated(ClassifierError):
    """The server requires a credential, and the call had none that is valid."""


class PermissionDenied(ClassifierError):
    """The caller's role does not allow the call. The message says what is missing."""


class ModelNotFound(ClassifierError):
    """The server has no such model or version. The message lists the available ones."""


class ModelNotReady(ClassifierError):
    """The server answered that the model is loading, draining, or failed its check."""


class ServerUnreachable(ClassifierError):
    """There is no connection to the server, or the connection broke before the answer came."""


class TlsError(ServerUnreachable):
    """The TLS handshake failed. The message names the file or the host. No retry can help."""


class Overloaded(ClassifierError):
    """The server refused the call. `retry_after_s` says when to try again."""


class QuotaExceeded(ClassifierError):
    """The caller's quota on this server is used up. `retry_after_s` says when there is room.

    Quotas belong to the caller. Another server has a quota of its own, but sending the call there
    defeats the purpose of the quota.
    """


class DeadlineExceeded(ClassifierError):
    """The answer did not come in time, or the server knows that it cannot."""


class EngineFailure(ClassifierError):
    """The server failed. Its log has the details; the answer does not."""


ERRORS: dict[grpc.StatusCode, type[ClassifierError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidInput,
    grpc.StatusCode.UNAUTHENTICATED: Unauthenticated,
    grpc.StatusCode.PERMISSION_DENIED: PermissionDenied,
    grpc.StatusCode.NOT_FOUND: ModelNotFound,
    grpc.StatusCode.UNAVAILABLE: ModelNotReady,  # ServerUnreachable if there is no connection
    grpc.StatusCode.RESOURCE_EXHAUSTED: Overloaded,  # or QuotaExceeded, by a trailer
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.INTERNAL: EngineFailure,
}


def closed_error() -> ClassifierError:
    """Error of a call that was in progress when the client was closed."""
    return ClassifierError(
        "the client was closed before the answer came", code=grpc.StatusCode.CANCELLED
    )
