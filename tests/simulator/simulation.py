"""Policies against each other in virtual time: `python -m tests.simulator.simulation`.

A discrete-event simulation of one device. Engines follow a latency law with noise, callers arrive
by a seeded process and want their answer by a deadline. Every policy sees the same arrivals and the
same noise. The reference policies are the published rules of other servers, small and without their
surroundings; they run on this device's lanes with unbounded queues, as those servers do by default.
"""

from __future__ import annotations

import heapq
import math
import random
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from server.errors import ServingError
from server.scheduling.base import Batch, BatchPart, InstanceGroup, Request, Scheduler
from server.scheduling.deadline import DeadlineScheduler
from server.scheduling.fixed import FixedScheduler
from server.scheduling.latency import LatencyProfile

MODEL = "model"
NOISE = 0.03


@dataclass(frozen=True)
class Device:
    """A device with the lanes of one model."""

    name: str
    units: int
    lanes: tuple[InstanceGroup, ...]
    deadline_s: float

    @property
    def capacity_hz(self) -> float:
        """Rows a second of the best lane at its best batch size."""
        return max(
            rows / lane.profile(rows) * min(lane.count, self.units // lane.units)
            for lane in self.lanes
            for rows in range(1, lane.max_batch + 1)
        )


# ResNet-50 in bf16 on two cores: batching gives little, two narrow lanes give more than a wide one.
CPU = Device(
    "cpu",
    2,
    (
        InstanceGroup(2, 1, 8, LatencyProfile({1: 0.0055, 2: 0.0095, 4: 0.0175, 8: 0.0324})),
        InstanceGroup(1, 2, 8, LatencyProfile({1: 0.0081, 2: 0.0155, 4: 0.0300, 8: 0.0604})),
    ),
    0.100,
)
# The shape of a GPU: the first rows are nearly free, so a small batch wastes most of its time.
GPU = Device(
    "gpu",
    2,
    (InstanceGroup(1, 2, 32, LatencyProfile({1: 0.0020, 8: 0.0028, 16: 0.0036, 32: 0.0055})),),
    0.030,
)


# --- arrivals: times in seconds ------------------------------------------------------------------


def poisson(rate_hz: float, seconds: float, seed: int) -> list[float]:
    draw, now, times = random.Random(seed), 0.0, []
    while (now := now + draw.expovariate(rate_hz)) < seconds:
        times.append(now)
    return times


def bursts(rate_hz: float, seconds: float, seed: int, period_s: float = 0.6) -> list[float]:
    """Poisson at the given mean, all of it in every other fifth of a period."""
    draw, now, times = random.Random(seed), 0.0, []
    while (now := now + draw.expovariate(2.5 * rate_hz)) < seconds:
        if int(now / period_s * 5) % 5 in (0, 2):
            times.append(now)
    return times


def trace(rate_hz: float, seconds: float, seed: int) -> list[float]:
    """Like a day's traffic: the mean wanders between half and one and a half, with heavy noise."""
    draw, now, times = random.Random(seed), 0.0, []
    while now < seconds:
        level = 1 + 0.5 * math.sin(2 * math.pi * now / seconds)
        now += draw.expovariate(rate_hz * level * draw.lognormvariate(-0.125, 0.5))
        times.append(now)
    return [time for time in times if time < seconds]


ARRIVALS = {"poisson": poisson, "bursts": bursts, "trace": trace}


# --- the simulation -----------------------------------------------------------------------------


@dataclass(slots=True)
class Outcome:
    """What became of the calls, and how the device spent its time."""

    in_time: int = 0
    late: int = 0
    refused: int = 0
    given_up: int = 0
    busy_s: float = 0.0  # unit-seconds
    wasted_s: float = 0.0  # of these, for rows that came too late
    by_model: dict[str, float] = field(default_factory=dict)  # unit-seconds
    answered: dict[str, int] = field(default_factory=dict)  # in time, by model
    batches: list[Batch] = field(default_factory=list)
    timeline: list[tuple[float, bool]] = field(default_factory=list)  # finish, in time?


@dataclass(frozen=True, slots=True)
class Arrival:
    at_s: float
    deadline_s: float  # from arrival
    rows: int = 1
    priority: int = 0
    model: str = MODEL


Slowness = Callable[[float], float]  # virtual time -> factor on an engine's seconds


def simulate(
    policy: Scheduler,
    lanes: Sequence[InstanceGroup],
    arrivals: Iterable[Arrival],
    *,
    seed: int = 1,
    noise: float = NOISE,
    slowness: Slowness = lambda now_s: 1.0,
) -> Outcome:
    """Runs the arrivals to their end. `noise` is the standard deviation of a batch's slow-down."""
    draw = random.Random(seed)
    outcome = Outcome()
    events: list[tuple[float, int, str, object]] = []
    sequence = 0

    def push(at_s: float, kind: str, what: object) -> None:
        nonlocal sequence
        sequence += 1
        heapq.heappush(events, (at_s, sequence, kind, what))

    for arrival in arrivals:
        push(arrival.at_s, "arrival", arrival)
    wake_s: float | None = None
    while events:
        now_s, _, kind, what = heapq.heappop(events)
        if isinstance(what, Arrival):
            call = Request(what.rows, now_s, now_s + what.deadline_s, what.priority)
            try:
                policy.admit(what.model, call, now_s)
            except ServingError:
                outcome.refused += 1
                continue
            policy.mark_ready(what.model, call, now_s)
        elif kind == "finished":
            assert isinstance(what, tuple)
            batch, seconds = what
            policy.batch_finished(batch, now_s, seconds)
            _count(outcome, batch, seconds, now_s)
        while (batch := policy.next_batch(now_s)) is not None:
            lane = lanes[batch.group_index]
            seconds = lane.profile(batch.rows) * slowness(now_s) * (1 + abs(draw.gauss(0, noise)))
            outcome.batches.append(batch)
            push(now_s + seconds, "finished", (batch, seconds))
        outcome.given_up += len(list(policy.take_expired()))
        next_s = policy.next_wake_s(now_s)
        if next_s is not None and next_s != wake_s:
            wake_s = next_s
            push(max(next_s, now_s), "wake", None)
    return outcome


def _count(outcome: Outcome, batch: Batch, seconds: float, now_s: float) -> None:
    outcome.busy_s += seconds * batch.units
    outcome.by_model[batch.model] = outcome.by_model.get(batch.model, 0.0) + seconds * batch.units
    for call, first, rows in batch.parts:
        in_time = now_s <= call.deadline_s + 1e-9
        if not in_time:
            outcome.wasted_s += seconds * batch.units * rows / batch.rows
        if first + rows == call.rows:  # its last rows: portions start in order
            outcome.timeline.append((now_s, in_time))
            if in_time:
                outcome.in_time += 1
                outcome.answered[batch.model] = outcome.answered.get(batch.model, 0) + 1
            else:
                outcome.late += 1


def clairvoyant(arrivals: Sequence[Arrival], capacity_hz: float, noise: float = NOISE) -> int:
    """No policy answers more one-row calls of one deadline in time than this.

    A server at the device's best pace from the first row on, that skips whom it can't make: for
    equal work and deadlines in the order of arrival, first come first served loses the fewest.
    `noise` slows it as it slows the engines, on average.
    """
    capacity_hz /= 1 + noise * math.sqrt(2 / math.pi)
    free_s, answered = 0.0, 0
    for arrival in arrivals:
        finish_s = max(free_s, arrival.at_s) + 1 / capacity_hz
        if finish_s <= arrival.at_s + arrival.deadline_s:
            free_s = finish_s
            answered += 1
    return answered


# --- how others decide ----------------------------------------------------------------------------


class Reference:
    """What the reference policies share: one queue in order of arrival, lanes of the best kind."""

    def __init__(self, units: int) -> None:
        self._free = units
        self.calls: deque[Request] = deque()

    def add(
        self,
        model: str,
        groups: Sequence[InstanceGroup],
        *,
        objective_s: float,
        weight: float = 1.0,
    ) -> None:
        self._index, self.lane = min(enumerate(groups), key=lambda entry: entry[1].units)
        self._busy = 0
        self.objective_s = objective_s

    def remove(self, model: str) -> list[Request]:
        return list(self.calls)

    def admit(self, model: str, call: Request, now_s: float) -> None:
        pass

    def mark_ready(self, model: str, call: Request, now_s: float) -> None:
        self.calls.append(call)

    def cancel(self, model: str, call: Request) -> None:
        call.is_cancelled = True

    def next_batch(self, now_s: float) -> Batch | None:
        if self._busy == self.lane.count or not self.calls:
            return None
        rows = self.size(now_s)
        if not self.calls or not rows:
            return None
        parts = [BatchPart(self.calls.popleft(), 0, 1) for _ in range(min(rows, len(self.calls)))]
        self._busy += 1
        rows = len(parts)
        return Batch(MODEL, self._index, self.lane.units, parts, rows, 0.0)

    def size(self, now_s: float) -> int:
        """How many calls to start now; 0 to wait."""
        raise NotImplementedError

    def take_expired(self) -> Iterator[tuple[str, Request]]:
        return iter(())

    def batch_finished(self, batch: Batch, now_s: float, seconds: float) -> None:
        self._busy -= 1

    def next_wake_s(self, now_s: float) -> float | None:
        return None

    def queued_rows(self, model: str) -> int:
        return len(self.calls)


class AllowedSizes(Reference):
    """TensorFlow Serving: a batch closes at the largest allowed size or after a timeout."""

    TIMEOUT_S = 0.002

    def size(self, now_s: float) -> int:
        largest = self.lane.max_batch
        due = now_s >= self.calls[0].arrived_s + self.TIMEOUT_S
        return min(largest, len(self.calls)) if due or len(self.calls) >= largest else 0

    def next_wake_s(self, now_s: float) -> float | None:
        due_s = self.calls[0].arrived_s + self.TIMEOUT_S if self.calls else 0.0
        return due_s if due_s > now_s else None


class StraightLine(Reference):
    """BentoML: a line through the last batches' seconds by size; cancels what it calls too late.

    The objective is one for all, as there; waits while that costs everybody less than it wins.
    """

    def __init__(self, units: int) -> None:
        super().__init__(units)
        self._seen: deque[tuple[int, float]] = deque(maxlen=50)
        self._slope, self._base = 0.0, 0.0
        self._given_up: list[tuple[str, Request]] = []

    def size(self, now_s: float) -> int:
        while self.calls:
            count = min(len(self.calls), self.lane.max_batch)
            waited_s = now_s - self.calls[0].arrived_s
            if waited_s + self._slope * count + self._base < self.objective_s:
                return count
            if len(self.calls) == 1:
                return 1
            self._given_up.append((MODEL, self.calls.popleft()))
        return 0

    def take_expired(self) -> Iterator[tuple[str, Request]]:
        given_up, self._given_up = self._given_up, []
        return iter(given_up)

    def batch_finished(self, batch: Batch, now_s: float, seconds: float) -> None:
        super().batch_finished(batch, now_s, seconds)
        self._seen.append((batch.rows, seconds))
        count = len(self._seen)
        mean_n = sum(n for n, _ in self._seen) / count
        mean_s = sum(s for _, s in self._seen) / count
        spread = sum((n - mean_n) ** 2 for n, _ in self._seen)
        if spread:
            self._slope = sum((n - mean_n) * (s - mean_s) for n, s in self._seen) / spread
        self._base = mean_s - self._slope * mean_n


class Aimd(Reference):
    """Clipper: batches grow by one until the objective is missed, then shrink by a tenth; calls
    whose deadline has passed are dropped."""

    def __init__(self, units: int) -> None:
        super().__init__(units)
        self._most = 1.0
        self._given_up: list[tuple[str, Request]] = []

    def size(self, now_s: float) -> int:
        while self.calls and self.calls[0].deadline_s <= now_s:
            self._given_up.append((MODEL, self.calls.popleft()))
        return min(int(self._most), self.lane.max_batch)

    def take_expired(self) -> Iterator[tuple[str, Request]]:
        given_up, self._given_up = self._given_up, []
        return iter(given_up)

    def batch_finished(self, batch: Batch, now_s: float, seconds: float) -> None:
        super().batch_finished(batch, now_s, seconds)
        missed = any(part.request.deadline_s < now_s for part in batch.parts)
        self._most = max(1.0, self._most * 0.9) if missed else self._most + 1


POLICIES: dict[str, Callable[[Device], Scheduler]] = {
    "deadline": lambda device: DeadlineScheduler(device.units, 1 << 16),
    "size+delay (Triton)": lambda device: FixedScheduler(
        device.units, 1 << 30, size=device.lanes[-1].max_batch, delay_s=0.002
    ),
    "allowed sizes (TFS)": lambda device: AllowedSizes(device.units),
    "straight line (BentoML)": lambda device: StraightLine(device.units),
    "AIMD (Clipper)": lambda device: Aimd(device.units),
}


@dataclass(frozen=True, slots=True)
class Row:
    """One scenario: goodput as a share of the clairvoyant bound, by policy."""

    device: str
    arrivals: str
    load: float  # offered over capacity
    bound_hz: float
    shares: dict[str, float]


def compare(device: Device, arrivals: str, load: float, deadlines: int, seed: int = 1) -> Row:
    """Arrivals at `load` times the device's capacity for so many deadlines, under every policy."""
    rate_hz = load * device.capacity_hz
    seconds = deadlines * device.deadline_s
    times = ARRIVALS[arrivals](rate_hz, seconds, seed)
    offered = [Arrival(time, device.deadline_s) for time in times]
    bound = clairvoyant(offered, device.capacity_hz)
    shares = {}
    for name, make in POLICIES.items():
        policy = make(device)
        policy.add(MODEL, device.lanes, objective_s=device.deadline_s, weight=1.0)
        outcome = simulate(policy, device.lanes, offered)
        shares[name] = outcome.in_time / bound
    return Row(device.name, arrivals, load, bound / seconds, shares)


def main(deadlines: int = 100) -> int:
    print("Calls answered in time, as a share of what a clairvoyant server could answer.\n")
    print("| device | arrivals | load | bound /s | " + " | ".join(POLICIES) + " |")
    print("|---|---|--:|--:|" + "--:|" * len(POLICIES))
    worst = 1.0
    for device in (CPU, GPU):
        for arrivals in ARRIVALS:
            for load in (0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 3.0, 5.0):
                row = compare(device, arrivals, load, deadlines)
                cells = " | ".join(f"{share:.1%}" for share in row.shares.values())
                print(f"| {device.name} | {arrivals} | {load} | {row.bound_hz:.0f} | {cells} |")
                worst = min(worst, row.shares["deadline"])
    print(f"\nThe least share of policy deadline: {worst:.1%}")
    return 0


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
