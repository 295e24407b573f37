"""Invalid requests are refused with the field, and harm no other request."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc import StatusCode
from grpc_health.v1.health_pb2 import HealthCheckRequest

from server.api.stubs import classify_pb2 as pb
from tests.api.classify_calls import best, failure, raw_image, refused, violation
from tests.support.serving import (
    SERVICE,
    publish,
    raw,
    serve,
)


async def test_an_error_in_the_images_names_the_field(tmp_path: Path) -> None:
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
        assert best(await served.classify(raw(1))) == [0]


async def test_text_that_is_not_utf8_names_the_field(tmp_path: Path) -> None:
    publish(tmp_path)
    bad_model = b"\x0a\x04\xff\xfe\xfd\xfc"
    bad_id = b"\x0a\x04tiny" + b"\x32\x02\xc3\x28"
    async with serve(tmp_path) as served:
        for field, data in (("model", bad_model), ("request_id", bad_id)):
            assert (await refused(served, data))[0] == field
        error = await failure(served.call("GetModel", bad_model))
        assert (error.code(), violation(error)[0]) == (StatusCode.INVALID_ARGUMENT, "model")


async def test_bytes_that_are_not_a_message_are_an_invalid_argument(tmp_path: Path) -> None:
    publish(tmp_path)
    async with serve(tmp_path) as served:
        for data in (b"\xff" * 40, b"\x0a\x7f", b"\x1a\x02\x0a\x50", b"\x00\x01"):
            field, description = await refused(served, data)
            assert field == "request"
            assert "convserve.v1.ClassifyRequest" in description


async def test_health_and_reflection_refuse_garbage(
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


async def test_a_message_with_too_many_fields_is_refused(
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


async def test_a_message_above_the_size_limit_is_resource_exhausted(tmp_path: Path) -> None:
    publish(tmp_path)
    async with serve(tmp_path, max_message_bytes=1 << 16) as served:
        large = raw(1)
        large.pixels.data = bytes(1 << 17)
        error = await failure(served.classify(large))
        assert error.code() == StatusCode.RESOURCE_EXHAUSTED
        assert best(await served.classify(raw(1))) == [0]


async def test_an_unknown_method_is_unimplemented(tmp_path: Path) -> None:
    publish(tmp_path)
    async with serve(tmp_path) as served:
        call: Any = served.channel.unary_unary
        error = await failure(call(SERVICE + "Guess")(b"", timeout=20))
        assert error.code() == StatusCode.UNIMPLEMENTED


@pytest.mark.parametrize("priority", [10, 2**32 - 1])
async def test_a_priority_above_nine_names_the_field(tmp_path: Path, priority: int) -> None:
    publish(tmp_path)
    async with serve(tmp_path) as served:
        await served.classify(raw(0, priority=9))
        with pytest.raises(grpc.aio.AioRpcError, match=f"priority: is {priority}; 0 ") as error:
            await served.classify(raw(0, priority=priority))
        assert error.value.code() == grpc.StatusCode.INVALID_ARGUMENT
