"""Limits that principals share."""

from __future__ import annotations

import random

import pytest

from server.security.fair_limit import FairLimit
from server.security.principal import LOCAL_CALLER, Principal


def principal(name: str, weight: float = 1.0) -> Principal:
    return Principal(name=name, roles=frozenset(), weight=weight)


def fill(limit: FairLimit, *principals: Principal) -> list[int]:
    """Adds one by one for each principal in turn until nothing fits. Returns what each got."""
    got = [0] * len(principals)
    while any(limit.fits(who, 1) for who in principals):
        for index, who in enumerate(principals):
            if limit.fits(who, 1):
                limit.add(who, 1)
                got[index] += 1
    return got


def test_anonymous_callers_use_the_whole_limit() -> None:
    assert fill(FairLimit(90), LOCAL_CALLER) == [90]


def test_one_principal_leaves_room_for_others() -> None:
    limit = FairLimit(90)
    assert fill(limit, principal("a")) == [80]
    assert fill(limit, principal("b")) == [8]
    assert fill(limit, LOCAL_CALLER) == [2]


def test_a_small_limit_may_be_used_by_one_principal() -> None:
    for size in range(1, 9):
        assert fill(FairLimit(size), principal("a")) == [size]


@pytest.mark.parametrize("weight", [1.0, 3.0])
def test_after_a_flood_each_principal_gets_its_part(weight: float) -> None:
    limit, flood, modest = FairLimit(900), principal("flood"), principal("modest", weight)
    held = {flood: fill(limit, flood)[0], modest: 0}
    draw = random.Random(1)
    for _ in range(20_000):  # calls end in any order, and both principals want more
        ends = draw.choices(list(held), weights=list(held.values()))[0]
        limit.remove(ends, 1)
        held[ends] -= 1
        for who in (flood, modest):
            if limit.fits(who, 1):
                limit.add(who, 1)
                held[who] += 1
    assert held[modest] / held[flood] == pytest.approx(weight, rel=0.1)
    for who, count in held.items():
        limit.remove(who, count)
    assert limit.used == 0


def test_a_weight_may_change_while_a_principal_holds_something() -> None:
    limit = FairLimit(90)
    limit.add(principal("a"), 5)
    limit.add(principal("a", 7.0), 5)
    limit.remove(principal("a"), 10)
    assert (limit.used, fill(limit, principal("b"))) == (0, [80])
