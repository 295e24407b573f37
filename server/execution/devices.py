"""The devices of a server: one executor for each, made when its first engine is loaded."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from server.engines.base import Engine
from server.execution.device import DeviceExecutor
from server.scheduling.base import Scheduler
from server.telemetry.loop_lag import LoopLag
from server.telemetry.tracing import Tracing


class Devices:
    """Executors by device. Used on the event loop's thread only.

    Tasks in `background` watch for stalled batches until `stop`.
    """

    def __init__(
        self,
        make_scheduler: Callable[[int], Scheduler],
        background: asyncio.TaskGroup,
        loop_lag: LoopLag,
        tracing: Tracing | None,
    ) -> None:
        """`make_scheduler` makes a scheduler for a device with the given number of units."""
        self._make_scheduler = make_scheduler
        self._background = background
        self._loop_lag = loop_lag
        self._tracing = tracing
        self._executors: dict[str, DeviceExecutor] = {}
        self._watches: list[asyncio.Task[None]] = []

    def executor_for(self, engine: Engine) -> DeviceExecutor:
        """The executor of the engine's device."""
        executor = self._executors.get(engine.device)
        if executor is None:
            scheduler = self._make_scheduler(engine.units)
            executor = DeviceExecutor(
                engine.device, engine.units, scheduler, self._loop_lag, self._tracing
            )
            self._executors[engine.device] = executor
            self._watches.append(self._background.create_task(executor.watch_for_stalls()))
        return executor

    def busy_ratios(self) -> dict[str, float]:
        """Fraction of each device's units at work over the last seconds."""
        return {device: executor.busy_ratio() for device, executor in self._executors.items()}

    @property
    def lost_reason(self) -> str:
        """Why a device cannot be used any more by this process; empty if all can."""
        reasons = (executor.lost_reason for executor in self._executors.values())
        return next((reason for reason in reasons if reason), "")

    def stop(self) -> None:
        for executor in self._executors.values():
            executor.stop()
        for watch in self._watches:
            watch.cancel()
