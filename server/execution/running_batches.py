"""The batches that run on a device: how busy they keep it, and which of them have stalled."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from server.engines.base import Instance
from server.execution.engine_state import EngineState
from server.scheduling.base import Batch

# A batch is considered stalled after STALL_FACTOR times its expected run time, but not before
# STALL_S.
STALL_FACTOR = 50
STALL_S = 10.0


@dataclass(slots=True, eq=False)
class RunningBatch:
    """A batch that runs on an instance."""

    batch: Batch
    engine: EngineState
    instance: Instance
    started_s: float
    stalls_s: float  # after this time it is considered stalled
    is_abandoned: bool = False  # its requests have failed already

    def unit_seconds(self, now_s: float) -> float:
        return (now_s - self.started_s) * self.instance.units


class RunningBatches:
    """The running batches of a device and the ratio of busy units.

    Call `sample` regularly: the busy ratio covers the last `WINDOW_SAMPLES` samples.
    """

    WINDOW_SAMPLES = 5

    def __init__(self, units: int) -> None:
        self._units = units
        self._running: set[RunningBatch] = set()
        self._finished_s = 0.0  # unit-seconds of finished batches
        self._samples: deque[tuple[float, float]] = deque(maxlen=self.WINDOW_SAMPLES)

    def start(
        self, batch: Batch, engine: EngineState, instance: Instance, now_s: float
    ) -> RunningBatch:
        limit_s = max(STALL_S, STALL_FACTOR * batch.expected_s)
        run = RunningBatch(batch, engine, instance, now_s, now_s + limit_s)
        self._running.add(run)
        return run

    def finish(self, run: RunningBatch, done_s: float) -> None:
        self._running.discard(run)
        self._finished_s += (done_s - run.started_s) * run.instance.units

    def abandon_stalled(self, now_s: float) -> list[RunningBatch]:
        """Removes and returns the stalled batches.

        Their instances do not become free: the engine may still write into their memory.
        """
        return self._abandon([run for run in self._running if now_s > run.stalls_s])

    def abandon_all(self) -> list[RunningBatch]:
        return self._abandon(list(self._running))

    def sample(self, now_s: float) -> None:
        self._samples.append((now_s, self._busy_s(now_s)))

    def busy_ratio(self, now_s: float) -> float:
        """Busy units divided by all units, 0 to 1."""
        if not self._samples:
            return 0.0
        since_s, busy_s = self._samples[0]
        elapsed_s = now_s - since_s
        if elapsed_s <= 0:
            return 0.0
        return min(1.0, (self._busy_s(now_s) - busy_s) / (elapsed_s * self._units))

    def _abandon(self, runs: list[RunningBatch]) -> list[RunningBatch]:
        for run in runs:
            run.is_abandoned = True
            self._running.discard(run)
        return runs

    def _busy_s(self, now_s: float) -> float:
        return self._finished_s + sum(run.unit_seconds(now_s) for run in self._running)
