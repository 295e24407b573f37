"""Prometheus really scrapes the server: every panel, rule and alert has data, and the counts agree.

Needs `prometheus` and `promtool`, as Debian's package `prometheus` has them. Where they are not
installed these tests are skipped, except in CI, which brings them.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from convserve_client.loadgen.measure import Report, measure
from convserve_client.loadgen.plan import Kind, Plan
from server.telemetry.metrics import SECONDS
from server.telemetry.nvml import GpuMonitor
from tests.clients.test_queueing import load
from tests.support.doc_tables import OneGpu
from tests.support.serving import Served, publish, serve

ROOT = Path(__file__).resolve().parent.parent.parent
SHIPPED = ROOT / "deploy/prometheus"
GROUPS = [
    group
    for name in ("rules.yml", "alerts.yml")
    for group in yaml.safe_load((SHIPPED / name).read_text())["groups"]
]
RULES = [rule for group in GROUPS for rule in group["rules"]]
ALERTS = [rule for rule in RULES if "alert" in rule]
LIMIT_S = 40.0

pytestmark = pytest.mark.skipif(
    shutil.which("prometheus") is None and not os.environ.get("CI"),
    reason="Debian's package prometheus is not here; see .ci/run",
)


def promtool(*arguments: str | Path) -> str:
    done = subprocess.run(["promtool", *arguments], capture_output=True, text=True, cwd=SHIPPED)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_shipped_configuration_is_sound() -> None:
    promtool("check", "config", "prometheus.yml")


def test_every_alert_fires_when_it_should() -> None:
    promtool("test", "rules", "tests.yml")


def test_every_alert_is_tested_both_ways_and_has_a_runbook() -> None:
    tested: dict[str, set[bool]] = {}
    for test in yaml.safe_load((SHIPPED / "tests.yml").read_text())["tests"]:
        for case in test.get("alert_rule_test", ()):
            tested.setdefault(case["alertname"], set()).add(bool(case["exp_alerts"]))
    assert tested == {rule["alert"]: {True, False} for rule in ALERTS}
    headings = re.findall(r"^### (\w+)$", (ROOT / "docs/operations.md").read_text(), re.MULTILINE)
    assert {rule["alert"] for rule in ALERTS} <= set(headings)
    for rule in ALERTS:
        assert rule["annotations"]["runbook"] == f"docs/operations.md#{rule['alert'].lower()}"


# --- a Prometheus that scrapes ---------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Prometheus:
    """A running one."""

    client: httpx.AsyncClient

    async def ask(self, expression: str) -> list[tuple[dict[str, str], float]]:
        """Labels and values of an expression now."""
        response = await self.client.get("/api/v1/query", params={"query": expression})
        answer = response.json()
        assert answer["status"] == "success", (expression, answer)
        found = answer["data"]["result"]
        return [(series["metric"], float(series["value"][1])) for series in found]

    async def value(self, expression: str) -> float:
        """Of an expression that has one; nan where it has none."""
        found = await self.ask(expression)
        assert len(found) <= 1, expression
        return found[0][1] if found else float("nan")

    async def becomes(self, expression: str, value: float) -> None:
        """Waits until a scrape has brought the value. A test's own limit ends the wait."""
        while (found := await self.value(expression)) != value:
            assert not found > value, f"{expression} is {found}, beyond {value}"
            await asyncio.sleep(0.1)  # between questions


@asynccontextmanager
async def scraping(served: Served, folder: Path) -> AsyncIterator[Prometheus]:
    """Prometheus with the shipped configuration, but of this server, and looking more often."""
    config = yaml.safe_load((SHIPPED / "prometheus.yml").read_text())
    config["global"] |= {
        "scrape_interval": "500ms",
        "scrape_timeout": "500ms",
        "evaluation_interval": "500ms",
    }
    config["scrape_configs"][0]["static_configs"][0]["targets"] = [served.http.partition("//")[2]]
    config["rule_files"] = [str(SHIPPED / name) for name in config["rule_files"]]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    process = await asyncio.create_subprocess_exec(
        "prometheus",
        f"--config.file={folder}/prometheus.yml",
        f"--storage.tsdb.path={folder}/data",
        "--web.listen-address=127.0.0.1:0",
        "--enable-feature=exemplar-storage",
        "--log.format=json",
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        assert process.stderr is not None
        port = await _port_of(process.stderr, process.pid)
        drained = asyncio.create_task(process.stderr.read())
        async with httpx.AsyncClient(
            base_url=f"http://127.0.0.1:{port}", trust_env=False
        ) as client:
            while (await client.get("/-/ready")).status_code != 200:
                await asyncio.sleep(0.05)  # it says so in no other way
            yield Prometheus(client)
    finally:
        process.terminate()
        await process.wait()
        await drained


async def _port_of(log: asyncio.StreamReader, pid: int) -> int:
    """The free port that it took: its log gives the address it was told, port 0, so the kernel is
    asked which socket the process listens at."""
    async for line in log:
        if b"Server is ready to receive web requests" in line:
            return _listening(pid)
    raise AssertionError("prometheus did not start")


def _listening(pid: int) -> int:
    sockets = {
        os.readlink(entry).removeprefix("socket:[").rstrip("]")
        for entry in Path(f"/proc/{pid}/fd").iterdir()
        if entry.is_symlink() and os.path.lexists(entry) and "socket" in os.readlink(entry)
    }
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        if (
            fields[3] == "0A" and fields[9] in sockets
        ):  # it listens, and the socket is the process's
            return int(fields[1].partition(":")[2], 16)
    raise AssertionError(f"process {pid} listens nowhere")


def panel_expressions() -> list[tuple[str, str]]:
    """Where it stands, and the expression as Grafana would send it, looking back for 5 s."""
    found = []
    for path in sorted((ROOT / "deploy/grafana/dashboards").glob("*.json")):
        for panel in json.loads(path.read_text())["panels"]:
            for target in panel["targets"]:
                expression = target["expr"].replace("$__rate_interval", "20s")
                expression = re.sub(r"\$(model|instance)\b", ".*", expression)
                found.append((f"{path.stem}: {panel['title']}", expression))
    return found


def alert_expression(rule: dict[str, Any]) -> str:
    """An alert's, so that it has a value where it does not fire too; an hour ago is 1 s ago."""
    told, count = re.subn(r"([<>]) ([\d.]+)\s*$", r"\1 bool \2", rule["expr"])
    assert count == 1, rule["expr"]
    return told.replace("offset 1h", "offset 1s")


def bucket_width(seconds: float) -> float:
    """Of the bucket that the value falls into."""
    return next(high - low for low, high in pairwise((0.0, *SECONDS)) if low < seconds <= high)


async def test_every_panel_rule_and_alert_has_data_and_the_counts_agree(tmp_path: Path) -> None:
    publish(tmp_path / "engines", max_batch=4, trained=False)
    async with (
        asyncio.timeout(LIMIT_S),
        serve(tmp_path / "engines", load=load, queue_rows=8, max_images_per_call=8) as served,
        scraping(served, tmp_path) as prometheus,
    ):
        served.server.metrics.read_gpus(GpuMonitor(OneGpu()))
        await prometheus.becomes("up", 1)  # it looks for its targets every five seconds
        reports = [await measure(plan) for plan in plans(served)]
        calls = 'convserve_requests_total{method=~"Classify|Model(Stream)?Infer", code="%s"}'
        counts = [report.summary.counts for report in reports]
        answered = sum(count.get("OK", 0) for count in counts)
        refused = sum(count.get("RESOURCE_EXHAUSTED", 0) for count in counts)
        await prometheus.becomes(f"sum({calls % 'OK'})", answered)
        assert await prometheus.value("sum(convserve_request_duration_seconds_count)") >= answered
        assert await prometheus.value("sum(convserve_images_total)") == answered
        assert await prometheus.value("sum(convserve_batch_rows_sum)") == answered
        told = await prometheus.value("sum(convserve_refused_total)")
        assert told == refused > 0
        await agree_about_latency(prometheus, reports[0])

        empty = []
        for where, expression in panel_expressions():
            found = await prometheus.ask(expression)
            if not found or all(value != value for _, value in found):
                empty.append((where, expression))
        for rule in RULES:
            told_of = rule.get("record") or alert_expression(rule)
            if not await prometheus.ask(told_of):
                empty.append((rule.get("alert", "rule"), told_of))
        assert not empty
        response = await prometheus.client.get("/api/v1/rules")
        rules = [rule for group in response.json()["data"]["groups"] for rule in group["rules"]]
        assert len(rules) == len(RULES)
        assert {rule["health"] for rule in rules} == {"ok"}


def plans(served: Served) -> list[Plan]:
    """One caller after the other, whose latency is known; then more than there is place for, by the
    other protocol, so that some are refused. No deadline is near: where one passes just as the
    answer comes, the two sides need not agree on what became of the call."""
    alone = Plan(
        target=served.target,
        kinds=(Kind(model="tiny", deadline_ms=20_000),),
        concurrency=1,
        warmup_s=0.0,
        duration_s=1.5,
    )
    crowd = Plan(
        target=served.target,
        protocol="oip",
        kinds=(Kind(model="tiny", deadline_ms=20_000),),
        concurrency=None,
        rate_hz=300,
        warmup_s=0.0,
        duration_s=1.5,
    )
    return [alone, crowd]


async def agree_about_latency(prometheus: Prometheus, report: Report) -> None:
    """The p99 of callers that come one after the other, as Prometheus reads it off its buckets."""
    buckets = 'convserve_request_duration_seconds_bucket{method="Classify"}'
    read = await prometheus.value(f"histogram_quantile(0.99, sum by (le) ({buckets}))")
    assert report.summary.latency is not None
    seen = report.summary.latency.p99_s
    assert abs(read - seen) <= max(bucket_width(read), bucket_width(seen))


# --- the dashboards --------------------------------------------------------------------------


def test_the_dashboards_are_those_that_the_code_makes() -> None:
    made = subprocess.run(
        [
            sys.executable,
            "-c",
            "import json, sys; sys.path.insert(0, 'deploy/grafana'); import build;"
            " print(json.dumps(build.texts()))",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert made.returncode == 0, made.stderr
    texts = json.loads(made.stdout)
    there = {path.name: path.read_text() for path in (ROOT / "deploy/grafana/dashboards").iterdir()}
    assert there == texts, "run python deploy/grafana/build.py"


def test_every_panel_has_a_unit_a_description_and_no_average_of_a_quantile() -> None:
    for path in (ROOT / "deploy/grafana/dashboards").glob("*.json"):
        for panel in json.loads(path.read_text())["panels"]:
            where = f"{path.stem}: {panel['title']}"
            assert panel["fieldConfig"]["defaults"]["unit"], where
            assert len(panel["description"]) > 20, where
            for target in panel["targets"]:
                assert not re.search(r"avg\w*\s*(by|\()", target["expr"]), where
