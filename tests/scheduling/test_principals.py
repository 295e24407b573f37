"""How principals share a model: by weight, whatever the others send."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.errors import Overloaded
from server.scheduling.base import Request
from server.scheduling.deadline import DeadlineScheduler
from server.scheduling.device_share import MAX_CREDIT_S
from server.security.principal import Principal
from tests.scheduling.driver import ONE, deadline_scheduler, enqueue, start
from tests.simulator.scenarios import CPU, GPU, MODEL, Arrival, Device, poisson
from tests.simulator.simulation import Outcome, simulate


def principal(name: str, weight: float = 1.0) -> Principal:
    return Principal(name=name, roles=frozenset(), weight=weight)


MODEST, FLOOD = principal("modest"), principal("flood")


def arrivals(
    device: Device,
    who: Principal,
    load: float,
    seconds: float,
    deadline_s: float,
    *,
    priority: int = 0,
    rows: int = 1,
) -> list[Arrival]:
    """Requests of a principal at `load` times the device's capacity."""
    rate_hz = load * device.capacity_hz / rows
    times = poisson(rate_hz, seconds, seed=len(who.name))
    return [Arrival(time, deadline_s, rows, priority, principal=who) for time in times]


def run(device: Device, *offered: list[Arrival]) -> Outcome:
    together = sorted((one for many in offered for one in many), key=lambda one: one.at_s)
    return simulate(deadline_scheduler(device), device.groups, together)


@pytest.mark.parametrize("flood_deadline_s", [0.04, 0.5])
@pytest.mark.parametrize("deadline_s", [0.04, 0.5])
def test_beside_a_flood_a_principal_keeps_95_percent_of_its_share(
    deadline_s: float, flood_deadline_s: float
) -> None:
    modest = arrivals(CPU, MODEST, 0.47, 5.0, deadline_s)
    flood = arrivals(CPU, FLOOD, 10.0, 5.0, flood_deadline_s)
    outcome = run(CPU, modest, flood)
    assert outcome.in_time_by_principal["modest"] >= 0.95 * len(modest)
    # The flood gets all that is left, almost.
    assert outcome.in_time_by_principal["flood"] >= 0.46 * 5.0 * CPU.capacity_hz


def test_beside_a_flood_a_principal_keeps_its_share_of_a_device_that_needs_large_batches() -> None:
    modest = arrivals(GPU, MODEST, 0.49, 0.25, 0.04)
    outcome = run(GPU, modest, arrivals(GPU, FLOOD, 10.0, 0.25, 0.04))
    assert outcome.in_time_by_principal["modest"] >= 0.95 * len(modest)
    assert outcome.in_time_by_principal["flood"] >= 0.45 * 0.25 * GPU.capacity_hz


@pytest.mark.parametrize("device", [CPU, GPU], ids=lambda device: device.name)
def test_a_flood_in_pulses_takes_nothing_from_another_share(device: Device) -> None:
    seconds = 4.0 if device is CPU else 0.3
    modest = arrivals(device, MODEST, 0.4, seconds, 0.04)
    flood = [one for one in arrivals(device, FLOOD, 10.0, seconds, 0.04) if one.at_s % 0.25 < 0.05]
    outcome = run(device, modest, flood)
    assert outcome.in_time_by_principal["modest"] >= 0.95 * len(modest)


def test_the_flood_does_not_gain_by_a_higher_priority() -> None:
    modest = arrivals(CPU, MODEST, 0.4, 3.0, 0.1)
    outcome = run(CPU, modest, arrivals(CPU, FLOOD, 10.0, 3.0, 0.1, priority=9))
    assert outcome.in_time_by_principal["modest"] >= 0.98 * len(modest)


def test_the_flood_pays_for_the_small_batches_that_its_short_deadlines_need() -> None:
    modest = arrivals(GPU, MODEST, 0.45, 0.4, 0.1)
    outcome = run(GPU, modest, arrivals(GPU, FLOOD, 10.0, 0.4, 0.0035))
    # 75 % if all rows of a batch paid the same.
    assert outcome.in_time_by_principal["modest"] >= 0.9 * len(modest)


def test_the_flood_does_not_gain_by_large_requests() -> None:
    modest = arrivals(CPU, MODEST, 0.4, 3.0, 0.1)
    outcome = run(CPU, modest, arrivals(CPU, FLOOD, 10.0, 3.0, 2.0, rows=64))
    assert outcome.in_time_by_principal["modest"] >= 0.95 * len(modest)


def test_a_flood_without_deadlines_does_not_delay_others() -> None:
    modest = arrivals(CPU, MODEST, 0.4, 4.0, math.inf)
    outcome = run(CPU, modest, arrivals(CPU, FLOOD, 5.0, 4.0, math.inf))
    # Requests without a deadline count as in time if they meet the model's objective.
    assert outcome.in_time_by_principal["modest"] >= 0.97 * len(modest)


@pytest.mark.parametrize("weight", [1.0, 3.0])
def test_principals_above_their_shares_get_device_time_by_weight(weight: float) -> None:
    heavy = principal("heavy", weight)
    outcome = run(
        CPU, arrivals(CPU, heavy, 2.0, 4.0, 0.1), arrivals(CPU, principal("light"), 2.0, 4.0, 0.1)
    )
    got, other = (outcome.in_time_by_principal[name] for name in ("heavy", "light"))
    assert got / (got + other) == pytest.approx(weight / (weight + 1), abs=0.04)
    assert got + other >= 0.9 * 4.0 * CPU.capacity_hz


def test_two_principals_without_overload_lose_nothing() -> None:
    slow = arrivals(CPU, principal("slow"), 0.4, 4.0, 0.5, rows=4)
    fast = arrivals(CPU, principal("quick"), 0.3, 4.0, 0.08)
    outcome = run(CPU, slow, fast)
    assert outcome.in_time_by_principal["slow"] >= 0.99 * len(slow)
    assert outcome.in_time_by_principal["quick"] >= 0.99 * len(fast)


def test_a_batch_has_rows_of_several_principals_and_each_pays_for_its_own() -> None:
    scheduler = deadline_scheduler(ONE)
    enqueue(scheduler, Request(1, 0.0, 10.0, principal=FLOOD))
    running = start(scheduler)
    for who in (FLOOD, MODEST):
        for _ in range(12):
            enqueue(scheduler, Request(1, 0.0, 10.0, principal=who))
    scheduler.batch_finished(running, 0.005, 0.005)
    names = [part.request.principal.name for part in start(scheduler, 0.005).parts]
    assert len(names) == 8
    # The flood has used one row's time; then both run in turn.
    assert 3 <= names.count("flood") <= 4


def test_a_full_queue_has_room_for_another_principal() -> None:
    scheduler = DeadlineScheduler(1, 90)
    scheduler.add(MODEL, ONE.groups, objective_s=10.0)
    for _ in range(80):
        enqueue(scheduler, Request(1, 0.0, 100.0, principal=FLOOD))
    with pytest.raises(Overloaded, match="holds at most 90"):
        enqueue(scheduler, Request(1, 0.0, 100.0, principal=FLOOD))
    for _ in range(5):
        enqueue(scheduler, Request(1, 0.0, 100.0, principal=MODEST))


def test_a_principal_cannot_fill_the_queues_of_all_models() -> None:
    scheduler = DeadlineScheduler(1, 90, 90)
    for model in ("a", "b"):
        scheduler.add(model, ONE.groups, objective_s=10.0)
    for model in ("a", "b"):
        for _ in range(40):
            enqueue(scheduler, Request(1, 0.0, 100.0, principal=FLOOD), model=model)
    with pytest.raises(Overloaded, match="all queues together hold at most 90"):
        enqueue(scheduler, Request(1, 0.0, 100.0, principal=FLOOD), model="a")
    for model in ("a", "b"):
        enqueue(scheduler, Request(1, 0.0, 100.0, principal=MODEST), model=model)
    scheduler.remove("a")
    for _ in range(20):
        enqueue(scheduler, Request(1, 0.0, 100.0, principal=FLOOD), model="b")


def test_a_principal_that_returns_after_a_pause_goes_before_the_flood() -> None:
    scheduler = deadline_scheduler(ONE)
    now_s = 0.0
    for _ in range(64):
        enqueue(scheduler, Request(1, 0.0, 50.0, principal=FLOOD))
    scheduler.batch_finished(start(scheduler), 0.012, 0.012)
    now_s = 0.012
    first = enqueue(scheduler, Request(2, now_s, 60.0, principal=MODEST), now_s)
    parts = start(scheduler, now_s).parts
    assert parts[0].request is first
    assert MAX_CREDIT_S < 60.0, "not because of its deadline"


@given(
    requests=st.lists(
        st.tuples(
            st.floats(0, 0.3),  # arrival
            st.one_of(st.floats(0.001, 0.5), st.just(math.inf)),  # deadline
            st.integers(1, 20),  # rows
            st.integers(0, 9),  # priority
            st.sampled_from([principal("a"), principal("b", 5.0), principal("c", 0.1)]),
        ),
        min_size=1,
        max_size=60,
    ),
    device=st.sampled_from([CPU, GPU, ONE]),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_every_request_of_every_principal_ends_once(
    requests: list[tuple[float, float, int, int, Principal]], device: Device
) -> None:
    offered = [
        Arrival(at_s, deadline_s, rows, priority, principal=who)
        for at_s, deadline_s, rows, priority, who in requests
    ]
    scheduler = deadline_scheduler(device)
    outcome = simulate(scheduler, device.groups, sorted(offered, key=lambda one: one.at_s))
    ends = outcome.in_time + outcome.late + outcome.refused + outcome.expired
    assert ends == len(offered)
    assert scheduler.queued_rows(MODEL) == 0
