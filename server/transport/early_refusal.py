"""Refuses calls that would start too late, before they cost anything.

With more calls than processor time, all calls would start after their deadline. A refusal before
there is a stream costs a tenth of starting the call.
"""

from __future__ import annotations

from collections.abc import Collection

from server.security.principal import ANONYMOUS, Principal
from server.telemetry.clock import clock
from server.transport.calls.calls_in_progress import CallsInProgress
from server.transport.calls.grpc_call import GrpcCall
from server.transport.http2.connection import ServerConnection
from server.transport.methods import Abort, UnaryMethod

# A call may wait at most this fraction of its timeout before it starts. It has waited about as long
# to be read, its response will wait as long again, and its batch takes time
# too. Measured with LeNet-5, deadlines of 20 ms, 9,000 to 12,000 calls/s in a closed loop. With
# 20,000 calls/s offered a fraction of 0.2 answers 840/s in time; 0.1, 0.07 and 0.05 answer about
# 13,000/s. With 40,000 calls/s offered they answer 940, 8,100, 9,700 and 11,400/s.
MAX_START_DELAY_FRACTION = 0.07

# For a principal that has fewer waiting calls than its share: the others are refused first.
SHARE_START_DELAY_FRACTION = 0.25

# A connection with at most this fraction of the average calls in progress has not made the wait.
MODEST_FRACTION = 0.25
COUNT_INTERVAL_S = 0.1  # the connections with calls are counted that often, and only if asked


class EarlyRefusal:
    """Decides by the wait for the event loop, and by who has caused it."""

    def __init__(
        self, calls: CallsInProgress[GrpcCall], connections: Collection[ServerConnection]
    ) -> None:
        self._calls = calls
        self._connections = connections
        self._busy_connections = 1
        self._counted_s = 0.0

    def of(
        self, method: UnaryMethod, principal: Principal, timeout_s: float, open_streams: int
    ) -> Abort | None:
        """The refusal of a call on a connection with so many others; None if it may start."""
        if method.too_late is None:
            return None
        wait_s = self._calls.loop_lag.wait_s
        if wait_s <= MAX_START_DELAY_FRACTION * timeout_s:
            return None
        if principal.name == ANONYMOUS:
            return None if self._is_modest(open_streams) else method.too_late(principal, wait_s)
        wait_s, is_within_share = self._calls.starts.wait_of(principal)
        fraction = SHARE_START_DELAY_FRACTION if is_within_share else MAX_START_DELAY_FRACTION
        return method.too_late(principal, wait_s) if wait_s > fraction * timeout_s else None

    def is_full(self, principal: Principal, open_streams: int) -> bool:
        """Whether there are too many calls for one more."""
        if principal.name != ANONYMOUS:
            return not self._calls.fits(principal)
        return self._calls.is_full and not self._is_modest(open_streams)

    def _is_modest(self, open_streams: int) -> bool:
        """Whether a connection with so many calls in progress has few, compared with others."""
        now_s = clock()
        if now_s - self._counted_s > COUNT_INTERVAL_S:
            self._counted_s = now_s
            self._busy_connections = sum(1 for one in self._connections if one.streams) or 1
        average = len(self._calls) / self._busy_connections
        return open_streams + 1 <= MODEST_FRACTION * average
