"""Versions come and go under load, and nobody who calls is the worse for it."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import msgspec
import pytest
from grpc import StatusCode
from grpc_health.v1.health_pb2 import HealthCheckResponse

from server.api.stubs import classify_pb2 as pb
from server.engines import null
from server.errors import EngineFailure
from server.models import watcher as rollout
from server.repository import writer
from server.repository.__main__ import main as command
from server.repository.manifest import GOLDEN_FILE, LABELS_FILE, MANIFEST_FILE, ONNX_FILE, Manifest
from server.repository.reader import Golden
from server.repository.serving_config import ServingConfig, write_serving_config
from tests.support import triton_clients as triton
from tests.support.serving import (
    CLASSES,
    SHAPE,
    Mirror,
    Mirrors,
    Served,
    loading,
    publish,
    raw,
    serve,
    until,
)

State = pb.Model.State


async def states(served: Served, model: str = "tiny") -> dict[int, str]:
    """The state of every version of a model, as callers are told."""
    listing = await served.call("ListModels", pb.ListModelsRequest())
    return {m.version: State.Name(m.state) for m in listing.models if m.name == model}


async def reasons(served: Served, model: str = "tiny") -> dict[int, str]:
    listing = await served.call("ListModels", pb.ListModelsRequest())
    return {m.version: m.reason for m in listing.models if m.name == model}


async def once(served: Served, expected: dict[int, str], model: str = "tiny") -> None:
    """Asks until the versions named are in these states; the server's own limit ends the wait."""
    while True:
        found = await states(served, model)
        if found.items() >= expected.items():
            return


@dataclass
class Load:
    """Callers that call one after the other, and what became of their calls."""

    codes: Counter[str] = field(default_factory=Counter)
    answered_by: Counter[int] = field(default_factory=Counter)
    messages: list[str] = field(default_factory=list)


@asynccontextmanager
async def under_load(served: Served, callers: int = 4) -> AsyncIterator[Load]:
    load = Load()
    stop = asyncio.Event()

    async def calls() -> None:
        while not stop.is_set():
            try:
                answer = await served.classify(raw(0, 0))
            except grpc.aio.AioRpcError as error:
                load.codes[error.code().name] += 1
                load.messages.append(error.details() or "")
            else:
                load.codes["OK"] += 1
                load.answered_by[answer.version] += 1

    async with asyncio.TaskGroup() as tasks:
        for _ in range(callers):
            tasks.create_task(calls())
        try:
            yield load
        finally:
            stop.set()


async def answered(load: Load, more: int = 20) -> None:
    """Waits until so many more calls have ended."""
    enough = load.codes.total() + more
    while load.codes.total() < enough:
        await asyncio.sleep(0.001)


def metric(served: Served, line: str) -> float:
    """The value of a series, 0 where there is none."""
    for text in served.server.metrics.render().decode().splitlines():
        if text.startswith(line + " "):
            return float(text.rpartition(" ")[2])
    return 0.0


# --- what is published -----------------------------------------------------------------------


async def test_versions_published_under_load_take_over_without_a_failed_call(
    tmp_path: Path,
) -> None:
    publish(tmp_path)
    swaps = 6
    async with serve(tmp_path, bake_time_s=0.0) as served, under_load(served) as load:
        await answered(load)
        for number in range(2, 2 + swaps):
            await asyncio.to_thread(publish, tmp_path)
            await once(served, {number - 1: "UNLOADED", number: "READY"})
            await answered(load)
            assert (await served.classify(raw(0))).version == number
        assert metric(served, 'convserve_version_switches_total{model="tiny"}') == swaps
        assert metric(served, 'convserve_model_state{model="tiny",state="READY",version="7"}') == 1
        assert metric(served, 'convserve_model_ready{model="tiny",version="6"}') == 0
    assert load.codes.keys() == {"OK"}, load.messages
    assert load.answered_by.keys() == set(range(1, 2 + swaps))


async def test_the_version_before_waits_until_the_new_one_has_proved_itself(
    tmp_path: Path,
) -> None:
    publish(tmp_path)
    engines = Mirrors()
    async with serve(tmp_path, load=loading(engines), bake_time_s=2.0) as served:
        publish(tmp_path)
        await once(served, {1: "DRAINING", 2: "READY"})
        assert (await reasons(served))[1] == (
            "version 2 is served; this one is kept until that has proved itself"
        )
        assert not engines.made[0].closed
        await once(served, {1: "UNLOADED", 2: "READY"})
        assert engines.made[0].closed
        assert (await reasons(served))[1] == "version 2 is served"


async def test_a_new_model_is_served(tmp_path: Path) -> None:
    publish(tmp_path, "a")
    async with serve(tmp_path, load=loading(Mirror)) as served:
        publish(tmp_path, "b")
        await once(served, {1: "READY"}, model="b")
        assert (await served.classify(raw(3, model="b"))).results[0].classes[0].index == 3


async def test_a_new_model_that_is_not_asked_for_is_not_served(tmp_path: Path) -> None:
    publish(tmp_path, "a")
    async with serve(tmp_path, models="a") as served:
        publish(tmp_path, "b")
        publish(tmp_path, "a")
        await once(served, {2: "READY"}, model="a")
        assert await states(served, "b") == {}


async def test_a_version_taken_away_gives_way_to_the_one_before(tmp_path: Path) -> None:
    publish(tmp_path)
    publish(tmp_path)
    async with serve(tmp_path, bake_time_s=0.0) as served, under_load(served) as load:
        (tmp_path / "tiny/2").rename(tmp_path / "elsewhere")
        while 2 in await states(served):
            pass
        assert await states(served) == {1: "READY"}
        await answered(load)
        shutil.rmtree(tmp_path / "tiny/1")  # the last one goes on: nothing could take its place
        publish(tmp_path, "other")
        await until(served.channel, "other", HealthCheckResponse.SERVING)
        assert await states(served) == {1: "READY"}
    assert load.codes.keys() == {"OK"}, load.messages


async def test_where_the_system_tells_of_no_changes_they_are_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_watches(*arguments: Any, **options: Any) -> Any:
        raise OSError("OS file watch limit reached.")

    monkeypatch.setattr(rollout, "awatch", no_watches)
    monkeypatch.setattr(rollout, "RESCAN_S", 0.05)
    publish(tmp_path)
    async with serve(tmp_path, bake_time_s=0.0) as served:
        publish(tmp_path)
        await once(served, {2: "READY"})
    assert "watching_by_looking" in [record.msg for record in caplog.records]


async def test_without_control_a_server_serves_what_was_there(tmp_path: Path) -> None:
    publish(tmp_path)
    async with serve(tmp_path, model_control="none") as served:
        publish(tmp_path)
        await served.server.registry.route("tiny").executor.submit("tiny/1", zeros())
        assert await states(served) == {1: "READY"}


def zeros() -> Any:
    import numpy as np

    return np.zeros((1, *SHAPE), np.uint8)


# --- what is broken --------------------------------------------------------------------------

Break = Callable[[Path], None]


def republished(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Changes a manifest, with the hashes of the files as they are now."""
    path = folder / MANIFEST_FILE
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def with_hash(folder: Path, part: str, name: str) -> None:
    """Has the manifest say that a file is as it should be."""
    record = msgspec.to_builtins(writer.file_record(folder / name))

    def change(manifest: dict[str, Any]) -> None:
        if part == "engine":
            manifest["engines"][0]["files"] = [record]
        else:
            manifest[part] = record

    republished(folder, change)


def truncate(name: str) -> Break:
    def broken(folder: Path) -> None:
        path = folder / name
        path.write_bytes(path.read_bytes()[:-5])

    return broken


def flip(name: str) -> Break:
    def broken(folder: Path) -> None:
        data = bytearray((folder / name).read_bytes())
        data[len(data) // 2] ^= 1
        (folder / name).write_bytes(data)

    return broken


def missing(name: str) -> Break:
    return lambda folder: (folder / name).unlink()


def linked(name: str) -> Break:
    """The file is a link to one outside of the repository."""

    def broken(folder: Path) -> None:
        outside = folder.parents[2] / f"outside-{folder.name}-{name}"
        (folder / name).rename(outside)
        (folder / name).symlink_to(outside)

    return broken


def manifest(**fields: Any) -> Break:
    return lambda folder: republished(folder, lambda found: found.update(fields))


def engine(**fields: Any) -> Break:
    return lambda folder: republished(folder, lambda found: found["engines"][0].update(fields))


def text(content: str) -> Break:
    def broken(folder: Path) -> None:
        (folder / MANIFEST_FILE).write_text(content)

    return broken


def truncated_with_its_hash(folder: Path) -> None:
    truncate(null.FILE)(folder)
    with_hash(folder, "engine", null.FILE)


def golden_of_another(folder: Path) -> None:
    import numpy as np

    answers = np.zeros((2, CLASSES), np.float32)
    answers[:, 1] = 1
    truth = Golden(np.zeros((2, *SHAPE), np.uint8), answers)
    writer.write_golden(folder / GOLDEN_FILE, truth)
    with_hash(folder, "golden", GOLDEN_FILE)


def golden_that_is_none(folder: Path) -> None:
    (folder / GOLDEN_FILE).write_bytes(b"PK\x03\x04 no archive")
    with_hash(folder, "golden", GOLDEN_FILE)


def pipe(folder: Path) -> None:
    (folder / null.FILE).unlink()
    os.mkfifo(folder / null.FILE)


BROKEN: dict[str, Break] = {
    "engine truncated": truncate(null.FILE),
    "engine truncated, with its hash": truncated_with_its_hash,
    "engine flipped": flip(null.FILE),
    "engine missing": missing(null.FILE),
    "engine linked": linked(null.FILE),
    "engine a pipe": pipe,
    "engine of another version": engine(backend_version="0", backend="openvino"),
    "engine of an unknown backend": engine(backend="magic"),
    "engine of an unknown precision": engine(precision="fp3"),
    "engine named outside": engine(files=[{"name": "../x", "bytes": 1, "sha256": "0" * 64}]),
    "engine with a batch beyond reason": engine(max_batch=1 << 30),
    "engine without files": engine(files=[]),
    "graph truncated": truncate(ONNX_FILE),
    "graph flipped": flip(ONNX_FILE),
    "graph linked": linked(ONNX_FILE),
    "golden wrong": golden_of_another,
    "golden no archive": golden_that_is_none,
    "golden flipped": flip(GOLDEN_FILE),
    "golden missing": missing(GOLDEN_FILE),
    "golden linked": linked(GOLDEN_FILE),
    "labels truncated": truncate(LABELS_FILE),
    "labels missing": missing(LABELS_FILE),
    "manifest missing": missing(MANIFEST_FILE),
    "manifest linked": linked(MANIFEST_FILE),
    "manifest empty": text(""),
    "manifest no JSON": text("{"),
    "manifest a thousand deep": text("[" * 100_000),
    "manifest of another model": manifest(model="other"),
    "manifest of a coming format": manifest(format=99),
    "manifest of a trillion classes": manifest(classes=10**12),
    "manifest without an objective": manifest(objective_ms=0),
    "manifest huge": text(" " * ((1 << 20) + 1)),
}


async def test_broken_versions_of_every_kind_never_serve_and_disturb_nobody(
    tmp_path: Path,
) -> None:
    root, workshop = tmp_path / "repository", tmp_path / "workshop"
    publish(root)
    async with serve(root, bake_time_s=0.0) as served, under_load(served) as load:
        await answered(load)
        for number, (_, damage) in enumerate(BROKEN.items(), start=2):
            await asyncio.to_thread(publish_broken, root, workshop, number, damage)
        numbers = range(2, 2 + len(BROKEN))
        await once(served, dict.fromkeys(numbers, "FAILED"))
        told = await reasons(served)
        assert all(told[number] for number in numbers)
        await answered(load)
        sound = publish(root).version
        await once(served, {1: "UNLOADED", sound: "READY"})
        await answered(load)
    assert len(BROKEN) >= 30
    assert load.codes.keys() == {"OK"}, load.messages
    assert load.answered_by.keys() == {1, sound}


def publish_broken(root: Path, workshop: Path, number: int, damage: Break) -> None:
    """A version as no builder would write it, put into the repository in one step."""
    shutil.rmtree(workshop, ignore_errors=True)
    publish(workshop)
    folder = workshop / "tiny" / str(number)
    (workshop / "tiny/1").rename(folder)
    republished(folder, lambda found: found.update(version=number))
    damage(folder)
    folder.rename(root / "tiny" / str(number))


async def test_a_version_that_is_mended_is_served(tmp_path: Path) -> None:
    publish(tmp_path)
    async with serve(tmp_path, bake_time_s=0.0) as served:
        publish(tmp_path / "workshop")
        folder = tmp_path / "workshop/tiny/1"
        labels = (folder / LABELS_FILE).read_text()
        republished(folder, lambda found: found.update(version=2))
        (folder / LABELS_FILE).write_text(labels[::-1])
        folder.rename(tmp_path / "tiny/2")
        await once(served, {1: "READY", 2: "FAILED"})
        assert "labels.txt is not what was published" in (await reasons(served))[2]
        (tmp_path / "tiny/2" / LABELS_FILE).write_text(labels)
        await once(served, {2: "READY"})


async def test_what_does_not_fit_into_memory_is_not_even_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(tmp_path)
    async with serve(tmp_path) as served:
        monkeypatch.setattr("server.models.memory_budget.free_bytes", lambda: 80 << 20)
        publish(tmp_path, shape=(1000, 1000, 3), max_batch=64)
        await once(served, {1: "READY", 2: "FAILED"})
        told = (await reasons(served))[2]
        assert "MiB of memory, and 80 MiB are free" in told
        monkeypatch.undo()
        (tmp_path / "tiny/2").touch()  # asks for another try
        await once(served, {2: "READY"})


# --- back ------------------------------------------------------------------------------------


class Failing(Mirrors):
    """Engines of which those after the first one fail."""

    def __call__(self, manifest: Manifest) -> Mirror:
        engine = super().__call__(manifest)
        if manifest.version > 1:
            engine.failure = EngineFailure("it has a screw loose")
        return engine


@pytest.mark.parametrize("bake_time_s", [60.0, 0.0])
async def test_a_version_that_errs_in_its_probation_goes_back(
    tmp_path: Path, bake_time_s: float
) -> None:
    publish(tmp_path)
    engines = Failing()
    async with serve(tmp_path, load=loading(engines), bake_time_s=bake_time_s) as served:
        publish(tmp_path)
        await once(served, {2: "READY"})
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await served.classify(raw(1))
        assert caught.value.code() == StatusCode.INTERNAL
        if not bake_time_s:
            assert (await states(served))[2] == "READY"
            return
        answer = await served.classify(raw(1))  # at once, as the one before had been kept
        assert answer.version == 1
        await once(served, {1: "READY", 2: "FAILED"})
        assert (await reasons(served))[2] == (
            "within its probation a batch failed: it has a screw loose"
        )
        assert (
            metric(served, 'convserve_rollbacks_total{model="tiny",reason="engine_failure"}') == 1
        )
        assert engines.made[1].closed
        publish(tmp_path, "other")  # a look at the repository does not bring it back
        await until(served.channel, "other", HealthCheckResponse.SERVING)
        assert await states(served) == {1: "READY", 2: "FAILED"}


async def test_golden_answers_that_change_stop_a_version_at_once(tmp_path: Path) -> None:
    publish(tmp_path)
    publish(tmp_path)
    async with serve(tmp_path, golden_interval_s=0.05, bake_time_s=0.0) as served:
        engine = served.server.registry.route("tiny").engine
        assert isinstance(engine, null.NullEngine)
        (instance,) = engine.instances
        while not metric(served, 'convserve_golden_checks_total{model="tiny",outcome="passed"}'):
            await asyncio.sleep(0.01)
        classes, scores, probabilities = instance._answer
        instance._answer = (classes[:, ::-1], scores, probabilities[:, ::-1])
        await once(served, {1: "READY", 2: "FAILED"})
        assert "golden inputs, run again, got other answers" in (await reasons(served))[2]
        assert (await served.classify(raw(0))).version == 1
        assert metric(served, 'convserve_rollbacks_total{model="tiny",reason="golden_drift"}') == 1


async def test_without_another_version_one_with_wrong_answers_answers_no_more(
    tmp_path: Path,
) -> None:
    publish(tmp_path)
    async with serve(tmp_path, golden_interval_s=0.05) as served:
        engine = served.server.registry.route("tiny").engine
        assert isinstance(engine, null.NullEngine)
        (instance,) = engine.instances
        classes, scores, probabilities = instance._answer
        instance._answer = (classes[:, ::-1], scores, probabilities[:, ::-1])
        await until(served.channel, "tiny", HealthCheckResponse.NOT_SERVING)
        await until(served.channel, "", HealthCheckResponse.NOT_SERVING)
        await once(served, {1: "FAILED"})


# --- who gets which calls --------------------------------------------------------------------


async def test_a_canary_gets_its_percentage_and_a_request_always_the_same_of_both(
    tmp_path: Path,
) -> None:
    publish(tmp_path)
    publish(tmp_path)
    write_serving_config(tmp_path, "tiny", ServingConfig(labels={"canary": 2}, canary_percent=25))
    async with serve(tmp_path) as served:
        assert await states(served) == {1: "READY", 2: "READY"}
        listing = await served.call("ListModels", pb.ListModelsRequest())
        assert [list(m.version_labels) for m in listing.models] == [["canary"], ["stable"]]
        without_id = [(await served.classify(raw(0))).version for _ in range(40)]
        assert Counter(without_id) == {1: 30, 2: 10}
        with_id = [f"r{number}" for number in range(80)]
        first = [(await served.classify(raw(0, request_id=one))).version for one in with_id]
        again = [(await served.classify(raw(0, request_id=one))).version for one in with_id]
        assert first == again
        assert 8 <= first.count(2) <= 32
        assert (await served.classify(raw(0, label="stable"))).version == 1
        assert (await served.classify(raw(0, label="canary"))).version == 2
        assert (await served.classify(raw(0, version=1, request_id="r0"))).version == 1


async def test_who_asks_about_a_model_takes_nothing_of_its_canarys_share(tmp_path: Path) -> None:
    publish(tmp_path)
    publish(tmp_path)
    write_serving_config(tmp_path, "tiny", ServingConfig(labels={"canary": 2}, canary_percent=50))
    async with (
        serve(tmp_path) as served,
        triton.aio.InferenceServerClient(served.target) as client,
    ):
        found = []
        for _ in range(10):
            await client.get_model_metadata("tiny")
            found.append((await served.classify(raw(0))).version)
            assert (await client.get_model_config("tiny")).config.name == "tiny"
            stats = (await client.get_inference_statistics("tiny")).model_stats
            assert [one.version for one in stats] == ["2", "1"], "of all that answer, each time"
            (one,) = (await client.get_inference_statistics("tiny", "1")).model_stats
            assert one.version == "1"
        assert Counter(found) == {1: 5, 2: 5}


async def test_a_canary_that_is_given_up_is_a_rollback_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    publish(tmp_path)
    publish(tmp_path)
    write_serving_config(tmp_path, "tiny", ServingConfig(labels={"canary": 2}, canary_percent=50))
    engines = Mirrors()
    async with serve(tmp_path, load=loading(engines), bake_time_s=60.0) as served:
        await once(served, {1: "READY", 2: "READY"})
        canary = engines.made[0]  # the newest is loaded first
        canary.failure = EngineFailure("it has a screw loose")
        with pytest.raises(grpc.aio.AioRpcError):
            await served.classify(raw(0, label="canary"))
        await once(served, {1: "READY", 2: "FAILED"})
        assert [(await served.classify(raw(0))).version for _ in range(4)] == [1] * 4
        assert (
            metric(served, 'convserve_rollbacks_total{model="tiny",reason="engine_failure"}') == 1
        )


async def test_a_version_that_was_published_anew_under_its_number_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It can't be both: callers get the one that was loaded until the server starts anew."""
    publish(tmp_path)
    async with serve(tmp_path, bake_time_s=0.0) as served:
        shutil.rmtree(tmp_path / "tiny")
        publish(tmp_path, trained=True)
        while "holds another network" not in (await reasons(served))[1]:
            pass
        assert await states(served) == {1: "READY"}
        assert not (await served.classify(raw(0))).trained, "as it was loaded"
        told = [one for one in caplog.records if one.message == "version_replaced"]
        assert len(told) == 1


async def test_labels_are_followed_as_they_are_given(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(3):
        publish(tmp_path)
    async with serve(tmp_path, bake_time_s=0.0) as served, under_load(served) as load:

        def label(*arguments: str) -> None:
            assert command(["--repo", str(tmp_path), "label", "tiny", *arguments]) == 0

        assert (await served.classify(raw(0))).version == 3
        label("stable=1", "--versions=latest:2")
        await once(served, {1: "READY", 2: "READY", 3: "READY"})
        assert (await served.classify(raw(0))).version == 1
        assert (await served.classify(raw(0, version=2))).version == 2
        label("stable=", "--versions=named:2")
        await once(served, {1: "UNLOADED", 2: "READY", 3: "UNLOADED"})
        assert (await served.classify(raw(0))).version == 2
        (tmp_path / "tiny/serving.json").write_text("{")  # what can't be read changes nothing
        publish(tmp_path)
        await once(served, {4: "UNAVAILABLE"})
        assert (await states(served))[2] == "READY"
    assert load.codes.keys() == {"OK"}, load.messages


@pytest.mark.parametrize(
    ("fields", "code", "words"),
    [
        ({"label": "best"}, StatusCode.INVALID_ARGUMENT, "stable or canary is allowed"),
        ({"label": "canary"}, StatusCode.NOT_FOUND, "no version labelled 'canary'"),
        ({"label": "stable", "version": 1}, StatusCode.INVALID_ARGUMENT, "a version too"),
    ],
)
async def test_a_wrong_label_in_a_call_is_told(
    tmp_path: Path, fields: dict[str, Any], code: StatusCode, words: str
) -> None:
    publish(tmp_path)
    async with serve(tmp_path) as served:
        assert (await served.classify(raw(0, label="stable"))).version == 1
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await served.classify(raw(0, **fields))
        assert caught.value.code() == code
        assert words in (caught.value.details() or "")


async def test_a_server_keeps_as_many_versions_as_it_is_set_to(tmp_path: Path) -> None:
    for _ in range(4):
        publish(tmp_path)
    (tmp_path / "tiny/3/labels.txt").unlink()
    async with serve(tmp_path, version_policy="latest:2") as served:
        assert await states(served) == {4: "READY", 3: "FAILED", 2: "READY", 1: "UNAVAILABLE"}
        assert (await served.classify(raw(0))).version == 4
        assert (await served.classify(raw(0, version=2))).version == 2
