"""Devices and arrival patterns for simulations."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

from server.scheduling.base import InstanceGroup
from server.scheduling.latency import LatencyProfile
from server.security.principal import LOCAL_CALLER, Principal

MODEL = "model"


@dataclass(frozen=True)
class Device:
    """A device with the instance groups of one model."""

    name: str
    units: int
    groups: tuple[InstanceGroup, ...]
    deadline_s: float

    @property
    def capacity_hz(self) -> float:
        """Rows per second of the best group at its best batch size."""
        return max(
            rows / group.profile(rows) * group.concurrency(self.units)
            for group in self.groups
            for rows in range(1, group.max_batch + 1)
        )


# ResNet-50 in bf16 on two cores. Batching gains little; two instances of one core each process more
# than one instance of two cores.
CPU = Device(
    "cpu",
    2,
    (
        InstanceGroup(2, 1, 8, LatencyProfile({1: 0.0055, 2: 0.0095, 4: 0.0175, 8: 0.0324})),
        InstanceGroup(1, 2, 8, LatencyProfile({1: 0.0081, 2: 0.0155, 4: 0.0300, 8: 0.0604})),
    ),
    0.100,
)
# Typical for a GPU: the first rows are nearly free, so a small batch wastes most of its time.
GPU = Device(
    "gpu",
    2,
    (InstanceGroup(1, 2, 32, LatencyProfile({1: 0.0020, 8: 0.0028, 16: 0.0036, 32: 0.0055})),),
    0.030,
)


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request that arrives at `at_s`."""

    at_s: float
    deadline_s: float  # from arrival
    rows: int = 1
    priority: int = 0
    model: str = MODEL
    principal: Principal = LOCAL_CALLER


def poisson(rate_hz: float, seconds: float, seed: int) -> list[float]:
    """Arrival times of a Poisson process."""
    draw, now, times = random.Random(seed), 0.0, []
    while (now := now + draw.expovariate(rate_hz)) < seconds:
        times.append(now)
    return times


def bursts(rate_hz: float, seconds: float, seed: int, period_s: float = 0.6) -> list[float]:
    """A Poisson process of the given mean rate that is active in two fifths of each period."""
    draw, now, times = random.Random(seed), 0.0, []
    while (now := now + draw.expovariate(2.5 * rate_hz)) < seconds:
        if int(now / period_s * 5) % 5 in (0, 2):
            times.append(now)
    return times


def trace(rate_hz: float, seconds: float, seed: int) -> list[float]:
    """Like a day's traffic: the mean rate varies between 0.5 and 1.5 times, with heavy noise."""
    draw, now, times = random.Random(seed), 0.0, []
    while now < seconds:
        level = 1 + 0.5 * math.sin(2 * math.pi * now / seconds)
        now += draw.expovariate(rate_hz * level * draw.lognormvariate(-0.125, 0.5))
        times.append(now)
    return [time for time in times if time < seconds]


ARRIVALS = {"poisson": poisson, "bursts": bursts, "trace": trace}
