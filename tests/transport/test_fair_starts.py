"""Calls of principals start in turn."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

import pytest

from server.security.principal import LOCAL_CALLER, Principal
from server.telemetry.loop_lag import LoopLag
from server.transport.calls.fair_starts import MAX_STARTS, FairStarts


def principal(name: str, weight: float = 1.0) -> Principal:
    return Principal(name=name, roles=frozenset(), weight=weight)


FLOOD, MODEST = principal("flood"), principal("modest")


class FixedLag(LoopLag):
    """A loop in which `waiting` tasks wait that take 1 ms each."""

    waiting = 0

    @property
    def task_s(self) -> float:
        return 0.001

    @property
    def wait_s(self) -> float:
        return 0.001 * self.waiting


async def start_order(
    starts: FairStarts, calls: Iterable[tuple[Principal, int]], size: int = 0
) -> list[str]:
    """The names of the principals in the order in which their calls start."""
    order: list[str] = []

    async def call(who: Principal) -> None:
        await starts.turn(who, size)
        order.append(who.name)

    tasks = [asyncio.create_task(call(who)) for who, count in calls for _ in range(count)]
    await asyncio.gather(*tasks)
    return order


async def test_a_call_does_not_wait_behind_the_calls_of_another_principal() -> None:
    order = await start_order(FairStarts(FixedLag()), [(FLOOD, 1000), (MODEST, 1)])
    assert len(order) == 1001
    assert order.index("modest") <= 8


@pytest.mark.parametrize("weight", [1.0, 3.0])
async def test_calls_start_by_weight(weight: float) -> None:
    heavy = principal("heavy", weight)
    order = await start_order(FairStarts(FixedLag()), [(heavy, 400), (MODEST, 400)])
    first = order[:400]
    assert first.count("heavy") / first.count("modest") == pytest.approx(weight, rel=0.1)


async def test_large_requests_cost_more() -> None:
    starts = FairStarts(FixedLag())
    large = asyncio.create_task(start_order(starts, [(FLOOD, 100)], 256 << 10))
    small = await start_order(starts, [(MODEST, 100)])
    assert len(small) == 100
    assert not large.done(), "a request of 256 KiB costs five times as much as a small one"
    await large


async def test_only_some_calls_start_in_one_turn() -> None:
    starts, started = FairStarts(LoopLag()), 0

    async def call() -> None:
        nonlocal started
        await starts.turn(FLOOD)
        started += 1

    tasks = [asyncio.create_task(call()) for _ in range(3 * MAX_STARTS)]
    await asyncio.sleep(0)
    assert started == MAX_STARTS
    await asyncio.gather(*tasks)


async def test_cancelled_calls_take_no_turn() -> None:
    starts = FairStarts(FixedLag())
    flood = [asyncio.create_task(starts.turn(FLOOD)) for _ in range(100)]
    await asyncio.sleep(0)
    for task in flood:
        task.cancel()
    assert await start_order(starts, [(MODEST, 8)]) == 8 * ["modest"]
    await asyncio.gather(*flood, return_exceptions=True)
    assert await start_order(starts, [(FLOOD, 1)]) == ["flood"], "nothing is left behind"


async def test_anonymous_calls_start_at_once() -> None:
    starts = FairStarts(FixedLag())
    flood = [asyncio.create_task(starts.turn(FLOOD)) for _ in range(100)]
    await asyncio.sleep(0)
    turn = starts.turn(LOCAL_CALLER)
    with pytest.raises(StopIteration):
        turn.send(None)
    await asyncio.gather(*flood)


async def test_a_call_waits_for_the_line_of_its_own_principal() -> None:
    lag = FixedLag()
    starts = FairStarts(lag)
    flood = [asyncio.create_task(starts.turn(FLOOD)) for _ in range(104)]
    await asyncio.sleep(0)
    lag.waiting = 100
    flood_wait_s, flood_is_within_share = starts.wait_of(FLOOD)
    assert flood_wait_s == pytest.approx(0.1)
    assert not flood_is_within_share
    wait_s, is_within_share = starts.wait_of(MODEST)
    assert wait_s == pytest.approx(0.002)
    assert is_within_share
    await asyncio.gather(*flood)
