"""How models share a device."""

from __future__ import annotations

import pytest

from server.scheduling.deadline import DeadlineScheduler
from tests.scheduling.driver import ONE
from tests.simulator.scenarios import CPU, Arrival, poisson
from tests.simulator.simulation import simulate


def device_fractions(
    weights: dict[str, float], rates_hz: dict[str, float], seconds: float
) -> dict[str, float]:
    """The fraction of the used device time that each model gets at these request rates."""
    scheduler = DeadlineScheduler(1, 1 << 16)
    for model, weight in weights.items():
        scheduler.add(model, ONE.groups, objective_s=0.1, weight=weight)
    arrivals = [
        Arrival(time, 0.1, model=model)
        for seed, (model, rate_hz) in enumerate(rates_hz.items())
        for time in poisson(rate_hz, seconds, seed)
    ]
    outcome = simulate(scheduler, ONE.groups, arrivals)
    total_s = sum(outcome.busy_by_model_s.values())
    return {model: used_s / total_s for model, used_s in outcome.busy_by_model_s.items()}


@pytest.mark.parametrize("weight", [1.0, 3.0])
def test_overloaded_models_share_the_device_by_weight(weight: float) -> None:
    got = device_fractions({"a": weight, "b": 1.0}, {"a": 2000, "b": 2000}, 3.0)
    assert got["a"] == pytest.approx(weight / (weight + 1), abs=0.05)


def test_an_overloaded_model_gets_idle_time_but_not_another_models_share() -> None:
    scheduler = DeadlineScheduler(1, 1 << 16)
    for model in ("quiet", "loud"):
        scheduler.add(model, ONE.groups, objective_s=0.1)
    quiet = [Arrival(time, 0.1, model="quiet") for time in poisson(150, 3.0, 1)]
    loud = [Arrival(time, 0.1, model="loud") for time in poisson(3000, 3.0, 2)]
    outcome = simulate(scheduler, ONE.groups, quiet + loud)
    rows = {"quiet": 0, "loud": 0}
    for batch in outcome.batches:
        rows[batch.model] += batch.rows
    assert rows["quiet"] >= 0.95 * len(quiet)
    assert outcome.busy_s >= 0.97 * 3.0
    assert outcome.busy_by_model_s["loud"] > outcome.busy_by_model_s["quiet"] * 0.9


def test_a_model_below_its_share_is_in_time_beside_an_overloaded_model() -> None:
    scheduler = DeadlineScheduler(CPU.units, 1 << 16)
    for model in ("overloaded", "modest"):
        scheduler.add(model, CPU.groups, objective_s=CPU.deadline_s)
    modest = poisson(0.4 * CPU.capacity_hz, 20.0, seed=1)
    offered = [Arrival(time, CPU.deadline_s, model="modest") for time in modest]
    offered += [
        Arrival(time, CPU.deadline_s, model="overloaded")
        for time in poisson(3 * CPU.capacity_hz, 20.0, seed=2)
    ]
    offered.sort(key=lambda arrival: arrival.at_s)
    outcome = simulate(scheduler, CPU.groups, offered, noise=0.1)
    assert outcome.in_time_by_model["modest"] > 0.99 * len(modest)
    # The overloaded model gets the time that is left.
    assert outcome.in_time_by_model["overloaded"] > 0.45 * 20 * CPU.capacity_hz
