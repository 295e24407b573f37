"""The errors a caller may see, named for what the caller should do. No transport in them.

ServingError
+-- InvalidInput          the request can't be right: mend it
+-- ModelNotFound         no such model or version: choose another
+-- ModelNotReady         loading, draining or failed its check: try again later
+-- Overloaded            the queue can't serve you in time: wait as long as it says
+-- DeadlineUnreachable   even an idle engine could not make your deadline: allow more time
+-- EngineFailure         it broke on our side: the input is not to blame
    +-- DeviceLost        and so will all that runs on the same device
"""


class ServingError(Exception):
    """Any error whose message is written for the caller."""


class InvalidInput(ServingError):
    """The request can't be right; `field` is its path in the message, as "images[3].raw"."""

    def __init__(self, field: str, description: str) -> None:
        super().__init__(f"{field}: {description}")
        self.field = field
        self.description = description


class ModelNotFound(ServingError):
    """There is no such model or version; the message names those there are."""


class ModelNotReady(ServingError):
    """The model is loading, draining or failed its check."""


class Overloaded(ServingError):
    """The queue can't serve the request in time; `retry_after_s` is when to try again."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class DeadlineUnreachable(ServingError):
    """Even an idle engine could not answer within the caller's deadline."""


class EngineFailure(ServingError):
    """The engine broke. The message is for the log; callers are told no details."""


class DeviceLost(EngineFailure):
    """The device is lost to this process: nothing more can run there until it starts anew."""
