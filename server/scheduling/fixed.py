"""The fixed scheduler: a batch size and a delay, as in Triton and TensorFlow Serving.

It exists for comparison with the deadline scheduler.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence

from server.errors import Overloaded
from server.scheduling.base import Batch, BatchPart, InstanceGroup, Request


class FixedScheduler:
    """Starts a batch when `size` rows wait or the oldest request has waited for `delay_s`.

    It ignores deadlines and profiles. It refuses requests when `capacity` rows wait for the model.
    """

    def __init__(self, units: int, capacity: int, *, size: int = 8, delay_s: float = 0.0) -> None:
        self._free = units
        self._capacity = capacity
        self._size = size
        self._delay_s = delay_s
        self._groups: dict[str, Sequence[InstanceGroup]] = {}
        self._running: dict[str, list[int]] = {}  # batches, by group
        self._requests: dict[str, deque[Request]] = {}
        self._rows: dict[str, int] = {}  # admitted, not in a batch
        self._ready_rows: dict[str, int] = {}  # of these, the rows that can run

    def add(
        self,
        model: str,
        groups: Sequence[InstanceGroup],
        *,
        objective_s: float,
        weight: float = 1.0,
    ) -> None:
        self._groups[model] = groups
        self._running[model] = [0] * len(groups)
        self._requests[model] = deque()
        self._rows[model] = self._ready_rows[model] = 0

    def remove(self, model: str) -> list[Request]:
        del self._groups[model], self._running[model], self._rows[model], self._ready_rows[model]
        return [request for request in self._requests.pop(model) if not request.is_cancelled]

    def admit(self, model: str, request: Request, now_s: float) -> None:
        if self._rows[model] + request.rows > self._capacity:
            fastest = min(self._groups[model], key=lambda group: group.profile(group.max_batch))
            batch_s = fastest.profile(fastest.max_batch)
            raise Overloaded(
                f"the queue holds at most {self._capacity} images: {self._rows[model]} images wait "
                f"for {model}",
                retry_after_s=batch_s * self._rows[model] / fastest.max_batch,
            )
        self._rows[model] += request.rows

    def mark_ready(self, model: str, request: Request, now_s: float) -> None:
        if model in self._requests and not request.is_cancelled:
            request.mark_ready()
            self._ready_rows[model] += request.rows
            self._requests[model].append(request)

    def cancel(self, model: str, request: Request) -> None:
        if not request.is_cancelled:
            request.mark_cancelled()
            if model in self._rows:
                left = request.rows - request.taken_rows
                self._rows[model] -= left
                self._ready_rows[model] -= left if request.is_ready else 0

    def next_batch(self, now_s: float) -> Batch | None:
        for model in sorted(self._requests, key=self._oldest_s):
            waiting = self._ready_rows[model]
            is_due = waiting >= self._size or now_s >= self._oldest_s(model) + self._delay_s
            if not waiting or not is_due:
                continue
            for index, group in sorted(enumerate(self._groups[model]), key=lambda e: e[1].units):
                if group.units <= self._free and self._running[model][index] < group.count:
                    return self._start(model, index, min(group.max_batch, self._size, waiting))
        return None

    def take_expired(self) -> Iterable[tuple[str, Request]]:
        return ()

    def batch_finished(self, batch: Batch, now_s: float, seconds: float) -> None:
        self._free += batch.units
        if batch.model in self._running:
            self._running[batch.model][batch.group_index] -= 1

    def next_wake_s(self, now_s: float) -> float | None:
        """The time at which the oldest request has waited for the delay."""
        due_s = min((self._oldest_s(model) for model in self._requests), default=math.inf)
        due_s += self._delay_s
        return due_s if now_s < due_s < math.inf else None

    def queued_rows(self, model: str) -> int:
        return self._rows.get(model, 0)

    def _oldest_s(self, model: str) -> float:
        requests = self._requests[model]
        while requests and requests[0].is_cancelled:
            requests.popleft()
        return requests[0].arrived_s if requests else math.inf

    def _start(self, model: str, group_index: int, size: int) -> Batch:
        requests, group = self._requests[model], self._groups[model][group_index]
        parts: list[BatchPart] = []
        rows = 0
        while rows < size:
            request = requests[0]
            if not request.is_cancelled:
                count = min(size - rows, request.rows - request.taken_rows)
                parts.append(request.take(count))
                rows += count
            if request.is_cancelled or request.taken_rows == request.rows:
                requests.popleft()
        self._rows[model] -= rows
        self._ready_rows[model] -= rows
        self._running[model][group_index] += 1
        self._free -= group.units
        return Batch(model, group_index, group.units, parts, rows, group.profile(rows))
