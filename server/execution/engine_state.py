"""The state of an engine on its device."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from server.engines.base import Engine, Instance
from server.telemetry.metrics import ModelMetrics


@dataclass(slots=True, eq=False)
class EngineState:
    """An engine that is served: its idle instances, its running batches, and whether it failed."""

    name: str
    engine: Engine
    metrics: ModelMetrics
    on_engine_failed: Callable[[str], None]
    on_batch_failed: Callable[[str], None]
    idle_instances: list[list[Instance]]  # by instance group
    running: int = 0  # batches
    has_failed: bool = False  # its instances may still run, but no request waits for them
    _no_batches: asyncio.Event = field(default_factory=asyncio.Event)
    _progress: asyncio.Event | None = None

    def take_instance(self, group_index: int) -> Instance:
        self.running += 1
        return self.idle_instances[group_index].pop()

    def return_instance(self, group_index: int, instance: Instance) -> None:
        self.running -= 1
        self.idle_instances[group_index].append(instance)

    def mark_failed(self) -> None:
        self.has_failed = True
        self._no_batches.set()

    def notify_no_batches(self) -> None:
        self._no_batches.set()

    async def close(self) -> None:
        """Waits until no batch runs, then closes the engine in a thread.

        Returns without closing it if it has failed.
        """
        if self.running:
            await self._no_batches.wait()
        if not self.has_failed:
            self.idle_instances.clear()  # otherwise the instances outlive `Engine.close`
            await asyncio.to_thread(self.engine.close)  # blocks for tens of milliseconds or more

    def notify_progress(self) -> None:
        """Fewer requests are queued or fewer batches run than before."""
        if self._progress is not None:
            self._progress.set()

    async def wait_for_progress(self) -> None:
        self._progress = asyncio.Event()
        await self._progress.wait()
