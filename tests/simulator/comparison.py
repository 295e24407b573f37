"""Compares the deadline scheduler with the rules of other servers.

All schedulers get the same arrivals and the same noise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from server.scheduling.base import Scheduler
from server.scheduling.deadline import DeadlineScheduler
from server.scheduling.fixed import FixedScheduler
from tests.simulator.reference_schedulers import Aimd, AllowedSizes, LinearModel
from tests.simulator.scenarios import ARRIVALS, CPU, GPU, MODEL, Arrival, Device
from tests.simulator.simulation import clairvoyant, simulate

LOADS = (0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 3.0, 5.0)

SCHEDULERS: dict[str, Callable[[Device], Scheduler]] = {
    "deadline": lambda device: DeadlineScheduler(device.units, 1 << 16),
    "size+delay (Triton)": lambda device: FixedScheduler(
        device.units, 1 << 30, size=device.groups[-1].max_batch, delay_s=0.002
    ),
    "allowed sizes (TFS)": lambda device: AllowedSizes(),
    "straight line (BentoML)": lambda device: LinearModel(),
    "AIMD (Clipper)": lambda device: Aimd(),
}


@dataclass(frozen=True, slots=True)
class Row:
    """One scenario: requests in time as a fraction of the clairvoyant bound, by scheduler."""

    device: str
    arrivals: str
    load: float  # offered rate divided by capacity
    bound_hz: float
    fractions: dict[str, float]


def compare(device: Device, arrivals: str, load: float, deadlines: int, seed: int = 1) -> Row:
    """Runs all schedulers at `load` times the device's capacity, for `deadlines` deadlines."""
    rate_hz = load * device.capacity_hz
    seconds = deadlines * device.deadline_s
    times = ARRIVALS[arrivals](rate_hz, seconds, seed)
    offered = [Arrival(time, device.deadline_s) for time in times]
    bound = clairvoyant(offered, device.capacity_hz)
    fractions = {}
    for name, make in SCHEDULERS.items():
        scheduler = make(device)
        scheduler.add(MODEL, device.groups, objective_s=device.deadline_s, weight=1.0)
        outcome = simulate(scheduler, device.groups, offered)
        fractions[name] = outcome.in_time / bound
    return Row(device.name, arrivals, load, bound / seconds, fractions)


def print_table(deadlines: int = 100) -> None:
    print("Requests answered in time, as a fraction of what a clairvoyant server could answer.\n")
    print("| device | arrivals | load | bound /s | " + " | ".join(SCHEDULERS) + " |")
    print("|---|---|--:|--:|" + "--:|" * len(SCHEDULERS))
    lowest = 1.0
    for device in (CPU, GPU):
        for arrivals in ARRIVALS:
            for load in LOADS:
                row = compare(device, arrivals, load, deadlines)
                cells = " | ".join(f"{fraction:.1%}" for fraction in row.fractions.values())
                print(f"| {device.name} | {arrivals} | {load} | {row.bound_hz:.0f} | {cells} |")
                lowest = min(lowest, row.fractions["deadline"])
    print(f"\nLowest fraction of the deadline scheduler: {lowest:.1%}")
