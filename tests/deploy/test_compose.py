"""docker-compose.yml: profiles, ports, mounts and limits. No container engine is needed."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from server.settings import Settings
from tests.deploy.files import COMPOSE, DOCKERFILE, ROOT, stage


def check_schema(compose: Path) -> subprocess.CompletedProcess[str]:
    """Checks a file with the schema of compose-spec.io, which check-jsonschema includes."""
    check = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
    return subprocess.run([*check, str(compose)], capture_output=True, text=True)


def test_the_compose_file_follows_the_compose_schema(tmp_path: Path) -> None:
    checked = check_schema(ROOT / "docker-compose.yml")
    assert checked.returncode == 0, checked.stdout
    wrong = COMPOSE | {"services": COMPOSE["services"] | {"prometheus": {"imag": "no such key"}}}
    (tmp_path / "docker-compose.yml").write_text(yaml.safe_dump(wrong))
    refused = check_schema(tmp_path / "docker-compose.yml")
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
def test_a_profile_starts_its_services(profile: str, services: set[str]) -> None:
    started = {
        name
        for name, service in COMPOSE["services"].items()
        if profile in service.get("profiles", [profile])
    }
    assert started == services


def test_each_profile_publishes_all_four_ports_once() -> None:
    for profile in ("cpu", "gpu"):
        ports = [
            port.rpartition(":")[2]
            for service in COMPOSE["services"].values()
            if profile in service["profiles"]
            for port in service.get("ports", ())
        ]
        assert sorted(ports) == ["3000", "8000", "8001", "9090"]


def test_ports_are_open_on_this_machine_only_by_default() -> None:
    for service in COMPOSE["services"].values():
        for port in service.get("ports", ()):
            assert port.startswith("${BIND:-127.0.0.1}:")


def test_every_mounted_path_exists_or_is_created_by_a_build() -> None:
    for service in COMPOSE["services"].values():
        for volume in service.get("volumes", ()):
            source = volume.split(":")[0]
            if not source.startswith("."):
                assert source in COMPOSE["volumes"]
            elif source != "./model_repo/engines":
                assert (ROOT / source).exists(), source


@pytest.mark.parametrize("name", ["server-cpu", "server-gpu"])
def test_a_server_reads_its_models_and_writes_nothing(name: str) -> None:
    service = COMPOSE["services"][name]
    assert service["volumes"] == ["./model_repo/engines:/models:ro"]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]


@pytest.mark.parametrize("name", ["server-cpu", "server-gpu"])
def test_the_stop_grace_period_is_longer_than_drain_notice_and_grace(name: str) -> None:
    (notice,) = re.findall(r"CONVSERVE_DRAIN_NOTICE_S=(\d+)", DOCKERFILE)
    period_s = float(COMPOSE["services"][name]["stop_grace_period"].rstrip("s"))
    assert period_s > int(notice) + Settings().grace_s


def test_only_the_gpu_profile_reserves_a_gpu() -> None:
    services = COMPOSE["services"]
    (device,) = services["server-gpu"]["deploy"]["resources"]["reservations"]["devices"]
    assert device["capabilities"] == ["gpu"]
    assert "deploy" not in services["server-cpu"]


def test_prometheus_scrapes_the_server_of_either_profile() -> None:
    config = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text())
    targets = config["scrape_configs"][0]["static_configs"][0]["targets"]
    for name in ("server-cpu", "server-gpu"):
        aliases = COMPOSE["services"][name]["networks"]["default"]["aliases"]
        assert targets == [f"{alias}:8000" for alias in aliases]


def test_every_image_is_built_from_an_existing_stage_with_existing_arguments() -> None:
    for service in COMPOSE["services"].values():
        if "build" in service:
            assert (ROOT / service["build"]["dockerfile"]).is_file()
            assert stage(service["build"]["target"])
            for argument in service["build"]["args"]:
                assert f"ARG {argument}" in stage(service["build"]["target"])
