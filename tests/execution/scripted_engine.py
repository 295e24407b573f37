"""An engine whose batches end when the test says so, and an executor that runs it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import numpy as np

from server.engines.base import Instance, OnDone, Outputs
from server.execution.device import DeviceExecutor, profile_groups
from server.execution.pending_request import ExecutionResult
from server.images.input_spec import Pixels
from server.scheduling.base import Scheduler
from server.scheduling.deadline import DeadlineScheduler
from server.telemetry.clock import clock
from server.telemetry.metrics import Metrics

SHAPE = (2, 2, 1)


class ScriptedEngine:
    """Its batches end on other threads, as with real engines. With `held`, they end at `release`.

    The class of a row is the row's first byte.
    """

    device = "scripted"

    def __init__(self, instances: int = 1, max_batch: int = 4, *, held: bool = False) -> None:
        self.units = instances
        self.max_batch = max_batch
        self.held = held
        self.failure: Exception | None = None
        self.raises_at_start = False
        self.batches: list[list[int]] = []  # the first bytes of each batch's rows
        self.started: asyncio.Queue[int] = asyncio.Queue()
        self.closed = False
        self.instances: Sequence[Instance] = [_Instance(self, max_batch) for _ in range(instances)]
        self._held_batches: list[Callable[[], None]] = []

    def run(self, rows: Pixels, done: OnDone) -> None:
        if self.raises_at_start:
            raise RuntimeError("it does not start")
        first = rows[:, 0, 0, 0].astype(np.int32)
        self.batches.append(first.tolist())
        probabilities = np.eye(256, dtype=np.float32)[first]
        outputs = Outputs(first[:, np.newaxis], np.ones((len(rows), 1), np.float32), probabilities)
        outcome: Outputs | Exception = self.failure or outputs
        thread = threading.Thread(target=done, args=(outcome,))
        if self.held:
            self._held_batches.append(thread.start)
        else:
            thread.start()
        self.started.put_nowait(len(rows))

    def release(self, *, last_first: bool = False) -> None:
        """Ends the running batches and does not hold later ones."""
        self.held = False
        held, self._held_batches = self._held_batches, []
        for end in reversed(held) if last_first else held:
            end()

    def computed_rows(self, rows: int) -> int:
        return rows

    def close(self) -> None:
        self.closed = True


class _Instance:
    units = 1

    def __init__(self, engine: ScriptedEngine, max_batch: int) -> None:
        self.pixels = np.zeros((max_batch, *SHAPE), np.uint8)
        self._engine = engine

    def start(self, rows: int, done: OnDone) -> None:
        self._engine.run(self.pixels[:rows], done)


@dataclass
class Bench:
    """An executor that serves the engine as model "m"."""

    executor: DeviceExecutor
    engine: ScriptedEngine
    metrics: Metrics
    failures: list[str] = field(default_factory=list)

    def submit(self, *classes: int, deadline_s: float = 1e9) -> asyncio.Task[ExecutionResult]:
        """Submits one request with a row of each class."""
        pixels = np.zeros((len(classes), *SHAPE), np.uint8)
        pixels[:, 0, 0, 0] = classes
        return asyncio.create_task(self.executor.submit("m", pixels, clock() + deadline_s))

    def value(self, name: str, **labels: str) -> float | None:
        """The value of a metric."""
        return self.metrics.registry.get_sample_value(name, {"model": "m", **labels})


@asynccontextmanager
async def executing(
    engine: ScriptedEngine, scheduler: Scheduler | None = None, *, watch: bool = False
) -> AsyncIterator[Bench]:
    """Runs an executor for the engine. `watch` also watches for stalls."""
    scheduler = scheduler or DeadlineScheduler(engine.units, 64)
    metrics = Metrics()
    bench = Bench(DeviceExecutor(engine.device, engine.units, scheduler), engine, metrics)
    bench.executor.add(
        "m",
        engine,
        profile_groups(engine, lambda instance, rows: 0.001),
        metrics.model("m"),
        on_engine_failed=bench.failures.append,
        objective_s=10.0,
    )
    watching = asyncio.create_task(bench.executor.watch_for_stalls()) if watch else None
    try:
        async with asyncio.timeout(30):
            yield bench
    finally:
        engine.release()
        bench.executor.stop()
        if watching:
            watching.cancel()


def classes_of(result: ExecutionResult) -> list[int]:
    return [int(row[0]) for row in result.outputs.classes]
