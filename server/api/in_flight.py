"""Limits on the requests in flight, applied before a request is parsed."""

from __future__ import annotations

from dataclasses import dataclass, field

from server.errors import Overloaded, QuotaExceeded
from server.security.fair_limit import FairLimit
from server.security.principal import ANONYMOUS, Principal
from server.transport.calls.calls_in_progress import BUSY_RETRY_S


@dataclass(slots=True)
class InFlightLimits:
    """Counts calls in progress and the bytes of their requests. All protocols share one instance.

    Every `begin` needs one `end`, whether or not it raised. Used on the event loop's thread only.

    Principals share both limits, see `FairLimit`. Without --auth there is only one, and it is
    counted by two numbers: this is on the path of every call.
    """

    max_fields: int  # in one message, fields of nested messages included
    max_calls: int  # health watches included
    max_bytes: int  # of the requests of all calls in progress
    calls: int = 0  # of anonymous callers
    held_bytes: int = 0
    _calls: FairLimit = field(init=False)  # of principals
    _bytes: FairLimit = field(init=False)

    def __post_init__(self) -> None:
        self._calls = FairLimit(self.max_calls)
        self._bytes = FairLimit(self.max_bytes)

    def begin(self, principal: Principal, size: int = 0) -> None:
        """Counts a call whose request has `size` bytes. Raises Overloaded, QuotaExceeded."""
        if principal.name != ANONYMOUS:
            self._begin_named(principal, size)
            return
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

    def check(self, principal: Principal) -> None:
        """Raises Overloaded or QuotaExceeded if no other call may begin now."""
        try:
            self.begin(principal)
        finally:
            self.end(principal)

    def add_bytes(self, principal: Principal, size: int) -> None:
        """Counts `size` more bytes of a call in progress. Raises Overloaded."""
        if principal.name != ANONYMOUS:
            self._add_named_bytes(principal, size)
        else:
            self.calls -= 1
            self.begin(principal, size)

    def remove_bytes(self, principal: Principal, size: int) -> None:
        """Forgets `size` bytes of a call that continues without them."""
        if principal.name != ANONYMOUS:
            self._bytes.remove(principal, size)
        else:
            self.held_bytes -= size

    def end(self, principal: Principal, size: int = 0) -> None:
        """Forgets a call, with all bytes that it still holds."""
        if principal.name != ANONYMOUS:
            self._calls.remove(principal, 1)
            self._bytes.remove(principal, size)
        else:
            self.calls -= 1
            self.held_bytes -= size

    def _begin_named(self, principal: Principal, size: int) -> None:
        held, most = self._calls.held(principal), principal.max_calls
        has_room = self._calls.fits(principal, 1)
        has_room_for_bytes = self._bytes.fits(principal, size)
        self._calls.add(principal, 1)
        self._bytes.add(principal, size)
        if most is not None and held >= most:
            raise QuotaExceeded(
                f"{principal.name} has {held:,} calls in progress; its quota allows {most:,}",
                retry_after_s=BUSY_RETRY_S,
            )
        if not has_room:
            raise Overloaded(
                f"{principal.name} has {held:,} of {self.max_calls:,} calls in progress; the rest "
                "is for other principals",
                retry_after_s=BUSY_RETRY_S,
            )
        if not has_room_for_bytes:
            raise self._too_many_bytes(principal)

    def _add_named_bytes(self, principal: Principal, size: int) -> None:
        has_room = self._bytes.fits(principal, size)
        self._bytes.add(principal, size)
        if not has_room:
            raise self._too_many_bytes(principal)

    def _too_many_bytes(self, principal: Principal) -> Overloaded:
        return Overloaded(
            f"requests of {principal.name} in progress hold {self._bytes.held(principal):,} bytes, "
            f"this one included; all principals share {self.max_bytes:,}",
            retry_after_s=BUSY_RETRY_S,
        )
