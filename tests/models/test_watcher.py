"""Published, removed and repaired versions take effect under load without a failed request."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from grpc_health.v1.health_pb2 import HealthCheckResponse

from server.repository.manifest import LABELS_FILE
from tests.support.serving import (
    SHAPE,
    Mirror,
    Mirrors,
    loading,
    publish,
    raw,
    serve,
    until,
)
from tests.support.versions import (
    change_manifest,
    metric,
    reasons,
    states,
    under_load,
    wait_for_requests,
    wait_for_states,
)


async def test_new_versions_replace_old_ones_under_load_without_a_failed_request(
    tmp_path: Path,
) -> None:
    publish(tmp_path)
    swaps = 6
    async with serve(tmp_path, bake_time_s=0.0) as served, under_load(served) as results:
        await wait_for_requests(results)
        for number in range(2, 2 + swaps):
            await asyncio.to_thread(publish, tmp_path)
            await wait_for_states(served, {number - 1: "UNLOADED", number: "READY"})
            await wait_for_requests(results)
            assert (await served.classify(raw(0))).version == number
        assert metric(served, 'convserve_version_switches_total{model="tiny"}') == swaps
        assert metric(served, 'convserve_model_state{model="tiny",state="READY",version="7"}') == 1
        assert metric(served, 'convserve_model_ready{model="tiny",version="6"}') == 0
    assert results.codes.keys() == {"OK"}, results.messages
    assert results.answered_by.keys() == set(range(1, 2 + swaps))


async def test_the_previous_version_stays_loaded_during_the_bake_time(
    tmp_path: Path,
) -> None:
    publish(tmp_path)
    engines = Mirrors()
    async with serve(tmp_path, load=loading(engines), bake_time_s=2.0) as served:
        publish(tmp_path)
        await wait_for_states(served, {1: "DRAINING", 2: "READY"})
        assert (await reasons(served))[1] == (
            "version 2 is served; this version stays loaded during its bake time"
        )
        assert not engines.made[0].closed
        await wait_for_states(served, {1: "UNLOADED", 2: "READY"})
        assert engines.made[0].closed
        assert (await reasons(served))[1] == "version 2 is served"


async def test_a_new_model_is_served(tmp_path: Path) -> None:
    publish(tmp_path, "a")
    async with serve(tmp_path, load=loading(Mirror)) as served:
        publish(tmp_path, "b")
        await wait_for_states(served, {1: "READY"}, model="b")
        assert (await served.classify(raw(3, model="b"))).results[0].classes[0].index == 3


async def test_a_new_model_outside_the_models_setting_is_not_served(tmp_path: Path) -> None:
    publish(tmp_path, "a")
    async with serve(tmp_path, models="a") as served:
        publish(tmp_path, "b")
        publish(tmp_path, "a")
        await wait_for_states(served, {2: "READY"}, model="a")
        assert await states(served, "b") == {}


async def test_after_a_version_is_removed_the_previous_one_serves(tmp_path: Path) -> None:
    publish(tmp_path)
    publish(tmp_path)
    async with serve(tmp_path, bake_time_s=0.0) as served, under_load(served) as results:
        (tmp_path / "tiny/2").rename(tmp_path / "elsewhere")
        while 2 in await states(served):
            pass
        assert await states(served) == {1: "READY"}
        await wait_for_requests(results)
        shutil.rmtree(tmp_path / "tiny/1")  # the last version keeps serving: nothing can replace it
        publish(tmp_path, "other")
        await until(served.channel, "other", HealthCheckResponse.SERVING)
        assert await states(served) == {1: "READY"}
    assert results.codes.keys() == {"OK"}, results.messages


async def test_without_model_control_new_versions_are_ignored(tmp_path: Path) -> None:
    publish(tmp_path)
    async with serve(tmp_path, model_control="none") as served:
        publish(tmp_path)
        await served.server.registry.route("tiny").executor.submit("tiny/1", zeros())
        assert await states(served) == {1: "READY"}


def zeros() -> Any:
    return np.zeros((1, *SHAPE), np.uint8)


async def test_another_network_under_a_loaded_version_number_is_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The loaded network serves until the server restarts."""
    publish(tmp_path)
    async with serve(tmp_path, bake_time_s=0.0) as served:
        shutil.rmtree(tmp_path / "tiny")
        publish(tmp_path, trained=True)
        while "holds a different network" not in (await reasons(served))[1]:
            pass
        assert await states(served) == {1: "READY"}
        assert not (await served.classify(raw(0))).trained, "the loaded network answers"
        events = [one for one in caplog.records if one.message == "version_replaced"]
        assert len(events) == 1


async def test_a_repaired_version_is_served(tmp_path: Path) -> None:
    publish(tmp_path)
    async with serve(tmp_path, bake_time_s=0.0) as served:
        publish(tmp_path / "workshop")
        folder = tmp_path / "workshop/tiny/1"
        labels = (folder / LABELS_FILE).read_text()
        change_manifest(folder, lambda found: found.update(version=2))
        (folder / LABELS_FILE).write_text(labels[::-1])
        folder.rename(tmp_path / "tiny/2")
        await wait_for_states(served, {1: "READY", 2: "FAILED"})
        assert "labels.txt is not what was published" in (await reasons(served))[2]
        (tmp_path / "tiny/2" / LABELS_FILE).write_text(labels)
        await wait_for_states(served, {2: "READY"})


async def test_a_version_that_does_not_fit_into_memory_is_not_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(tmp_path)
    async with serve(tmp_path) as served:
        monkeypatch.setattr("server.models.memory_budget.free_bytes", lambda: 80 << 20)
        publish(tmp_path, shape=(1000, 1000, 3), max_batch=64)
        await wait_for_states(served, {1: "READY", 2: "FAILED"})
        reason = (await reasons(served))[2]
        assert "MiB of memory; 80 MiB are free" in reason
        monkeypatch.undo()
        (tmp_path / "tiny/2").touch()  # causes another attempt
        await wait_for_states(served, {2: "READY"})
