"""The client against a real server on a real socket: what it sends, says and repeats."""

import asyncio
import json
import math
import random
import socket
import sys
import threading
from pathlib import Path

import grpc
import numpy as np
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2
from hypothesis import given
from hypothesis import strategies as st

from convserve_client import classify
from convserve_client import client as client_module
from convserve_client.client import (
    ERRORS,
    NO_RETRY,
    Answer,
    AsyncClient,
    ClassifierError,
    Client,
    DeadlineExceeded,
    EngineFailure,
    Image,
    InvalidInput,
    ModelNotFound,
    ModelNotReady,
    Overloaded,
    Prediction,
    RetryBudget,
    RetryPolicy,
    ServerUnreachable,
    Timing,
    Violation,
)
from convserve_client.stubs import classify_pb2 as pb
from tests.support.scripted_classifier import (
    ANSWER,
    SMALL,
    Context,
    ScriptedClassifier,
    Silence,
    answer,
    refuse,
    retry_info,
    serving,
)

ROOT = Path(__file__).resolve().parent.parent.parent
UNAVAILABLE = grpc.StatusCode.UNAVAILABLE
EXHAUSTED = grpc.StatusCode.RESOURCE_EXHAUSTED
ANSWERED = Answer(
    results=((Prediction(1, "dog", 0.75), Prediction(0, "cat", 0.25)),),
    model="small",
    version=3,
    trained=True,
    timing=Timing(decode_ms=1, queue_ms=2, compute_ms=4, total_ms=8, batch_rows=(2, 3)),
    request_id="mine",
)


class VirtualTime:
    """A clock that only sleeping moves."""

    def __init__(self) -> None:
        self.now_s = 1000.0
        self.slept_s: list[float] = []

    def __call__(self) -> float:
        return self.now_s

    async def sleep(self, delay_s: float) -> None:
        self.slept_s.append(delay_s)
        self.now_s += delay_s


def retrying(target: str, time: VirtualTime, **policy: float) -> AsyncClient:
    return AsyncClient(
        target,
        retry=RetryPolicy(**policy),  # type: ignore[arg-type]
        clock=time,
        sleep=time.sleep,
        rng=random.Random(1),
    )


@pytest.fixture
def nobody() -> str:
    """An address where nothing listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{taken.getsockname()[1]}"


async def test_an_answer_carries_every_field_of_the_contract() -> None:
    async with serving(ScriptedClassifier()) as target, AsyncClient(target) as client:
        assert await client.classify(b"image", model="small") == ANSWERED


async def test_every_kind_of_image_arrives_as_the_contract_says(tmp_path: Path) -> None:
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


async def test_an_array_of_images_goes_as_one_field() -> None:
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
    ("image", "field", "given_"),
    [
        (np.zeros((2, 3, 3), np.float32), "images[0]", "float32"),
        (np.zeros((1, 2, 3, 3), np.int64), "pixels", "int64"),
        (np.zeros(5, np.uint8), "images[0]", "(5,)"),
    ],
)
async def test_pixels_that_can_not_be_right_are_refused_before_they_are_sent(
    image: Image, field: str, given_: str, nobody: str
) -> None:
    async with AsyncClient(nobody) as client:
        with pytest.raises(InvalidInput) as refused:
            await client.classify(image, model="small")
    (violation,) = refused.value.violations
    assert violation.field == field
    assert given_ in violation.description


async def test_what_the_message_can_not_hold_is_invalid_input(nobody: str) -> None:
    async with AsyncClient(nobody) as client:
        with pytest.raises(InvalidInput):
            await client.classify(b"", model="small", top_k=-1)
        with pytest.raises(InvalidInput):
            await client.classify(b"", model="half a character: \ud800")
        with pytest.raises(InvalidInput):
            await client.get_model("small", 2**63)
        with pytest.raises(TypeError, match="it may be"):
            await client.classify(["cat.jpg"], model="small")  # type: ignore[list-item]


async def test_models_come_with_all_they_are() -> None:
    other = pb.Model(name="other", version=1, state=pb.Model.FAILED, reason="it is corrupt")
    service = ScriptedClassifier(models=(SMALL, other))
    async with serving(service) as target, AsyncClient(target) as client:
        small, failed = await client.list_models()
        assert small == await client.get_model("small")
        with pytest.raises(ModelNotFound, match="nosuch"):
            await client.get_model("nosuch")
    assert (small.state, small.ready, small.input_shape) == ("READY", True, (8, 6, 1))
    assert (small.labels, small.top_k, small.max_batch) == (("cat", "dog"), 2, 4)
    assert (failed.state, failed.ready, failed.reason) == ("FAILED", False, "it is corrupt")


@pytest.mark.parametrize("code", [c for c in grpc.StatusCode if c is not grpc.StatusCode.OK])
async def test_every_status_becomes_its_exception(code: grpc.StatusCode) -> None:
    async with (
        serving(ScriptedClassifier(refuse(code, "so it is"))) as target,
        AsyncClient(target, retry=NO_RETRY) as client,
    ):
        with pytest.raises(ClassifierError, match="so it is") as failure:
            await client.classify(b"", model="small")
    assert type(failure.value) is ERRORS.get(code, ClassifierError)
    assert failure.value.code is code


def test_every_exception_is_somebodys() -> None:
    assert set(ClassifierError.__subclasses__()) == {*ERRORS.values(), ServerUnreachable}


def test_the_tree_at_the_top_names_every_exception() -> None:
    tree = client_module.__doc__ or ""
    assert all(f"+-- {error.__name__} " in tree for error in ClassifierError.__subclasses__())


async def test_invalid_input_names_the_fields() -> None:
    violations = [
        error_details_pb2.BadRequest.FieldViolation(field="images[3].raw", description="too short"),
        error_details_pb2.BadRequest.FieldViolation(field="top_k", description="too large"),
    ]
    details = error_details_pb2.BadRequest(field_violations=violations)
    service = ScriptedClassifier(refuse(grpc.StatusCode.INVALID_ARGUMENT, "bad", details))
    async with serving(service) as target, AsyncClient(target) as client:
        with pytest.raises(InvalidInput) as refused:
            await client.classify(b"", model="small")
    assert refused.value.violations == (
        Violation("images[3].raw", "too short"),
        Violation("top_k", "too large"),
    )


@pytest.mark.parametrize(
    "garbled",
    [
        b"\xff\xff\xff",  # no google.rpc.Status
        # one whose only detail says RetryInfo and is none
        b"\x1a\x32\x0a\x28type.googleapis.com/google.rpc.RetryInfo\x12\x06\xff\xff\xff\xff\xff\xff",
    ],
)
async def test_garbled_details_do_not_hide_the_error(garbled: bytes) -> None:
    step = refuse(EXHAUSTED, "full", trailing=(("grpc-status-details-bin", garbled),))
    async with serving(ScriptedClassifier(step)) as target, AsyncClient(target) as client:
        with pytest.raises(Overloaded, match="full") as refused:
            await client.classify(b"", model="small")
    assert refused.value.retry_after_s is None


async def test_a_message_over_the_servers_limit_is_invalid_input() -> None:
    service = ScriptedClassifier()
    async with (
        serving(service, max_message_bytes=1000) as target,
        AsyncClient(target) as client,
    ):
        with pytest.raises(InvalidInput, match="larger than max"):
            await client.classify(bytes(2000), model="small")
    assert service.requests == []


@pytest.mark.parametrize(
    "message",
    [
        "request: is 75,264,033 bytes; at most 67,108,864 are allowed",
        "request: is more than 67,108,864 bytes when decompressed; at most 67,108,864 are allowed",
        "metadata: is 20,000 bytes; at most 16,384 are allowed",
    ],
)
async def test_what_is_too_large_for_the_server_is_invalid_input(message: str) -> None:
    service = ScriptedClassifier(refuse(EXHAUSTED, message))
    async with serving(service) as target, AsyncClient(target) as client:
        with pytest.raises(InvalidInput, match="allowed") as refused:
            await client.classify(b"", model="small")
    assert refused.value.retry_after_s is None
    assert len(service.requests) == 1, "it would be as large the next time"


async def test_a_call_says_who_is_to_answer_and_how_urgent_it_is() -> None:
    service = ScriptedClassifier()
    async with serving(service) as target, AsyncClient(target) as client:
        await client.classify(b"", model="small", label="canary", priority=9)
        await client.classify(b"", model="small", version=3)
        with pytest.raises(InvalidInput, match="out of range"):
            await client.classify(b"", model="small", priority=-1)
    found = [(r.label, r.version, r.priority) for r in service.requests]
    assert found == [("canary", 0, 9), ("", 3, 0)]


async def test_a_message_over_the_clients_limit_is_invalid_input() -> None:
    service = ScriptedClassifier()
    async with (
        serving(service) as target,
        AsyncClient(target, max_message_bytes=1000) as client,
    ):
        with pytest.raises(InvalidInput, match="larger than max"):
            await client.classify(bytes(2000), model="small")
    assert service.requests == []


async def test_a_target_where_nobody_listens_is_unreachable(nobody: str) -> None:
    async with AsyncClient(nobody, retry=NO_RETRY) as client:
        with pytest.raises(ServerUnreachable) as failure:
            await client.classify(b"", model="small")
    assert failure.value.code is UNAVAILABLE


async def test_a_server_that_hangs_up_is_unreachable() -> None:
    async def hang_up(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    async with await asyncio.start_server(hang_up, "127.0.0.1", 0) as server:
        host, port = server.sockets[0].getsockname()
        async with AsyncClient(f"{host}:{port}", retry=NO_RETRY) as client:
            with pytest.raises(ServerUnreachable):
                await client.classify(b"", model="small")


async def test_a_refused_call_is_repeated_no_sooner_than_the_server_asks() -> None:
    refused = refuse(EXHAUSTED, "full", retry_info(1.5))
    service = ScriptedClassifier(refused, refused, answer)
    time = VirtualTime()
    async with serving(service) as target, retrying(target, time) as client:
        assert await client.classify(b"image", model="small") == ANSWERED
    assert len(service.requests) == 3
    assert service.requests[0] == service.requests[2]
    assert len(time.slept_s) == 2
    assert all(1.5 <= slept_s <= 1.5 + 2.0 for slept_s in time.slept_s)


async def test_pushback_is_a_hint_too() -> None:
    refused = refuse(EXHAUSTED, "full", trailing=(("grpc-retry-pushback-ms", "2500"),))
    time = VirtualTime()
    async with (
        serving(ScriptedClassifier(refused, answer)) as target,
        retrying(target, time) as client,
    ):
        assert await client.classify(b"", model="small") == ANSWERED
    assert time.slept_s[0] >= 2.5


async def test_of_two_hints_the_longer_one_counts() -> None:
    refused = refuse(
        EXHAUSTED, "full", retry_info(3), trailing=(("grpc-retry-pushback-ms", "100"),)
    )
    time = VirtualTime()
    async with (
        serving(ScriptedClassifier(refused, answer)) as target,
        retrying(target, time) as client,
    ):
        assert await client.classify(b"", model="small") == ANSWERED
    assert time.slept_s[0] >= 3


@pytest.mark.parametrize("pushback", ["-1", "soon", "1e3", ""])
async def test_a_server_that_asks_for_no_retry_gets_none(pushback: str) -> None:
    refused = refuse(UNAVAILABLE, "leave", trailing=(("grpc-retry-pushback-ms", pushback),))
    service = ScriptedClassifier(refused)
    time = VirtualTime()
    async with serving(service) as target, retrying(target, time) as client:
        with pytest.raises(ModelNotReady) as failure:
            await client.classify(b"", model="small")
    assert failure.value.retry_after_s == math.inf
    assert (len(service.requests), time.slept_s) == (1, [])


async def test_unavailable_is_repeated_without_a_hint() -> None:
    service = ScriptedClassifier(refuse(UNAVAILABLE), answer)
    time = VirtualTime()
    async with serving(service) as target, retrying(target, time) as client:
        assert await client.classify(b"", model="small") == ANSWERED
    assert len(time.slept_s) == 1


@pytest.mark.parametrize(
    "code", [c for c in grpc.StatusCode if c not in (grpc.StatusCode.OK, UNAVAILABLE)]
)
async def test_nothing_else_is_repeated(code: grpc.StatusCode) -> None:
    """RESOURCE_EXHAUSTED is among them: without a hint it need not be about load."""
    service = ScriptedClassifier(refuse(code))
    time = VirtualTime()
    async with serving(service) as target, retrying(target, time) as client:
        with pytest.raises(ClassifierError):
            await client.classify(b"", model="small")
    assert (len(service.requests), time.slept_s) == (1, [])


async def test_a_hint_beyond_the_deadline_is_an_error_at_once() -> None:
    service = ScriptedClassifier(refuse(EXHAUSTED, "full", retry_info(5.5)))
    time = VirtualTime()
    async with serving(service) as target, retrying(target, time) as client:
        with pytest.raises(Overloaded, match="full") as refused:
            await client.classify(b"", model="small", timeout_s=5)
    assert refused.value.retry_after_s == 5.5
    assert (len(service.requests), time.slept_s) == (1, [])


async def test_an_attempt_gets_only_the_time_that_is_left() -> None:
    refused = refuse(EXHAUSTED, "full", retry_info(3))
    service = ScriptedClassifier(refused, refused, answer)
    time = VirtualTime()
    async with (
        serving(service) as target,
        retrying(target, time, max_backoff_s=0.5) as client,
    ):
        await client.classify(b"", model="small", timeout_s=9)
    assert len(service.time_left_s) == 3
    for left_s, most_s in zip(service.time_left_s, (9, 6, 3), strict=True):
        assert left_s <= 1.01 * most_s  # gRPC sends it rounded up, by 1 % at most


async def test_retries_never_go_past_the_deadline() -> None:
    service = ScriptedClassifier(refuse(UNAVAILABLE))
    time = VirtualTime()
    async with (
        serving(service) as target,
        retrying(
            target, time, attempts=100, first_backoff_s=1, max_backoff_s=1, budget_burst=100
        ) as client,
    ):
        with pytest.raises(ModelNotReady):
            await client.classify(b"", model="small", timeout_s=7)
    assert 0 < sum(time.slept_s) < 7


async def test_a_call_makes_no_more_attempts_than_allowed() -> None:
    service = ScriptedClassifier(refuse(UNAVAILABLE))
    async with serving(service) as target, retrying(target, VirtualTime(), attempts=3) as client:
        with pytest.raises(ModelNotReady):
            await client.classify(b"", model="small")
    assert len(service.requests) == 3


async def test_retries_of_all_calls_stay_within_the_budget() -> None:
    service = ScriptedClassifier(refuse(UNAVAILABLE))
    async with (
        serving(service) as target,
        retrying(target, VirtualTime(), budget_burst=5, budget_ratio=0.1) as client,
    ):
        for _ in range(100):
            with pytest.raises(ModelNotReady):
                await client.classify(b"", model="small", timeout_s=1000)
    assert len(service.requests) == 100 + 5 + 10


@given(st.lists(st.booleans()), st.floats(0, 1), st.integers(0, 20))
def test_a_budget_never_gives_more_than_its_burst_and_its_share(
    wanted: list[bool], ratio: float, burst: int
) -> None:
    budget = RetryBudget(ratio, burst)
    retries = 0
    for calls, retry in enumerate(wanted, start=1):
        budget.deposit()
        retries += retry and budget.withdraw()
        assert retries <= burst + round(ratio, 3) * calls + 1e-9


@given(st.integers(1, 100), st.one_of(st.none(), st.floats(0, 1e6)), st.integers(0, 2**32))
def test_a_wait_is_never_below_the_hint_nor_far_above_it(
    attempt: int, hint_s: float | None, seed: int
) -> None:
    policy = RetryPolicy(attempts=100, first_backoff_s=0.1, max_backoff_s=5)
    wait_s = policy.wait_s(attempt, hint_s, random.Random(seed))
    ceiling_s = min(5, 0.1 * 2 ** (attempt - 1))
    assert (hint_s or 0) <= wait_s <= (hint_s or 0) + ceiling_s


def test_waits_use_the_whole_range() -> None:
    rng = random.Random(1)
    waits = [
        RetryPolicy(first_backoff_s=1, max_backoff_s=1).wait_s(1, None, rng) for _ in range(500)
    ]
    assert min(waits) < 0.02
    assert max(waits) > 0.98


@pytest.mark.parametrize(
    "wrong",
    [
        {"attempts": 0},
        {"first_backoff_s": 0},
        {"first_backoff_s": 3},
        {"max_backoff_s": math.inf},
        {"budget_ratio": 1.5},
        {"budget_burst": -1},
    ],
)
def test_a_policy_that_makes_no_sense_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        RetryPolicy(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("timeout_s", [0, -1, math.inf, math.nan])
async def test_there_is_no_call_without_a_deadline(timeout_s: float, nobody: str) -> None:
    with pytest.raises(ValueError, match="every call ends"):
        AsyncClient(nobody, timeout_s=timeout_s)
    async with AsyncClient(nobody) as client:
        with pytest.raises(ValueError, match="every call ends"):
            await client.classify(b"", model="small", timeout_s=timeout_s)


async def test_a_server_that_never_answers_costs_the_deadline_and_no_more() -> None:
    silence = Silence()
    async with serving(ScriptedClassifier(silence)) as target, AsyncClient(target) as client:
        with pytest.raises(DeadlineExceeded):
            await client.classify(b"", model="small", timeout_s=1)
        await silence.left.wait()


async def test_time_spent_before_sending_counts(nobody: str) -> None:
    time = VirtualTime()

    class SlowDisk:
        def __fspath__(self) -> str:
            time.now_s += 6
            return __file__

    async with retrying(nobody, time) as client:
        with pytest.raises(DeadlineExceeded, match="before"):
            await client.classify(SlowDisk(), model="small", timeout_s=5)


async def test_a_cancelled_caller_cancels_its_call_on_the_server() -> None:
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
        assert await client.classify(b"", model="small") == ANSWERED


async def test_closing_ends_calls_under_way_with_an_error_and_not_with_a_cancellation() -> None:
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


async def test_one_channel_serves_many_calls() -> None:
    peers: set[str] = set()

    async def note_peer(request: pb.ClassifyRequest, context: Context) -> pb.ClassifyResponse:
        peers.add(context.peer())
        return await answer(request, context)

    async with serving(ScriptedClassifier(note_peer)) as target, AsyncClient(target) as client:
        await asyncio.gather(*(client.classify(b"", model="small") for _ in range(20)))
    assert len(peers) == 1


async def test_health_is_told_per_model_and_whole() -> None:
    service = ScriptedClassifier()
    await service.health.set("", health_pb2.HealthCheckResponse.SERVING)
    await service.health.set("small", health_pb2.HealthCheckResponse.NOT_SERVING)
    async with serving(service) as target, AsyncClient(target) as client:
        assert await client.is_serving()
        assert not await client.is_serving("small")
        with pytest.raises(ModelNotFound):
            await client.is_serving("nosuch")


async def test_waiting_ends_when_the_model_is_ready() -> None:
    service = ScriptedClassifier()
    await service.health.set("small", health_pb2.HealthCheckResponse.NOT_SERVING)
    async with serving(service) as target, AsyncClient(target) as client:
        waiting = asyncio.create_task(client.wait_ready(model="small"))
        assert not await client.is_serving("small")
        assert not waiting.done()
        await service.health.set("small", health_pb2.HealthCheckResponse.SERVING)
        await waiting


async def test_a_server_may_be_waited_for_before_it_is_there(nobody: str) -> None:
    service = ScriptedClassifier()
    await service.health.set("", health_pb2.HealthCheckResponse.SERVING)
    async with AsyncClient(nobody) as client:
        with pytest.raises(DeadlineExceeded, match="no connection"):
            await client.wait_ready(0.1)
        waiting = asyncio.create_task(client.wait_ready(20))
        async with serving(service, port=int(nobody.rpartition(":")[2])):
            await waiting


async def test_waiting_in_vain_says_what_was_seen() -> None:
    async with serving(ScriptedClassifier()) as target, AsyncClient(target) as client:
        with pytest.raises(DeadlineExceeded, match="nosuch.*SERVICE_UNKNOWN"):
            await client.wait_ready(1, model="nosuch")


async def test_many_threads_may_share_one_sync_client() -> None:
    service = ScriptedClassifier()
    async with serving(service) as target:

        def ask_from_threads() -> list[Answer]:
            answers: list[Answer] = []
            with Client(target) as client:

                def ask() -> None:
                    for _ in range(10):
                        answers.append(client.classify(b"", model="small"))

                threads = [threading.Thread(target=ask) for _ in range(4)]
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join()
                assert client.get_model("small").labels == ("cat", "dog")
            return answers

        assert await asyncio.to_thread(ask_from_threads) == [ANSWERED] * 40
    assert len(service.requests) == 40


async def test_the_sync_client_raises_what_the_other_one_does() -> None:
    service = ScriptedClassifier(refuse(grpc.StatusCode.INTERNAL, "internal error"))
    async with serving(service) as target:

        def ask() -> None:
            with Client(target) as client:
                client.classify(b"", model="small")

        with pytest.raises(EngineFailure, match="internal error"):
            await asyncio.to_thread(ask)


async def test_the_sync_client_works_where_a_loop_is_running(nobody: str) -> None:
    with Client(nobody, retry=NO_RETRY) as client, pytest.raises(ServerUnreachable):
        client.list_models()


async def test_closing_the_sync_client_ends_its_calls_and_its_thread() -> None:
    silence = Silence()
    async with serving(ScriptedClassifier(silence)) as target:
        client = Client(target)
        call = asyncio.create_task(asyncio.to_thread(client.classify, b"", model="small"))
        await silence.entered.wait()
        await asyncio.to_thread(client.close)
        with pytest.raises(ClassifierError, match="closed"):
            await call
        client.close()
        with pytest.raises(RuntimeError, match="closed"):
            client.list_models()
    assert not any(thread.name == "classifier-client" for thread in threading.enumerate())


async def run_command(*arguments: str) -> int:
    return await asyncio.to_thread(classify.main, arguments)


async def test_the_command_prints_each_image_with_its_classes(tmp_path: Path) -> None:
    """Run as a user runs it, from the root of the repository."""
    (tmp_path / "pet.jpg").write_bytes(b"image")
    service = ScriptedClassifier()
    async with serving(service) as target:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "clients/classify.py",
            str(tmp_path / "pet.jpg"),
            f"--target={target}",
            cwd=ROOT,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        out, err = await process.communicate()
    assert (process.returncode, err) == (0, b"")
    for shown in ("small version 3", "dog", "75.00%", "cat", "25.00%"):
        assert shown in out.decode()
    assert "UNTRAINED" not in out.decode()
    assert (service.requests[0].model, service.requests[0].images[0].encoded) == ("small", b"image")


async def test_the_command_hides_no_untrained_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "pet.jpg").write_bytes(b"image")

    async def untrained(request: pb.ClassifyRequest, context: Context) -> pb.ClassifyResponse:
        return pb.ClassifyResponse(results=ANSWER.results, model="small", version=3)

    async with serving(ScriptedClassifier(untrained)) as target:
        command = (str(tmp_path / "pet.jpg"), "--target", target)
        assert await run_command(*command) == 0
        warning = "UNTRAINED: random parameters, these classes mean nothing"
        assert warning in capsys.readouterr().out
        assert await run_command(*command, "--json") == 0
    answered = json.loads(capsys.readouterr().out)
    assert answered["trained"] is False
    assert answered["results"][0][0]["label"] == "dog"


async def test_the_command_fails_in_one_plain_line(
    tmp_path: Path, nobody: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "pet.jpg").write_bytes(b"image")
    image, missing = str(tmp_path / "pet.jpg"), str(tmp_path / "nosuch.jpg")
    other = pb.Model(name="other", version=1, state=pb.Model.READY)
    async with serving(ScriptedClassifier(models=(SMALL, other))) as target:
        for arguments, said in (
            ((image, "--target", target), "other, small"),
            ((missing, "--target", target, "--model", "small"), "nosuch.jpg"),
            ((image, "--target", nobody, "--timeout", "2"), nobody),
        ):
            assert await run_command(*arguments) == 1
            shown = capsys.readouterr()
            assert (shown.out, shown.err.count("\n")) == ("", 1)
            assert said in shown.err


@pytest.mark.parametrize("wrong", ["--top-k=0", "--timeout=0", "--timeout=nan"])
def test_wrong_usage_of_the_command_is_status_2(wrong: str) -> None:
    with pytest.raises(SystemExit) as ended:
        classify.main(["pet.jpg", wrong])
    assert ended.value.code == 2
