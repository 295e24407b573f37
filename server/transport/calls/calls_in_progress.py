"""Calls in progress on one server, and the limits they share."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

from server.security.fair_limit import FairLimit
from server.security.principal import ANONYMOUS, Principal
from server.telemetry.loop_lag import LoopLag
from server.transport.calls.fair_starts import FairStarts
from server.transport.compression import Inflater

C = TypeVar("C")

BUSY_RETRY_S = 0.1  # pushback of a call refused for memory: most calls take less


@dataclass(frozen=True, slots=True)
class TransportLimits:
    """Limits on what a server accepts."""

    message_bytes: int  # of one message, request or response
    receiving_bytes: int  # of all messages that are not complete or not read
    streams: int  # of one connection
    calls: int = 1 << 30  # of all connections, also those whose requests have not arrived
    unsent_bytes: int = 256 << 20  # of all responses that wait for their clients
    connection_idle_s: float = 0.0  # without a call, then GOAWAY; 0: no limit
    connection_age_s: float = 0.0  # then GOAWAY; 0: no limit
    connection_age_grace_s: float = 0.0  # after the GOAWAY, for calls; 0: no limit

    @property
    def connection_unsent_bytes(self) -> int:
        """Of one connection: a quarter of all, but at least two responses."""
        return max(self.unsent_bytes // 4, 2 * self.message_bytes)


class CallsInProgress(Generic[C]):
    """Set of the calls in progress. Used on the event loop's thread only."""

    def __init__(self, limits: TransportLimits, inflater: Inflater, loop_lag: LoopLag) -> None:
        self.limits = limits
        self.inflater = inflater
        self.loop_lag = loop_lag
        self.starts = FairStarts(loop_lag)
        self.loop = asyncio.get_running_loop()
        self.receiving_bytes = 0  # of messages that are not complete or not read
        self.is_refusing = False  # new calls end UNAVAILABLE
        self.is_full = False  # there are as many calls as the limits allow
        self.idle = asyncio.Event()  # no call is in progress
        self.idle.set()
        self._calls: dict[C, Principal] = {}
        self._by_principal = FairLimit(limits.calls)
        self._bytes_by_principal = FairLimit(limits.receiving_bytes)

    def __len__(self) -> int:
        return len(self._calls)

    def __iter__(self) -> Iterator[C]:
        """The calls now in progress; they may end while they are visited."""
        return iter(list(self._calls))

    def fits(self, principal: Principal) -> bool:
        """Whether a principal may have one more call."""
        return self._by_principal.fits(principal, 1)

    def hold(self, principal: Principal, size: int) -> bool:
        """Counts `size` more bytes that are not read; a negative `size` gives bytes back.

        Returns whether they are within the limits. They are counted anyway.
        """
        self.receiving_bytes += size
        is_within = self.receiving_bytes <= self.limits.receiving_bytes
        if principal.name != ANONYMOUS:
            by_principal = self._bytes_by_principal
            if size < 0:
                by_principal.remove(principal, -size)
            else:
                is_within = by_principal.fits(principal, size)
                by_principal.add(principal, size)
        return is_within or size <= 0

    def add(self, call: C, principal: Principal) -> None:
        if not self._calls:
            self.idle.clear()
        self._calls[call] = principal
        if principal.name != ANONYMOUS:
            self._by_principal.add(principal, 1)
        self.is_full = len(self._calls) >= self.limits.calls

    def remove(self, call: C) -> None:
        principal = self._calls.pop(call, None)
        if principal is not None and principal.name != ANONYMOUS:
            self._by_principal.remove(principal, 1)
        self.is_full = False
        if not self._calls:
            self.idle.set()
