"""The bench command measures what its options say and ends with the right exit status."""

import asyncio
import csv
import io
import json
import re
import signal
from pathlib import Path
from typing import Any

import grpc
import pytest
from rich.console import Console

from convserve_client import bench
from convserve_client.loadgen.arguments import parse_options
from convserve_client.loadgen.results.samples import OK
from convserve_client.stubs import classify_pb2 as pb
from tests.clients.bench_command import start_bench
from tests.support.scripted_classifier import (
    ANSWER,
    Context,
    ScriptedClassifier,
    refuse,
    serving,
)


async def test_json_goes_to_standard_output_and_the_table_to_standard_error() -> None:
    async with serving(ScriptedClassifier()) as target:
        process = await start_bench(
            f"--target={target}",
            "--model=small",
            "--rate-hz=50",
            "--warmup-s=0",
            "--deadline-ms=20000",
            "--duration-s=0.5",
            "--json=-",
        )
        out, err = await process.communicate()
    found = json.loads(out)
    assert process.returncode == 0
    assert (found["loop"], found["rate_hz"], found["seed"]) == ("open", 50, 1)
    assert found["latency_ms"]["p50"] <= found["latency_ms"]["max"]
    assert b"latency p99.9" in err


@pytest.mark.parametrize("processes", [1, 2])
async def test_an_interrupt_prints_the_results_so_far(processes: int) -> None:
    enough = asyncio.Event()

    async def count(request: pb.ClassifyRequest, context: Context) -> pb.ClassifyResponse:
        if len(service.requests) == 50:
            enough.set()
        return ANSWER

    service = ScriptedClassifier(count)
    async with serving(service) as target:
        process = await start_bench(
            f"--target={target}",
            "--model=small",
            "--warmup-s=0",
            "--duration-s=60",
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


async def test_no_success_exits_with_status_1() -> None:
    service = ScriptedClassifier(refuse(grpc.StatusCode.UNAVAILABLE))
    async with serving(service) as target:
        process = await start_bench(
            f"--target={target}", "--model=small", "--warmup-s=0", "--duration-s=1"
        )
        out, _ = await process.communicate()
    assert process.returncode == 1
    assert b"UNAVAILABLE" in out


async def test_an_unknown_model_fails_with_one_plain_line() -> None:
    async with serving(ScriptedClassifier()) as target:
        process = await start_bench(f"--target={target}", "--model=nosuch")
        out, err = await process.communicate()
    assert (process.returncode, out, err) == (1, b"", b"bench: no model 'nosuch'\n")


@pytest.mark.parametrize(
    "wrong",
    [
        [],
        ["--model=m", "--concurrency=0"],
        ["--model=m", "--rate-hz=-1"],
        ["--model=m", "--rate-hz=inf"],
        ["--model=m", "--rate-hz=5", "--concurrency=5"],
        ["--model=m", "--duration-s=0"],
        ["--model=m", "--warmup-s=nan"],
        ["--model=m=0"],
        ["--model=m,,n"],
        ["--model=m", "--target=nowhere"],
        ["--model=m", "--target=http://host:1"],
        ["--model=m", "--objective=p99<5"],
        ["--model=m", "--find-max-rate"],
        ["--model=m", "--sweep", "--rate-hz=5"],
        ["--model=m", "--compare", "a:1", "b:2", "--rate-hz=5,6"],
        ["--model=m", "--trace=/nonexistent"],
        ["--model=m", "--shape=image"],
    ],
)
def test_wrong_usage_exits_with_status_2(
    wrong: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        bench.main(wrong)
    assert ended.value.code == 2
    assert "usage:" in capsys.readouterr().err


async def run_bench(*arguments: str) -> tuple[dict[str, Any], int, str]:
    """Runs the command in this process. Returns its result, exit status and table."""
    options, table = (
        parse_options("", ["--model=small", "--deadline-ms=20000", *arguments]),
        io.StringIO(),
    )
    result, reports, status = await bench.run(options, Console(file=table, width=160))
    bench.write_outputs(options, result, reports, ["bench.py"])
    return result, status, table.getvalue()


async def test_several_runs_are_written_in_every_format(tmp_path: Path) -> None:
    async with serving(ScriptedClassifier()) as target:
        _, status, _ = await run_bench(
            *(f"--target={target}", "--concurrency=1,3", "--warmup-s=0.1", "--duration-s=0.3"),
            *(f"--csv={tmp_path}/runs.csv", f"--report={tmp_path}/runs.html"),
            *(f"--hdr={tmp_path}/runs.hlog", f"--json={tmp_path}/runs.json"),
            *("--objective=p99<20s", "--objective=failed<=0"),
        )
    runs = json.loads((tmp_path / "runs.json").read_text())["runs"]
    # Server and generator share this process, so that the generator may be the limit.
    assert status == (0 if all(run["valid"] for run in runs) else 3)
    assert [run["concurrency"] for run in runs] == [1, 3]
    lines = list(csv.DictReader(io.StringIO((tmp_path / "runs.csv").read_text())))
    assert [line["concurrency"] for line in lines] == ["1", "3"]
    assert float(lines[1]["p99_ms"]) == pytest.approx(runs[1]["latency_ms"]["p99"], abs=1e-4)
    assert hdr_counts(tmp_path / "runs.hlog") == [sum(run["counts"].values()) for run in runs]
    page = (tmp_path / "runs.html").read_text()
    assert page.count("<svg") == 4  # throughput, distribution, and a timeline for each run
    assert not re.search(r"(?:src|href)=\"(?!#|http://purl.org|#)[^\"]", page), (
        "the page must not load anything"
    )
    assert "<script" not in page
    assert "met: p99&lt;20s" in page
    identities = re.findall(r'\bid="([^"]+)"', page)
    assert len(identities) == len(set(identities))


def hdr_counts(path: Path) -> list[int]:
    """Number of values in the histograms of each run, by HdrHistogram's own decoder."""
    from hdrh.histogram import HdrHistogram

    counts: dict[str, int] = {}
    for line in path.read_text().splitlines():
        if line.startswith("Tag="):
            tag, *_, encoded = line.split(",")
            histogram = HdrHistogram.decode(encoded)
            counts[tag] = counts.get(tag, 0) + histogram.get_total_count()
    return list(counts.values())


async def test_a_missed_objective_exits_with_status_3() -> None:
    async with serving(ScriptedClassifier()) as target:
        _, status, table = await run_bench(
            *(f"--target={target}", "--warmup-s=0", "--duration-s=0.2"),
            "--objective=goodput>1000000",
        )
    assert status == 3
    assert "MISSED: goodput>1000000" in table


async def test_a_comparison_alternates_targets_and_gives_ratios() -> None:
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
        found, status, _ = await run_bench(
            *("--compare", a, f"classify://{b}", "--rounds=2"),
            *("--concurrency=2", "--warmup-s=0", "--duration-s=0.3"),
        )
    assert status == 0
    assert order == [
        "a",
        "b",
        "a",
    ]  # the second round starts with the target that ended the first one
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
        found, status, _ = await run_bench(
            *(f"--target={target}", "--find-max-rate", "--objective=p90<400ms", "--rate-hz=8"),
            *("--arrivals=constant", "--duration-s=1", "--warmup-s=0", "--tolerance=1"),
        )
    assert status == 0
    # The server answers at most 20 per second: a queue builds up at 32. A slow moment of this
    # machine may also fail the run at 16.
    assert 1 <= found["highest_rate_hz"] <= 16
    assert found["objectives"] == ["p90<400ms"]
