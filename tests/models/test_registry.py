"""The newest sound version of each model answers, and every other one says why it does not."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from server.engines.base import Engine
from server.errors import EngineFailure, InvalidInput, ModelNotFound, ModelNotReady
from server.execution.device import DeviceExecutor, profile_groups
from server.models.changes import ChangeNotifier
from server.models.loader import LoadedEngine
from server.models.registry import ModelRegistry
from server.models.state import State
from server.repository import reader
from server.repository.contents import VersionEntry, list_contents
from server.repository.manifest import InvalidVersion
from server.scheduling.base import InstanceGroup
from server.scheduling.deadline import DeadlineScheduler
from server.telemetry.clock import clock
from server.telemetry.metrics import Metrics, ModelMetrics
from tests.support.serving import SHAPE, Mirror, publish


@dataclass
class Shop:
    """A registry and what its making took: engines by model and version, failures by version."""

    failures: dict[str, Exception] = field(default_factory=dict)
    engines: dict[str, Mirror] = field(default_factory=dict)
    hosts: list[DeviceExecutor] = field(default_factory=list)
    metrics: Metrics = field(default_factory=Metrics)
    changes: int = 0

    def load(self, version: VersionEntry, checking: Callable[[], None]) -> LoadedEngine:
        key = f"{version.model}/{version.version}"
        if key in self.failures:
            raise self.failures[key]
        assert version.manifest is not None
        engine = self.engines[key] = Mirror(version.manifest)
        groups = profile_groups(engine, lambda instance, rows: 0.001)
        labels = reader.open_version(version.folder, version.manifest).labels
        checking()
        return LoadedEngine(engine, version.manifest.engines[0], groups, labels)

    def host_for(self, engine: Engine) -> DeviceExecutor:
        if not self.hosts:
            self.hosts.append(
                DeviceExecutor(engine.device, engine.units, DeadlineScheduler(engine.units, 64))
            )
        return self.hosts[0]

    def notifier(self) -> ChangeNotifier:
        notifier = ChangeNotifier()
        notifier.subscribe(self.count_change)
        return notifier

    def count_change(self) -> None:
        self.changes += 1

    def ready_by_metrics(self) -> dict[str, float]:
        return {
            f"{sample.labels['model']}/{sample.labels['version']}": sample.value
            for metric in self.metrics.registry.collect()
            for sample in metric.samples
            if sample.name == "convserve_model_ready"
        }


@asynccontextmanager
async def registry_of(root: Path, shop: Shop, **options: Any) -> AsyncIterator[ModelRegistry]:
    """A registry with the versions under `root` loaded, as far as that goes, and tended."""
    with ThreadPoolExecutor(1) as loader:
        registry = ModelRegistry(
            load=shop.load,
            loader=loader,
            host_for=shop.host_for,
            metrics=shop.metrics,
            changes=shop.notifier(),
            **options,
        )
        await sync(registry, root)
        tending = asyncio.create_task(registry.reconcile_forever())
        try:
            yield registry
        finally:
            tending.cancel()
        await registry.unload_all()
        for host in shop.hosts:
            host.stop()


async def sync(registry: ModelRegistry, root: Path) -> None:
    """Has the registry look at the repository as it is now."""
    found = list_contents(root)
    await registry.sync(found.versions, found.configs)


def told(registry: ModelRegistry) -> list[tuple[str, int, State, str]]:
    return [
        (status.model_name, status.number, status.state, status.reason)
        for status in registry.versions()
    ]


async def test_the_newest_version_of_each_model_answers(tmp_path: Path) -> None:
    publish(tmp_path, "b")
    publish(tmp_path, "b")
    publish(tmp_path, "a")
    shop = Shop()
    async with registry_of(tmp_path, shop) as registry:
        assert told(registry) == [
            ("a", 1, State.READY, ""),
            ("b", 2, State.READY, ""),
            ("b", 1, State.UNAVAILABLE, "version 2 is served"),
        ]
        assert registry.route("b").version_text == "2"
        assert registry.route("b", 2) is registry.route("b")
        assert registry.is_ready
        assert [registry.is_serving(name) for name in ("a", "b", "c")] == [True, True, None]
    assert list(shop.engines) == ["a/1", "b/2"]  # what is not served is not loaded
    assert shop.ready_by_metrics() == {"a/1": 1, "b/2": 1, "b/1": 0}


async def test_where_the_newest_fails_an_older_one_answers(tmp_path: Path) -> None:
    for _ in range(4):
        publish(tmp_path)
    (tmp_path / "tiny/4/manifest.json").write_text("{")
    reason = "its answers differ from the golden ones by 3 %"
    shop = Shop(failures={"tiny/3": InvalidVersion(reason)})
    async with registry_of(tmp_path, shop) as registry:
        statuses = told(registry)
        assert registry.route("tiny").manifest.version == 2
        with pytest.raises(ModelNotReady, match="version 3 is failed: its answers differ"):
            registry.route("tiny", 3)
        with pytest.raises(ModelNotReady, match="version 1 is unavailable: version 2 is served"):
            registry.route("tiny", 1)
    assert [(version, state) for _, version, state, _ in statuses] == [
        (4, State.FAILED),
        (3, State.FAILED),
        (2, State.READY),
        (1, State.UNAVAILABLE),
    ]
    assert "manifest.json is not JSON" in statuses[0][3]
    assert statuses[1][3] == reason


async def test_an_unexpected_failure_is_logged_in_full_and_told_without_its_words(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    publish(tmp_path)
    publish(tmp_path, "other")
    shop = Shop(failures={"tiny/1": RuntimeError("secret")})
    async with registry_of(tmp_path, shop) as registry:
        (other, tiny) = registry.versions()
        assert (other.state, tiny.state) == (State.READY, State.FAILED)
        assert tiny.reason == "RuntimeError while loading; the log has the details"
        assert registry.is_ready
    (record,) = (record for record in caplog.records if record.msg == "load_failed")
    assert record.exc_info is not None
    assert str(record.exc_info[1]) == "secret"


async def test_a_catalog_without_a_sound_version_is_not_ready(tmp_path: Path) -> None:
    publish(tmp_path)
    shop = Shop(failures={"tiny/1": InvalidVersion("no")})
    async with registry_of(tmp_path, shop) as registry:
        assert not registry.is_loading
        assert not registry.is_ready
        assert registry.is_serving("tiny") is False
        assert registry.version("tiny").reason == "no"


async def test_versions_are_loading_until_their_turn_comes(tmp_path: Path) -> None:
    publish(tmp_path)
    publish(tmp_path)
    gate = threading.Event()
    shop = Shop()

    def held_load(version: VersionEntry, checking: Callable[[], None]) -> LoadedEngine:
        gate.wait()
        return shop.load(version, checking)

    with ThreadPoolExecutor(1) as loader:
        registry = ModelRegistry(
            load=held_load,
            loader=loader,
            host_for=shop.host_for,
            metrics=shop.metrics,
            changes=shop.notifier(),
        )
        loading = asyncio.create_task(sync(registry, tmp_path))
        await asyncio.sleep(0)  # lets it begin
        assert [status.state for status in registry.versions()] == [
            State.LOADING,
            State.UNAVAILABLE,
        ]
        with pytest.raises(ModelNotReady, match="model 'tiny' version 2 is loading$"):
            registry.route("tiny")
        assert (registry.is_loading, registry.is_ready) == (True, False)
        gate.set()
        await loading
        assert registry.is_ready
        await registry.unload_all()
        shop.hosts[0].stop()


async def test_a_models_share_of_its_device_is_the_one_published(tmp_path: Path) -> None:
    publish(tmp_path, "a", share=3.0)
    publish(tmp_path, "b")
    weights: dict[str, float] = {}
    shop = Shop()

    class Noting(DeviceExecutor):
        def add(self, *positional: Any, **named: Any) -> None:
            weights[positional[0]] = named["weight"]
            super().add(*positional, **named)

    shop.hosts.append(Noting("mirror", 1, DeadlineScheduler(1, 64)))
    async with registry_of(tmp_path, shop):
        assert weights == {"a/1": 3.0, "b/1": 1.0}


async def test_an_engine_given_up_ceases_to_answer_at_once(tmp_path: Path) -> None:
    publish(tmp_path)
    shop = Shop()
    given_up: list[Callable[[str], None]] = []

    class Telling(DeviceExecutor):
        """A host that keeps what it is to call when it gives an engine up."""

        def add(
            self,
            name: str,
            engine: Engine,
            groups: Sequence[InstanceGroup],
            metrics: ModelMetrics,
            on_engine_failed: Callable[[str], None],
            objective_s: float,
            weight: float = 1.0,
            on_batch_failed: Callable[[str], None] = lambda reason: None,
        ) -> None:
            given_up.append(on_engine_failed)
            super().add(
                name,
                engine,
                groups,
                metrics,
                on_engine_failed,
                objective_s,
                weight,
                on_batch_failed,
            )

    shop.hosts.append(Telling("mirror", 1, DeadlineScheduler(1, 64)))
    async with registry_of(tmp_path, shop) as registry:
        before = shop.changes
        given_up[0]("a batch has not come back for 10 s")
        assert shop.changes == before + 1
        assert registry.is_serving("tiny") is False
        assert not registry.is_ready
        with pytest.raises(ModelNotReady, match="has not come back for 10 s"):
            registry.route("tiny")
    assert shop.ready_by_metrics() == {"tiny/1": 0}
    assert b"convserve_engine_info{" not in shop.metrics.render()


async def test_unloading_closes_every_engine_and_answers_who_waits(tmp_path: Path) -> None:
    publish(tmp_path)
    publish(tmp_path, "other")
    shop = Shop()
    async with registry_of(tmp_path, shop) as registry:
        ready = registry.route("tiny")
        mirror = shop.engines["tiny/1"]
        mirror.held = True
        pixels = np.ones((1, *SHAPE), np.uint8)
        runs, waits = (
            asyncio.create_task(ready.executor.submit(ready.key, pixels)) for _ in range(2)
        )
        await mirror.started.wait()
        unloading = asyncio.create_task(registry.unload_all())
        with pytest.raises(ModelNotReady):
            await waits
        assert not mirror.closed
        mirror.release()
        assert (await runs).outputs.classes[0, 0] == 1
        await unloading
    assert all(engine.closed for engine in shop.engines.values())


async def test_a_lookup_says_what_is_wrong_with_it(tmp_path: Path) -> None:
    for number in range(20):
        publish(tmp_path, f"m{number:02}", classes=2)
    shop = Shop(failures={"m00/1": EngineFailure("broken")})
    async with registry_of(tmp_path, shop) as registry:
        with pytest.raises(ModelNotFound) as caught:
            registry.route("x" * 1000)
        first = ", ".join(f"m{number:02}" for number in range(16))
        assert str(caught.value) == f"there is no model '{'x' * 80}'; there are {first}, ..."
        with pytest.raises(InvalidInput, match="model: is empty"):
            registry.route("")
        with pytest.raises(InvalidInput, match="version: is -1"):
            registry.route("m01", -1)
        with pytest.raises(ModelNotFound, match="model 'm01' has no version 2; it has 1$"):
            registry.route("m01", 2)
        with pytest.raises(ModelNotReady, match="EngineFailure while loading"):
            registry.route("m00")


async def test_a_version_slower_than_the_one_before_goes_back_within_its_probation(
    tmp_path: Path,
) -> None:
    publish(tmp_path)
    shop = Shop()
    async with registry_of(tmp_path, shop, bake_time_s=1000.0) as registry:
        for _ in range(20):
            registry.route("tiny").metrics.answered(1, 0.0, 0.0, 0.01, 0.0)
        publish(tmp_path)
        await sync(registry, tmp_path)
        (new, old) = registry.versions()
        assert (new.state, old.state) == (State.READY, State.DRAINING)
        for _ in range(20):
            registry.route("tiny").metrics.answered(1, 0.0, 0.0, 0.2, 0.0)  # the objective is 0.1 s
        registry.check_bake_times(clock())
        assert (new.state, old.state) == (State.DRAINING, State.READY)  # at once
        assert registry.route("tiny").version_text == "1"
        while new.state is not State.FAILED:  # drained and closed
            await asyncio.sleep(0)
        assert "100% of 20 answers were later than its objective, 100 ms" in new.reason
        assert shop.engines["tiny/2"].closed
        assert not shop.engines["tiny/1"].closed


async def test_a_version_that_outlives_its_probation_lets_the_one_before_go(
    tmp_path: Path,
) -> None:
    publish(tmp_path)
    shop = Shop()
    async with registry_of(tmp_path, shop, bake_time_s=1000.0) as registry:
        publish(tmp_path)
        await sync(registry, tmp_path)
        (new, old) = registry.versions()
        registry.check_bake_times(clock() + 999)
        assert told(registry)[1][2] is State.DRAINING
        registry.check_bake_times(clock() + 1001)
        while told(registry)[1][2] is not State.UNLOADED:
            await asyncio.sleep(0)
        assert shop.engines["tiny/1"].closed
        assert registry.route("tiny").version_text == "2"
        registry.roll_back(new, "too late", "objective")  # what is on disk can be loaded again
        while new.state is not State.FAILED:
            await asyncio.sleep(0)
        assert old.state is State.READY
