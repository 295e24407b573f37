"""LoadGen judges runs against a server: its summary stays, and where it departs is told."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.clients.test_bench import run_script
from tests.support.serving import (
    Mirror,
    loading,
    publish,
    serve,
)


@pytest.mark.parametrize(
    ("scenario", "options"),
    [
        ("SingleStream", ["--warmup=0.2"]),
        ("MultiStream", ["--images-per-call=8", "--warmup=0.2"]),
        ("Server", ["--rate=50", "--mlperf-latency-ms=500", "--warmup=0"]),
        ("Offline", ["--rate=400", "--images-per-call=16", "--warmup=0"]),
        ("Offline", ["--images-per-call=16", "--warmup=0.2"]),  # finds out the rate by itself
    ],
)
async def test_a_scenario_is_judged_by_loadgen(
    tmp_path: Path, scenario: str, options: list[str]
) -> None:
    publish(tmp_path / "engines")
    async with serve(tmp_path / "engines", load=loading(Mirror)) as served:
        process = await run_script(
            *(f"--target={served.target}", "--model=tiny", f"--scenario={scenario}", *options),
            *("--duration=0.5", f"--mlperf-dir={tmp_path}/mlperf", "--json=-"),
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


@pytest.mark.parametrize("options", [["--scenario=Server"], ["--scenario=Offline", "--warmup=0"]])
async def test_a_scenario_that_can_not_know_its_rate_asks_for_one(
    tmp_path: Path, options: list[str]
) -> None:
    process = await run_script("--model=tiny", *options, f"--mlperf-dir={tmp_path}")
    _, err = await process.communicate()
    assert process.returncode == 1
    assert b"needs a --rate" in err
