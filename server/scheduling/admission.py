"""Admission: accepts a request if its predicted completion time meets its deadline."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from server.errors import DeadlineUnreachable, Overloaded, ServingError
from server.scheduling.base import Request
from server.scheduling.device_share import MAX_CREDIT_S, DeviceShares, Share
from server.scheduling.model_queue import ModelQueue
from server.scheduling.occupancy import DeviceOccupancy
from server.scheduling.plans import BatchPlan, StartTimes, alone_s, finish_s
from server.scheduling.principal_queue import PrincipalQueue
from server.scheduling.waiting_rows import WaitingRows
from server.security.fair_limit import FairLimit

# Above this idle ratio the device has spare capacity. (With 0.05, ResNet-50 at 80 % load was at
# times considered overloaded, and 0.4 % of its answers were lost.)
MIN_SPARE_RATIO = 0.02

MIN_ACTIVE_RATIO = 0.01  # a model that used less of the device lately is idle

# A request without a deadline is refused if it would wait longer than this for other requests: as a
# multiple of the model's latency objective, and at least in seconds (64 clients of a slow network
# wait for 3 s).
WAIT_LIMIT_OBJECTIVES = 10
MIN_WAIT_LIMIT_S = 10.0


class Admission:
    """Decides whether a request can be admitted.

    It changes only the request, and updates the idle ratio of the device.

    A request is admitted if its answer is expected in time and if the admitted requests of its
    principal and priority behind it stay in time. Requests of lower priorities may expire because
    of it, and so may requests of a principal that uses more than its share.
    """

    def __init__(
        self,
        queues: Mapping[str, ModelQueue],
        occupancy: DeviceOccupancy,
        shares: DeviceShares,
        capacity: int,
        all_rows: FairLimit,
    ) -> None:
        """`capacity` is the number of rows that may wait for one model, `all_rows` counts those of
        all models.

        The scheduler keeps `queues`, `occupancy`, `shares` and `all_rows` up to date.
        """
        self._queues = queues
        self._occupancy = occupancy
        self._shares = shares
        self._capacity = capacity
        self._all_rows = all_rows

    def check(self, queue: ModelQueue, own: PrincipalQueue, request: Request, now_s: float) -> None:
        """Sets the request's predicted time, and its deadline if the client set none.

        `own` is the queue of the request's principal. Raises Overloaded or DeadlineUnreachable.
        """
        if request.deadline_s == math.inf:
            request.best_effort = True
            request.deadline_s = now_s + queue.objective_s
        limit_s = self._limit_s(queue, request, now_s)
        is_shared = queue.principals.is_shared
        if (
            is_shared
            or queue.rows + request.rows > self._capacity
            or self._all_rows.used + request.rows > self._all_rows.limit
        ):
            self._check_capacity(queue, own, request, now_s)
        if not queue.rows and not self._occupancy.running:
            self._check_alone(queue, request, limit_s, now_s)
            return
        waiting = own.priorities[request.priority]
        step = waiting.step_of(request.deadline_s)
        ahead = waiting.up_to(step)
        if waiting.total != own.rows:  # requests of other priorities wait too
            ahead += sum(higher.total for higher in own.priorities[request.priority + 1 :])
        self._occupancy.update_idle_ratio(now_s)
        has_spare_capacity = self._occupancy.idle_ratio > MIN_SPARE_RATIO
        starts = self._start_times(queue, has_spare_capacity, now_s)
        share = self._share(queue, now_s, queue.batch_penalty)
        own_rows = ahead + request.rows
        rows, credit_s = own_rows, share.credit_s
        if is_shared:
            rows = queue.rows_ahead(own, own_rows, share.ratio, now_s)
            credit_s = max(credit_s, queue.principals.credit_s(own))
        if has_spare_capacity or credit_s > MAX_CREDIT_S / 4:  # a burst, which ends
            candidates: Sequence[BatchPlan] = queue.plans
        else:
            candidates = _plans_in_overload(queue, limit_s - now_s)
        plan = None
        for candidate in candidates:
            end_s = finish_s(candidate, starts, rows, share)
            if request.ready_s > now_s:  # its images must be decoded
                own_s = alone_s(candidate, request.rows, candidate.latency.p50_s)
                end_s = max(end_s, request.ready_s + own_s)
            request.predicted_s = min(request.predicted_s, end_s)
            if end_s <= limit_s:
                plan = candidate
                request.predicted_s = end_s
                break
        if plan is None:
            raise self._refusal(queue, request, now_s, _too_late(queue, request))
        factor = 1.0
        if rows != own_rows:  # rows of other principals run in between
            all_rows = own_rows + waiting.total
            all_ahead = queue.rows_ahead(own, all_rows, share.ratio, now_s)
            factor = max(rows / own_rows, all_ahead / all_rows)
        if not _others_stay_in_time(waiting, step, own_rows, factor, plan, starts, share):
            reason = "admitted requests would miss their deadlines"
            raise self._refusal(queue, request, now_s, reason)

    def _check_capacity(
        self, queue: ModelQueue, own: PrincipalQueue, request: Request, now_s: float
    ) -> None:
        """Checks the number of waiting rows."""
        if not queue.principals.may_add(own, request.rows, self._capacity - queue.rows):
            reason = f"the queue holds at most {self._capacity} images"
        elif not self._all_rows.fits(request.principal, request.rows):
            reason = f"all queues together hold at most {self._all_rows.limit} images"
        else:
            return
        raise self._refusal(queue, request, now_s, reason)

    def _check_alone(
        self, queue: ModelQueue, request: Request, limit_s: float, now_s: float
    ) -> None:
        """Checks a request to an idle device against the profile only.

        The last batches may have been slow. If they decided, every request would be refused, and no
        batch could show that the engine is fast again.
        """
        for plan in queue.plans:
            seconds = alone_s(plan, request.rows, plan.latency.profile)
            end_s = max(now_s, request.ready_s) + seconds
            request.predicted_s = min(request.predicted_s, end_s)
        if request.predicted_s > limit_s:
            raise self._refusal(queue, request, now_s, _too_late(queue, request))

    def _limit_s(self, queue: ModelQueue, request: Request, now_s: float) -> float:
        """The time by which a request must be done.

        Without a deadline, the limit is on the wait for other requests. The run time of its own
        rows is added: a request with a longer run time would never be admitted otherwise.
        """
        if not request.best_effort:
            return request.deadline_s
        own_s = min(alone_s(plan, request.rows, plan.latency.p50_s) for plan in queue.plans)
        return now_s + _wait_limit_s(queue) + own_s

    def _start_times(self, queue: ModelQueue, has_spare_capacity: bool, now_s: float) -> StartTimes:
        """The times at which the waiting rows can start.

        The time of each instance is known if all instances are alike and nothing else uses the
        device: waiting rows go to them in turn. In lasting overload the mean is used nevertheless.
        It is later by a quarter of a batch: the few additional requests would be only just in time,
        and a batch that is slightly slow would be cut.
        """
        occupancy = self._occupancy
        mean_s = now_s + occupancy.remaining_s(now_s)
        concurrency = queue.groups[0].concurrency(occupancy.units)
        alike = len(queue.groups) == 1 and concurrency > 1
        alone = len(self._queues) == 1 and len(occupancy.running) == sum(queue.running)
        if not alike or not alone or not has_spare_capacity:
            return StartTimes(mean_s, ())
        busy_s = sorted(now_s + run.remaining_s(now_s) for run in occupancy.running.values())
        return StartTimes(mean_s, [now_s] * (concurrency - len(busy_s)) + busy_s)

    def _share(self, queue: ModelQueue, now_s: float, penalty: float = 1.0) -> Share:
        """The device time that this model can count on.

        `penalty` is the time per row, relative to the plan.
        """
        if len(self._queues) == 1:
            return Share(1.0 / penalty, 0.0)
        others_ratio = others_weight = 0.0
        for other in self._queues.values():
            if other is not queue:
                used_ratio = other.account.used_ratio(now_s)
                if used_ratio > MIN_ACTIVE_RATIO or other.rows:
                    others_ratio += used_ratio
                    others_weight += other.account.weight
        share = self._shares.share_of(queue.account, others_ratio, others_weight)
        return Share(share.ratio / penalty, share.credit_s)

    def _refusal(
        self, queue: ModelQueue, request: Request, now_s: float, reason: str
    ) -> ServingError:
        """The error for a request that is not admitted, with the time to retry."""
        fastest_s = min(plan.latency.profile(request.rows) for plan in queue.plans)
        if not request.best_effort and now_s + fastest_s > request.deadline_s:
            return DeadlineUnreachable(
                f"{queue.model} needs {fastest_s * 1e3:.1f} ms for {request.rows} images when "
                f"idle, and {max(0.0, request.deadline_s - now_s) * 1e3:.1f} ms are left"
            )
        own = queue.principals.of(request.principal)
        queue.principals.refused()
        queued_s = self._drain_s(queue, own, max(1, own.rows), now_s)
        # When the same request would be in time if no others came, and one batch more: the batch
        # that runs then may have just started.
        left_s = self._limit_s(queue, request, now_s) - now_s
        excess_s = self._drain_s(queue, own, own.rows + request.rows, now_s) - left_s
        batch_s = min(plan.latency.p99_s(plan.rows) for plan in queue.plans)
        return Overloaded(
            f"{reason}: {own.rows} images wait for {queue.model}, about {queued_s * 1e3:.0f} ms "
            "of work",
            retry_after_s=max(excess_s, request.ready_s - now_s, 0.0) + batch_s,
        )

    def _drain_s(self, queue: ModelQueue, own: PrincipalQueue, rows: int, now_s: float) -> float:
        """Seconds until the running batches and then `rows` rows of a principal are done."""
        share = self._share(queue, now_s)
        rows = queue.rows_ahead(own, rows, share.ratio, now_s)
        starts = StartTimes(self._occupancy.remaining_s(now_s), ())
        return min(finish_s(plan, starts, rows, share) for plan in queue.plans)


def _wait_limit_s(queue: ModelQueue) -> float:
    """How long a request without a deadline waits for other requests at most."""
    return max(WAIT_LIMIT_OBJECTIVES * queue.objective_s, MIN_WAIT_LIMIT_S)


def _too_late(queue: ModelQueue, request: Request) -> str:
    if not request.best_effort:
        decode_s = request.ready_s - request.arrived_s
        decoding = f"; its images are decoded in {decode_s * 1e3:.0f} ms" if decode_s > 0 else ""
        return f"the deadline cannot be met{decoding}"
    return f"a request without a deadline waits at most {_wait_limit_s(queue):g} s"


def _plans_in_overload(queue: ModelQueue, budget_s: float) -> Sequence[BatchPlan]:
    """The plan that may be assumed in lasting overload for a request with `budget_s` left.

    It is the cheapest per row that has time for one and a half batches: the rest of the running
    batch, on average, and the request's own batch. (Nexus, SOSP 2019, plans with two batches.)
    Assuming smaller batches would admit requests later and later, until there is time only for
    small batches, which cost more per row.
    """
    for number, plan in enumerate(queue.plans):
        if 1.5 * plan.latency.p50_s(plan.rows) <= budget_s:
            return queue.plans[number : number + 1]
    return queue.plans[-1:]


def _others_stay_in_time(
    waiting: WaitingRows,
    step: int,
    ahead: int,
    factor: float,
    plan: BatchPlan,
    starts: StartTimes,
    share: Share,
) -> bool:
    """Whether the requests behind `step` meet their deadlines with `ahead` rows before them.

    All principals together run `factor` times as many rows meanwhile.
    """
    all_rows = ahead + waiting.total
    if factor != 1.0:
        all_rows = math.ceil(factor * all_rows)
    all_done_s = finish_s(plan, starts, all_rows, share)
    for later in waiting.steps_after(step):
        limit_s = later * waiting.step_s
        if limit_s >= all_done_s:
            break  # from here on even the last request is in time
        ahead += waiting.by_step[later]
        rows = math.ceil(factor * ahead)
        if waiting.with_deadline[later] and finish_s(plan, starts, rows, share) > limit_s:
            return False
    return True
