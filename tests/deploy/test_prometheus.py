"""A real Prometheus scrapes a server: all panels, rules and alerts have data; the counts agree.

Needs `prometheus` and `promtool` (Debian package `prometheus`). Without them these tests are
skipped, except in CI, which installs them.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from convserve_client.loadgen.measure import measure
from convserve_client.loadgen.plan import Plan, RequestClass
from convserve_client.loadgen.results.report import Report
from server.telemetry.metrics import SECONDS
from server.telemetry.nvml import GpuMonitor
from tests.clients.loadgen.test_queueing import load
from tests.support.serving import Served, publish, serve
from tests.telemetry.fake_nvml import FakeNvml

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
    reason="prometheus is not installed (Debian package prometheus); see .ci/run",
)


def promtool(*arguments: str | Path) -> str:
    done = subprocess.run(["promtool", *arguments], capture_output=True, text=True, cwd=SHIPPED)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_configuration_is_valid() -> None:
    promtool("check", "config", "prometheus.yml")


def test_every_alert_fires_when_it_should() -> None:
    promtool("test", "rules", "tests.yml")


def test_every_alert_has_a_runbook_and_is_tested_firing_and_not_firing() -> None:
    tested: dict[str, set[bool]] = {}
    for test in yaml.safe_load((SHIPPED / "tests.yml").read_text())["tests"]:
        for case in test.get("alert_rule_test", ()):
            tested.setdefault(case["alertname"], set()).add(bool(case["exp_alerts"]))
    assert tested == {rule["alert"]: {True, False} for rule in ALERTS}
    headings = re.findall(r"^### (\w+)$", (ROOT / "docs/operations.md").read_text(), re.MULTILINE)
    assert {rule["alert"] for rule in ALERTS} <= set(headings)
    for rule in ALERTS:
        assert rule["annotations"]["runbook"] == f"docs/operations.md#{rule['alert'].lower()}"


@dataclass(frozen=True, slots=True)
class Prometheus:
    """HTTP client of a running Prometheus."""

    client: httpx.AsyncClient

    async def query(self, expression: str) -> list[tuple[dict[str, str], float]]:
        """Current labels and values of an expression."""
        response = await self.client.get("/api/v1/query", params={"query": expression})
        answer = response.json()
        assert answer["status"] == "success", (expression, answer)
        found = answer["data"]["result"]
        return [(series["metric"], float(series["value"][1])) for series in found]

    async def value(self, expression: str) -> float:
        """The single value of an expression; nan if there is none."""
        found = await self.query(expression)
        assert len(found) <= 1, expression
        return found[0][1] if found else float("nan")

    async def wait_for(self, expression: str, value: float) -> None:
        """Waits until a scrape has brought the value. The test's time limit ends the wait."""
        while (found := await self.value(expression)) != value:
            assert not found > value, f"{expression} is {found}, beyond {value}"
            await asyncio.sleep(0.1)


@asynccontextmanager
async def scraping(served: Served, folder: Path) -> AsyncIterator[Prometheus]:
    """Prometheus with the shipped configuration, but scraping this server, and more often."""
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
                await asyncio.sleep(0.05)  # there is no other sign of readiness
            yield Prometheus(client)
    finally:
        process.terminate()
        await process.wait()
        await drained


async def _port_of(log: asyncio.StreamReader, pid: int) -> int:
    """The port that Prometheus listens on. Its log shows only the configured port 0, so look at
    the process's sockets."""
    async for line in log:
        if b"Server is ready to receive web requests" in line:
            return _listening_port(pid)
    raise AssertionError("prometheus did not start")


def _listening_port(pid: int) -> int:
    sockets = {
        os.readlink(entry).removeprefix("socket:[").rstrip("]")
        for entry in Path(f"/proc/{pid}/fd").iterdir()
        if entry.is_symlink() and os.path.lexists(entry) and "socket" in os.readlink(entry)
    }
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        if fields[3] == "0A" and fields[9] in sockets:  # state LISTEN, a socket of this process
            return int(fields[1].partition(":")[2], 16)
    raise AssertionError(f"process {pid} has no listening socket")


def panel_expressions() -> list[tuple[str, str]]:
    """The panel, and its expression as Grafana sends it, with a range of 20 s."""
    found = []
    for path in sorted((ROOT / "deploy/grafana/dashboards").glob("*.json")):
        for panel in json.loads(path.read_text())["panels"]:
            for target in panel["targets"]:
                expression = target["expr"].replace("$__rate_interval", "20s")
                expression = re.sub(r"\$(model|instance|job)\b", ".*", expression)
                found.append((f"{path.stem}: {panel['title']}", expression))
    return found


def alert_expression(rule: dict[str, Any]) -> str:
    """The expression of an alert, changed to have a value when the alert does not fire. One hour
    ago becomes 1 s ago."""
    expression, count = re.subn(r"([<>]) ([\d.]+)\s*$", r"\1 bool \2", rule["expr"])
    assert count == 1, rule["expr"]
    return expression.replace("offset 1h", "offset 1s")


def bucket_width(seconds: float) -> float:
    """Width of the histogram bucket that contains the value."""
    return next(high - low for low, high in pairwise((0.0, *SECONDS)) if low < seconds <= high)


async def test_every_panel_rule_and_alert_has_data_and_the_counts_agree(tmp_path: Path) -> None:
    publish(tmp_path / "engines", max_batch=4, trained=False)
    async with (
        asyncio.timeout(LIMIT_S),
        serve(tmp_path / "engines", load=load, queue_rows=8, max_images_per_call=8) as served,
        scraping(served, tmp_path) as prometheus,
    ):
        served.server.metrics.read_gpus(GpuMonitor(FakeNvml()))
        served.server.metrics.principals.keep({"team-a"})  # as an auth file does
        served.server.metrics.read_tls(lambda: time.time() + 90 * 86_400, lambda: False)
        await prometheus.wait_for("up", 1)  # target discovery runs every 5 s
        reports = [await measure(plan) for plan in plans(served)]
        calls = 'convserve_requests_total{method=~"Classify|Model(Stream)?Infer", code="%s"}'
        counts = [report.summary.counts for report in reports]
        successful = sum(count.get("OK", 0) for count in counts)
        refused = sum(count.get("RESOURCE_EXHAUSTED", 0) for count in counts)
        await prometheus.wait_for(f"sum({calls % 'OK'})", successful)
        assert await prometheus.value("sum(convserve_request_duration_seconds_count)") >= successful
        assert await prometheus.value("sum(convserve_images_total)") == successful
        assert await prometheus.value("sum(convserve_batch_rows_sum)") == successful
        counted = await prometheus.value("sum(convserve_refused_total)")
        assert counted == refused > 0
        await check_latency(prometheus, reports[0])

        empty = []
        for where, expression in panel_expressions():
            found = await prometheus.query(expression)
            if not found or all(value != value for _, value in found):
                empty.append((where, expression))
        for rule in RULES:
            expression = rule.get("record") or alert_expression(rule)
            if not await prometheus.query(expression):
                empty.append((rule.get("alert", "rule"), expression))
        assert not empty
        response = await prometheus.client.get("/api/v1/rules")
        rules = [rule for group in response.json()["data"]["groups"] for rule in group["rules"]]
        assert len(rules) == len(RULES)
        assert {rule["health"] for rule in rules} == {"ok"}


def plans(served: Served) -> list[Plan]:
    """First one client without concurrency, for the latency. Then overload with the other protocol,
    so that some requests are refused. Deadlines are long: client and server may disagree about a
    request whose deadline expires at the moment of the response."""
    single = Plan(
        target=served.target,
        classes=(RequestClass(model="tiny", deadline_ms=20_000),),
        concurrency=1,
        warmup_s=0.0,
        duration_s=1.5,
    )
    overload = Plan(
        target=served.target,
        protocol="oip",
        classes=(RequestClass(model="tiny", deadline_ms=20_000),),
        concurrency=None,
        rate_hz=300,
        warmup_s=0.0,
        duration_s=1.5,
    )
    return [single, overload]


async def check_latency(prometheus: Prometheus, report: Report) -> None:
    """The client's p99 and the p99 from Prometheus's buckets differ by one bucket at most."""
    buckets = 'convserve_request_duration_seconds_bucket{method="Classify"}'
    server_s = await prometheus.value(f"histogram_quantile(0.99, sum by (le) ({buckets}))")
    assert report.summary.latency is not None
    client_s = report.summary.latency.p99_s
    assert abs(server_s - client_s) <= max(bucket_width(server_s), bucket_width(client_s))
