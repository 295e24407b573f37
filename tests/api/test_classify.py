"""What the contract promises, and what becomes of those who do not keep to it; over a socket."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import AsyncExitStack
from io import BytesIO
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from google.rpc.error_details_pb2 import BadRequest, RetryInfo
from google.rpc.status_pb2 import Status
from grpc import StatusCode
from grpc_health.v1 import health_pb2_grpc
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from PIL import Image
from prometheus_client import CollectorRegistry

from server import errors
from server.api.health import Health
from server.api.status import STATUS
from server.api.stubs import classify_pb2 as pb
from tests.support.serving import (
    CLASSES,
    MAX_BATCH,
    SERVICE,
    SHAPE,
    HeldLoader,
    Mirror,
    Mirrors,
    Served,
    loading,
    publish,
    raw,
    serve,
)

CLASSIFIER = pb.DESCRIPTOR.services_by_name["Classifier"]
HEIGHT, WIDTH, CHANNELS = SHAPE


def row(index: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Pixels that a Mirror finds to be of that class."""
    pixels = np.zeros(SHAPE, np.uint8)
    pixels[0, 0, 0] = index
    return pixels


def png(index: int) -> bytes:
    file = BytesIO()
    Image.fromarray(row(index)).save(file, "PNG")
    return file.getvalue()


def raw_image(index: int) -> pb.Image:
    data = row(index).tobytes()
    image = pb.RawImage(height=HEIGHT, width=WIDTH, channels=CHANNELS, data=data)
    return pb.Image(raw=image)


def found(response: pb.ClassifyResponse) -> list[int]:
    """The best class of each image."""
    return [result.classes[0].index for result in response.results]


async def failure(call: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value


async def eventually(condition: Callable[[], bool]) -> None:
    """Lets the server's tasks go on until the condition holds; the test's time limit ends it."""
    while not condition():
        await asyncio.sleep(0.001)


def value(registry: CollectorRegistry, name: str, **labels: str) -> float:
    return registry.get_sample_value(name, labels) or 0.0


def trailers(error: grpc.aio.AioRpcError) -> dict[str, Any]:
    metadata: Any = error.trailing_metadata()
    return dict(iter(metadata))  # grpcio before 1.80 has `keys`, but nothing to use them with


def details(error: grpc.aio.AioRpcError) -> Status:
    return Status.FromString(trailers(error)["grpc-status-details-bin"])


def violation(error: grpc.aio.AioRpcError) -> tuple[str, str]:
    """The field that a BadRequest names, and its description."""
    request = BadRequest()
    assert details(error).details[0].Unpack(request)
    (one,) = request.field_violations
    return one.field, one.description


async def refused(served: Served, request: pb.ClassifyRequest | bytes) -> tuple[str, str]:
    """What an INVALID_ARGUMENT says of that request."""
    error = await failure(served.call("Classify", request))
    assert error.code() == StatusCode.INVALID_ARGUMENT
    field, description = violation(error)
    assert error.details() == f"{field}: {description}"
    return field, description


# --- what is promised ------------------------------------------------------------------------


async def test_every_rpc_of_the_contract_is_served(tmp_path: Path) -> None:
    publish(tmp_path)
    async with serve(tmp_path) as served:
        for method in CLASSIFIER.methods:
            unary: Any = served.channel.unary_unary
            call = unary(SERVICE + method.name)(b"", timeout=20)
            assert await call.code() in (StatusCode.OK, StatusCode.INVALID_ARGUMENT), method.name


def test_every_serving_error_has_a_status() -> None:
    found, kinds = set(), [errors.ServingError]
    while kinds:
        kinds = [sub for kind in kinds for sub in kind.__subclasses__()]
        found |= set(kinds)
    assert found == set(STATUS)


async def test_files_and_pixels_give_the_same_classes_whatever_carries_them(
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
    assert found(answers[0]) == of
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
    assert found(answer) == [7, 4]
    assert found(batch) == [7, 7]


async def test_answers_come_in_the_order_of_the_images_however_they_were_batched(
    tmp_path: Path,
) -> None:
    publish(tmp_path)
    of = [(7 * n + 3) % CLASSES for n in range(50)]
    files = pb.ClassifyRequest(model="tiny", images=[pb.Image(encoded=png(i)) for i in of])
    async with serve(tmp_path, load=loading(Mirror)) as served:
        answers = await asyncio.gather(
            *(served.classify(request) for request in (raw(*of), files, raw(*of[::-1])))
        )
    assert [found(answer) for answer in answers] == [of, of, of[::-1]]


async def test_a_call_larger_than_a_batch_is_split_and_answered_whole(tmp_path: Path) -> None:
    publish(tmp_path)
    async with serve(tmp_path, load=loading(Mirror)) as served:
        answer = await served.classify(raw(*range(10)))
    assert found(answer) == list(range(10))
    assert sum(answer.timing.batch_rows) == 10
    assert max(answer.timing.batch_rows) <= MAX_BATCH


async def test_batch_rows_count_the_rows_of_other_callers(tmp_path: Path) -> None:
    publish(tmp_path)
    mirrors = Mirrors(held=True)
    async with serve(tmp_path, load=loading(mirrors)) as served:
        first = asyncio.create_task(served.classify(raw(1)))
        await eventually(lambda: bool(mirrors.made) and mirrors.made[0].started.is_set())
        others = [asyncio.create_task(served.classify(raw(*of))) for of in ([2], [3, 4, 5])]
        (host,) = {ready.executor for ready in served.server.registry.serving_models()}
        await eventually(lambda: host.queued_rows("tiny/1") == 4)
        mirrors.made[0].release()
        answers = await asyncio.gather(first, *others)
    assert [list(answer.timing.batch_rows) for answer in answers] == [[1], [4], [4]]
    assert [found(answer) for answer in answers] == [[1], [2], [3, 4, 5]]


async def test_top_k_is_five_or_what_the_call_asks_for(tmp_path: Path) -> None:
    publish(tmp_path)
    publish(tmp_path, "pair", classes=2)
    async with serve(tmp_path, load=loading(Mirror)) as served:
        for asked, given in ((0, 5), (1, 1), (10, 10)):
            (result,) = (await served.classify(raw(3, top_k=asked))).results
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


async def test_an_answer_says_who_gave_it_and_to_which_request(tmp_path: Path) -> None:
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


async def test_a_request_id_stands_in_the_log_at_level_debug(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    publish(tmp_path)
    with caplog.at_level(logging.DEBUG, logger="server"):
        async with serve(tmp_path) as served:
            await served.classify(raw(1, 2, request_id="find me"))
    (record,) = (vars(record) for record in caplog.records if record.msg == "request_answered")
    assert (record["request_id"], record["model"], record["images"]) == ("find me", "tiny", 2)


async def test_the_phases_of_a_call_follow_each_other(tmp_path: Path) -> None:
    publish(tmp_path)
    mirrors = Mirrors(held=True)
    async with serve(tmp_path, load=loading(mirrors)) as served:
        loop = asyncio.get_running_loop()
        sent_s = loop.time()
        first = asyncio.create_task(served.classify(raw(1)))
        await eventually(lambda: bool(mirrors.made) and mirrors.made[0].started.is_set())
        second = asyncio.create_task(served.classify(raw(2)))
        (host,) = {ready.executor for ready in served.server.registry.serving_models()}
        await eventually(lambda: host.queued_rows("tiny/1") == 1)
        until_s = loop.time() + 0.05
        await eventually(lambda: loop.time() > until_s)
        mirrors.made[0].release()
        timings = [(await call).timing for call in (first, second)]
        whole_ms = (loop.time() - sent_s) * 1e3
    for timing in timings:
        phases = timing.decode_ms, timing.queue_ms, timing.compute_ms
        assert min(phases) >= 0
        assert sum(phases) <= timing.total_ms <= whole_ms
    assert timings[0].compute_ms >= 50  # while it was held
    assert timings[1].queue_ms >= 50


# --- what there is ---------------------------------------------------------------------------


async def test_the_listing_has_every_version_with_what_is_wrong_with_it(tmp_path: Path) -> None:
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


async def test_an_unknown_model_or_version_is_not_found_and_told_what_there_is(
    tmp_path: Path,
) -> None:
    publish(tmp_path)
    async with serve(tmp_path) as served:
        cases: list[tuple[dict[str, Any], str]] = [
            ({"model": "tinny"}, "there is no model 'tinny'; there are tiny"),
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
        assert await refused(served, raw(1, model="")) == ("model", "is empty; there are tiny")


async def test_health_of_models_and_the_whole_follows_the_truth(tmp_path: Path) -> None:
    publish(tmp_path)
    mirrors = Mirrors()
    status = HealthCheckResponse

    loader = HeldLoader(mirrors)
    async with serve(tmp_path, load=loader, wait=False) as served:
        stub: Any = health_pb2_grpc.HealthStub(served.channel)
        watches = [stub.Watch(HealthCheckRequest(service=name)) for name in ("", "tiny", "alien")]
        seen = [(await watch.read()).status for watch in watches]
        assert seen == [status.NOT_SERVING, status.NOT_SERVING, status.SERVICE_UNKNOWN]
        early = await failure(served.classify(raw(1)))
        assert early.code() == StatusCode.UNAVAILABLE
        assert early.details() == "model 'tiny' version 1 is loading"

        loader.gate.set()
        for watch in watches[:2]:
            assert (await watch.read()).status == status.SERVING
        for name in ("", CLASSIFIER.full_name, "inference.GRPCInferenceService", "tiny"):
            answer = await stub.Check(HealthCheckRequest(service=name))
            assert answer.status == status.SERVING, name
        error = await failure(stub.Check(HealthCheckRequest(service="alien")))
        assert error.code() == StatusCode.NOT_FOUND


async def test_a_watcher_that_leaves_takes_no_other_along(tmp_path: Path) -> None:
    publish(tmp_path)

    loader = HeldLoader(Mirror)
    async with serve(tmp_path, load=loader, wait=False) as served:
        stub: Any = health_pb2_grpc.HealthStub(served.channel)
        leaving, staying = (stub.Watch(HealthCheckRequest(service="tiny")) for _ in range(2))
        for watch in (leaving, staying):
            assert (await watch.read()).status == HealthCheckResponse.NOT_SERVING
        leaving.cancel()
        await served.call("ListModels", pb.ListModelsRequest())  # the cancellation came before it
        loader.gate.set()
        assert (await staying.read()).status == HealthCheckResponse.SERVING


async def test_reflection_knows_the_contract(tmp_path: Path) -> None:
    publish(tmp_path)
    async with serve(tmp_path) as served:
        stub: Any = reflection_pb2_grpc.ServerReflectionStub(served.channel)
        request = reflection_pb2.ServerReflectionRequest
        stream = stub.ServerReflectionInfo()
        await stream.write(request(list_services=""))
        listed = (await stream.read()).list_services_response.service
        await stream.write(request(file_containing_symbol=CLASSIFIER.full_name))
        files = (await stream.read()).file_descriptor_response.file_descriptor_proto
        await stream.write(request(file_by_filename="no such file"))
        unknown = (await stream.read()).error_response.error_code
        await stream.done_writing()
        assert not await stream.read()  # the end
    assert {service.name for service in listed} == {
        CLASSIFIER.full_name,
        "inference.GRPCInferenceService",
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
    }
    contract = FileDescriptorProto.FromString(files[0])
    assert contract.name == "convserve/v1/classify.proto"
    assert [method.name for method in contract.service[0].method] == [
        method.name for method in CLASSIFIER.methods
    ]
    assert unknown == StatusCode.NOT_FOUND.value[0]


# --- what is wrong with a request ------------------------------------------------------------


async def test_what_is_wrong_with_the_images_is_told_by_field(tmp_path: Path) -> None:
    publish(tmp_path)
    good = raw(1).pixels
    wrong: list[tuple[str, pb.ClassifyRequest]] = [
        ("images", pb.ClassifyRequest(model="tiny")),
        ("images", pb.ClassifyRequest(model="tiny", images=[raw_image(1)] * 257)),
        ("images[0]", pb.ClassifyRequest(model="tiny", images=[pb.Image()])),
        ("images[0].encoded", pb.ClassifyRequest(model="tiny", images=[pb.Image(encoded=b"")])),
        (
            "images[1].encoded",
            pb.ClassifyRequest(model="tiny", images=[raw_image(1), pb.Image(encoded=b"text")]),
        ),
        (
            "images[0].raw.data",
            pb.ClassifyRequest(
                model="tiny",
                images=[pb.Image(raw=pb.RawImage(height=8, width=6, channels=3, data=b"short"))],
            ),
        ),
        (
            "images[0].raw.height",
            pb.ClassifyRequest(model="tiny", images=[pb.Image(raw=pb.RawImage())]),
        ),
        ("pixels", pb.ClassifyRequest(model="tiny", images=[raw_image(1)], pixels=good)),
        ("pixels.count", pb.ClassifyRequest(model="tiny", pixels=pb.RawImages())),
        (
            "pixels.count",
            pb.ClassifyRequest(model="tiny", pixels=pb.RawImages(count=2**32 - 1, data=b"")),
        ),
        (
            "pixels.channels",
            pb.ClassifyRequest(
                model="tiny", pixels=pb.RawImages(count=1, height=1, width=1, channels=4)
            ),
        ),
    ]
    async with serve(tmp_path) as served:
        for field, request in wrong:
            given, description = await refused(served, request)
            assert given == field, description
            assert description
        assert found(await served.classify(raw(1))) == [0]


async def test_text_that_is_not_utf8_is_told_by_field(tmp_path: Path) -> None:
    publish(tmp_path)
    bad_model = b"\x0a\x04\xff\xfe\xfd\xfc"
    bad_id = b"\x0a\x04tiny" + b"\x32\x02\xc3\x28"
    async with serve(tmp_path) as served:
        for field, data in (("model", bad_model), ("request_id", bad_id)):
            assert (await refused(served, data))[0] == field
        error = await failure(served.call("GetModel", bad_model))
        assert (error.code(), violation(error)[0]) == (StatusCode.INVALID_ARGUMENT, "model")


async def test_bytes_that_are_no_message_are_an_invalid_argument(tmp_path: Path) -> None:
    publish(tmp_path)
    async with serve(tmp_path) as served:
        for data in (b"\xff" * 40, b"\x0a\x7f", b"\x1a\x02\x0a\x50", b"\x00\x01"):
            field, description = await refused(served, data)
            assert field == "request"
            assert "convserve.v1.ClassifyRequest" in description


async def test_health_and_reflection_take_garbage_for_what_it_is(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    publish(tmp_path)
    long_name = HealthCheckRequest(service="x" * 5000).SerializeToString()
    async with serve(tmp_path) as served:
        channel: Any = served.channel
        for data in (b"\xff" * 20, b"\x0a\x01\xff", long_name):
            check = channel.unary_unary("/grpc.health.v1.Health/Check")(data, timeout=20)
            watch = channel.unary_stream("/grpc.health.v1.Health/Watch")(data, timeout=20)
            reflect = channel.stream_stream(
                "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
            )(timeout=20)
            await reflect.write(data)
            for call in (check, watch, reflect):
                assert await call.code() == StatusCode.INVALID_ARGUMENT
    assert not caplog.records


async def test_a_message_of_countless_fields_is_refused_before_it_is_parsed(
    tmp_path: Path,
) -> None:
    publish(tmp_path)
    empty_images = b"\x1a\x00" * (1 << 20)
    within_one_image = b"\x1a\x80\x80\x80\x01" + b"\x0a\x00\x12\x00" * (1 << 19)
    unknown_fields = b"\x78\x00" * (1 << 20)
    async with serve(tmp_path) as served:
        for data in (empty_images, within_one_image, unknown_fields):
            field, description = await refused(served, data)
            assert (field, "fields" in description) == ("request", True)


async def test_a_message_too_large_is_resource_exhausted_and_harms_nobody(tmp_path: Path) -> None:
    publish(tmp_path)
    async with serve(tmp_path, max_message_bytes=1 << 16) as served:
        large = raw(1)
        large.pixels.data = bytes(1 << 17)
        error = await failure(served.classify(large))
        assert error.code() == StatusCode.RESOURCE_EXHAUSTED
        assert found(await served.classify(raw(1))) == [0]


async def test_an_unknown_method_is_unimplemented(tmp_path: Path) -> None:
    publish(tmp_path)
    async with serve(tmp_path) as served:
        call: Any = served.channel.unary_unary
        error = await failure(call(SERVICE + "Guess")(b"", timeout=20))
        assert error.code() == StatusCode.UNIMPLEMENTED


@pytest.mark.parametrize(
    "name",
    ["x" * 100_000, "ä" * 50_000, "a\nb\r\0c\x1b[31m", "'\"%0A{}$(x)", "\U0001f40d" * 3000],
    ids=["long", "long and wide", "control characters", "quotes", "snakes"],
)
async def test_no_name_breaks_the_trailers_of_its_error(tmp_path: Path, name: str) -> None:
    publish(tmp_path)
    async with serve(tmp_path) as served:
        error = await failure(served.classify(raw(1, model=name)))
    assert error.code() == StatusCode.NOT_FOUND
    assert error.details() == f"there is no model {name[:80]!r}; there are tiny"


async def test_errors_stay_short_however_much_there_is_to_tell(tmp_path: Path) -> None:
    for number in range(20):
        publish(tmp_path, f"model-{number:02}-{'x' * 50}", classes=2)
    async with serve(tmp_path) as served:
        error = await failure(served.classify(raw(1, model="ä" * 100)))
        other = await failure(served.classify(raw(1, model="")))
    assert error.code() == StatusCode.NOT_FOUND
    assert other.code() == StatusCode.INVALID_ARGUMENT
    assert len(error.details() or "") <= 600
    assert len(violation(other)[1]) <= 600


# --- what is refused, cut short or broken ----------------------------------------------------


async def test_a_refusal_under_load_says_when_to_try_again(tmp_path: Path) -> None:
    publish(tmp_path)
    mirrors = Mirrors(held=True)
    async with serve(
        tmp_path, load=loading(mirrors), queue_rows=4, max_images_per_call=4
    ) as served:
        running = asyncio.create_task(served.classify(raw(1)))
        await eventually(lambda: bool(mirrors.made) and mirrors.made[0].started.is_set())
        waiting = asyncio.create_task(served.classify(raw(1, 2, 3, 4)))
        (host,) = {ready.executor for ready in served.server.registry.serving_models()}
        await eventually(lambda: host.queued_rows("tiny/1") == 4)
        error = await failure(served.classify(raw(1)))
        registry = served.server.metrics.registry
        refusals = value(registry, "convserve_refused_total", model="tiny", reason="overloaded")
        mirrors.made[0].release()
        assert found(await running) == [1]
        assert found(await waiting) == [1, 2, 3, 4]
    assert error.code() == StatusCode.RESOURCE_EXHAUSTED
    retry = RetryInfo()
    assert details(error).details[0].Unpack(retry)
    assert details(error).message == error.details()
    wait_ms = retry.retry_delay.ToMilliseconds()
    pushback = trailers(error)["grpc-retry-pushback-ms"]
    assert 0 < wait_ms <= int(pushback) <= wait_ms + 1
    assert refusals == 1


async def test_requests_in_progress_may_hold_only_so_many_bytes(tmp_path: Path) -> None:
    publish(tmp_path, shape=(64, 64, 3))
    mirrors = Mirrors(held=True)
    bound = 64 * 64 * 3 * 3 // 2  # of one and a half requests
    async with serve(
        tmp_path,
        load=loading(mirrors),
        max_message_bytes=bound,
        max_bytes_in_progress=bound,
    ) as served:
        large = raw(1, shape=(64, 64, 3))
        running = asyncio.create_task(served.classify(large))
        await eventually(lambda: bool(mirrors.made) and mirrors.made[0].started.is_set())
        error = await failure(served.classify(large))
        await served.call("ListModels", pb.ListModelsRequest())  # what is small still gets through
        mirrors.made[0].release()
        assert found(await running) == [1]
        assert found(await served.classify(large)) == [1]
    assert error.code() == StatusCode.RESOURCE_EXHAUSTED
    assert "bytes" in (error.details() or "")


async def test_calls_beyond_the_limit_are_refused_at_once(tmp_path: Path) -> None:
    publish(tmp_path)
    mirrors = Mirrors(held=True)
    async with serve(tmp_path, load=loading(mirrors), max_calls=2) as served:
        stub: Any = health_pb2_grpc.HealthStub(served.channel)
        watch = stub.Watch(HealthCheckRequest())
        await watch.read()
        running = asyncio.create_task(served.classify(raw(1)))
        await eventually(lambda: bool(mirrors.made) and mirrors.made[0].started.is_set())
        for _ in range(10):  # none of those refused makes room for another
            error = await failure(served.classify(raw(2)))
            assert error.code() == StatusCode.RESOURCE_EXHAUSTED
            assert "2 calls are in progress" in str(error.details())
        late = stub.Watch(HealthCheckRequest())
        assert await late.code() == StatusCode.RESOURCE_EXHAUSTED
        hint = {key: value for key, value in await late.trailing_metadata()}
        assert hint["grpc-retry-pushback-ms"] == "100", "as any other call"
        mirrors.made[0].release()
        assert found(await running) == [1]
        assert found(await served.classify(raw(2))) == [2]


async def test_a_call_that_runs_out_of_time_is_counted_by_where_it_was(tmp_path: Path) -> None:
    publish(tmp_path)
    mirrors = Mirrors(held=True)
    async with serve(tmp_path, load=loading(mirrors)) as served:
        error = await failure(served.classify(raw(1), timeout=0.3))
        assert error.code() == StatusCode.DEADLINE_EXCEEDED
        registry = served.server.metrics.registry
        missed = "convserve_deadline_missed_total"
        await eventually(lambda: value(registry, missed, model="tiny", stage="compute") == 1)
        answered = {"model": "tiny", "version": "1", "method": "Classify"}
        assert (
            value(registry, "convserve_requests_total", **answered, code="DEADLINE_EXCEEDED") == 1
        )
        assert value(registry, "convserve_requests_total", **answered, code="CANCELLED") == 0
        mirrors.made[0].release()
        assert found(await served.classify(raw(2))) == [2]
        assert value(registry, "convserve_wasted_compute_seconds_total", model="tiny") > 0


async def test_a_deadline_that_has_passed_already_harms_nobody(tmp_path: Path) -> None:
    publish(tmp_path)
    async with serve(tmp_path, load=loading(Mirror)) as served:
        errors = await asyncio.gather(
            *(failure(served.classify(raw(1), timeout=1e-6)) for _ in range(20))
        )
        assert {error.code() for error in errors} == {StatusCode.DEADLINE_EXCEEDED}
        assert found(await served.classify(raw(2))) == [2]


async def test_a_caller_that_leaves_is_counted_and_costs_nothing_more(tmp_path: Path) -> None:
    publish(tmp_path)
    mirrors = Mirrors(held=True)
    async with serve(tmp_path, load=loading(mirrors)) as served:
        running = asyncio.create_task(served.classify(raw(1)))
        await eventually(lambda: bool(mirrors.made) and mirrors.made[0].started.is_set())
        leaving = asyncio.create_task(served.classify(raw(2, 3)))
        (host,) = {ready.executor for ready in served.server.registry.serving_models()}
        await eventually(lambda: host.queued_rows("tiny/1") == 2)
        leaving.cancel()
        registry = served.server.metrics.registry
        counted = {"model": "tiny", "version": "1", "method": "Classify", "code": "CANCELLED"}
        await eventually(lambda: value(registry, "convserve_requests_total", **counted) == 1)
        assert host.queued_rows("tiny/1") == 0
        mirrors.made[0].release()
        assert found(await running) == [1]
        assert list((await served.classify(raw(4))).timing.batch_rows) == [1]
        assert value(registry, "convserve_batch_rows_sum", model="tiny") == 2


async def test_a_broken_batch_is_internal_without_details_and_the_next_one_runs(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    publish(tmp_path)
    mirrors = Mirrors()
    async with serve(tmp_path, load=loading(mirrors)) as served:
        for reason in (errors.EngineFailure("secret of the engine"), OSError("secret of the disk")):
            mirrors.made[0].failure = reason
            error = await failure(served.classify(raw(1)))
            assert error.code() == StatusCode.INTERNAL
            assert error.details() == "the engine failed; the request is not to blame"
        mirrors.made[0].failure = None
        assert found(await served.classify(raw(1))) == [1]
    assert "secret of the engine" in str([vars(record) for record in caplog.records])
    assert len(caplog.records) == 2  # one a batch, none a call


async def test_a_mistake_of_ours_is_internal_without_details_and_logged_in_full(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    publish(tmp_path)

    class Wild(Mirror):
        """Finds classes that have no label."""

        def _answer(self, pixels: Any) -> Any:
            outputs = super()._answer(pixels)
            return outputs._replace(classes=outputs.classes + 1000)

    async with serve(tmp_path, load=loading(Wild)) as served:
        error = await failure(served.classify(raw(1)))
        registry = served.server.metrics.registry
        counted = {"model": "tiny", "version": "1", "method": "Classify", "code": "INTERNAL"}
        assert value(registry, "convserve_requests_total", **counted) == 1
    assert (error.code(), error.details()) == (StatusCode.INTERNAL, "internal error")
    (record,) = (record for record in caplog.records if record.msg == "call_failed")
    assert record.exc_info is not None
    assert record.exc_info[0] is IndexError


async def test_a_stopping_server_ends_the_streams_that_would_never_end(tmp_path: Path) -> None:
    publish(tmp_path)
    loop = asyncio.get_running_loop()
    async with AsyncExitStack() as server:
        served = await server.enter_async_context(serve(tmp_path, grace_s=40.0))
        async with grpc.aio.insecure_channel(served.target) as channel:
            stub: Any = health_pb2_grpc.HealthStub(channel)
            watch = stub.Watch(HealthCheckRequest())
            assert (await watch.read()).status == HealthCheckResponse.SERVING
            stub = reflection_pb2_grpc.ServerReflectionStub(channel)
            stream = stub.ServerReflectionInfo()
            await stream.write(reflection_pb2.ServerReflectionRequest(list_services=""))
            await stream.read()
            began_s = loop.time()
            await server.aclose()
            assert loop.time() - began_s < 20
            assert (await watch.read()).status == HealthCheckResponse.NOT_SERVING
            assert [await watch.code(), await stream.code()] == [StatusCode.OK, StatusCode.OK]


async def test_a_watcher_told_of_one_status_while_the_next_came_is_told_of_that_too() -> None:
    health = Health(lambda name: True)
    statuses = health.watch(HealthCheckRequest())
    assert (await anext(statuses)).status == HealthCheckResponse.SERVING
    health.stop()  # the watch is still busy sending
    told = [response.status async for response in statuses]
    assert told == [HealthCheckResponse.NOT_SERVING]


@pytest.mark.parametrize("priority", [10, 2**32 - 1])
async def test_a_priority_beyond_nine_is_told_by_field(tmp_path: Path, priority: int) -> None:
    publish(tmp_path)
    async with serve(tmp_path) as served:
        await served.classify(raw(0, priority=9))
        with pytest.raises(grpc.aio.AioRpcError, match=f"priority: is {priority}; 0 ") as error:
            await served.classify(raw(0, priority=priority))
        assert error.value.code() == grpc.StatusCode.INVALID_ARGUMENT
