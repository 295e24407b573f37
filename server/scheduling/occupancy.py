"""Occupancy of a device: running batches, free units, and the recent idle ratio."""

from __future__ import annotations

import math
from dataclasses import dataclass

from server.scheduling.base import Batch

IDLE_WINDOW_S = 0.3  # time constant of the average idle ratio


@dataclass(slots=True, eq=False)
class OccupiedUnits:
    """The units that a batch occupies, and its expected end."""

    units: int
    ends_s: float

    def remaining_s(self, now_s: float) -> float:
        """Seconds until its end. A batch that is overdue by x is assumed to need x more."""
        return abs(self.ends_s - now_s)


class DeviceOccupancy:
    """The running batches of a device and its idle ratio.

    Only idle time without work counts as idle: units that are free because no batch fits into them
    do not.
    """

    def __init__(self, units: int) -> None:
        self.units = units
        self.free = units
        self.running: dict[int, OccupiedUnits] = {}  # by the identity of the batch
        self.idle_ratio = 1.0  # lately, 0 to 1; as old as the last `update_idle_ratio`
        self._has_work = False
        self._updated_s = -math.inf

    def start(self, batch: Batch, now_s: float) -> None:
        self.update_idle_ratio(now_s)
        self._has_work = True
        self.free -= batch.units
        self.running[id(batch)] = OccupiedUnits(batch.units, now_s + batch.expected_s)

    def finish(self, batch: Batch, now_s: float) -> None:
        """Takes the batch object that was given to `start`."""
        self.update_idle_ratio(now_s)
        self.free += batch.units
        del self.running[id(batch)]

    def mark_idle(self, now_s: float) -> None:
        """Nothing waits that could use the free units."""
        self.update_idle_ratio(now_s)
        self._has_work = False

    def update_idle_ratio(self, now_s: float) -> None:
        kept = math.exp((self._updated_s - now_s) / IDLE_WINDOW_S)
        idle = 0.0 if self._has_work else self.free / self.units
        self.idle_ratio = self.idle_ratio * kept + idle * (1 - kept)
        self._updated_s = now_s

    def remaining_s(self, now_s: float) -> float:
        """Device seconds until all running batches are done."""
        running = self.running.values()
        return sum(batch.remaining_s(now_s) * batch.units for batch in running) / self.units
