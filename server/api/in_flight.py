"""Limits on the requests in flight, applied before a request is parsed."""

from __future__ import annotations

from dataclasses import dataclass

from server.errors import Overloaded
from server.transport.calls_in_progress import BUSY_RETRY_S


@dataclass(slots=True)
class InFlightLimits:
    """Counts calls in progress and the bytes of their requests. All protocols share one instance.

    Every `begin` needs one `end`, whether or not it raised. Used on the event loop's thread only.
    """

    max_fields: int  # in one message, fields of nested messages included
    max_calls: int  # health watches included
    max_bytes: int  # of the requests of all calls in progress
    calls: int = 0
    held_bytes: int = 0

    def begin(self, size: int = 0) -> None:
        """Counts a call whose request has `size` bytes. Raises Overloaded above a limit."""
        self.calls += 1
        self.held_bytes += size
        if self.calls > self.max_calls:
            reason = f"{self.max_calls:,} calls are in progress; no more are allowed"
        elif self.held_bytes > self.max_bytes:
            reason = (
                f"requests in progress hold {self.held_bytes:,} bytes, this one included; "
                f"at most {self.max_bytes:,} are allowed"
            )
        else:
            return
        raise Overloaded(reason, retry_after_s=BUSY_RETRY_S)

    def check(self) -> None:
        """Raises Overloaded if no other call may begin now."""
        try:
            self.begin()
        finally:
            self.end()

    def add_bytes(self, size: int) -> None:
        """Counts `size` more bytes of a call in progress. Raises as `begin` does."""
        self.calls -= 1
        self.begin(size)

    def remove_bytes(self, size: int) -> None:
        """Forgets `size` bytes of a call that continues without them."""
        self.held_bytes -= size

    def end(self, size: int = 0) -> None:
        """Forgets a call, with all bytes that it still holds."""
        self.calls -= 1
        self.held_bytes -= size
