"""LoadGen judges runs; its summary is kept, and departures from the rules are reported."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.clients.bench_command import start_bench
from tests.support.serving import (
    Mirror,
    loading,
    publish,
    serve,
)


@pytest.mark.parametrize(
    ("scenario", "options"),
    [
        ("SingleStream", ["--warmup-s=0.2"]),
        ("MultiStream", ["--images-per-call=8", "--warmup-s=0.2"]),
        ("Server", ["--rate-hz=50", "--mlperf-latency-ms=500", "--warmup-s=0"]),
        ("Offline", ["--rate-hz=400", "--images-per-call=16", "--warmup-s=0"]),
        ("Offline", ["--images-per-call=16", "--warmup-s=0.2"]),  # measures the rate itself
    ],
)
async def test_a_scenario_is_judged_by_loadgen(
    tmp_path: Path, scenario: str, options: list[str]
) -> None:
    publish(tmp_path / "engines")
    async with serve(tmp_path / "engines", load=loading(Mirror)) as served:
        process = await start_bench(
            *(f"--target={served.target}", "--model=tiny", f"--scenario={scenario}", *options),
            *("--duration-s=0.5", f"--mlperf-dir={tmp_path}/mlperf", "--json=-"),
        )
        out, err = await process.communicate()
    found: dict[str, Any] = json.loads(out)
    summary = Path(found["summary_file"])
    assert summary == tmp_path / "mlperf" / f"tiny-{scenario}" / "mlperf_log_summary.txt"
    assert f"Scenario : {scenario}" in summary.read_text()
    assert (summary.parent / "mlperf_log_detail.txt").stat().st_size
    assert found["summary"]["Scenario"] == scenario
    assert found["failed_calls"] == 0
    assert found["compliant"] is False
    assert "0.5 s, not 600 s" in found["departures"][0]
    assert b"NOT COMPLIANT" in err
    assert process.returncode == (0 if found["valid"] else 3)


@pytest.mark.parametrize("options", [["--scenario=Server"], ["--scenario=Offline", "--warmup-s=0"]])
async def test_a_scenario_without_a_rate_asks_for_one(tmp_path: Path, options: list[str]) -> None:
    process = await start_bench("--model=tiny", *options, f"--mlperf-dir={tmp_path}")
    _, err = await process.communicate()
    assert process.returncode == 1
    assert b"needs a --rate-hz" in err
