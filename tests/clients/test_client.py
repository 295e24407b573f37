"""The asyncio client sends what the caller gives and returns what the server answers."""

import asyncio
import math
from pathlib import Path

import numpy as np
import pytest
from grpc_health.v1 import health_pb2

from convserve_client import (
    AsyncClient,
    ClassifierError,
    DeadlineExceeded,
    Image,
    InvalidInput,
    ModelNotFound,
)
from convserve_client.stubs import classify_pb2 as pb
from tests.support.scripted_classifier import (
    EXPECTED_ANSWER,
    SMALL,
    Context,
    ScriptedClassifier,
    Silence,
    answer,
    serving,
)


async def test_an_answer_carries_every_field_of_the_contract() -> None:
    async with serving(ScriptedClassifier()) as target, AsyncClient(target) as client:
        assert await client.classify(b"image", model="small") == EXPECTED_ANSWER


async def test_every_form_of_image_is_sent_as_the_contract_says(tmp_path: Path) -> None:
    service = ScriptedClassifier()
    colours = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
    grey = np.arange(6, dtype=np.uint8).reshape(2, 3)
    path = tmp_path / "image.png"
    path.write_bytes(b"in a file")
    images: list[Image] = [b"bytes", path, colours, grey, colours[:, ::-1]]
    async with serving(service) as target, AsyncClient(target) as client:
        await client.classify(images, model="small", version=2, top_k=1, request_id="r")
    (request,) = service.requests
    assert (request.model, request.version, request.top_k, request.request_id) == (
        "small",
        2,
        1,
        "r",
    )
    assert [image.encoded for image in request.images[:2]] == [b"bytes", b"in a file"]
    assert [
        (i.raw.height, i.raw.width, i.raw.channels, i.raw.data) for i in request.images[2:]
    ] == [
        (2, 3, 3, bytes(range(18))),
        (2, 3, 1, bytes(range(6))),
        (2, 3, 3, colours[:, ::-1].tobytes()),
    ]


async def test_an_array_of_images_is_sent_in_one_field() -> None:
    service = ScriptedClassifier()
    pixels = np.arange(2 * 4 * 3 * 1, dtype=np.uint8).reshape(2, 4, 3, 1)
    async with serving(service) as target, AsyncClient(target) as client:
        await client.classify(pixels, model="small")
    assert service.requests == [
        pb.ClassifyRequest(
            model="small",
            top_k=5,
            pixels=pb.RawImages(count=2, height=4, width=3, channels=1, data=bytes(range(24))),
        )
    ]


@pytest.mark.parametrize("alone", [b"bytes", np.zeros((2, 3, 3), np.uint8), Path(__file__)])
async def test_one_image_needs_no_list(alone: Image) -> None:
    service = ScriptedClassifier()
    async with serving(service) as target, AsyncClient(target) as client:
        await client.classify(alone, model="small")
    assert len(service.requests[0].images) == 1


@pytest.mark.parametrize(
    ("image", "field", "given"),
    [
        (np.zeros((2, 3, 3), np.float32), "images[0]", "float32"),
        (np.zeros((1, 2, 3, 3), np.int64), "pixels", "int64"),
        (np.zeros(5, np.uint8), "images[0]", "(5,)"),
    ],
)
async def test_wrong_pixels_are_rejected_before_sending(
    image: Image, field: str, given: str, unused_target: str
) -> None:
    async with AsyncClient(unused_target) as client:
        with pytest.raises(InvalidInput) as refused:
            await client.classify(image, model="small")
    (violation,) = refused.value.violations
    assert violation.field == field
    assert given in violation.description


async def test_values_that_do_not_fit_the_message_are_invalid_input(unused_target: str) -> None:
    async with AsyncClient(unused_target) as client:
        with pytest.raises(InvalidInput):
            await client.classify(b"", model="small", top_k=-1)
        with pytest.raises(InvalidInput):
            await client.classify(b"", model="half a character: \ud800")
        with pytest.raises(InvalidInput):
            await client.get_model("small", 2**63)
        with pytest.raises(TypeError, match="it may be"):
            await client.classify(["cat.jpg"], model="small")  # type: ignore[list-item]


async def test_models_have_every_field_of_the_contract() -> None:
    other = pb.Model(name="other", version=1, state=pb.Model.FAILED, reason="it is corrupt")
    service = ScriptedClassifier(models=(SMALL, other))
    async with serving(service) as target, AsyncClient(target) as client:
        small, failed = await client.list_models()
        assert small == await client.get_model("small")
        with pytest.raises(ModelNotFound, match="nosuch"):
            await client.get_model("nosuch")
    assert (small.state, small.is_ready, small.input_shape) == ("READY", True, (8, 6, 1))
    assert (small.labels, small.top_k, small.max_batch) == (("cat", "dog"), 2, 4)
    assert (failed.state, failed.is_ready, failed.reason) == ("FAILED", False, "it is corrupt")


async def test_version_label_and_priority_are_sent() -> None:
    service = ScriptedClassifier()
    async with serving(service) as target, AsyncClient(target) as client:
        await client.classify(b"", model="small", label="canary", priority=9)
        await client.classify(b"", model="small", version=3)
        with pytest.raises(InvalidInput, match="out of range"):
            await client.classify(b"", model="small", priority=-1)
    found = [(r.label, r.version, r.priority) for r in service.requests]
    assert found == [("canary", 0, 9), ("", 3, 0)]


@pytest.mark.parametrize("timeout_s", [0, -1, math.inf, math.nan])
async def test_every_call_needs_a_finite_timeout(timeout_s: float, unused_target: str) -> None:
    with pytest.raises(ValueError, match="every call ends"):
        AsyncClient(unused_target, timeout_s=timeout_s)
    async with AsyncClient(unused_target) as client:
        with pytest.raises(ValueError, match="every call ends"):
            await client.classify(b"", model="small", timeout_s=timeout_s)


async def test_a_call_to_a_silent_server_ends_at_its_deadline() -> None:
    silence = Silence()
    async with serving(ScriptedClassifier(silence)) as target, AsyncClient(target) as client:
        with pytest.raises(DeadlineExceeded):
            await client.classify(b"", model="small", timeout_s=1)
        await silence.left.wait()


async def test_cancelling_the_caller_cancels_the_call_on_the_server() -> None:
    silence = Silence()
    async with (
        serving(ScriptedClassifier(silence, answer)) as target,
        AsyncClient(target) as client,
    ):
        call = asyncio.create_task(client.classify(b"", model="small"))
        await silence.entered.wait()
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        await silence.left.wait()
        assert await client.classify(b"", model="small") == EXPECTED_ANSWER


async def test_closing_fails_calls_in_progress_with_an_error_not_a_cancellation() -> None:
    silence = Silence()
    async with serving(ScriptedClassifier(silence)) as target:
        client = AsyncClient(target)
        call = asyncio.create_task(client.classify(b"", model="small"))
        await silence.entered.wait()
        await client.close()
        await client.close()
        with pytest.raises(ClassifierError, match="closed"):
            await call
        with pytest.raises(RuntimeError, match="closed"):
            await client.list_models()


async def test_all_calls_share_one_connection() -> None:
    peers: set[str] = set()

    async def note_peer(request: pb.ClassifyRequest, context: Context) -> pb.ClassifyResponse:
        peers.add(context.peer())
        return await answer(request, context)

    async with serving(ScriptedClassifier(note_peer)) as target, AsyncClient(target) as client:
        await asyncio.gather(*(client.classify(b"", model="small") for _ in range(20)))
    assert len(peers) == 1


async def test_health_is_reported_for_each_model_and_for_the_server() -> None:
    service = ScriptedClassifier()
    await service.health.set("", health_pb2.HealthCheckResponse.SERVING)
    await service.health.set("small", health_pb2.HealthCheckResponse.NOT_SERVING)
    async with serving(service) as target, AsyncClient(target) as client:
        assert await client.is_serving()
        assert not await client.is_serving("small")
        with pytest.raises(ModelNotFound):
            await client.is_serving("nosuch")


async def test_wait_ready_returns_when_the_model_is_ready() -> None:
    service = ScriptedClassifier()
    await service.health.set("small", health_pb2.HealthCheckResponse.NOT_SERVING)
    async with serving(service) as target, AsyncClient(target) as client:
        waiting = asyncio.create_task(client.wait_ready(model="small"))
        assert not await client.is_serving("small")
        assert not waiting.done()
        await service.health.set("small", health_pb2.HealthCheckResponse.SERVING)
        await waiting


async def test_wait_ready_works_before_the_server_starts(unused_target: str) -> None:
    service = ScriptedClassifier()
    await service.health.set("", health_pb2.HealthCheckResponse.SERVING)
    async with AsyncClient(unused_target) as client:
        with pytest.raises(DeadlineExceeded, match="Connection refused"):
            await client.wait_ready(0.1)
        waiting = asyncio.create_task(client.wait_ready(20))
        async with serving(service, port=int(unused_target.rpartition(":")[2])):
            await waiting


async def test_wait_ready_reports_the_last_status_at_its_timeout() -> None:
    async with serving(ScriptedClassifier()) as target, AsyncClient(target) as client:
        with pytest.raises(DeadlineExceeded, match="nosuch.*SERVICE_UNKNOWN"):
            await client.wait_ready(1, model="nosuch")
