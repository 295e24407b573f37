"""Plans to process the queue of a model, and the completion times they predict."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from server.scheduling.base import InstanceGroup
from server.scheduling.device_share import Share
from server.scheduling.latency import LatencyEstimate, planned_sizes

# Start delay of a batch that admission allows for, as a fraction of the batch's run time. Without
# it, a batch behind a slow one would be cut smaller and cost more time per row. (In tests/simulator
# up to 1 % of the requests in bursts expire at 0.05, none at 0.15. With more, instances idle at the
# end of a burst.)
START_DELAY_FRACTION = 0.15


class BatchPlan(NamedTuple):
    """All instances of one group run batches of one size in parallel."""

    latency: LatencyEstimate
    rows: int  # of a batch
    row_s: float  # device seconds per row, by the profile


class StartTimes(NamedTuple):
    """The times at which the device can start the waiting rows."""

    mean_s: float  # as if all units became free at the same time
    instances_s: Sequence[float]  # for each instance, ascending; empty if not known


def make_plans(
    groups: Sequence[InstanceGroup], latencies: Sequence[LatencyEstimate], device_units: int
) -> list[BatchPlan]:
    """The useful plans, from the cheapest per row (large batches) to the fastest (small ones)."""
    plans = [
        BatchPlan(latency, rows, group.profile(rows) / rows / group.concurrency(device_units))
        for group, latency in zip(groups, latencies, strict=True)
        for rows in planned_sizes(group.max_batch)
    ]
    plans.sort(key=lambda plan: plan.row_s)
    useful: list[BatchPlan] = []
    for plan in plans:  # a plan that is both dearer and slower than another one is useless
        seconds = plan.latency.profile(plan.rows)
        if not useful or seconds < useful[-1].latency.profile(useful[-1].rows):
            useful.append(plan)
    return useful


def alone_s(plan: BatchPlan, rows: int, batch_s: Callable[[int], float]) -> float:
    """Seconds that `rows` take on an idle device.

    `batch_s` gives the run time of the last batch.
    """
    last = min(plan.rows, rows)
    return (rows - last) * plan.row_s + batch_s(last)


def finish_s(plan: BatchPlan, starts: StartTimes, rows: int, share: Share) -> float:
    """The time at which the next `rows` rows of the queue are done.

    Full batches run first, at the plan's pace. Then the batch with the last row runs.

    The prediction uses median run times plus half of the distance to the 99th percentile. Slow and
    fast batches compensate each other, so the distance grows with the square root of the number of
    batches. Half is enough: a batch that would be too slow is cut at its start, but a request that
    admission refused cannot be answered at all.
    """
    batches = (rows - 1) // plan.rows
    before = batches * plan.rows
    latency = plan.latency
    work_s = before * plan.row_s
    batch_s = latency.profile(plan.rows)
    last_s = batch_s if before else latency.profile(rows)  # after full batches, assume a full one
    # Variances add up: one batch in each of work_s / batch_s rounds, and the last batch.
    distance = 0.5 * (latency.p99_factor - latency.p50_factor)
    spread_s = distance * math.sqrt(last_s**2 + work_s * batch_s)
    instances_s = starts.instances_s
    # Batches go to the instances in turn, unless the first instance is free again before the last
    # one is free at all.
    in_turn = instances_s and instances_s[-1] - instances_s[0] <= batch_s * latency.p50_factor
    if in_turn:
        rounds, instance = divmod(batches, len(instances_s))
        start_s = instances_s[instance] + START_DELAY_FRACTION * batch_s
        before_s = rounds * batch_s / share.ratio
    else:
        start_s = starts.mean_s
        on_credit_s = min(work_s, share.credit_s)
        before_s = on_credit_s + (work_s - on_credit_s) / share.ratio
    return start_s + (before_s + last_s) * latency.p50_factor + spread_s
