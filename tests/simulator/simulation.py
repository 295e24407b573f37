"""Discrete-event simulation of one device under a scheduler, in virtual time."""

from __future__ import annotations

import heapq
import math
import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from server.errors import ServingError
from server.scheduling.base import Batch, InstanceGroup, Request, Scheduler
from tests.simulator.scenarios import Arrival

NOISE = 0.03  # standard deviation of a batch's relative slowdown

Slowdown = Callable[[float], float]  # virtual time -> factor on run times


@dataclass(slots=True)
class Outcome:
    """Results of a simulation: requests in time, and the use of the device."""

    in_time: int = 0
    late: int = 0
    refused: int = 0
    expired: int = 0
    busy_s: float = 0.0  # unit-seconds
    wasted_s: float = 0.0  # of these, for rows that were late
    busy_by_model_s: dict[str, float] = field(default_factory=dict)  # unit-seconds
    in_time_by_model: dict[str, int] = field(default_factory=dict)
    in_time_by_principal: Counter[str] = field(default_factory=Counter)
    late_by_principal: Counter[str] = field(default_factory=Counter)  # late or expired
    batches: list[Batch] = field(default_factory=list)
    timeline: list[tuple[float, bool]] = field(default_factory=list)  # completion, in time?

    def add(self, batch: Batch, seconds: float, now_s: float) -> None:
        """A batch has finished."""
        model, unit_s = batch.model, seconds * batch.units
        self.busy_s += unit_s
        self.busy_by_model_s[model] = self.busy_by_model_s.get(model, 0.0) + unit_s
        for request, first, rows in batch.parts:
            in_time = now_s <= request.deadline_s + 1e-9
            if not in_time:
                self.wasted_s += unit_s * rows / batch.rows
            if first + rows == request.rows:  # the last part: parts start in order
                self.timeline.append((now_s, in_time))
                if in_time:
                    self.in_time += 1
                    self.in_time_by_model[model] = self.in_time_by_model.get(model, 0) + 1
                    self.in_time_by_principal[request.principal.name] += 1
                else:
                    self.late += 1
                    self.late_by_principal[request.principal.name] += 1


class Simulation:
    """The event queue of a simulation, and the device that runs the scheduler's batches."""

    def __init__(
        self,
        scheduler: Scheduler,
        groups: Sequence[InstanceGroup],
        seed: int,
        noise: float,
        slowdown: Slowdown,
    ) -> None:
        self.outcome = Outcome()
        self._scheduler = scheduler
        self._groups = groups
        self._draw = random.Random(seed)
        self._noise = noise
        self._slowdown = slowdown
        self._events: list[tuple[float, int, Callable[[float], None]]] = []
        self._sequence = 0
        self._wake_s: float | None = None

    def arrive(self, arrival: Arrival) -> None:
        self._at(arrival.at_s, lambda now_s: self._admit(arrival, now_s))

    def run(self) -> None:
        while self._events:
            now_s, _, happen = heapq.heappop(self._events)
            happen(now_s)

    def _at(self, at_s: float, happen: Callable[[float], None]) -> None:
        self._sequence += 1
        heapq.heappush(self._events, (at_s, self._sequence, happen))

    def _admit(self, arrival: Arrival, now_s: float) -> None:
        deadline_s = now_s + arrival.deadline_s
        request = Request(arrival.rows, now_s, deadline_s, arrival.priority, arrival.principal)
        try:
            self._scheduler.admit(arrival.model, request, now_s)
        except ServingError:
            self.outcome.refused += 1
        else:
            self._scheduler.mark_ready(arrival.model, request, now_s)
            self._dispatch(now_s)

    def _dispatch(self, now_s: float) -> None:
        while (batch := self._scheduler.next_batch(now_s)) is not None:
            self._start(batch, now_s)
        for _, request in self._scheduler.take_expired():
            self.outcome.expired += 1
            self.outcome.late_by_principal[request.principal.name] += 1
        wake_s = self._scheduler.next_wake_s(now_s)
        if wake_s is not None and wake_s != self._wake_s:
            self._wake_s = wake_s
            self._at(max(wake_s, now_s), self._dispatch)

    def _start(self, batch: Batch, now_s: float) -> None:
        profile_s = self._groups[batch.group_index].profile(batch.rows)
        noise = 1 + abs(self._draw.gauss(0, self._noise))
        seconds = profile_s * self._slowdown(now_s) * noise
        self.outcome.batches.append(batch)
        self._at(now_s + seconds, lambda now_s: self._finish(batch, seconds, now_s))

    def _finish(self, batch: Batch, seconds: float, now_s: float) -> None:
        self._scheduler.batch_finished(batch, now_s, seconds)
        self.outcome.add(batch, seconds, now_s)
        self._dispatch(now_s)


def simulate(
    scheduler: Scheduler,
    groups: Sequence[InstanceGroup],
    arrivals: Iterable[Arrival],
    *,
    seed: int = 1,
    noise: float = NOISE,
    slowdown: Slowdown = lambda now_s: 1.0,
) -> Outcome:
    """Simulates the arrivals until the last batch is done."""
    simulation = Simulation(scheduler, groups, seed, noise, slowdown)
    for arrival in arrivals:
        simulation.arrive(arrival)
    simulation.run()
    return simulation.outcome


def clairvoyant(arrivals: Sequence[Arrival], capacity_hz: float, noise: float = NOISE) -> int:
    """An upper bound for the number of one-row requests answered in time, if all have the same
    deadline.

    The bound assumes a server that always runs at the device's best rate and skips the requests
    that it cannot answer in time. With equal run times and deadlines in the order of arrival, first
    come first served is optimal. `noise` slows it down as it slows the device, on average.
    """
    capacity_hz /= 1 + noise * math.sqrt(2 / math.pi)
    free_s, in_time = 0.0, 0
    for arrival in arrivals:
        end_s = max(free_s, arrival.at_s) + 1 / capacity_hz
        if end_s <= arrival.at_s + arrival.deadline_s:
            free_s = end_s
            in_time += 1
    return in_time
