"""Which requests are admitted, and the errors for the others."""

from __future__ import annotations

import math
import random

import pytest

from server.errors import DeadlineUnreachable, Overloaded
from server.scheduling.admission import MIN_WAIT_LIMIT_S
from server.scheduling.base import InstanceGroup, Request
from server.scheduling.deadline import DeadlineScheduler
from server.scheduling.device_share import Share
from server.scheduling.latency import LatencyEstimate, LatencyProfile
from server.scheduling.plans import BatchPlan, StartTimes, finish_s
from tests.scheduling.driver import ONE, deadline_scheduler, enqueue, refusals, start
from tests.simulator.scenarios import MODEL


def test_a_request_that_would_be_late_behind_others_is_refused_with_a_retry_time() -> None:
    scheduler = deadline_scheduler(ONE)
    for _ in range(40):
        enqueue(scheduler, Request(1, 0.0, 10.0))
    enqueue(scheduler, Request(1, 0.0, 0.050))  # runs before all of them
    errors = refusals(scheduler, 40, deadline_s=0.050)
    assert errors
    assert all(0.005 <= error.retry_after_s <= 1.0 for error in errors)


def test_a_slow_engine_causes_overloaded_and_not_deadline_unreachable() -> None:
    scheduler = deadline_scheduler(ONE)
    enqueue(scheduler, Request(1, 0.0, 10.0))
    scheduler.batch_finished(start(scheduler), 0.500, 0.500)
    enqueue(scheduler, Request(8, 0.5, 10.0), 0.5)
    start(scheduler, 0.5)
    with pytest.raises(Overloaded):
        enqueue(scheduler, Request(1, 0.5, 0.520), 0.5)


def test_a_deadline_that_even_an_idle_engine_misses_is_unreachable() -> None:
    scheduler = deadline_scheduler(ONE)
    with pytest.raises(DeadlineUnreachable, match=r"needs 5\.0 ms"):
        enqueue(scheduler, Request(1, 0.0, 0.004))


def test_running_batches_of_a_removed_model_delay_new_requests() -> None:
    scheduler = DeadlineScheduler(2, 64)
    scheduler.add("old", [InstanceGroup(2, 1, 8, LatencyProfile({1: 2.0}))], objective_s=1.0)
    enqueue(scheduler, Request(1, 0.0), model="old")
    start(scheduler)
    scheduler.remove("old")
    scheduler.add(
        "new", [InstanceGroup(1, 2, 8, LatencyProfile({1: 0.005, 8: 0.012}))], objective_s=0.1
    )
    with pytest.raises(Overloaded):
        enqueue(scheduler, Request(1, 0.0, 0.050), model="new")


def test_more_rows_ahead_never_make_the_predicted_completion_earlier() -> None:
    latency = LatencyEstimate(LatencyProfile({1: 0.004, 32: 0.100}))
    plan, starts = BatchPlan(latency, 1, 0.002), StartTimes(0.050, [0.0, 0.100])
    ends_s = [finish_s(plan, starts, rows, Share(1.0, 0.0)) for rows in range(1, 40)]
    assert ends_s == sorted(ends_s)


def test_a_request_that_would_make_an_admitted_request_late_is_refused() -> None:
    scheduler = deadline_scheduler(ONE)
    enqueue(scheduler, Request(8, 0.0, 10.0))
    start(scheduler)
    admitted = 0
    while True:
        try:
            enqueue(scheduler, Request(1, 0.0, 0.080))
            admitted += 1
        except Overloaded:
            break
    assert admitted > 8
    with pytest.raises(Overloaded, match="would miss their deadlines"):
        enqueue(scheduler, Request(8, 0.0, 0.060))


def test_a_request_without_a_deadline_is_ordered_by_the_objective_and_never_expires() -> None:
    scheduler = deadline_scheduler(ONE)
    enqueue(scheduler, Request(8, 0.0, 10.0))
    running = start(scheduler)
    best_effort = enqueue(scheduler, Request(1, 0.0))
    assert best_effort.best_effort
    assert best_effort.deadline_s == pytest.approx(0.100)
    scheduler.batch_finished(running, 0.500, 0.500)
    assert start(scheduler, 0.500).parts[0].request is best_effort


def test_a_request_without_a_deadline_waits_at_most_10_s_for_others() -> None:
    scheduler = deadline_scheduler(ONE)
    row_s = ONE.groups[0].profile(8) / 8
    many = math.ceil(1.5 * MIN_WAIT_LIMIT_S / row_s)
    first = enqueue(scheduler, Request(many, 0.0))  # runs longer than the maximum wait
    start(scheduler)
    with pytest.raises(Overloaded, match="without a deadline waits at most 10 s: ") as refusal:
        scheduler.admit(MODEL, Request(many, 0.0), 0.0)
    retry_after_s = refusal.value.retry_after_s
    assert 0.5 * MIN_WAIT_LIMIT_S < retry_after_s < 0.51 * MIN_WAIT_LIMIT_S
    scheduler.cancel(MODEL, first)
    enqueue(scheduler, Request(math.floor(0.9 * MIN_WAIT_LIMIT_S / row_s), 0.0))
    enqueue(scheduler, Request(many, 0.0))  # its own run time does not count
    with pytest.raises(Overloaded, match="without a deadline"):
        scheduler.admit(MODEL, Request(1, 0.0), 0.0)


def test_queued_rows_are_limited_per_model_and_in_total() -> None:
    scheduler = DeadlineScheduler(1, 10, 15)
    for model in ("a", "b"):
        scheduler.add(model, ONE.groups, objective_s=10.0)
    enqueue(scheduler, Request(10, 0.0, 100.0), model="a")
    with pytest.raises(Overloaded, match="queue holds at most 10"):
        scheduler.admit("a", Request(1, 0.0, 100.0), 0.0)
    enqueue(scheduler, Request(5, 0.0, 100.0), model="b")
    with pytest.raises(Overloaded, match="all queues together hold at most 15"):
        scheduler.admit("b", Request(1, 0.0, 100.0), 0.0)


def test_an_idle_engine_gets_requests_again_after_slow_batches() -> None:
    scheduler = deadline_scheduler(ONE)
    now_s = 0.0
    for _ in range(20):
        enqueue(scheduler, Request(1, now_s, now_s + 10.0), now_s)
        scheduler.batch_finished(start(scheduler, now_s), now_s + 0.5, 0.5)
        now_s += 0.5
    for _ in range(20):  # fast again
        enqueue(scheduler, Request(1, now_s, now_s + 0.100), now_s)
        scheduler.batch_finished(start(scheduler, now_s), now_s + 0.005, 0.005)
        now_s += 0.005
    enqueue(scheduler, Request(8, now_s, now_s + 0.020), now_s)


def test_a_retry_at_the_suggested_time_is_admitted_after_a_burst() -> None:
    scheduler = deadline_scheduler(ONE)
    draw = random.Random(1)
    kept = 0
    for trial in range(50):
        now_s = 10.0 * trial
        retry_after_s = refusals(scheduler, 200, deadline_s=0.1, now_s=now_s)[-1].retry_after_s
        retry_s = now_s + retry_after_s + draw.uniform(0, 0.01)
        while (batch := scheduler.next_batch(now_s)) is not None:
            seconds = ONE.groups[0].profile(batch.rows)
            now_s += seconds
            if now_s > retry_s and not math.isinf(retry_s):
                try:
                    scheduler.admit(MODEL, request := Request(1, retry_s, retry_s + 0.1), retry_s)
                    scheduler.cancel(MODEL, request)
                    kept += 1
                except Overloaded:
                    pass
                retry_s = math.inf
            scheduler.batch_finished(batch, now_s, seconds)
    assert kept >= 45
