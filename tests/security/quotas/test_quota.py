"""Token buckets of images, in virtual time."""

from __future__ import annotations

import math

import pytest

from server.errors import InvalidInput, QuotaExceeded
from server.security.principal import LOCAL_CALLER, Principal
from server.security.quota import Quotas

TEAM = Principal(name="team", roles=frozenset(), images_per_s=10.0, burst=20.0)


def wait_s(quotas: Quotas, images: int, now_s: float) -> float:
    """The time until a retry that a refusal names."""
    with pytest.raises(QuotaExceeded) as caught:
        quotas.charge(TEAM, images, now_s)
    return caught.value.retry_after_s


def test_a_burst_is_followed_by_the_rate() -> None:
    quotas = Quotas()
    quotas.charge(TEAM, 20, 100.0)
    assert wait_s(quotas, 1, 100.0) == pytest.approx(0.1)
    admitted = 0
    for step in range(1, 1001):
        try:
            quotas.charge(TEAM, 1, 100.0 + step / 100)
            admitted += 1
        except QuotaExceeded:
            pass
    assert admitted in (99, 100)


def test_a_retry_at_the_given_time_is_accepted_and_not_before() -> None:
    quotas = Quotas()
    quotas.charge(TEAM, 15, 0.0)
    again_s = wait_s(quotas, 12, 0.0)
    assert again_s == pytest.approx(0.7)
    assert wait_s(quotas, 12, again_s - 0.01) == pytest.approx(0.01)
    quotas.charge(TEAM, 12, again_s + 1e-9)


def test_a_refusal_costs_nothing() -> None:
    quotas = Quotas()
    quotas.charge(TEAM, 15, 0.0)
    for _ in range(100):
        wait_s(quotas, 6, 0.0)
    quotas.charge(TEAM, 5, 0.0)


def test_a_refund_makes_room_for_the_same_number_of_images() -> None:
    quotas = Quotas()
    quotas.charge(TEAM, 20, 0.0)
    quotas.refund(TEAM, 20)
    quotas.charge(TEAM, 20, 0.0)
    assert wait_s(quotas, 1, 0.0) == pytest.approx(0.1)


def test_a_request_above_the_burst_is_wrong_and_not_early() -> None:
    with pytest.raises(InvalidInput, match=r"are 21; the quota of team allows 20 at once"):
        Quotas().charge(TEAM, 21, 0.0)


def test_principals_without_a_rate_are_not_limited() -> None:
    quotas = Quotas()
    for _ in range(100):
        quotas.charge(LOCAL_CALLER, 1_000_000, 0.0)
    assert LOCAL_CALLER.images_per_s == math.inf


def test_each_principal_has_its_own_bucket() -> None:
    quotas = Quotas()
    quotas.charge(TEAM, 20, 0.0)
    quotas.charge(Principal(name="b", roles=frozenset(), images_per_s=1.0, burst=20.0), 20, 0.0)


def test_a_reload_neither_fills_a_bucket_nor_keeps_those_of_principals_that_left() -> None:
    quotas = Quotas()
    quotas.charge(TEAM, 20, 0.0)
    quotas.keep(["team"])
    slower = Principal(name="team", roles=frozenset(), images_per_s=5.0, burst=10.0)
    with pytest.raises(QuotaExceeded) as caught:
        quotas.charge(slower, 1, 0.0)
    assert caught.value.retry_after_s == pytest.approx(0.2)
    quotas.keep(["other"])
    quotas.charge(TEAM, 20, 0.0)
