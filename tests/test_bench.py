"""The benchmark counts every request once, under what became of it, and tells where it is from."""

import asyncio
import json
import signal
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from itertools import takewhile
from pathlib import Path
from typing import Any

import grpc
import pytest

from clients import bench
from clients.bench import NOT_SENT, Plan, Run, measure, picture, prepared_requests
from clients.load import OK, poisson
from proto import classify_pb2 as pb
from tests.scripted_classifier import (
    ANSWER,
    Context,
    ScriptedClassifier,
    answer,
    refuse,
    serving,
)

ROOT = Path(__file__).resolve().parent.parent


def plan(target: str = "", **changes: Any) -> Plan:
    values: dict[str, Any] = {
        "target": target,
        "model": "small",
        "version": 0,
        "concurrency": 4,
        "rate_hz": None,
        "seed": 1,
        "duration_s": 0.3,
        "warmup_s": 0.0,
        "images_per_call": 1,
        "input": "raw",
        "deadline_ms": 5000,
        "channels": 1,
        "max_in_flight": 100,
    }
    return Plan(**values | changes)


@asynccontextmanager
async def running(service: ScriptedClassifier, timeout_s: float = 5) -> AsyncIterator[Run]:
    """A run whose requests go to the service."""
    async with serving(service) as target, grpc.aio.insecure_channel(target) as channel:
        rpc: Any = channel.unary_unary(bench.CLASSIFY, None, pb.ClassifyResponse.FromString)
        yield Run([rpc], [b""], images=1, timeout_s=timeout_s)


async def test_every_request_is_counted_under_what_it_ended_with() -> None:
    refused = refuse(grpc.StatusCode.RESOURCE_EXHAUSTED)
    broken = refuse(grpc.StatusCode.INTERNAL)
    service = ScriptedClassifier(refused, answer, refused, broken, answer)
    async with serving(service) as target:
        report = await measure(plan(target))
    assert report.summary.total == len(service.requests)  # refusals are not retried
    assert report.summary.counts == {
        "RESOURCE_EXHAUSTED": 2,
        "INTERNAL": 1,
        OK: len(service.requests) - 3,
    }
    assert report.server.answers == report.summary.succeeded


async def test_the_closed_loop_keeps_as_many_callers_as_asked() -> None:
    now = most = 0
    gate = asyncio.Event()

    async def count(request: pb.ClassifyRequest, context: Context) -> pb.ClassifyResponse:
        nonlocal now, most
        now += 1
        most = max(most, now)
        if now == 3:
            gate.set()
        await gate.wait()
        now -= 1
        return ANSWER

    async with running(ScriptedClassifier(count)) as run:
        await run.closed_loop(3, until_s=run.now_s() + 0.5)
    assert most == 3


async def test_the_open_loop_waits_for_no_answer() -> None:
    all_there = asyncio.Event()

    async def answer_when_all_are_there(
        request: pb.ClassifyRequest, context: Context
    ) -> pb.ClassifyResponse:
        if len(service.requests) == 20:
            all_there.set()
        await all_there.wait()
        return ANSWER

    service = ScriptedClassifier(answer_when_all_are_there)
    arrivals = [n / 1000 for n in range(20)]
    async with running(service, timeout_s=20) as run:
        await run.open_loop(iter(arrivals), until_s=1, max_in_flight=100)
    assert sorted(sample.due_s for sample in run.samples) == arrivals
    assert {sample.status for sample in run.samples} == {OK}
    assert all(sample.due_s <= sample.sent_s <= sample.finished_s for sample in run.samples)


async def test_what_is_due_beyond_the_cap_is_counted_and_not_sent() -> None:
    all_due = asyncio.Event()

    def arrivals() -> Iterator[float]:
        yield from [0.0] * 10
        all_due.set()

    async def answer_when_all_are_due(
        request: pb.ClassifyRequest, context: Context
    ) -> pb.ClassifyResponse:
        await all_due.wait()
        return ANSWER

    service = ScriptedClassifier(answer_when_all_are_due)
    async with running(service, timeout_s=20) as run:
        await run.open_loop(arrivals(), until_s=1, max_in_flight=3)
    statuses = sorted(sample.status for sample in run.samples)
    assert statuses == [NOT_SENT] * 7 + [OK] * 3
    assert len(service.requests) == 3


async def test_warm_up_is_sent_and_not_counted() -> None:
    service = ScriptedClassifier()
    async with serving(service) as target:
        open_loop = plan(target, concurrency=None, rate_hz=100, warmup_s=0.3)
        report = await measure(open_loop)
    due = list(takewhile(lambda due_s: due_s < 0.6, poisson(100, seed=1)))
    assert len(service.requests) == len(due)
    assert report.summary.counts == {OK: sum(due_s >= 0.3 for due_s in due)}
    assert report.server.answers == report.summary.succeeded


async def test_the_report_has_the_servers_own_account() -> None:
    service = ScriptedClassifier()
    async with serving(service) as target:
        found = (await measure(plan(target, channels=2))).as_json()
    assert found["answered_by"] == [{"model": "small", "version": 3, "trained": True}]
    assert found["server_mean_ms"] == {"decode": 1, "queue": 2, "compute": 4, "total": 8}
    assert found["server_mean_batch_rows"] == 2.5
    assert found["client_cpu_s_per_call"] > 0


async def test_several_channels_are_several_connections() -> None:
    peers: set[str] = set()

    async def note_peer(request: pb.ClassifyRequest, context: Context) -> pb.ClassifyResponse:
        peers.add(context.peer())
        return ANSWER

    async with serving(ScriptedClassifier(note_peer)) as target:
        await measure(plan(target, channels=3))
    assert len(peers) == 3


def test_raw_requests_have_the_models_shape_and_are_the_same_every_time() -> None:
    (message,) = prepared_requests(plan(images_per_call=3), (8, 6, 1))
    pixels = pb.ClassifyRequest.FromString(message).pixels
    assert (pixels.count, pixels.height, pixels.width, pixels.channels) == (3, 8, 6, 1)
    assert len(pixels.data) == 3 * 8 * 6
    assert [message] == prepared_requests(plan(images_per_call=3), (8, 6, 1))


def test_a_folder_of_files_is_sent_in_turn(tmp_path: Path) -> None:
    for name in "abc":
        (tmp_path / name).write_bytes(name.encode())
    prepared = prepared_requests(plan(input=str(tmp_path), images_per_call=2), (8, 6, 1))
    sent = [
        [image.encoded for image in pb.ClassifyRequest.FromString(message).images]
        for message in prepared
    ]
    assert sent == [[b"a", b"b"], [b"c", b"a"]]


def test_made_up_jpegs_are_about_as_long_as_photographs() -> None:
    (message,) = prepared_requests(plan(input="jpeg"), (224, 224, 3))
    (image,) = pb.ClassifyRequest.FromString(message).images
    assert image.encoded.startswith(b"\xff\xd8")
    assert 40_000 < len(image.encoded) < 160_000  # ImageNet's have 110 kB on average


def test_pictures_use_the_range_of_a_byte() -> None:
    pixels = picture(64, 64, 3, seed=1)
    assert (pixels.shape, pixels.dtype) == ((64, 64, 3), "uint8")
    assert pixels.max() - pixels.min() > 100


async def run_script(*arguments: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "clients/bench.py",
        *arguments,
        cwd=ROOT,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )


async def test_the_command_writes_json_to_the_standard_output_and_the_table_beside_it() -> None:
    async with serving(ScriptedClassifier()) as target:
        process = await run_script(
            f"--target={target}",
            "--model=small",
            "--rate=50",
            "--warmup=0",
            "--deadline-ms=20000",
            "--duration=0.5",
            "--json=-",
        )
        out, err = await process.communicate()
    found = json.loads(out)
    assert process.returncode == 0
    assert (found["loop"], found["rate_hz"], found["seed"]) == ("open", 50, 1)
    assert found["latency_ms"]["p50"] <= found["latency_ms"]["max"]
    assert b"latency p99.9" in err


async def test_an_interrupt_prints_what_there_is() -> None:
    enough = asyncio.Event()

    async def count(request: pb.ClassifyRequest, context: Context) -> pb.ClassifyResponse:
        if len(service.requests) == 50:
            enough.set()
        return ANSWER

    service = ScriptedClassifier(count)
    async with serving(service) as target:
        process = await run_script(
            f"--target={target}",
            "--model=small",
            "--warmup=0",
            "--duration=60",
            "--json=-",
            "--deadline-ms=20000",
        )
        await enough.wait()
        process.send_signal(signal.SIGINT)
        out, _ = await process.communicate()
    found = json.loads(out)
    assert process.returncode == 0
    assert found["interrupted"]
    assert found["measured_s"] < 30
    assert found["counts"][OK] >= 16


async def test_nothing_succeeded_is_status_1() -> None:
    service = ScriptedClassifier(refuse(grpc.StatusCode.UNAVAILABLE))
    async with serving(service) as target:
        process = await run_script(
            f"--target={target}", "--model=small", "--warmup=0", "--duration=1"
        )
        out, _ = await process.communicate()
    assert process.returncode == 1
    assert b"UNAVAILABLE" in out


async def test_an_unknown_model_is_one_plain_line() -> None:
    async with serving(ScriptedClassifier()) as target:
        process = await run_script(f"--target={target}", "--model=nosuch")
        out, err = await process.communicate()
    assert (process.returncode, out, err) == (1, b"", b"bench: no model 'nosuch'\n")


@pytest.mark.parametrize(
    "wrong",
    [
        [],
        ["--model=m", "--concurrency=0"],
        ["--model=m", "--rate=-1"],
        ["--model=m", "--rate=inf"],
        ["--model=m", "--rate=5", "--concurrency=5"],
        ["--model=m", "--duration=0"],
        ["--model=m", "--warmup=nan"],
    ],
)
def test_wrong_usage_is_status_2(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        bench.main(wrong)
    assert ended.value.code == 2
    assert "usage:" in capsys.readouterr().err
