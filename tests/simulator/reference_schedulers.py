"""The published batching rules of other servers, without the rest of those servers.

They run on the same instance groups. Their queues are unbounded, as those servers' are by default.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence

from server.scheduling.base import Batch, BatchPart, InstanceGroup, Request
from tests.simulator.scenarios import MODEL


class ReferenceScheduler:
    """One queue in order of arrival, for requests of one row. Uses the smallest instances only."""

    def __init__(self) -> None:
        self.requests: deque[Request] = deque()
        self.expired: list[tuple[str, Request]] = []

    def add(
        self,
        model: str,
        groups: Sequence[InstanceGroup],
        *,
        objective_s: float,
        weight: float = 1.0,
    ) -> None:
        self._index, self.group = min(enumerate(groups), key=lambda entry: entry[1].units)
        self._running = 0
        self.objective_s = objective_s

    def remove(self, model: str) -> list[Request]:
        return list(self.requests)

    def admit(self, model: str, request: Request, now_s: float) -> None:
        pass

    def mark_ready(self, model: str, request: Request, now_s: float) -> None:
        self.requests.append(request)

    def cancel(self, model: str, request: Request) -> None:
        request.mark_cancelled()

    def next_batch(self, now_s: float) -> Batch | None:
        if self._running == self.group.count or not self.requests:
            return None
        size = self.batch_size(now_s)
        if not self.requests or not size:
            return None
        rows = min(size, len(self.requests))
        parts = [BatchPart(self.requests.popleft(), 0, 1) for _ in range(rows)]
        self._running += 1
        return Batch(MODEL, self._index, self.group.units, parts, rows, 0.0)

    def batch_size(self, now_s: float) -> int:
        """How many requests to start now; 0 to wait."""
        raise NotImplementedError

    def take_expired(self) -> Iterable[tuple[str, Request]]:
        expired, self.expired = self.expired, []
        return expired

    def batch_finished(self, batch: Batch, now_s: float, seconds: float) -> None:
        self._running -= 1

    def next_wake_s(self, now_s: float) -> float | None:
        return None

    def queued_rows(self, model: str) -> int:
        return len(self.requests)


class AllowedSizes(ReferenceScheduler):
    """TensorFlow Serving: a batch starts at the largest allowed size or after a timeout."""

    TIMEOUT_S = 0.002

    def batch_size(self, now_s: float) -> int:
        largest = self.group.max_batch
        is_due = now_s >= self.requests[0].arrived_s + self.TIMEOUT_S
        if is_due or len(self.requests) >= largest:
            return min(largest, len(self.requests))
        return 0

    def next_wake_s(self, now_s: float) -> float | None:
        due_s = self.requests[0].arrived_s + self.TIMEOUT_S if self.requests else 0.0
        return due_s if due_s > now_s else None


class LinearModel(ReferenceScheduler):
    """BentoML: fits a line to the run times of the last batches by size, and cancels requests that
    would miss the objective. The objective is the same for all requests, as in BentoML."""

    def __init__(self) -> None:
        super().__init__()
        self._samples: deque[tuple[int, float]] = deque(maxlen=50)
        self._slope, self._base = 0.0, 0.0

    def batch_size(self, now_s: float) -> int:
        while self.requests:
            count = min(len(self.requests), self.group.max_batch)
            waited_s = now_s - self.requests[0].arrived_s
            if waited_s + self._slope * count + self._base < self.objective_s:
                return count
            if len(self.requests) == 1:
                return 1
            self.expired.append((MODEL, self.requests.popleft()))
        return 0

    def batch_finished(self, batch: Batch, now_s: float, seconds: float) -> None:
        super().batch_finished(batch, now_s, seconds)
        self._samples.append((batch.rows, seconds))
        count = len(self._samples)
        mean_n = sum(n for n, _ in self._samples) / count
        mean_s = sum(s for _, s in self._samples) / count
        spread = sum((n - mean_n) ** 2 for n, _ in self._samples)
        if spread:
            self._slope = sum((n - mean_n) * (s - mean_s) for n, s in self._samples) / spread
        self._base = mean_s - self._slope * mean_n


class Aimd(ReferenceScheduler):
    """Clipper: the batch size grows by one until a deadline is missed, then shrinks by a tenth.
    Requests expire at their deadline."""

    def __init__(self) -> None:
        super().__init__()
        self._max_batch = 1.0

    def batch_size(self, now_s: float) -> int:
        while self.requests and self.requests[0].deadline_s <= now_s:
            self.expired.append((MODEL, self.requests.popleft()))
        return min(int(self._max_batch), self.group.max_batch)

    def batch_finished(self, batch: Batch, now_s: float, seconds: float) -> None:
        super().batch_finished(batch, now_s, seconds)
        missed = any(part.request.deadline_s < now_s for part in batch.parts)
        self._max_batch = max(1.0, self._max_batch * 0.9) if missed else self._max_batch + 1
