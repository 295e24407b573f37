"""The queue of one model: its instance groups and the requests that wait for them."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import replace

from server.scheduling.base import PRIORITIES, BatchPart, InstanceGroup, Request
from server.scheduling.device_share import ShareAccount
from server.scheduling.latency import LatencyEstimate, efficient_batch
from server.scheduling.plans import make_plans
from server.scheduling.waiting_rows import WaitingRows

DEADLINE_STEPS = 48  # within one latency objective


class ModelQueue:
    """The waiting requests of a model, by priority and then by deadline.

    A request counts as waiting from its admission. It can run once it is ready.
    """

    def __init__(
        self,
        model: str,
        groups: Sequence[InstanceGroup],
        device_units: int,
        objective_s: float,
        account: ShareAccount,
    ) -> None:
        self.model = model
        self.groups = [
            replace(group, max_batch=efficient_batch(group.profile, group.max_batch))
            for group in groups
        ]
        self.latencies = [LatencyEstimate(group.profile) for group in self.groups]
        self.plans = make_plans(self.groups, self.latencies, device_units)
        self.objective_s = objective_s
        self.account = account
        self.priorities = [WaitingRows(objective_s / DEADLINE_STEPS) for _ in PRIORITIES]
        self.running = [0] * len(groups)  # batches, by group
        self.rows = 0  # admitted, not in a batch
        self.ready_rows = 0  # of these, the rows that can run
        # Time per row of recent batches, relative to batches as large as possible.
        self.batch_penalty = 1.0
        self._ready: list[tuple[int, float, int, Request]] = []  # a heap
        self._sequence = 0

    def accept(self, request: Request) -> None:
        """Adds an admitted request."""
        self.priorities[request.priority].add(request)
        self.rows += request.rows

    def mark_ready(self, request: Request) -> None:
        """Lets an admitted request run."""
        self._sequence += 1
        key = (-request.priority, request.deadline_s, self._sequence, request)
        heapq.heappush(self._ready, key)
        self.ready_rows += request.rows
        request.mark_ready()

    def first(self) -> Request | None:
        """The next request to run."""
        ready = self._ready
        while ready:
            request = ready[0][3]
            if not request.is_cancelled:
                return request
            heapq.heappop(ready)
        return None

    def take_from_first(self, request: Request, rows: int) -> BatchPart:
        """Moves rows of the request that is first into a batch."""
        part = request.take(rows)
        if request.taken_rows == request.rows:
            heapq.heappop(self._ready)
        self._remove(request, rows)
        return part

    def discard(self, request: Request) -> int:
        """Removes the rows of a cancelled request. Returns how many rows that were."""
        rows = request.rows - request.taken_rows
        if rows:
            self._remove(request, rows)
        return rows

    def ready_requests(self) -> list[Request]:
        """The requests that can run, in no order."""
        return [entry[3] for entry in self._ready if not entry[3].is_cancelled]

    def batch_started(self, group_index: int) -> None:
        self.running[group_index] += 1

    def batch_finished(self, group_index: int) -> None:
        self.running[group_index] -= 1

    def learn_batch_penalty(self, latency: LatencyEstimate, rows: int, possible_rows: int) -> None:
        """A batch has `rows` where `possible_rows` would fit if its deadline were later."""
        profile = latency.profile
        penalty = (profile(rows) / rows) / (profile(possible_rows) / possible_rows)
        self.batch_penalty += 0.2 * (penalty - self.batch_penalty)

    def _remove(self, request: Request, rows: int) -> None:
        self.priorities[request.priority].remove(request, rows)
        self.rows -= rows
        if request.is_ready:
            self.ready_rows -= rows
            if not self.ready_rows:
                self._ready.clear()  # only cancelled requests are left
