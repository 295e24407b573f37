"""Latency profiles, and the estimates that follow the latest batches."""

from __future__ import annotations

import math
import random

import pytest

from server.scheduling.base import InstanceGroup, Request
from server.scheduling.deadline import DeadlineScheduler
from server.scheduling.latency import LatencyEstimate, LatencyProfile
from tests.scheduling.driver import enqueue, start


def test_a_profile_interpolates_between_sizes_and_never_decreases() -> None:
    profile = LatencyProfile({1: 0.010, 2: 0.009, 4: 0.020})
    assert [profile(rows) for rows in (1, 2, 4)] == [0.010, 0.010, 0.020]
    assert profile(3) == pytest.approx(0.015)
    assert profile(8) == pytest.approx(0.040)
    sizes = [profile.largest_batch(seconds) for seconds in (0.009, 0.010, 0.016, 1.0)]
    assert sizes == [0, 2, 3, 4]


@pytest.mark.parametrize("seconds", [{}, {2: 0.1}, {1: 0.0}, {1: 0.1, 4: -1.0}])
def test_a_profile_without_size_1_or_with_a_time_of_0_is_rejected(
    seconds: dict[int, float],
) -> None:
    with pytest.raises(ValueError, match="latency profile"):
        LatencyProfile(seconds)


def test_an_estimate_follows_a_slowdown_and_a_recovery_within_20_batches() -> None:
    latency = LatencyEstimate(LatencyProfile({1: 0.010, 8: 0.040}))
    for _ in range(20):
        latency.record(8, 0.120, 0.0)
    assert latency.p50_factor == pytest.approx(3)
    assert latency.p99_factor == pytest.approx(3)
    assert latency.p50_s(1) == pytest.approx(0.030), "other batch sizes are slower too"
    for _ in range(20):
        latency.record(1, 0.010, 0.0)
    assert (latency.p50_factor, latency.p99_factor) == (1.0, 1.0)


def test_one_outlier_is_ignored_and_no_estimate_is_faster_than_the_profile() -> None:
    latency = LatencyEstimate(LatencyProfile({1: 0.010}))
    for seconds in (0.010, 0.500, 0.004, 0.010):
        latency.record(1, seconds, 0.0)
    assert latency.p99_factor == pytest.approx(1.0)
    assert latency.p50_factor == 1.0


def test_the_p99_factor_is_about_the_99th_percentile_of_an_exponential_tail() -> None:
    draw, profile = random.Random(1), LatencyProfile({1: 1.0})
    estimates = []
    for _ in range(400):
        latency = LatencyEstimate(profile)
        for _ in range(LatencyEstimate.WINDOW):
            latency.record(1, 1.0 + draw.expovariate(1 / 0.1), 0.0)
        estimates.append(latency.p99_factor)
    percentile = 1.0 + 0.1 * math.log(100)
    assert sum(estimates) / len(estimates) == pytest.approx(percentile, rel=0.05)


def test_a_group_that_has_not_run_for_a_while_is_estimated_by_its_profile_again() -> None:
    wide = InstanceGroup(2, 1, 8, LatencyProfile({1: 0.010}))
    narrow = InstanceGroup(1, 2, 8, LatencyProfile({1: 0.018}))
    scheduler = DeadlineScheduler(2, 64)
    scheduler.add("net", [wide, narrow], objective_s=1.0)

    def run_one(now_s: float) -> int:
        """The instance group that a single request runs on."""
        enqueue(scheduler, Request(1, now_s), now_s, model="net")
        batch = start(scheduler, now_s)
        seconds = (0.040, 0.018)[batch.group_index]
        scheduler.batch_finished(batch, now_s + seconds, seconds)
        return batch.group_index

    groups = [run_one(0.1 * n) for n in range(6)]
    assert groups == [0] + 5 * [1], "group 0 was slow at first"
    assert run_one(0.6) == 0, "its last batch is long ago, so it is tried again"
    assert run_one(0.7) == 1
