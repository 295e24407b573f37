"""Labels, the canary percentage and the version policy decide which version gets a request."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc import StatusCode

from server.api.stubs import classify_pb2 as pb
from server.repository.__main__ import main as command
from server.repository.serving_config import ServingConfig, write_serving_config
from tests.support import triton_clients as triton
from tests.support.serving import (
    publish,
    raw,
    serve,
)
from tests.support.versions import (
    states,
    under_load,
    wait_for_states,
)


async def test_a_canary_gets_its_percentage_and_a_request_id_always_the_same_version(
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


async def test_metadata_calls_do_not_count_for_the_canary(tmp_path: Path) -> None:
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
            assert [one.version for one in stats] == ["2", "1"], "all serving versions, each time"
            (one,) = (await client.get_inference_statistics("tiny", "1")).model_stats
            assert one.version == "1"
        assert Counter(found) == {1: 5, 2: 5}


async def test_new_labels_take_effect_without_a_failed_request(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(3):
        publish(tmp_path)
    async with serve(tmp_path, bake_time_s=0.0) as served, under_load(served) as results:

        def set_labels(*arguments: str) -> None:
            assert command(["--repo", str(tmp_path), "label", "tiny", *arguments]) == 0

        assert (await served.classify(raw(0))).version == 3
        set_labels("stable=1", "--versions=latest:2")
        await wait_for_states(served, {1: "READY", 2: "READY", 3: "READY"})
        assert (await served.classify(raw(0))).version == 1
        assert (await served.classify(raw(0, version=2))).version == 2
        set_labels("stable=", "--versions=named:2")
        await wait_for_states(served, {1: "UNLOADED", 2: "READY", 3: "UNLOADED"})
        assert (await served.classify(raw(0))).version == 2
        (tmp_path / "tiny/serving.json").write_text("{")  # an unreadable file changes nothing
        publish(tmp_path)
        await wait_for_states(served, {4: "UNAVAILABLE"})
        assert (await states(served))[2] == "READY"
    assert results.codes.keys() == {"OK"}, results.messages


@pytest.mark.parametrize(
    ("fields", "code", "words"),
    [
        ({"label": "best"}, StatusCode.INVALID_ARGUMENT, "stable or canary is allowed"),
        ({"label": "canary"}, StatusCode.NOT_FOUND, "no version labelled 'canary'"),
        (
            {"label": "stable", "version": 1},
            StatusCode.INVALID_ARGUMENT,
            "set together with a version",
        ),
    ],
)
async def test_a_request_with_a_wrong_label_is_rejected(
    tmp_path: Path, fields: dict[str, Any], code: StatusCode, words: str
) -> None:
    publish(tmp_path)
    async with serve(tmp_path) as served:
        assert (await served.classify(raw(0, label="stable"))).version == 1
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await served.classify(raw(0, **fields))
        assert caught.value.code() == code
        assert words in (caught.value.details() or "")


async def test_the_version_policy_decides_how_many_versions_stay_loaded(tmp_path: Path) -> None:
    for _ in range(4):
        publish(tmp_path)
    (tmp_path / "tiny/3/labels.txt").unlink()
    async with serve(tmp_path, version_policy="latest:2") as served:
        assert await states(served) == {4: "READY", 3: "FAILED", 2: "READY", 1: "UNAVAILABLE"}
        assert (await served.classify(raw(0))).version == 4
        assert (await served.classify(raw(0, version=2))).version == 2
