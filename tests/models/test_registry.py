"""The newest valid version of each model serves; every other version has a reason why not."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from server.engines.base import Engine
from server.errors import EngineFailure, InvalidInput, ModelNotFound, ModelNotReady
from server.execution.device import DeviceExecutor
from server.models.changes import ChangeNotifier
from server.models.loader import LoadedEngine
from server.models.registry import ModelRegistry
from server.models.state import State
from server.repository.contents import VersionEntry, list_contents
from server.repository.manifest import InvalidVersion, Manifest
from server.scheduling.deadline import DeadlineScheduler
from server.telemetry.clock import clock
from server.telemetry.metrics import Metrics
from tests.support.serving import SHAPE, FakeLoader, Mirror, publish


@dataclass
class Fakes:
    """Everything a registry needs: a loader with failures by version, one device, metrics."""

    failures: dict[str, Exception] = field(default_factory=dict)
    engines: dict[str, Mirror] = field(default_factory=dict)  # by model and version
    executors: list[DeviceExecutor] = field(default_factory=list)
    metrics: Metrics = field(default_factory=Metrics)
    changes: int = 0
    gate: threading.Event | None = None  # loads wait for it

    def load(self, version: VersionEntry, on_checking: Callable[[], None]) -> LoadedEngine:
        key = f"{version.model}/{version.version}"
        if self.gate is not None:
            self.gate.wait()
        if key in self.failures:
            raise self.failures[key]

        def make(manifest: Manifest) -> Mirror:
            self.engines[key] = Mirror(manifest)
            return self.engines[key]

        return FakeLoader(make).load(version, on_checking)

    def stop(self) -> None:
        pass

    def executor_for(self, engine: Engine) -> DeviceExecutor:
        if not self.executors:
            scheduler = DeadlineScheduler(engine.units, 64)
            self.executors.append(DeviceExecutor(engine.device, engine.units, scheduler))
        return self.executors[0]

    def count_change(self) -> None:
        self.changes += 1

    def registry(self, load_thread: ThreadPoolExecutor, **options: Any) -> ModelRegistry:
        changes = ChangeNotifier()
        changes.subscribe(self.count_change)
        return ModelRegistry(
            loader=self,
            load_thread=load_thread,
            executor_for=self.executor_for,
            metrics=self.metrics,
            changes=changes,
            **options,
        )

    def ready_by_metrics(self) -> dict[str, float]:
        return {
            f"{sample.labels['model']}/{sample.labels['version']}": sample.value
            for metric in self.metrics.registry.collect()
            for sample in metric.samples
            if sample.name == "convserve_model_ready"
        }


@asynccontextmanager
async def registry_of(root: Path, fakes: Fakes, **options: Any) -> AsyncIterator[ModelRegistry]:
    """A registry that has loaded the versions under `root` and reconciles in a task."""
    with ThreadPoolExecutor(1) as load_thread:
        registry = fakes.registry(load_thread, **options)
        await sync(registry, root)
        reconciling = asyncio.create_task(registry.reconcile_forever())
        try:
            yield registry
        finally:
            reconciling.cancel()
        await registry.unload_all()
        for executor in fakes.executors:
            executor.stop()


async def sync(registry: ModelRegistry, root: Path) -> None:
    contents = list_contents(root)
    await registry.sync(contents.versions, contents.configs)


def states(registry: ModelRegistry) -> list[tuple[str, int, State, str]]:
    return [
        (version.model_name, version.number, version.state, version.reason)
        for version in registry.versions()
    ]


async def test_the_newest_version_of_each_model_serves(tmp_path: Path) -> None:
    publish(tmp_path, "b")
    publish(tmp_path, "b")
    publish(tmp_path, "a")
    fakes = Fakes()
    async with registry_of(tmp_path, fakes) as registry:
        assert states(registry) == [
            ("a", 1, State.READY, ""),
            ("b", 2, State.READY, ""),
            ("b", 1, State.UNAVAILABLE, "version 2 is served"),
        ]
        assert registry.route("b").version_text == "2"
        assert registry.route("b", 2) is registry.route("b")
        assert registry.is_ready
        assert [registry.is_serving(name) for name in ("a", "b", "c")] == [True, True, None]
    assert list(fakes.engines) == ["a/1", "b/2"]  # other versions are not loaded
    assert fakes.ready_by_metrics() == {"a/1": 1, "b/2": 1, "b/1": 0}


async def test_if_the_newest_version_fails_an_older_one_serves(tmp_path: Path) -> None:
    for _ in range(4):
        publish(tmp_path)
    (tmp_path / "tiny/4/manifest.json").write_text("{")
    reason = "its answers differ from the golden ones by 3 %"
    fakes = Fakes(failures={"tiny/3": InvalidVersion(reason)})
    async with registry_of(tmp_path, fakes) as registry:
        found = states(registry)
        assert registry.route("tiny").manifest.version == 2
        with pytest.raises(ModelNotReady, match="version 3 is failed: its answers differ"):
            registry.route("tiny", 3)
        with pytest.raises(ModelNotReady, match="version 1 is unavailable: version 2 is served"):
            registry.route("tiny", 1)
    assert [(version, state) for _, version, state, _ in found] == [
        (4, State.FAILED),
        (3, State.FAILED),
        (2, State.READY),
        (1, State.UNAVAILABLE),
    ]
    assert "manifest.json is not JSON" in found[0][3]
    assert found[1][3] == reason


async def test_an_unexpected_failure_is_logged_in_full_and_clients_get_no_details(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    publish(tmp_path)
    publish(tmp_path, "other")
    fakes = Fakes(failures={"tiny/1": RuntimeError("secret")})
    async with registry_of(tmp_path, fakes) as registry:
        (other, tiny) = registry.versions()
        assert (other.state, tiny.state) == (State.READY, State.FAILED)
        assert tiny.reason == "RuntimeError while loading; the log has the details"
        assert registry.is_ready
    (record,) = (record for record in caplog.records if record.msg == "load_failed")
    assert record.exc_info is not None
    assert str(record.exc_info[1]) == "secret"


async def test_a_registry_without_a_valid_version_is_not_ready(tmp_path: Path) -> None:
    publish(tmp_path)
    fakes = Fakes(failures={"tiny/1": InvalidVersion("no")})
    async with registry_of(tmp_path, fakes) as registry:
        assert not registry.is_loading
        assert not registry.is_ready
        assert registry.is_serving("tiny") is False
        assert registry.version("tiny").reason == "no"


async def test_a_request_during_loading_is_rejected_with_the_state(tmp_path: Path) -> None:
    publish(tmp_path)
    publish(tmp_path)
    gate = threading.Event()
    fakes = Fakes(gate=gate)
    with ThreadPoolExecutor(1) as load_thread:
        registry = fakes.registry(load_thread)
        syncing = asyncio.create_task(sync(registry, tmp_path))
        await asyncio.sleep(0)  # lets it begin
        assert [version.state for version in registry.versions()] == [
            State.LOADING,
            State.UNAVAILABLE,
        ]
        with pytest.raises(ModelNotReady, match="model 'tiny' version 2 is loading$"):
            registry.route("tiny")
        assert (registry.is_loading, registry.is_ready) == (True, False)
        gate.set()
        await syncing
        assert registry.is_ready
        await registry.unload_all()
        fakes.executors[0].stop()


async def test_a_model_gets_the_share_of_its_device_that_the_manifest_names(
    tmp_path: Path,
) -> None:
    publish(tmp_path, "a", share=3.0)
    publish(tmp_path, "b")
    weights: dict[str, float] = {}
    fakes = Fakes()

    class Recording(DeviceExecutor):
        def add(self, *positional: Any, **named: Any) -> None:
            weights[positional[0]] = named["weight"]
            super().add(*positional, **named)

    fakes.executors.append(Recording("mirror", 1, DeadlineScheduler(1, 64)))
    async with registry_of(tmp_path, fakes):
        assert weights == {"a/1": 3.0, "b/1": 1.0}


async def test_a_stalled_engine_stops_serving_at_once(tmp_path: Path) -> None:
    publish(tmp_path)
    fakes = Fakes()
    on_stalled: list[Callable[[str], None]] = []

    class Recording(DeviceExecutor):
        """An executor that keeps the callback for a stalled engine."""

        def add(self, *positional: Any, **named: Any) -> None:
            on_stalled.append(named["on_engine_failed"])
            super().add(*positional, **named)

    fakes.executors.append(Recording("mirror", 1, DeadlineScheduler(1, 64)))
    async with registry_of(tmp_path, fakes) as registry:
        before = fakes.changes
        on_stalled[0]("a batch has not finished in 10 s")
        assert fakes.changes == before + 1
        assert registry.is_serving("tiny") is False
        assert not registry.is_ready
        with pytest.raises(ModelNotReady, match="has not finished in 10 s"):
            registry.route("tiny")
    assert fakes.ready_by_metrics() == {"tiny/1": 0}
    assert b"convserve_engine_info{" not in fakes.metrics.render()


async def test_unloading_rejects_queued_requests_and_closes_every_engine(tmp_path: Path) -> None:
    publish(tmp_path)
    publish(tmp_path, "other")
    fakes = Fakes()
    async with registry_of(tmp_path, fakes) as registry:
        model = registry.route("tiny")
        mirror = fakes.engines["tiny/1"]
        mirror.held = True
        pixels = np.ones((1, *SHAPE), np.uint8)
        running, queued = (
            asyncio.create_task(model.executor.submit(model.key, pixels)) for _ in range(2)
        )
        await mirror.started.wait()
        unloading = asyncio.create_task(registry.unload_all())
        with pytest.raises(ModelNotReady):
            await queued
        assert not mirror.closed
        mirror.release()
        assert (await running).outputs.classes[0, 0] == 1
        await unloading
    assert all(engine.closed for engine in fakes.engines.values())


async def test_a_failed_lookup_says_what_is_wrong(tmp_path: Path) -> None:
    for number in range(20):
        publish(tmp_path, f"m{number:02}", classes=2)
    fakes = Fakes(failures={"m00/1": EngineFailure("broken")})
    async with registry_of(tmp_path, fakes) as registry:
        with pytest.raises(ModelNotFound) as caught:
            registry.route("x" * 1000)
        first = ", ".join(f"m{number:02}" for number in range(16))
        assert str(caught.value) == f"there is no model '{'x' * 80}'; known models: {first}, ..."
        with pytest.raises(InvalidInput, match="model: is empty"):
            registry.route("")
        with pytest.raises(InvalidInput, match="version: is -1"):
            registry.route("m01", -1)
        with pytest.raises(ModelNotFound, match="model 'm01' has no version 2; it has 1$"):
            registry.route("m01", 2)
        with pytest.raises(ModelNotReady, match="EngineFailure while loading"):
            registry.route("m00")


async def test_a_version_that_misses_its_objective_is_rolled_back(tmp_path: Path) -> None:
    publish(tmp_path)
    fakes = Fakes()
    async with registry_of(tmp_path, fakes, bake_time_s=1000.0) as registry:
        for _ in range(20):
            registry.route("tiny").metrics.answered(1, 0.0, 0.0, 0.01, 0.0)
        publish(tmp_path)
        await sync(registry, tmp_path)
        (new, old) = registry.versions()
        assert (new.state, old.state) == (State.READY, State.DRAINING)
        for _ in range(20):
            registry.route("tiny").metrics.answered(1, 0.0, 0.0, 0.2, 0.0)  # the objective: 0.1 s
        registry.check_bake_times(clock())
        assert (new.state, old.state) == (State.DRAINING, State.READY)  # at once
        assert registry.route("tiny").version_text == "1"
        while new.state is not State.FAILED:  # drained and closed
            await asyncio.sleep(0)
        assert "100% of 20 requests missed the latency objective of 100 ms" in new.reason
        assert fakes.engines["tiny/2"].closed
        assert not fakes.engines["tiny/1"].closed


async def test_the_previous_version_is_unloaded_after_the_bake_time(tmp_path: Path) -> None:
    publish(tmp_path)
    fakes = Fakes()
    async with registry_of(tmp_path, fakes, bake_time_s=1000.0) as registry:
        publish(tmp_path)
        await sync(registry, tmp_path)
        (new, old) = registry.versions()
        registry.check_bake_times(clock() + 999)
        assert states(registry)[1][2] is State.DRAINING
        registry.check_bake_times(clock() + 1001)
        while states(registry)[1][2] is not State.UNLOADED:
            await asyncio.sleep(0)
        assert fakes.engines["tiny/1"].closed
        assert registry.route("tiny").version_text == "2"
        registry.roll_back(new, "too late", "objective")  # version 1 is loaded again from disk
        while new.state is not State.FAILED:
            await asyncio.sleep(0)
        assert old.state is State.READY
