"""Errors that clients see. Each class stands for what the client should do, in every protocol.

ServingError
+-- InvalidInput          the request is wrong: correct it
+-- Unauthenticated       no valid credential: send one
+-- Forbidden             the caller lacks a permission: ask the operator
+-- ModelNotFound         there is no such model or version: choose another
+-- ModelNotReady         the model is loading, draining or failed its check: try again later
+-- Overloaded            the queue can't meet the deadline: try again after the given time
+-- QuotaExceeded         the caller's quota is used up: try again after the given time
+-- DeadlineUnreachable   even an idle engine can't meet the deadline: allow more time
+-- EngineFailure         the server failed: the request is not to blame
    +-- DeviceLost        the device fails all further requests too

CannotServe is for the operator: the server can't start.
"""


class ServingError(Exception):
    """Base class: the message is written for the client."""


class InvalidInput(ServingError):
    """The request is wrong; `field` is its path in the message, such as "images[3].raw"."""

    def __init__(self, field: str, description: str) -> None:
        super().__init__(f"{field}: {description}")
        self.field = field
        self.description = description


class Unauthenticated(ServingError):
    """The request has no valid credential. `reason` is the word for metrics and logs.

    The message never says which part of a credential is wrong, nor what would be right.
    """

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


class Forbidden(ServingError):
    """The caller may not do this; the message says which permission is missing."""


class ModelNotFound(ServingError):
    """There is no such model or version; the message lists the known ones."""


class ModelNotReady(ServingError):
    """The model is loading, draining or failed its check."""


class Overloaded(ServingError):
    """The queue can't meet the request's deadline; `retry_after_s` is the time until a retry."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class QuotaExceeded(ServingError):
    """The caller's quota is used up; `retry_after_s` is the time until a retry."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class DeadlineUnreachable(ServingError):
    """Even an idle engine can't meet the request's deadline."""


class EngineFailure(ServingError):
    """The engine failed. The message is for the log; clients get no details."""


class DeviceLost(EngineFailure):
    """The device can't be used any more until the process restarts."""


class CannotServe(Exception):
    """The server can't start; the message says why and what to do."""
