"""Grafana's dashboards: up to date, described, and only with metrics that the server exports."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy.grafana.build import dashboards
from server.telemetry.metrics import Metrics
from tests.deploy.files import COMPOSE, DASHBOARDS, ROOT
from tests.support.doc_tables import instruments

METRIC = re.compile(r"\b((?:convserve|process)_\w+|up)\b(?:\{([^}]*)\})?")
GROUPING = re.compile(r"\bby \(([^)]*)\)")
TARGET_LABELS = {"job", "instance"}  # added by Prometheus


def exported_metrics() -> dict[str, set[str]]:
    """Names under which Prometheus stores the server's metrics, with their labels."""
    found: dict[str, set[str]] = {"up": TARGET_LABELS}
    for family in Metrics().registry.collect():
        if family.name.startswith("process_"):
            found |= {sample.name: TARGET_LABELS for sample in family.samples}
    for name, kind, labels, _ in instruments():
        if kind == "histogram":
            found[f"{name}_bucket"] = {*labels, "le"} | TARGET_LABELS
            found[f"{name}_sum"] = found[f"{name}_count"] = TARGET_LABELS.union(labels)
        else:
            found[name] = TARGET_LABELS.union(labels)
    return found


def panels(dashboard: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(dashboard.read_text())["panels"]
    return found


def test_the_dashboards_are_up_to_date() -> None:
    committed = {path.name: path.read_text() for path in DASHBOARDS}
    assert committed == dashboards(), "run python -m deploy.grafana.build"


@pytest.mark.parametrize("dashboard", DASHBOARDS, ids=lambda path: path.stem)
def test_a_dashboard_uses_only_exported_metrics_and_labels(dashboard: Path) -> None:
    exported = exported_metrics()
    for expression in (
        target["expr"] for panel in panels(dashboard) for target in panel["targets"]
    ):
        metrics = METRIC.findall(expression)
        assert metrics, expression
        labels: set[str] = set()
        for name, selector in metrics:
            assert name in exported, expression
            labels |= exported[name]
            assert set(re.findall(r"(\w+)\s*[=!]", selector)) <= exported[name], expression
        for group in GROUPING.findall(expression):
            assert {label.strip() for label in group.split(",")} <= labels, expression


def data_sources(value: Any) -> Iterator[Any]:
    """Every reference to a data source in a dashboard, at any depth."""
    if isinstance(value, list):
        for one in value:
            yield from data_sources(one)
    elif isinstance(value, dict):
        for name, one in value.items():
            if name == "datasource":
                yield one
            else:
                yield from data_sources(one)


@pytest.mark.parametrize("dashboard", DASHBOARDS, ids=lambda path: path.stem)
def test_a_dashboard_works_with_any_prometheus(dashboard: Path) -> None:
    board = json.loads(dashboard.read_text())
    references = list(data_sources(board))
    assert len(references) > len(board["panels"])
    for reference in references:
        assert reference == {"type": "prometheus", "uid": "${datasource}"}
    first, *others = board["templating"]["list"]
    assert (first["name"], first["type"], first["query"]) == (
        "datasource",
        "datasource",
        "prometheus",
    )
    assert "current" not in first or not first["current"].get("value")
    for variable in others:
        assert "job=" not in json.dumps(variable["query"]), "each installation names its job"
        assert "allValue" not in variable or variable["name"] != "job", "other jobs have processes"
    for panel in board["panels"]:
        for target in panel["targets"]:
            assert 'job="' not in target["expr"]
            used = set(re.findall(r"\$(\w+)", target["expr"])) - {"__rate_interval"}
            assert used <= {variable["name"] for variable in others}


@pytest.mark.parametrize("dashboard", DASHBOARDS, ids=lambda path: path.stem)
def test_a_dashboard_has_the_form_of_an_export(dashboard: Path) -> None:
    """grafana.com accepts no other form, and only what it accepts can be imported by id."""
    board = json.loads(dashboard.read_text())
    assert board["__inputs"] == []
    assert board["id"] is None
    assert board["uid"]
    required = {(one["type"], one["id"]) for one in board["__requires"]}
    kinds = {("panel", panel["type"]) for panel in board["panels"]}
    assert required == {("grafana", "grafana"), ("datasource", "prometheus")} | kinds
    ids = [panel["id"] for panel in board["panels"]]
    assert len(set(ids)) == len(ids)


def test_the_provisioned_data_source_takes_nothing_over() -> None:
    provisioned = yaml.safe_load(
        (ROOT / "deploy/grafana/provisioning/datasources/prometheus.yml").read_text()
    )
    (source,) = provisioned["datasources"]
    assert source["type"] == "prometheus"
    assert not {"isDefault", "uid"} & source.keys()


def test_grafana_finds_the_dashboards() -> None:
    provider = yaml.safe_load(
        (ROOT / "deploy/grafana/provisioning/dashboards/files.yml").read_text()
    )["providers"][0]
    grafana = COMPOSE["services"]["grafana"]
    mounts = {volume.split(":")[1]: ROOT / volume.split(":")[0] for volume in grafana["volumes"]}
    assert sorted(mounts[provider["options"]["path"]].glob("*.json")) == DASHBOARDS
    home = Path(grafana["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"])
    assert (mounts[str(home.parent)] / home.name).is_file()


@pytest.mark.parametrize("dashboard", DASHBOARDS, ids=lambda path: path.stem)
def test_every_panel_has_a_unit_a_description_and_no_average_of_quantiles(dashboard: Path) -> None:
    for panel in panels(dashboard):
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        assert len(panel["description"]) > 20, panel["title"]
        for target in panel["targets"]:
            assert not re.search(r"avg\w*\s*(by|\()", target["expr"]), panel["title"]
