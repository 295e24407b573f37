"""Limits on frames of a client that cost work and bring no call forward.

libnghttp2 has limits too, see CONFIGURATION in connection.py. These are the ones that it lacks, or
that would end the connections of honest clients. Each is a token bucket. What the server does for
the client adds tokens: a client that gets answers may cancel calls, ping and open its windows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from server.telemetry.clock import clock

# Why a connection is cut; the names are values of a label in metrics and words in the GOAWAY frame.
RESETS = "resets"  # of streams, by the client or because of its errors (CVE-2023-44487, 2025-8671)
PINGS = "pings"
SETTINGS = "settings"
WINDOW_UPDATES = "window_updates"
SMALL_DATA = "small_data"  # frames with a few bytes of a body
LARGE_HEADERS = "large_headers"
FLOOD = "flood"  # a limit of libnghttp2
PROTOCOL_ERROR = "protocol_error"
UNSENT_BYTES = "unsent_bytes"
STALLED = "stalled"
NO_PREFACE = "no_preface"
NO_ANSWER = "no_answer"  # to a ping

REASONS = (
    *(RESETS, PINGS, SETTINGS, WINDOW_UPDATES, SMALL_DATA, LARGE_HEADERS, FLOOD, PROTOCOL_ERROR),
    *(UNSENT_BYTES, STALLED, NO_PREFACE, NO_ANSWER),
)

SMALL_DATA_BYTES = 16  # shorter than any message of the contract behind its prefix


class Work(NamedTuple):
    """What the server has done for a client since the connection opened."""

    requests: int
    writes: int
    written_bytes: int


@dataclass(frozen=True, slots=True)
class Allowance:
    """How many frames of a kind are allowed: at once, each second, and for the server's work."""

    burst: float
    per_s: float
    per_request: float = 0.0
    per_write: float = 0.0
    per_kib: float = 0.0


ALLOWANCES = {
    # Clients with short deadlines, and proxies with many users, cancel hundreds of calls a second.
    # Above 1,000 a second they may cancel half of their calls.
    RESETS: Allowance(burst=2_000, per_s=1_000, per_request=0.5),
    # Proxies ping once a second; grpc-go pings after data, to measure the connection.
    PINGS: Allowance(burst=1_000, per_s=100, per_write=1),
    SETTINGS: Allowance(burst=200, per_s=20),
    # Some clients send two for each frame of data.
    WINDOW_UPDATES: Allowance(burst=20_000, per_s=2_000, per_write=4, per_kib=4),
    SMALL_DATA: Allowance(burst=100_000, per_s=5_000),
    LARGE_HEADERS: Allowance(burst=200, per_s=20),
}


class _Bucket:
    """Tokens for one kind of frames."""

    __slots__ = ("_allowance", "_filled_s", "_tokens", "_work")

    def __init__(self, allowance: Allowance, work: Work) -> None:
        self._allowance = allowance
        self._tokens = allowance.burst
        self._filled_s = clock()
        self._work = work

    def take(self, work: Work) -> bool:
        """Takes a token. Returns False if there is none."""
        allowance, then = self._allowance, self._work
        now_s = clock()
        earned = (
            (now_s - self._filled_s) * allowance.per_s
            + (work.requests - then.requests) * allowance.per_request
            + (work.writes - then.writes) * allowance.per_write
            + (work.written_bytes - then.written_bytes) / 1024 * allowance.per_kib
        )
        self._tokens = min(allowance.burst, self._tokens + earned) - 1
        self._filled_s, self._work = now_s, work
        return self._tokens >= 0


class FrameLimits:
    """The limits on frames of one connection."""

    __slots__ = ("_buckets",)

    def __init__(self) -> None:
        self._buckets: dict[str, _Bucket] = {}

    def allows(self, kind: str, work: Work) -> bool:
        """Counts a frame. Returns False if the client has sent too many of this kind."""
        bucket = self._buckets.get(kind)
        if bucket is None:
            bucket = self._buckets[kind] = _Bucket(ALLOWANCES[kind], work)
        return bucket.take(work)
