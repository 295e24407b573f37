"""Classify, ListModels and GetModel do what the contract promises, over a socket."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from grpc import StatusCode

from server.api.stubs import classify_pb2 as pb
from tests.api.classify_calls import best, eventually, failure, png, raw_image, refused
from tests.support.serving import (
    CLASSES,
    MAX_BATCH,
    SERVICE,
    SHAPE,
    Mirror,
    Mirrors,
    loading,
    publish,
    raw,
    serve,
)

CLASSIFIER = pb.DESCRIPTOR.services_by_name["Classifier"]
HEIGHT, WIDTH, CHANNELS = SHAPE


async def test_every_rpc_of_the_contract_is_served(tmp_path: Path) -> None:
    publish(tmp_path)
    async with serve(tmp_path) as served:
        for method in CLASSIFIER.methods:
            unary: Any = served.channel.unary_unary
            call = unary(SERVICE + method.name)(b"", timeout=20)
            assert await call.code() in (StatusCode.OK, StatusCode.INVALID_ARGUMENT), method.name


async def test_files_and_pixels_give_the_same_classes_in_every_form(
    tmp_path: Path,
) -> None:
    publish(tmp_path)
    async with serve(tmp_path, load=loading(Mirror)) as served:
        of = [5, 2, 9]
        files = pb.ClassifyRequest(model="tiny", images=[pb.Image(encoded=png(i)) for i in of])
        rows = pb.ClassifyRequest(model="tiny", images=[raw_image(i) for i in of])
        mixed = pb.ClassifyRequest(
            model="tiny", images=[raw_image(5), pb.Image(encoded=png(2)), raw_image(9)]
        )
        answers = [await served.classify(request) for request in (files, rows, mixed, raw(*of))]
    assert best(answers[0]) == of
    for answer in answers[1:]:
        assert answer.results == answers[0].results


async def test_pixels_of_another_size_are_resized_like_a_file(tmp_path: Path) -> None:
    publish(tmp_path)
    large = np.full((2 * HEIGHT, 2 * WIDTH, 3), 7, np.uint8)
    size = {"height": 2 * HEIGHT, "width": 2 * WIDTH, "channels": 3}
    one = pb.RawImage(**size, data=large.tobytes())
    several = pb.RawImages(**size, count=2, data=2 * large.tobytes())
    grey = pb.RawImage(height=3, width=3, channels=1, data=bytes([4] * 9))
    async with serve(tmp_path, load=loading(Mirror)) as served:
        images = [pb.Image(raw=one), pb.Image(raw=grey)]
        answer = await served.classify(pb.ClassifyRequest(model="tiny", images=images))
        batch = await served.classify(pb.ClassifyRequest(model="tiny", pixels=several))
    assert best(answer) == [7, 4]
    assert best(batch) == [7, 7]


async def test_results_have_the_order_of_the_images(
    tmp_path: Path,
) -> None:
    publish(tmp_path)
    of = [(7 * n + 3) % CLASSES for n in range(50)]
    files = pb.ClassifyRequest(model="tiny", images=[pb.Image(encoded=png(i)) for i in of])
    async with serve(tmp_path, load=loading(Mirror)) as served:
        answers = await asyncio.gather(
            *(served.classify(request) for request in (raw(*of), files, raw(*of[::-1])))
        )
    assert [best(answer) for answer in answers] == [of, of, of[::-1]]


async def test_a_request_larger_than_a_batch_is_split_and_answered_whole(tmp_path: Path) -> None:
    publish(tmp_path)
    async with serve(tmp_path, load=loading(Mirror)) as served:
        answer = await served.classify(raw(*range(10)))
    assert best(answer) == list(range(10))
    assert sum(answer.timing.batch_rows) == 10
    assert max(answer.timing.batch_rows) <= MAX_BATCH


async def test_batch_rows_include_the_rows_of_other_requests(tmp_path: Path) -> None:
    publish(tmp_path)
    mirrors = Mirrors(held=True)
    async with serve(tmp_path, load=loading(mirrors)) as served:
        first = asyncio.create_task(served.classify(raw(1)))
        await eventually(lambda: bool(mirrors.made) and mirrors.made[0].started.is_set())
        others = [asyncio.create_task(served.classify(raw(*of))) for of in ([2], [3, 4, 5])]
        (executor,) = {model.executor for model in served.server.registry.serving_models()}
        await eventually(lambda: executor.queued_rows("tiny/1") == 4)
        mirrors.made[0].release()
        answers = await asyncio.gather(first, *others)
    assert [list(answer.timing.batch_rows) for answer in answers] == [[1], [4], [4]]
    assert [best(answer) for answer in answers] == [[1], [2], [3, 4, 5]]


async def test_top_k_is_five_unless_the_request_has_another(tmp_path: Path) -> None:
    publish(tmp_path)
    publish(tmp_path, "pair", classes=2)
    async with serve(tmp_path, load=loading(Mirror)) as served:
        for requested, given in ((0, 5), (1, 1), (10, 10)):
            (result,) = (await served.classify(raw(3, top_k=requested))).results
            assert [entry.index for entry in result.classes] == [
                (3 + n) % CLASSES for n in range(given)
            ]
            assert [entry.label for entry in result.classes][0] == "class 3"
            probabilities = [entry.probability for entry in result.classes]
            assert probabilities == sorted(probabilities, reverse=True)
        (result,) = (await served.classify(raw(0, model="pair"))).results
        assert len(result.classes) == 2
        field, description = await refused(served, raw(0, top_k=11))
        assert field == "top_k"
        assert description == "is 11; this model gives 1 to 10, or 0 for the default"
        assert (await refused(served, raw(0, top_k=2**32 - 1)))[0] == "top_k"


async def test_a_response_names_its_model_and_repeats_the_request_id(tmp_path: Path) -> None:
    publish(tmp_path, trained=False)
    publish(tmp_path, "wise", trained=True)
    async with serve(tmp_path, load=loading(Mirror)) as served:
        answer = await served.classify(raw(1, request_id="mine: ä\n" + "x" * 120))
        wise = await served.classify(raw(1, model="wise", version=1))
        field, _ = await refused(served, raw(1, request_id="x" * 129))
    assert (answer.model, answer.version, answer.trained) == ("tiny", 1, False)
    assert answer.request_id == "mine: ä\n" + "x" * 120
    assert (wise.model, wise.trained, wise.request_id) == ("wise", True, "")
    assert field == "request_id"


async def test_the_request_id_is_logged_at_level_debug(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    publish(tmp_path)
    with caplog.at_level(logging.DEBUG, logger="server"):
        async with serve(tmp_path) as served:
            await served.classify(raw(1, 2, request_id="find me"))
    (record,) = (vars(record) for record in caplog.records if record.msg == "request_answered")
    assert (record["request_id"], record["model"], record["images"]) == ("find me", "tiny", 2)


async def test_the_phases_of_a_request_add_up(tmp_path: Path) -> None:
    publish(tmp_path)
    mirrors = Mirrors(held=True)
    async with serve(tmp_path, load=loading(mirrors)) as served:
        loop = asyncio.get_running_loop()
        sent_s = loop.time()
        first = asyncio.create_task(served.classify(raw(1)))
        await eventually(lambda: bool(mirrors.made) and mirrors.made[0].started.is_set())
        second = asyncio.create_task(served.classify(raw(2)))
        (executor,) = {model.executor for model in served.server.registry.serving_models()}
        await eventually(lambda: executor.queued_rows("tiny/1") == 1)
        until_s = loop.time() + 0.05
        await eventually(lambda: loop.time() > until_s)
        mirrors.made[0].release()
        timings = [(await call).timing for call in (first, second)]
        whole_ms = (loop.time() - sent_s) * 1e3
    for timing in timings:
        phases = timing.decode_ms, timing.queue_ms, timing.compute_ms
        assert min(phases) >= 0
        assert sum(phases) <= timing.total_ms <= whole_ms
    assert timings[0].compute_ms >= 50  # the engine was held
    assert timings[1].queue_ms >= 50


async def test_the_listing_has_every_version_with_its_error(tmp_path: Path) -> None:
    for _ in range(3):
        publish(tmp_path)
    publish(tmp_path, "other", shape=(4, 5, 1), classes=2, trained=True)
    (tmp_path / "tiny/3/labels.txt").write_text("cut off")
    async with serve(tmp_path) as served:
        listing = await served.call("ListModels", pb.ListModelsRequest())
        newest = await served.call("GetModel", pb.GetModelRequest(model="tiny"))
        broken = await served.call("GetModel", pb.GetModelRequest(model="tiny", version=3))
        other = await served.call("GetModel", pb.GetModelRequest(model="other"))
        to_broken = await failure(served.classify(raw(1, version=3)))
        to_older = await failure(served.classify(raw(1, version=1)))
        answer = await served.classify(raw(1))
    state = pb.Model.State
    assert [(m.name, m.version, m.state) for m in listing.models] == [
        ("other", 1, state.READY),
        ("tiny", 3, state.FAILED),
        ("tiny", 2, state.READY),
        ("tiny", 1, state.UNAVAILABLE),
    ]
    assert "labels.txt" in broken.reason
    assert listing.models[3].reason == "version 2 is served"
    assert all(not model.labels for model in listing.models)
    assert (newest.version, list(newest.labels)[:2], len(newest.labels)) == (
        2,
        ["class 0", "class 1"],
        CLASSES,
    )
    assert (other.height, other.width, other.channels, other.classes, other.top_k) == (
        4,
        5,
        1,
        2,
        2,
    )
    assert other.activation == "softmax"
    assert (other.trained, other.weights, other.backend, other.precision, other.max_batch) == (
        True,
        "random:0",
        "null",
        "fp32",
        MAX_BATCH,
    )
    assert answer.version == 2
    assert to_broken.code() == to_older.code() == StatusCode.UNAVAILABLE
    assert "labels.txt" in (to_broken.details() or "")


async def test_an_unknown_model_or_version_is_not_found_and_the_error_lists_known_ones(
    tmp_path: Path,
) -> None:
    publish(tmp_path)
    async with serve(tmp_path) as served:
        cases: list[tuple[dict[str, Any], str]] = [
            ({"model": "tinny"}, "there is no model 'tinny'; known models: tiny"),
            ({"version": 7}, "model 'tiny' has no version 7; it has 1"),
            ({"version": 2**63 - 1}, f"model 'tiny' has no version {2**63 - 1}; it has 1"),
        ]
        for fields, message in cases:
            error = await failure(served.classify(raw(1, **fields)))
            assert (error.code(), error.details()) == (StatusCode.NOT_FOUND, message)
        error = await failure(served.call("GetModel", pb.GetModelRequest(model="tinny")))
        assert error.code() == StatusCode.NOT_FOUND
        assert await refused(served, raw(1, version=-1)) == (
            "version",
            "is -1; versions count from 1, 0 is the newest",
        )
        assert await refused(served, raw(1, model="")) == ("model", "is empty; known models: tiny")
