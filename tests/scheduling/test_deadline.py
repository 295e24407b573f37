"""Which requests the deadline scheduler runs next, and in which batches."""

from __future__ import annotations

import random

from server.scheduling.base import InstanceGroup, Request
from server.scheduling.deadline import DeadlineScheduler
from server.scheduling.latency import LatencyProfile
from tests.scheduling.driver import ONE, deadline_scheduler, enqueue, start
from tests.simulator.scenarios import CPU, GPU, MODEL


def test_one_request_gets_the_whole_device_and_many_run_on_instances_in_parallel() -> None:
    scheduler = deadline_scheduler(CPU)
    enqueue(scheduler, Request(1, 0.0, 1.0))
    assert start(scheduler).units == 2
    many = deadline_scheduler(CPU)
    for _ in range(16):
        enqueue(many, Request(1, 0.0, 10.0))
    assert [start(many).units, start(many).units] == [1, 1]
    assert many.next_batch(0.0) is None


def test_higher_priorities_run_first_and_then_earlier_deadlines() -> None:
    scheduler = deadline_scheduler(ONE)
    enqueue(scheduler, Request(8, 0.0, 10.0))
    running = start(scheduler)
    late, early = Request(1, 0.0, 9.0), Request(1, 0.0, 2.0)
    urgent = Request(1, 0.0, 9.5, priority=9)
    for request in (late, early, urgent):
        enqueue(scheduler, request)
    scheduler.batch_finished(running, 0.012, 0.012)
    assert [part.request for part in start(scheduler, 0.012).parts] == [urgent, early, late]


def test_a_batch_is_only_as_large_as_its_earliest_deadline_allows() -> None:
    scheduler = deadline_scheduler(ONE)
    enqueue(scheduler, Request(1, 0.0, 10.0))
    running = start(scheduler)
    tight = enqueue(scheduler, Request(1, 0.0, 0.0135))
    for _ in range(7):
        enqueue(scheduler, Request(1, 0.0, 5.0))
    scheduler.batch_finished(running, 0.005, 0.005)
    batch = start(scheduler, 0.005)
    assert batch.parts[0].request is tight
    assert batch.rows == 4  # they take 8 ms; five rows would end at 14 ms


def test_a_batch_is_not_larger_than_the_most_efficient_size() -> None:
    flat = InstanceGroup(1, 2, 8, LatencyProfile({1: 0.0081, 2: 0.0155, 4: 0.0300, 8: 0.0604}))
    scheduler = DeadlineScheduler(1, 1 << 10)
    scheduler.add(MODEL, [flat], objective_s=1.0)
    for _ in range(16):
        enqueue(scheduler, Request(1, 0.0, 1.0))
    assert start(scheduler).rows == 4


def test_a_request_larger_than_a_batch_is_split_in_order() -> None:
    scheduler = deadline_scheduler(ONE)
    request = enqueue(scheduler, Request(20, 0.0, 10.0))
    taken, now_s = [], 0.0
    while (batch := scheduler.next_batch(now_s)) is not None:
        taken += [(part.first, part.rows) for part in batch.parts]
        now_s += 0.012
        scheduler.batch_finished(batch, now_s, 0.012)
    assert taken == [(0, 8), (8, 8), (16, 4)]
    assert (request.taken_rows, scheduler.queued_rows(MODEL)) == (20, 0)


def test_a_cancelled_request_is_in_no_batch_and_frees_its_capacity() -> None:
    scheduler = deadline_scheduler(ONE, capacity=10)
    requests = [enqueue(scheduler, Request(5, 0.0, 10.0)) for _ in range(2)]
    scheduler.cancel(MODEL, requests[0])
    scheduler.cancel(MODEL, requests[0])
    assert scheduler.queued_rows(MODEL) == 5
    enqueue(scheduler, Request(5, 0.0, 11.0))
    assert requests[0] not in [part.request for part in start(scheduler).parts]


def test_a_request_that_is_not_ready_counts_as_queued_but_does_not_run() -> None:
    scheduler = deadline_scheduler(ONE)
    decoding = Request(1, 0.0, 5.0)
    scheduler.admit(MODEL, decoding, 0.0)
    assert scheduler.next_batch(0.0) is None
    assert scheduler.queued_rows(MODEL) == 1
    other = enqueue(scheduler, Request(1, 0.0, 9.0))
    running = start(scheduler)
    assert [part.request for part in running.parts] == [other]
    scheduler.mark_ready(MODEL, decoding, 0.001)
    scheduler.batch_finished(running, 0.005, 0.005)
    assert [part.request for part in start(scheduler, 0.005).parts] == [decoding]


def test_a_request_that_cannot_be_in_time_any_more_expires_before_it_runs() -> None:
    scheduler = deadline_scheduler(ONE)
    enqueue(scheduler, Request(8, 0.0, 10.0))
    running = start(scheduler)
    expired = enqueue(scheduler, Request(1, 0.0, 0.030))
    scheduler.batch_finished(running, 0.027, 0.027)  # more than twice the profile
    assert scheduler.next_batch(0.027) is None
    assert [request for _, request in scheduler.take_expired()] == [expired]
    assert list(scheduler.take_expired()) == []
    assert scheduler.queued_rows(MODEL) == 0


def test_cancelling_10000_requests_leaves_an_empty_queue() -> None:
    scheduler = deadline_scheduler(GPU)
    requests = [enqueue(scheduler, Request(1, 0.0, 100.0)) for _ in range(10_000)]
    random.Random(0).shuffle(requests)
    for request in requests:
        scheduler.cancel(MODEL, request)
    assert scheduler.queued_rows(MODEL) == 0
    assert scheduler.next_batch(1.0) is None


def test_requests_of_a_removed_model_change_no_queue_of_a_new_one_with_its_name() -> None:
    scheduler = deadline_scheduler(ONE)
    request = enqueue(scheduler, Request(20, 0.0, 10.0))
    start(scheduler)
    assert scheduler.remove(MODEL) == [request]
    scheduler.add(MODEL, ONE.groups, objective_s=0.1)
    scheduler.cancel(MODEL, request)  # its batch has failed
    assert scheduler.queued_rows(MODEL) == 0
    enqueue(scheduler, Request(1, 0.0, 10.0))
    assert scheduler.queued_rows(MODEL) == 1
