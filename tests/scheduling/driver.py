"""Devices for scheduler tests, and functions that drive a scheduler."""

from __future__ import annotations

from server.errors import Overloaded
from server.scheduling.base import Batch, InstanceGroup, Request, Scheduler
from server.scheduling.deadline import DeadlineScheduler
from server.scheduling.latency import LatencyProfile
from tests.simulator.scenarios import MODEL, Device

ONE = Device("one", 1, (InstanceGroup(1, 1, 8, LatencyProfile({1: 0.005, 8: 0.012})),), 0.100)

# A small network: one instance uses half of the device.
TINY = Device("tiny", 2, (InstanceGroup(1, 1, 64, LatencyProfile({1: 0.0001, 64: 0.001})),), 0.020)


def deadline_scheduler(device: Device, capacity: int = 1 << 16) -> DeadlineScheduler:
    scheduler = DeadlineScheduler(device.units, capacity)
    scheduler.add(MODEL, device.groups, objective_s=device.deadline_s)
    return scheduler


def enqueue(
    scheduler: Scheduler, request: Request, now_s: float = 0.0, model: str = MODEL
) -> Request:
    """Admits a request and marks it ready."""
    scheduler.admit(model, request, now_s)
    scheduler.mark_ready(model, request, now_s)
    return request


def start(scheduler: Scheduler, now_s: float = 0.0) -> Batch:
    """The next batch. There has to be one."""
    batch = scheduler.next_batch(now_s)
    assert batch is not None
    return batch


def refusals(
    scheduler: Scheduler, requests: int, *, deadline_s: float, now_s: float = 0.0
) -> list[Overloaded]:
    """Enqueues many requests at once. Returns the errors of those that are not admitted."""
    errors = []
    for _ in range(requests):
        try:
            enqueue(scheduler, Request(1, now_s, now_s + deadline_s), now_s)
        except Overloaded as error:
            errors.append(error)
    return errors
