"""The benchmark counts every request once, under what became of it, and tells where it is from."""

import asyncio
import csv
import io
import json
import re
import signal
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from itertools import takewhile
from pathlib import Path
from typing import Any

import grpc
import pytest
from rich.console import Console

from convserve_client import ModelNotFound, bench
from convserve_client.loadgen.arguments import parsed
from convserve_client.loadgen.calls import Call, Channel, clock
from convserve_client.loadgen.load import NOT_SENT, OK, poisson
from convserve_client.loadgen.measure import measure
from convserve_client.loadgen.plan import Kind, Plan
from convserve_client.loadgen.protocols import CLASSIFY, Classify
from convserve_client.loadgen.worker import Run
from convserve_client.stubs import classify_pb2 as pb
from tests.support.scripted_classifier import (
    ANSWER,
    Context,
    ScriptedClassifier,
    answer,
    refuse,
    retry_info,
    serving,
)

ROOT = Path(__file__).resolve().parent.parent.parent


def plan(target: str = "", kind: Kind | None = None, **changes: Any) -> Plan:
    values: dict[str, Any] = {
        "target": target,
        "kinds": (kind or Kind(model="small", deadline_ms=5000),),
        "concurrency": 4,
        "duration_s": 0.3,
        "warmup_s": 0.0,
        "max_in_flight": 100,
    }
    return Plan(**values | changes)


def open_loop(target: str, rate_hz: float, **changes: Any) -> Plan:
    return plan(target, **{"concurrency": None, "rate_hz": rate_hz, **changes})


@asynccontextmanager
async def running(service: ScriptedClassifier, **changes: Any) -> AsyncIterator[Run]:
    """A run whose requests go to the service."""
    slow = Kind(model="small", deadline_ms=20_000)
    async with serving(service) as target:
        channel = Channel(target, CLASSIFY)
        await channel.connect()
        asked = plan(target, slow, **changes)
        yield Run(asked, [channel], [[b""]], Classify(), zero_s=clock())
        await channel.close()


def all_of(kind: int, times: Iterator[float]) -> Iterator[tuple[float, int]]:
    return ((due_s, kind) for due_s in times)


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
        await run.closed_loop(3, iter(lambda: 0, None), until_s=run.now_s() + 0.5)
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
    async with running(service) as run:
        await run.open_loop(all_of(0, iter(arrivals)), until_s=1)
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
    async with running(service, max_in_flight=3) as run:
        await run.open_loop(all_of(0, arrivals()), until_s=1)
    statuses = sorted(sample.status for sample in run.samples)
    assert statuses == [NOT_SENT] * 7 + [OK] * 3
    assert len(service.requests) == 3


async def test_warm_up_is_sent_and_not_counted() -> None:
    service = ScriptedClassifier()
    async with serving(service) as target:
        report = await measure(open_loop(target, 100, warmup_s=0.3))
    due = list(takewhile(lambda due_s: due_s < 0.6, poisson(100, seed=1)))
    assert len(service.requests) == len(due)
    assert report.summary.counts == {OK: sum(due_s >= 0.3 for due_s in due)}
    assert report.server.answers == report.summary.succeeded


async def test_the_report_has_the_servers_own_account() -> None:
    service = ScriptedClassifier()
    async with serving(service) as target:
        found = (await measure(plan(target, channels=2))).as_json()
    assert found["answered_by"] == [{"model": "small", "version": "3", "trained": True}]
    assert found["server_mean_ms"] == {"decode": 1, "queue": 2, "compute": 4, "total": 8}
    assert found["server_mean_batch_rows"] == pytest.approx(2.5)
    assert found["client_cpu_s_per_call"] > 0


async def test_several_channels_are_several_connections() -> None:
    peers: set[str] = set()

    async def note_peer(request: pb.ClassifyRequest, context: Context) -> pb.ClassifyResponse:
        peers.add(context.peer())
        return ANSWER

    async with serving(ScriptedClassifier(note_peer)) as target:
        await measure(plan(target, channels=3))
    assert len(peers) == 3


async def test_several_processes_send_together_what_one_would() -> None:
    service = ScriptedClassifier()
    async with serving(service) as target:
        report = await measure(open_loop(target, 200, processes=2, warmup_s=0.1, duration_s=0.4))
    due = list(takewhile(lambda due_s: due_s < 0.5, poisson(200, seed=1)))
    assert sorted(report.samples["due_s"]) == due
    assert len(service.requests) == len(due)
    assert report.summary.counts == {OK: sum(due_s >= 0.1 for due_s in due)}
    assert report.server.answers == report.summary.succeeded
    assert len(report.sender_cpu_s) == 2


async def test_a_long_account_of_a_sending_process_comes_whole() -> None:
    async with serving(ScriptedClassifier()) as target:
        asked = open_loop(target, 20_000, processes=2, max_in_flight=1)
        report = await measure(asked)
    due = list(takewhile(lambda due_s: due_s < 0.3, poisson(20_000, seed=1)))
    assert sorted(report.samples["due_s"]) == due  # 40 bytes each: more than a pipe holds
    assert report.summary.counts[NOT_SENT] > 2000


async def test_what_a_sending_process_fails_at_is_told_as_in_one() -> None:
    async with serving(ScriptedClassifier()) as target:
        with pytest.raises(ModelNotFound, match="nosuch"):
            await measure(plan(target, Kind(model="nosuch"), processes=2))


async def test_kinds_are_asked_by_their_weights_and_told_apart() -> None:
    often = Kind(model="small", images=2, priority=3, deadline_ms=5000, weight=3.0)
    seldom = Kind(model="small", deadline_ms=5000)
    service = ScriptedClassifier()
    async with serving(service) as target:
        report = await measure(open_loop(target, 400, kinds=(often, seldom), duration_s=0.5))
    counts = [part.total for part in report.by_kind]
    assert sum(counts) == report.summary.total == len(service.requests)
    assert 2 < counts[0] / counts[1] < 4.5  # seeded: it is always the same
    sent = [(request.pixels.count, request.priority) for request in service.requests]
    assert {kind: sent.count(kind) for kind in set(sent)} == {(2, 3): counts[0], (1, 0): counts[1]}


async def test_a_hint_is_obeyed_where_asked_for_and_noted_in_any_case() -> None:
    refused = refuse(grpc.StatusCode.RESOURCE_EXHAUSTED, "later", retry_info(0.05))
    for obey, tries, status in ((True, 3, OK), (False, 1, "RESOURCE_EXHAUSTED")):
        service = ScriptedClassifier(refused, refused, answer)
        async with running(service, obey_hints=obey) as run:
            await run.open_loop(iter([(0.0, 0)]), until_s=1)
        (sample,) = run.samples
        assert (sample.status, sample.tries) == (status, tries)
        assert sample.hint_s == pytest.approx(0.05)
        if obey:
            assert sample.latency_s >= 0.1  # both waits are the caller's


async def test_a_hint_beyond_the_deadline_is_not_waited_for() -> None:
    hour = refuse(grpc.StatusCode.RESOURCE_EXHAUSTED, "later", retry_info(3600))
    async with running(ScriptedClassifier(hour), obey_hints=True) as run:
        await run.open_loop(iter([(0.0, 0)]), until_s=1)
    (sample,) = run.samples
    assert (sample.status, sample.tries) == ("RESOURCE_EXHAUSTED", 1)


async def test_requests_leave_at_their_time_and_not_at_the_next_millisecond() -> None:
    class AtOnce:
        def start(self, call: Call, body: bytes, timeout_s: float) -> None:
            call.answer = ANSWER.SerializeToString()
            asyncio.get_running_loop().call_soon(call.end, 0, "")

        def cancel(self, call: Call) -> None:
            raise AssertionError

    asked = open_loop("", 1.0)
    run = Run(asked, [AtOnce()], [[b""]], Classify(), zero_s=clock())
    await run.open_loop(((n * 0.00137, 0) for n in range(300)), until_s=1)
    lags = sorted(sample.sent_s - sample.due_s for sample in run.samples)
    assert len(lags) == 300
    assert lags[0] >= 0
    assert lags[len(lags) // 2] < 0.0004  # the loop's own timers give half a millisecond or more


async def test_a_load_beyond_the_generator_is_marked() -> None:
    async with serving(ScriptedClassifier()) as target:
        report = await measure(open_loop(target, 1e6, duration_s=0.01, max_in_flight=10_000))
    assert not report.valid
    assert report.summary.lag_p99_s is not None
    assert report.summary.lag_p99_s > 0.001
    assert "could not keep up" in report.faults[0]


async def test_windows_say_how_sure_a_figure_is() -> None:
    async with serving(ScriptedClassifier()) as target:
        found = (await measure(plan(target, windows=4, duration_s=0.4))).as_json()
    sure = found["confidence_95"]["calls_hz"]
    assert sure["windows"] == 4
    assert sure["margin"] > 0
    assert sure["mean"] == pytest.approx(found["calls_hz"])


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


@pytest.mark.parametrize("processes", [1, 2])
async def test_an_interrupt_prints_what_there_is(processes: int) -> None:
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
            f"--processes={processes}",
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
        ["--model=m=0"],
        ["--model=m,,n"],
        ["--model=m", "--target=nowhere"],
        ["--model=m", "--target=http://host:1"],
        ["--model=m", "--objective=p99<5"],
        ["--model=m", "--find-max-rate"],
        ["--model=m", "--sweep", "--rate=5"],
        ["--model=m", "--compare", "a:1", "b:2", "--rate=5,6"],
        ["--model=m", "--trace=/nonexistent"],
        ["--model=m", "--shape=image"],
    ],
)
def test_wrong_usage_is_status_2(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        bench.main(wrong)
    assert ended.value.code == 2
    assert "usage:" in capsys.readouterr().err


async def work(*arguments: str) -> tuple[dict[str, Any], int, str]:
    """What the command does but for ending: its result, exit status and table."""
    asked, table = parsed("", ["--model=small", "--deadline-ms=20000", *arguments]), io.StringIO()
    result, reports, status = await bench.work(asked, Console(file=table, width=160))
    bench.write(asked, result, reports, ["bench.py"])
    return result, status, table.getvalue()


async def test_a_sweep_writes_every_form_there_is(tmp_path: Path) -> None:
    async with serving(ScriptedClassifier()) as target:
        _, status, _ = await work(
            *(f"--target={target}", "--concurrency=1,3", "--warmup=0.1", "--duration=0.3"),
            *(f"--csv={tmp_path}/runs.csv", f"--report={tmp_path}/runs.html"),
            *(f"--hdr={tmp_path}/runs.hlog", f"--json={tmp_path}/runs.json"),
            *("--objective=p99<20s", "--objective=failed<=0"),
        )
    runs = json.loads((tmp_path / "runs.json").read_text())["runs"]
    # The server runs in this process too: that may well be more than one can.
    assert status == (0 if all(run["valid"] for run in runs) else 3)
    assert [run["concurrency"] for run in runs] == [1, 3]
    lines = list(csv.DictReader(io.StringIO((tmp_path / "runs.csv").read_text())))
    assert [line["concurrency"] for line in lines] == ["1", "3"]
    assert float(lines[1]["p99_ms"]) == pytest.approx(runs[1]["latency_ms"]["p99"], abs=1e-4)
    assert hdr_counts(tmp_path / "runs.hlog") == [sum(run["counts"].values()) for run in runs]
    page = (tmp_path / "runs.html").read_text()
    assert page.count("<svg") == 4  # throughput, distribution, a timeline a run
    assert not re.search(r"(?:src|href)=\"(?!#|http://purl.org|#)[^\"]", page), "nothing is fetched"
    assert "<script" not in page
    assert "met: p99&lt;20s" in page
    identities = re.findall(r'\bid="([^"]+)"', page)
    assert len(identities) == len(set(identities))


def hdr_counts(path: Path) -> list[int]:
    """Values in the histograms of each run, read by HdrHistogram's own decoder."""
    from hdrh.histogram import HdrHistogram

    counts: dict[str, int] = {}
    for line in path.read_text().splitlines():
        if line.startswith("Tag="):
            tag, *_, encoded = line.split(",")
            histogram = HdrHistogram.decode(encoded)
            counts[tag] = counts.get(tag, 0) + histogram.get_total_count()
    return list(counts.values())


async def test_a_missed_objective_is_status_3() -> None:
    async with serving(ScriptedClassifier()) as target:
        _, status, table = await work(
            *(f"--target={target}", "--warmup=0", "--duration=0.2"),
            "--objective=goodput>1000000",
        )
    assert status == 3
    assert "MISSED: goodput>1000000" in table


async def test_a_comparison_takes_turns_and_gives_ratios() -> None:
    order: list[str] = []

    def noting(name: str) -> ScriptedClassifier:
        async def note(request: pb.ClassifyRequest, context: Context) -> pb.ClassifyResponse:
            if order[-1:] != [name]:
                order.append(name)
            if name == "b":
                await asyncio.sleep(0.02)
            return ANSWER

        return ScriptedClassifier(note)

    async with serving(noting("a")) as a, serving(noting("b")) as b:
        found, status, _ = await work(
            *("--compare", a, f"classify://{b}", "--rounds=2"),
            *("--concurrency=2", "--warmup=0", "--duration=0.3"),
        )
    assert status == 0
    assert order == ["a", "b", "a"]  # the second round begins where the first one ended
    ratio = found["ratios"]["p50"]
    assert ratio["b"] >= 20
    assert ratio["ratio"] > 1
    assert len(ratio["rounds"]) == 2


async def test_the_highest_rate_of_a_server_of_known_speed_is_found() -> None:
    one_at_a_time, service_s = asyncio.Semaphore(1), 0.05

    async def serve_slowly(request: pb.ClassifyRequest, context: Context) -> pb.ClassifyResponse:
        async with one_at_a_time:
            await asyncio.sleep(service_s)
        return ANSWER

    async with serving(ScriptedClassifier(serve_slowly)) as target:
        found, status, _ = await work(
            *(f"--target={target}", "--find-max-rate", "--objective=p90<400ms", "--rate=8"),
            *("--arrivals=constant", "--duration=1", "--warmup=0", "--tolerance=1"),
        )
    assert status == 0
    # At most 20 a second: 32 build up a queue. A hiccup of this machine may spoil the run at 16.
    assert 1 <= found["highest_rate_hz"] <= 16
    assert found["objectives"] == ["p90<400ms"]
