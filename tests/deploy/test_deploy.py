"""What deploy/ and the Makefile promise, as far as it can be told without a container engine."""

from __future__ import annotations

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from server.settings import parse
from server.telemetry.metrics import Metrics
from tests.support.doc_tables import instruments

ROOT = Path(__file__).resolve().parent.parent.parent
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
DOCKERFILE = (ROOT / "deploy/Dockerfile").read_text()
DASHBOARDS = sorted((ROOT / "deploy/grafana/dashboards").glob("*.json"))
ASKED = re.compile(r"\b((?:convserve|process)_\w+|up)\b(?:\{([^}]*)\})?")
TARGET = {"job", "instance"}  # labels that Prometheus adds
GROUPED = re.compile(r"\bby \(([^)]*)\)")


# --- the compose file ------------------------------------------------------------------------


def follows_the_schema(compose: Path) -> subprocess.CompletedProcess[str]:
    """What a check by the schema of compose-spec.io says, as check-jsonschema brings it along."""
    check = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
    return subprocess.run([*check, str(compose)], capture_output=True, text=True)


def test_the_compose_file_follows_the_schema_of_compose_files(tmp_path: Path) -> None:
    checked = follows_the_schema(ROOT / "docker-compose.yml")
    assert checked.returncode == 0, checked.stdout
    wrong = COMPOSE | {"services": COMPOSE["services"] | {"prometheus": {"imag": "no such key"}}}
    (tmp_path / "docker-compose.yml").write_text(yaml.safe_dump(wrong))
    refused = follows_the_schema(tmp_path / "docker-compose.yml")
    assert refused.returncode == 1
    assert "imag" in refused.stdout


@pytest.mark.parametrize(
    ("profile", "services"),
    [
        ("cpu", {"server-cpu", "prometheus", "grafana"}),
        ("gpu", {"server-gpu", "prometheus", "grafana"}),
        ("build", {"build"}),
    ],
)
def test_a_profile_starts_what_belongs_together(profile: str, services: set[str]) -> None:
    started = {
        name
        for name, service in COMPOSE["services"].items()
        if profile in service.get("profiles", [profile])
    }
    assert started == services


def test_no_profile_binds_a_port_twice_and_all_four_are_there() -> None:
    for profile in ("cpu", "gpu"):
        ports = [
            port.rpartition(":")[2]
            for service in COMPOSE["services"].values()
            if profile in service["profiles"]
            for port in service.get("ports", ())
        ]
        assert sorted(ports) == ["3000", "8000", "8001", "9090"]


def test_ports_are_open_to_this_machine_only_unless_asked() -> None:
    for service in COMPOSE["services"].values():
        for port in service.get("ports", ()):
            assert port.startswith("${BIND:-127.0.0.1}:")


def test_every_mounted_path_exists_or_is_made_by_a_build() -> None:
    for service in COMPOSE["services"].values():
        for volume in service.get("volumes", ()):
            source = volume.split(":")[0]
            if not source.startswith("."):
                assert source in COMPOSE["volumes"]
            elif source != "./model_repo/engines":
                assert (ROOT / source).exists(), source


@pytest.mark.parametrize("name", ["server-cpu", "server-gpu"])
def test_a_server_may_read_its_models_and_write_nothing(name: str) -> None:
    service = COMPOSE["services"][name]
    assert service["volumes"] == ["./model_repo/engines:/models:ro"]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]


@pytest.mark.parametrize("name", ["server-cpu", "server-gpu"])
def test_a_server_is_given_longer_to_stop_than_its_own_notice_and_grace(name: str) -> None:
    from server.settings import Settings

    (notice,) = re.findall(r"CONVSERVE_DRAIN_NOTICE_S=(\d+)", DOCKERFILE)
    given_s = float(COMPOSE["services"][name]["stop_grace_period"].rstrip("s"))
    assert given_s > int(notice) + Settings().grace_s


def test_only_the_gpu_profile_reserves_a_gpu() -> None:
    services = COMPOSE["services"]
    (device,) = services["server-gpu"]["deploy"]["resources"]["reservations"]["devices"]
    assert device["capabilities"] == ["gpu"]
    assert "deploy" not in services["server-cpu"]


def test_prometheus_asks_the_server_where_it_is() -> None:
    config = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text())
    targets = config["scrape_configs"][0]["static_configs"][0]["targets"]
    for name in ("server-cpu", "server-gpu"):
        aliases = COMPOSE["services"][name]["networks"]["default"]["aliases"]
        assert targets == [f"{alias}:8000" for alias in aliases]


# --- the images ------------------------------------------------------------------------------


def stage(name: str) -> str:
    """The Dockerfile's lines of one stage."""
    stages = re.split(r"^FROM ", DOCKERFILE, flags=re.MULTILINE)[1:]
    (found,) = [lines for lines in stages if lines.splitlines()[0].endswith(f" AS {name}")]
    return found


def copied(lines: str) -> list[str]:
    return [
        source
        for line in re.findall(r"^COPY (.*)$", lines, flags=re.MULTILINE)
        for source in line.split()[:-1]
    ]


def test_every_service_is_built_from_a_stage_there_is() -> None:
    for service in COMPOSE["services"].values():
        if "build" in service:
            assert (ROOT / service["build"]["dockerfile"]).is_file()
            assert stage(service["build"]["target"])
            for argument in service["build"]["args"]:
                assert f"ARG {argument}" in stage(service["build"]["target"])


def test_the_serving_image_is_not_root_has_no_torch_and_stops_cleanly() -> None:
    serve = stage("serve")
    assert re.search(r"^USER 10001:10001$", serve, flags=re.MULTILINE)
    assert re.search(r"^STOPSIGNAL SIGTERM$", serve, flags=re.MULTILINE)
    assert re.search(r"^HEALTHCHECK ", serve, flags=re.MULTILINE)
    assert "model_repo" not in serve
    assert "torch" not in requirements("cpu")
    assert "torch==" in requirements("cpu", "build")


def test_what_the_images_copy_is_there_and_not_ignored() -> None:
    patterns = [
        line
        for line in (ROOT / ".dockerignore").read_text().splitlines()
        if line and not line.startswith("#")
    ]
    for source in copied(DOCKERFILE):
        assert (ROOT / source).exists(), source
        ignored = False
        for pattern in patterns:
            wanted = pattern.removeprefix("!")
            if fnmatch(source.rstrip("/"), wanted):
                ignored = not pattern.startswith("!")
        assert not ignored, source


def test_the_serving_image_holds_all_that_a_server_imports(tmp_path: Path) -> None:
    for source in copied(stage("base")) + copied(stage("serve")):
        target = tmp_path / source
        target.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / source).is_dir():
            shutil.copytree(ROOT / source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / source, target)
    blocked = (
        "import sys\nfor name in ('torch', 'model_repo', 'clients'): sys.modules[name] = None\n"
    )
    started = subprocess.run(
        [sys.executable, "-c", blocked + "from server.__main__ import main\nsys.exit(main())"],
        cwd=tmp_path,
        env={"PATH": os.environ["PATH"], "CONVSERVE_REPO": str(tmp_path / "missing")},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert started.returncode == 1, started.stderr
    assert "cannot_serve" in started.stderr


def requirements(*extras: str) -> str:
    done = subprocess.run(
        [sys.executable, ROOT / "deploy/requirements.py", *extras],
        capture_output=True,
        text=True,
    )
    return done.stdout + done.stderr


def test_an_extra_that_is_not_there_stops_the_image_and_is_named() -> None:
    assert "no extra 'tpu'" in requirements("tpu")


@contextmanager
def answering(status: int) -> Iterator[int]:
    """A port where every GET is answered with that status."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if self.path == "/readyz" else 404)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize(("status", "healthy"), [(200, True), (503, False)])
def test_the_healthcheck_says_what_readyz_says(status: int, healthy: bool) -> None:
    with answering(status) as port:
        environment = {
            "CONVSERVE_HTTP_PORT": str(port),
            "http_proxy": "http://127.0.0.1:1",  # must not be asked
        }
        checked = subprocess.run(
            [sys.executable, ROOT / "deploy/healthcheck.py"], env=environment, capture_output=True
        )
    assert (checked.returncode == 0) is healthy


@pytest.mark.parametrize("variable", ["", "tcp://10.0.0.1:8000"])
def test_the_healthcheck_takes_the_port_that_the_server_takes(
    variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kubernetes sets the second for a service called convserve-http."""
    asked: list[str] = []

    class Opener:
        def open(self, url: str, timeout: float) -> Any:
            asked.append(url)
            return nullcontext()

    monkeypatch.setenv("CONVSERVE_HTTP_PORT", variable)
    monkeypatch.setattr(urllib.request, "build_opener", lambda *_: Opener())
    found = runpy.run_path(str(ROOT / "deploy/healthcheck.py"))
    assert found["main"]() == 0
    port = parse([], {"CONVSERVE_HTTP_PORT": variable}).http_port
    assert asked == [f"http://127.0.0.1:{port}/readyz"]


# --- the dashboards --------------------------------------------------------------------------


def exported() -> dict[str, set[str]]:
    """Names that Prometheus stores of ours and of the process, with the labels of each."""
    found: dict[str, set[str]] = {"up": TARGET}
    for family in Metrics().registry.collect():
        if family.name.startswith("process_"):
            found |= {sample.name: TARGET for sample in family.samples}
    for name, kind, labels, _ in instruments():
        if kind == "histogram":
            found[f"{name}_bucket"] = {*labels, "le"} | TARGET
            found[f"{name}_sum"] = found[f"{name}_count"] = TARGET.union(labels)
        else:
            found[name] = TARGET.union(labels)
    return found


def expressions(dashboard: Path) -> list[str]:
    panels = json.loads(dashboard.read_text())["panels"]
    return [target["expr"] for panel in panels for target in panel.get("targets", ())]


@pytest.mark.parametrize("dashboard", DASHBOARDS, ids=lambda path: path.stem)
def test_a_dashboard_asks_only_for_metrics_and_labels_there_are(dashboard: Path) -> None:
    known = exported()
    for expression in expressions(dashboard):
        asked = ASKED.findall(expression)
        assert asked, expression
        of: set[str] = set()
        for name, selector in asked:
            assert name in known, expression
            of |= known[name]
            assert set(re.findall(r"(\w+)\s*[=!]", selector)) <= known[name], expression
        for group in GROUPED.findall(expression):
            assert {label.strip() for label in group.split(",")} <= of, expression


@pytest.mark.parametrize("dashboard", DASHBOARDS, ids=lambda path: path.stem)
def test_a_dashboard_uses_the_data_source_that_is_set_up(dashboard: Path) -> None:
    provisioned = yaml.safe_load(
        (ROOT / "deploy/grafana/provisioning/datasources/prometheus.yml").read_text()
    )
    uids = {source["uid"] for source in provisioned["datasources"]}
    content = json.loads(dashboard.read_text())
    assert {panel["datasource"]["uid"] for panel in content["panels"]} <= uids
    assert len({panel["id"] for panel in content["panels"]}) == len(content["panels"])


def test_grafana_finds_its_dashboards() -> None:
    provider = yaml.safe_load(
        (ROOT / "deploy/grafana/provisioning/dashboards/files.yml").read_text()
    )["providers"][0]
    grafana = COMPOSE["services"]["grafana"]
    mounts = {volume.split(":")[1]: ROOT / volume.split(":")[0] for volume in grafana["volumes"]}
    assert sorted(mounts[provider["options"]["path"]].glob("*.json")) == DASHBOARDS
    home = Path(grafana["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"])
    assert (mounts[str(home.parent)] / home.name).is_file()


# --- make and CI -----------------------------------------------------------------------------


def make(*arguments: str) -> str:
    done = subprocess.run(
        ["make", *arguments],
        cwd=ROOT,
        env={"PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_make_alone_lists_every_command() -> None:
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert phony is not None
    listed = set(re.findall(r"^  make ([a-z-]+) ", make(), flags=re.MULTILINE))
    assert listed == set(phony[1].split())


def test_an_index_of_torch_goes_to_pip(tmp_path: Path) -> None:
    plan = make("-n", "test", f"VENV={tmp_path / 'venv'}", "TORCH_INDEX=https://torch.example")
    assert "--extra-index-url https://torch.example" in plan


def test_make_test_makes_its_environment_lints_checks_types_and_tests(tmp_path: Path) -> None:
    plan = make("-n", "test", f"VENV={tmp_path / 'venv'}")
    steps = ["-m venv", "build,dev", "-m ruff check", "-m ruff format", "-m mypy", "-m pytest"]
    places = [plan.index(step) for step in steps]
    assert places == sorted(places)


def test_ci_runs_what_a_contributor_runs() -> None:
    script = ROOT / ".ci/run"
    assert os.access(script, os.X_OK)
    assert script.read_text().rstrip().endswith("exec make test")
