"""The queue of one model: its instance groups and the requests that wait for them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from server.scheduling.base import BatchPart, InstanceGroup, Request
from server.scheduling.device_share import ShareAccount
from server.scheduling.latency import LatencyEstimate, efficient_batch
from server.scheduling.plans import make_plans
from server.scheduling.principal_queue import PrincipalQueue
from server.scheduling.principal_queues import PrincipalQueues

DEADLINE_STEPS = 48  # within one latency objective


class ModelQueue:
    """A model's waiting requests, running batches, and latencies."""

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
        self.principals = PrincipalQueues(objective_s / DEADLINE_STEPS)
        self.running = [0] * len(groups)  # batches, by group
        self.rows = 0  # admitted, not in a batch
        self.ready_rows = 0  # of these, the rows that can run
        # Time per row of recent batches, relative to batches as large as possible.
        self.batch_penalty = 1.0

    def accept(self, own: PrincipalQueue, request: Request) -> None:
        """Adds an admitted request of the principal that has the queue `own`."""
        own.accept(request)
        self.rows += request.rows

    def mark_ready(self, request: Request) -> None:
        """Lets an admitted request run."""
        self.principals.mark_ready(request)
        self.ready_rows += request.rows

    def take_from_first(self, own: PrincipalQueue, request: Request, rows: int) -> BatchPart:
        """Moves rows of the request that is first in `own` into a batch."""
        part = own.take_from_first(request, rows)
        self.rows -= rows
        self.ready_rows -= rows
        return part

    def discard(self, request: Request) -> int:
        """Removes the rows of a cancelled request. Returns how many rows that were."""
        rows = request.rows - request.taken_rows
        if rows:
            self.principals.remove(request, rows)
            self.rows -= rows
            self.ready_rows -= rows if request.is_ready else 0
        return rows

    def rows_ahead(self, own: PrincipalQueue, rows: int, ratio: float, now_s: float) -> int:
        """How many rows run before the next `rows` rows of a principal are done, these included.

        `ratio` is the model's part of the device.
        """
        return self.principals.rows_ahead(own, rows, self.least_row_s, ratio, now_s)

    def row_costs(
        self, group_index: int, size: int, instances: int, ratio: float, now_s: float
    ) -> tuple[float, float]:
        """Device seconds of a row in a batch of `size` that starts: on average, and for other
        principals than that of the first request.

        `instances` of the group are free, each takes up a fraction `ratio` of the device.
        """
        max_batch = self.groups[group_index].max_batch
        row_s = ratio * self.latencies[group_index].p50_s(size) / size
        least_s = min(row_s, self.least_row_s)
        has_more = self.ready_rows > instances * max_batch
        if not self.principals.batch_starts(has_more=has_more, now_s=now_s):
            # Only for lack of requests is it dearer than in a full batch. That delays nobody.
            return least_s, least_s
        if size < min(max_batch, math.ceil(self.ready_rows / instances)):
            return row_s, least_s  # the first request's deadline makes the batch small
        return row_s, row_s

    @property
    def least_row_s(self) -> float:
        """Device seconds of a row in a batch of the cheapest size."""
        cheapest = self.plans[0]
        return cheapest.row_s * cheapest.latency.p50_factor

    def batch_started(self, group_index: int) -> None:
        self.running[group_index] += 1

    def batch_finished(self, group_index: int) -> None:
        self.running[group_index] -= 1

    def learn_batch_penalty(self, latency: LatencyEstimate, rows: int, possible_rows: int) -> None:
        """A batch has `rows` where `possible_rows` would fit if its deadline were later."""
        profile = latency.profile
        penalty = (profile(rows) / rows) / (profile(possible_rows) / possible_rows)
        self.batch_penalty += 0.2 * (penalty - self.batch_penalty)
