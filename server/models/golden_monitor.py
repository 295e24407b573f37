"""Looks after the versions that answer: are they as good as the ones before, and still right?

A version on probation is held to its objective; every version is asked its golden inputs again from
time to time, through the same queue as callers' images. Memory and processors do go bad, and an
engine whose answers have changed must not answer.
"""

from __future__ import annotations

import asyncio
import logging
from concurrent.futures import Executor

from server.engines import golden_check as golden
from server.engines.base import Outputs
from server.errors import ServingError
from server.models.registry import LoadedModel, ModelRegistry, ModelVersion
from server.repository import reader
from server.repository.contents import VersionEntry
from server.repository.manifest import InvalidVersion
from server.repository.reader import Golden
from server.telemetry.clock import clock
from server.telemetry.metrics import Metrics

log = logging.getLogger(__name__)

TICK_S = 0.5


class GoldenMonitor:
    """`run` is run by whoever owns it and ends when cancelled; files are read by the `reader`.

    Golden inputs are asked again every `golden_interval_s`; 0 never does.
    """

    def __init__(
        self, registry: ModelRegistry, metrics: Metrics, reader: Executor, golden_interval_s: float
    ) -> None:
        self._registry = registry
        self._metrics = metrics
        self._reader = reader
        self._interval_s = golden_interval_s

    async def run(self) -> None:
        due_s = clock() + self._interval_s
        while True:
            await asyncio.sleep(TICK_S)
            self._registry.check_bake_times(clock())
            if self._interval_s and clock() >= due_s:
                for status in self._registry.versions():
                    if status.ready_model is not None:
                        await self.ask_again(status, status.ready_model)
                due_s = clock() + self._interval_s

    async def ask_again(self, status: ModelVersion, ready: LoadedModel) -> None:
        """Has a version answer its golden inputs, and given up where it is wrong."""
        loop = asyncio.get_running_loop()
        try:
            truth = await loop.run_in_executor(self._reader, _golden_of, status.found)
            outputs = await _answers(ready, truth)
            await loop.run_in_executor(
                self._reader, golden.compare, outputs, truth, ready.record.precision
            )
        except golden.GoldenMismatch as error:
            outcome = "failed"
            reason = f"its golden inputs, run again, got other answers: {error}"
            self._registry.roll_back(status, reason, "golden_drift", wrong=True)
        except (
            InvalidVersion,
            ServingError,
        ) as error:  # its files are gone, or there is no time for it
            outcome = "skipped"
            named = {"model": status.model_name, "version": status.number}
            log.warning("golden_check_skipped", extra={**named, "reason": str(error)})
        else:
            outcome = "passed"
        self._metrics.golden_checks.labels(status.model_name, outcome).inc()


async def _answers(ready: LoadedModel, truth: Golden) -> Outputs:
    """A batch at a time, so that callers are held up no longer than by each other."""
    parts = []
    for first in range(0, len(truth.pixels), ready.engine.max_batch):
        pixels = truth.pixels[first : first + ready.engine.max_batch]
        parts.append((await ready.executor.submit(ready.key, pixels)).outputs)
    return Outputs.concatenate(parts)


def _golden_of(version: VersionEntry) -> Golden:
    """The golden inputs and answers, if they are still those published. Raises Unsound."""
    assert version.manifest is not None
    reader.verify_file(version.folder, version.manifest.golden)
    return reader.read_golden(version.folder, version.manifest)
