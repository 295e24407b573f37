"""Loads and unloads versions until each model serves what its configuration selects."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import Executor
from functools import partial

from server.engines.base import Engine
from server.execution.device import DeviceExecutor
from server.models.loader import LoadedEngine, Loader
from server.models.model import Model
from server.models.rollback import RollbackPolicy
from server.models.state import State
from server.models.version import LoadedModel, ModelVersion, weights_kind
from server.process.idle_priority import idle_priority
from server.repository.contents import VersionEntry
from server.repository.manifest import InvalidVersion
from server.telemetry.clock import clock
from server.telemetry.metrics import Metrics

log = logging.getLogger(__name__)

DRAIN_S = 30.0  # time for a version's requests to finish; then those that wait are rejected


class Reconciler:
    """Loads and unloads the versions of models, one version at a time.

    Used on the event loop's thread only; the caller makes sure that one `reconcile` runs at a time.
    The `loader` blocks, so it runs on the `load_thread`. `executor_for` returns the executor of an
    engine's device. After a failure or at the end of a bake time `wait_until_needed` returns.
    """

    def __init__(
        self,
        *,
        loader: Loader,
        load_thread: Executor,
        executor_for: Callable[[Engine], DeviceExecutor],
        metrics: Metrics,
        bake_time_s: float,
    ) -> None:
        self._loader = loader
        self._load_thread = load_thread
        self._executor_for = executor_for
        self._metrics = metrics
        self._bake_time_s = bake_time_s
        self._needed = asyncio.Event()

    async def wait_until_needed(self) -> None:
        await self._needed.wait()
        self._needed.clear()

    async def reconcile(self, model: Model, *, at_idle_priority: bool) -> None:
        """Loads missing versions, moves requests to them, then unloads versions not selected."""
        model.assign_requests()
        while missing := [one for one in model.selected_versions() if not one.loaded]:
            await self._load(model, missing[0], at_idle_priority=at_idle_priority)
        model.assign_requests()
        selected = model.selected_versions()
        kept = {one.previous for one in selected if one.loaded and one.previous}
        reason = model.why_not_loaded()
        for version in [one for one in model.versions if one not in selected]:
            if not version.loaded:
                if version.state in (State.UNAVAILABLE, State.UNLOADED):
                    version.explain(reason)
            elif version in kept and version.can_serve:
                version.drain(f"{reason}; this version stays loaded during its bake time")
            elif version is not model.stable:
                await self._unload(version, version.rejection or reason)
        model.forget_removed()

    def roll_back(
        self, model: Model, version: ModelVersion, reason: str, cause: str, *, stop_now: bool
    ) -> None:
        """Moves requests away from a version and has it unloaded; see `Model.roll_back`."""
        if model.roll_back(version, reason, cause, stop_now=stop_now):
            self._needed.set()

    def check_bake_time(self, model: Model, version: ModelVersion, now_s: float) -> None:
        """Rolls back a version that misses its objective; ends a bake time that is over."""
        policy = version.rollback_policy
        if policy is None or version.loaded is None:
            return
        if violation := policy.violation(version.loaded.request_counts()):
            self.roll_back(model, version, violation, "objective", stop_now=False)
        elif policy.has_ended(now_s):
            version.end_bake_time()
            self._needed.set()  # the previous version need not stay loaded any longer

    async def close(self, version: ModelVersion) -> None:
        """Rejects waiting requests, waits for running batches, then closes the engine."""
        if version.loaded is not None:
            await version.loaded.executor.remove(version.loaded.key)
            version.release()

    async def _load(self, model: Model, version: ModelVersion, *, at_idle_priority: bool) -> None:
        loop = asyncio.get_running_loop()
        started_s = time.perf_counter()
        version.start_loading()

        def on_checking() -> None:  # runs on the load thread
            loop.call_soon_threadsafe(version.start_checking)

        load = self._load_at_idle_priority if at_idle_priority else self._loader.load
        try:
            loaded = await loop.run_in_executor(
                self._load_thread, load, version.published, on_checking
            )
        except InvalidVersion as error:
            version.fail(str(error))
        except Exception as error:
            log.exception("load_failed", extra=version.log_fields())
            version.fail(f"{type(error).__name__} while loading; the log has the details")
        else:
            self._serve(model, version, loaded, time.perf_counter() - started_s)

    def _load_at_idle_priority(
        self, version: VersionEntry, on_checking: Callable[[], None]
    ) -> LoadedEngine:
        """Loads without slowing down the requests that are served meanwhile."""
        with idle_priority():
            return self._loader.load(version, on_checking)

    def _serve(
        self, model: Model, version: ModelVersion, loaded: LoadedEngine, seconds: float
    ) -> None:
        ready = self._loaded_model(version, loaded)
        ready.executor.add(
            ready.key,
            loaded.engine,
            loaded.groups,
            ready.metrics,
            on_engine_failed=partial(self._on_engine_failed, model, version),
            objective_s=ready.manifest.objective_ms / 1e3,
            weight=ready.manifest.share,
            on_batch_failed=partial(self._on_batch_failed, model, version),
        )
        version.start_serving(
            ready,
            seconds=seconds,
            skipped_engines=loaded.skipped_engines,
            rollback_policy=self._rollback_policy(model, ready),
            previous=model.stable if self._bake_time_s else None,
        )
        model.assign_requests()
        log.info(
            "version_loaded",
            extra=version.log_fields(
                engine=loaded.record.name,
                weights=weights_kind(ready.manifest),
                instance_groups=" ".join(f"{one.count}x{one.units}" for one in loaded.groups),
                row_ms=loaded.groups[0].profile(1) * 1e3,
                seconds=seconds,
            ),
        )

    def _loaded_model(self, version: ModelVersion, loaded: LoadedEngine) -> LoadedModel:
        manifest = version.manifest
        assert manifest is not None
        name, number = version.model_name, str(version.number)
        return LoadedModel(
            name=name,
            version_text=number,
            key=f"{name}/{number}",
            executor=self._executor_for(loaded.engine),
            manifest=manifest,
            spec=manifest.input.spec(),
            labels=loaded.labels,
            engine=loaded.engine,
            record=loaded.record,
            metrics=self._metrics.model(name, manifest.objective_ms / 1e3),
        )

    def _rollback_policy(self, model: Model, ready: LoadedModel) -> RollbackPolicy | None:
        if not self._bake_time_s:
            return None
        previous = model.stable.loaded if model.stable else None
        return RollbackPolicy(
            clock() + self._bake_time_s,
            ready.manifest.objective_ms / 1e3,
            previous.request_counts() if previous else None,
        )

    async def _unload(self, version: ModelVersion, reason: str) -> None:
        """Waits for the version's requests, then closes its engine."""
        ready = version.loaded
        assert ready is not None
        version.drain(reason)
        try:
            async with asyncio.timeout(DRAIN_S):
                await ready.executor.drain(ready.key, lambda: version.state is State.DRAINING)
        except TimeoutError:
            rows = ready.executor.queued_rows(ready.key)
            log.warning(
                "drain_timed_out", extra=version.log_fields(queued_rows=rows, seconds=DRAIN_S)
            )
        if version.loaded is None or version.state is not State.DRAINING:
            return  # it has stalled, or it serves again
        await ready.executor.remove(ready.key)
        if version.loaded is not None:
            version.finish_unloading(reason)

    def _on_batch_failed(self, model: Model, version: ModelVersion, reason: str) -> None:
        if version.is_baking(clock()):
            reason = f"a batch failed during bake time: {reason}"
            self.roll_back(model, version, reason, "engine_failure", stop_now=False)

    def _on_engine_failed(self, model: Model, version: ModelVersion, reason: str) -> None:
        version.fail_stalled(reason)
        model.assign_requests()
        self._needed.set()
