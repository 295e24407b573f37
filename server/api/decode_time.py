"""How long images take to decode, learned from those before."""

from __future__ import annotations

from collections.abc import Sequence

from server.telemetry.clock import clock

Data = bytes | memoryview

FRESH_S = 2.0  # an estimate holds for this long after an image; then the next one counts as free
STEP = 1.1  # by which an estimate moves to the next measurement


class DecodeTimes:
    """The median time of images by size and format. Any thread may use it.

    Images are alike if their sizes are within a factor of two, and their first bytes are the same.
    An estimate moves by a step, whatever the measurement is: a few slow files among many do not
    change it much. It expires, because requests that are refused for it cannot correct it.
    """

    def __init__(self) -> None:
        self._times: dict[tuple[int, int], tuple[float, float]] = {}  # the median, and until when

    def expected_s(self, data: Data) -> float:
        """Seconds of a thread; 0 if nothing is known."""
        median_s, until_s = self._times.get(_kind(data), (0.0, 0.0))
        return median_s if clock() < until_s else 0.0

    def record(self, data: Data, seconds: float) -> None:
        now_s = clock()
        median_s, _ = self._times.get(_kind(data), (0.0, 0.0))
        if not median_s:
            median_s = seconds
        else:
            median_s = min(seconds, median_s * STEP) if seconds > median_s else median_s / STEP
        self._times[_kind(data)] = median_s, now_s + FRESH_S


class DecodeBacklog:
    """The decoding work that waits, by principal. Used on the event loop's thread only."""

    def __init__(self, threads: int) -> None:
        self.times = DecodeTimes()
        self._threads = threads
        self._waiting_s: dict[str, float] = {}  # by principal, of those with work

    def add(self, principal: str, work: Sequence[Data]) -> float:
        """Counts work that waits or runs. Returns its seconds, for `remove`."""
        seconds = sum(map(self.times.expected_s, work))
        if seconds:
            self._waiting_s[principal] = self._waiting_s.get(principal, 0.0) + seconds
        return seconds

    def remove(self, principal: str, seconds: float) -> None:
        left_s = self._waiting_s.get(principal, 0.0) - seconds
        if left_s > 1e-9:
            self._waiting_s[principal] = left_s
        else:  # also if only work of unknown length is left
            self._waiting_s.pop(principal, None)

    def ready_in_s(self, principal: str, work: Sequence[Data]) -> float:
        """Seconds until such work would be done. Principals take turns."""
        own = [self.times.expected_s(data) for data in work]
        own_s = self._waiting_s.get(principal, 0.0) + sum(own)
        others_s = sum(
            min(own_s, waiting_s)
            for name, waiting_s in self._waiting_s.items()
            if name != principal
        )
        return max(max(own, default=0.0), (own_s + others_s) / self._threads)


def _kind(data: Data) -> tuple[int, int]:
    return len(data).bit_length(), data[0] if data else 0
