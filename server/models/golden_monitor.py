"""Repeats golden checks while the server runs, and watches versions during their bake time.

Memory and processors can fail. An engine whose golden answers have changed must not serve. The
golden inputs wait in the same queue as other requests.
"""

from __future__ import annotations

import asyncio
import logging
from concurrent.futures import Executor

from server.engines import golden_check as golden
from server.engines.base import Outputs
from server.errors import ServingError
from server.models.registry import ModelRegistry
from server.models.version import LoadedModel, ModelVersion
from server.repository import reader
from server.repository.contents import VersionEntry
from server.repository.manifest import InvalidVersion
from server.repository.reader import Golden
from server.telemetry.clock import clock
from server.telemetry.metrics import Metrics

log = logging.getLogger(__name__)

CHECK_INTERVAL_S = 0.5  # of the bake times


class GoldenMonitor:
    """Checks every serving version each `golden_interval_s`, or never if that is 0.

    The owner runs `run` in a task and cancels it. Files are read on the `file_thread`.
    """

    def __init__(
        self,
        registry: ModelRegistry,
        metrics: Metrics,
        file_thread: Executor,
        golden_interval_s: float,
    ) -> None:
        self._registry = registry
        self._metrics = metrics
        self._file_thread = file_thread
        self._interval_s = golden_interval_s

    async def run(self) -> None:
        due_s = clock() + self._interval_s
        while True:
            await asyncio.sleep(CHECK_INTERVAL_S)
            self._registry.check_bake_times(clock())
            if self._interval_s and clock() >= due_s:
                for version in self._registry.versions():
                    if version.ready_model is not None:
                        await self.check(version, version.ready_model)
                due_s = clock() + self._interval_s

    async def check(self, version: ModelVersion, model: LoadedModel) -> None:
        """Runs the golden inputs; rolls the version back if the answers are wrong."""
        loop = asyncio.get_running_loop()
        try:
            truth = await loop.run_in_executor(self._file_thread, _read_golden, version.published)
            outputs = await _run(model, truth)
            await loop.run_in_executor(
                self._file_thread, golden.compare, outputs, truth, model.record.precision
            )
        except golden.GoldenMismatch as error:
            outcome = "failed"
            reason = f"a repeated golden check failed: {error}"
            self._registry.roll_back(version, reason, "golden_drift", stop_now=True)
        except (InvalidVersion, ServingError) as error:  # files are gone, or the queue is full
            outcome = "skipped"
            log.warning("golden_check_skipped", extra=version.log_fields(reason=str(error)))
        else:
            outcome = "passed"
        self._metrics.golden_checks.labels(version.model_name, outcome).inc()


async def _run(model: LoadedModel, truth: Golden) -> Outputs:
    """Submits one batch at a time, so that other requests wait no longer than for each other."""
    parts = []
    for first in range(0, len(truth.pixels), model.engine.max_batch):
        pixels = truth.pixels[first : first + model.engine.max_batch]
        parts.append((await model.executor.submit(model.key, pixels)).outputs)
    return Outputs.concatenate(parts)


def _read_golden(version: VersionEntry) -> Golden:
    """The golden inputs and answers. Raises InvalidVersion if the file has changed."""
    assert version.manifest is not None
    reader.verify_file(version.folder, version.manifest.golden)
    return reader.read_golden(version.folder, version.manifest)
