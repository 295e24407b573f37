"""The methods of a server: unary and streaming, and how they end a call with an error."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from grpc import StatusCode

from server.security.caller import Caller
from server.security.principal import Principal
from server.transport.metadata import Header, Trailer
from server.transport.metadata import trailers as trailers_of

STOPPING = "the server is stopping"


REFUSAL = "convserve-refusal"  # key of the reason why a call is refused
OVERLOADED = "overloaded"


class Abort(Exception):
    """Ends a call with a status other than OK."""

    def __init__(self, code: StatusCode, message: str, trailers: Sequence[Trailer] = ()) -> None:
        super().__init__(message)
        self.trailers = trailers_of(code.value[0], message, trailers)

    @classmethod
    def of_trailers(cls, trailers: tuple[Header, ...]) -> Abort:
        """Makes an Abort from the trailers of an earlier one, without encoding them again."""
        abort = cls.__new__(cls)
        abort.trailers = trailers
        return abort


class WireCall(Protocol):
    """A call, as its method sees it."""

    caller: Caller
    deadline_s: float  # on time.monotonic; infinite if the client set none

    def time_remaining(self) -> float | None:
        """Seconds to the client's deadline; None if it set none."""

    async def turn(self, size: int) -> None:
        """Waits until another request of the same stream, with `size` bytes, may start."""

    def metadata(self) -> list[tuple[str, str | bytes]]:
        """The request's metadata, values of -bin keys as bytes."""

    def add_initial_metadata(self, fields: Sequence[Trailer]) -> None:
        """Adds metadata to the headers of the response; without effect once these are sent."""

    def add_trailing_metadata(self, fields: Sequence[Trailer]) -> None:
        """Adds metadata to the trailers, whatever status the call ends with."""

    async def write(self, message: bytes) -> None:
        """Sends one response of a stream. Returns when the message is on its way."""


@dataclass(frozen=True, slots=True)
class UnaryMethod:
    """A method with one request and one response.

    `too_late` makes the refusal of a call that would start too late, from its principal and its
    expected wait in seconds. Without it every call starts. `refused` is called for calls that end
    before they start.
    """

    answer: Callable[[bytes, WireCall], Awaitable[bytes]]
    too_late: Callable[[Principal, float], Abort] | None = None
    refused: Callable[[StatusCode], None] = lambda code: None


@dataclass(frozen=True, slots=True)
class StreamingMethod:
    """A method that reads a stream of requests and writes responses to its call."""

    answer: Callable[[AsyncIterator[bytes], WireCall], Awaitable[None]]
    refused: Callable[[StatusCode], None] = lambda code: None


Method = UnaryMethod | StreamingMethod
