"""The deadline scheduler: earliest deadline first, planned from measured latencies."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from server.scheduling.admission import Admission
from server.scheduling.base import Batch, BatchPart, InstanceGroup, Request
from server.scheduling.device_share import DeviceShares
from server.scheduling.latency import LatencyEstimate
from server.scheduling.model_queue import ModelQueue
from server.scheduling.occupancy import DeviceOccupancy
from server.scheduling.principal_queue import PrincipalQueue
from server.security.fair_limit import FairLimit
from server.security.principal import LOCAL_CALLER

# A small batch is costly if its time per row is higher by this factor than that of the batch that
# would be possible.
COSTLY_FACTOR = 1.2


class DeadlineScheduler:
    """Runs the request with the earliest deadline first, within a priority.

    A request is admitted only if its deadline can be met, see `Admission`. Requests of lower
    priority get the remaining time. If their deadline cannot be met any more, they expire before
    they use the device. Models share the device by weight, and principals share a model's part of
    it, see `DeviceShares`. Priorities and deadlines order the requests of one principal.
    """

    def __init__(self, units: int, capacity: int, total_capacity: int | None = None) -> None:
        """`capacity` is the number of rows that may wait for one model, `total_capacity` for all
        models together (default: four times `capacity`)."""
        self._queues: dict[str, ModelQueue] = {}
        self._all_rows = FairLimit(total_capacity or 4 * capacity)  # in all queues
        self._occupancy = DeviceOccupancy(units)
        self._shares = DeviceShares()
        self._admission = Admission(
            self._queues,
            self._occupancy,
            self._shares,
            capacity,
            self._all_rows,
        )
        self._expired: list[tuple[str, Request]] = []

    def add(
        self,
        model: str,
        groups: Sequence[InstanceGroup],
        *,
        objective_s: float,
        weight: float = 1.0,
    ) -> None:
        account = self._shares.open_account(weight)
        units = self._occupancy.units
        self._queues[model] = ModelQueue(model, groups, units, objective_s, account)

    def remove(self, model: str) -> list[Request]:
        queue = self._queues.pop(model)
        for principal, rows in queue.principals.rows():
            self._all_rows.remove(principal, rows)
        requests = queue.principals.ready_requests()
        for request in requests:  # the model may be added again before they end
            request.mark_cancelled()
        return requests

    def admit(self, model: str, request: Request, now_s: float) -> None:
        queue = self._queues[model]
        own = queue.principals.of(request.principal)
        self._admission.check(queue, own, request, now_s)
        queue.accept(own, request)
        self._all_rows.add(request.principal, request.rows)

    def mark_ready(self, model: str, request: Request, now_s: float) -> None:
        queue = self._queues.get(model)
        if queue is None or request.is_cancelled:
            return
        if not queue.ready_rows:
            self._shares.resume(queue.account)
        queue.mark_ready(request)

    def cancel(self, model: str, request: Request) -> None:
        if request.is_cancelled:
            return
        request.mark_cancelled()
        queue = self._queues.get(model)
        if queue is not None:
            self._all_rows.remove(request.principal, queue.discard(request))

    def next_batch(self, now_s: float) -> Batch | None:
        while self._occupancy.free:
            queue = self._next_queue()
            if queue is None:
                self._occupancy.mark_idle(now_s)
                return None
            own = queue.principals.next()
            first = own.first()
            assert first is not None
            group_index = self._choose_group(queue, first, now_s)
            if group_index is None:
                return None  # none of its instances fits into the free units
            size = self._batch_size(queue, own, first, group_index, now_s)
            if size:
                return self._start_batch(queue, own, first, group_index, size, now_s)
            self._expire(queue, first)
        return None

    def take_expired(self) -> Iterable[tuple[str, Request]]:
        expired, self._expired = self._expired, []
        return expired

    def batch_finished(self, batch: Batch, now_s: float, seconds: float) -> None:
        self._occupancy.finish(batch, now_s)
        queue = self._queues.get(batch.model)
        if queue is None:
            return
        queue.batch_finished(batch.group_index)
        queue.latencies[batch.group_index].record(batch.rows, seconds, now_s)
        device_units = self._occupancy.units
        device_s = seconds * batch.units / device_units
        expected_s = batch.expected_s * batch.units / device_units
        self._shares.settle(queue.account, device_s, expected_s, now_s)
        if queue.principals.is_shared:
            queue.principals.settle(batch, device_s, expected_s, now_s)

    def next_wake_s(self, now_s: float) -> float | None:
        return None  # work never waits for an idle instance

    def queued_rows(self, model: str) -> int:
        queue = self._queues.get(model)
        return queue.rows if queue is not None else 0

    def _next_queue(self) -> ModelQueue | None:
        """The model that has used the least of its share, among those that can run something."""
        chosen = None
        for queue in self._queues.values():
            if queue.ready_rows and (
                chosen is None or queue.account.virtual_s < chosen.account.virtual_s
            ):
                chosen = queue
        return chosen

    def _choose_group(self, queue: ModelQueue, first: Request, now_s: float) -> int | None:
        """The instance group that processes the ready rows the fastest.

        Groups that meet the first request's deadline come before groups that do not. None if no
        instance is free.
        """
        limit_s = math.inf if first.best_effort else first.deadline_s - now_s
        best, best_key = None, (True, math.inf)
        for index, group in enumerate(queue.groups):
            instances = self._free_instances(queue, index)
            if instances <= 0:
                continue
            latency = queue.latencies[index]
            latency.forget_stale(now_s)
            rounds = max(1.0, queue.ready_rows / (instances * group.max_batch))
            rows = min(group.max_batch, math.ceil(queue.ready_rows / instances))
            key = (latency.p99_s(1) > limit_s, latency.p50_s(rows) * rounds)
            if key < best_key or best is None:
                best, best_key = index, key
        return best

    def _batch_size(
        self,
        queue: ModelQueue,
        own: PrincipalQueue,
        first: Request,
        group_index: int,
        now_s: float,
    ) -> int:
        """The largest useful batch that meets the first request's deadline.

        0 if the request has to expire instead.
        """
        latency = queue.latencies[group_index]
        # On an idle device the profile decides, as in admission.
        least_s = latency.p50_s(1) if self._occupancy.running else latency.profile(1)
        if not first.best_effort and now_s + least_s > first.deadline_s:
            return 0
        instances = self._free_instances(queue, group_index)
        possible = min(queue.groups[group_index].max_batch, math.ceil(queue.ready_rows / instances))
        limit_s = (math.inf if first.best_effort else first.deadline_s) - now_s
        in_time = max(1, latency.profile.largest_batch(limit_s / latency.p99_factor))
        if in_time < possible:
            waiting_rows = own.ready_rows  # by another principal's rows no request expires
            if _is_costly(queue, latency, waiting_rows, in_time, possible, instances):
                return 0
        size = min(possible, in_time)
        queue.learn_batch_penalty(latency, size, possible)
        return size

    def _start_batch(
        self,
        queue: ModelQueue,
        own: PrincipalQueue,
        first: Request,
        group_index: int,
        size: int,
        now_s: float,
    ) -> Batch:
        """Takes up to `size` rows from the queue, fewer if a deadline needs a smaller batch."""
        latency, group = queue.latencies[group_index], queue.groups[group_index]
        ratio = group.units / self._occupancy.units
        principals, is_shared = queue.principals, queue.principals.is_shared
        row_s = guest_row_s = 0.0
        if is_shared:
            instances = self._free_instances(queue, group_index)
            row_s, guest_row_s = queue.row_costs(group_index, size, instances, ratio, now_s)
        host = own
        rows = 0
        parts: list[BatchPart] = []
        request: Request | None = first
        while request is not None:
            if request.deadline_s < first.deadline_s and not request.best_effort:
                # An earlier deadline, of a lower priority or another principal: the batch must not
                # make it late.
                left_s = request.deadline_s - now_s
                in_time = latency.profile.largest_batch(left_s / latency.p99_factor)
                if in_time <= rows:
                    break
                size = min(size, in_time)
            count = min(size - rows, request.rows - request.taken_rows)
            parts.append(queue.take_from_first(own, request, count))
            rows += count
            if is_shared:
                principals.charge(host, count * (row_s if own is host else row_s - guest_row_s))
                if own is not host:
                    principals.charge(own, count * guest_row_s)
                self._all_rows.remove(request.principal, count)
            if rows == size or not queue.ready_rows:
                break
            own = principals.next() if is_shared else own
            request = own.first()
        if not is_shared:
            self._all_rows.remove(LOCAL_CALLER, rows)
        expected_s = latency.p50_s(rows)
        batch = Batch(
            queue.model,
            group_index,
            group.units,
            parts,
            rows,
            expected_s,
            rows * row_s,
            guest_row_s,
        )
        queue.batch_started(group_index)
        self._occupancy.start(batch, now_s)
        self._shares.charge(queue.account, expected_s * ratio)
        return batch

    def _free_instances(self, queue: ModelQueue, group_index: int) -> int:
        """Instances of a group that are free and for which units are free."""
        group = queue.groups[group_index]
        free_units = self._occupancy.free
        return min(group.count - queue.running[group_index], free_units // group.units)

    def _expire(self, queue: ModelQueue, request: Request) -> None:
        self.cancel(queue.model, request)
        self._expired.append((queue.model, request))


def _is_costly(
    queue: ModelQueue,
    latency: LatencyEstimate,
    waiting_rows: int,
    in_time: int,
    possible: int,
    instances: int,
) -> bool:
    """Whether a batch of `in_time` rows for the first request would make `waiting_rows` late.

    A small batch costs more time per row. If the queue were processed at that cost, its last
    request would miss the latency objective. The first request then expires, as in Nexus (SOSP
    2019, early drop). Otherwise, after a stall, every first request would be urgent, every batch
    small, and no request would ever be in time again.
    """
    row_s = latency.p50_s(in_time) / in_time
    if row_s <= COSTLY_FACTOR * latency.p50_s(possible) / possible:
        return False
    return waiting_rows * (row_s / instances) > queue.objective_s
