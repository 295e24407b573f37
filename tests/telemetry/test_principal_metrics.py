"""Metrics by principal: only for names that are kept."""

from __future__ import annotations

from prometheus_client import CollectorRegistry

from server.telemetry.principal_metrics import PrincipalMetrics


def series(registry: CollectorRegistry) -> dict[tuple[str, str, str], float]:
    """Values by principal, name and second label."""
    return {
        (sample.labels["principal"], sample.name, sample.labels.get("code", "")): sample.value
        for family in registry.collect()
        for sample in family.samples
        if not sample.name.endswith("_created") and "reason" not in sample.labels
    }


def test_names_that_are_not_kept_have_no_series() -> None:
    registry = CollectorRegistry()
    metrics = PrincipalMetrics(registry)
    metrics.keep(["a", "b"])
    for name in ("a", "b", "stranger", "anonymous", ""):
        metrics.request_ended(name, "OK")
        metrics.images_answered(name, 3)
        metrics.request_refused(name, "quota")
        metrics.device_used(name, 0.5)
    assert {principal for principal, _, _ in series(registry)} == {"a", "b"}
    assert series(registry)["a", "convserve_principal_images_total", ""] == 3
    assert series(registry)["a", "convserve_principal_requests_total", "OK"] == 1
    assert series(registry)["a", "convserve_principal_device_seconds_total", ""] == 0.5


def test_the_series_of_a_principal_that_left_are_deleted() -> None:
    registry = CollectorRegistry()
    metrics = PrincipalMetrics(registry)
    metrics.keep(["a", "b"])
    for name in ("a", "b"):
        metrics.request_ended(name, "OK")
        metrics.images_answered(name, 1)
    metrics.keep(["b", "c"])
    metrics.images_answered("a", 1)
    assert {principal for principal, _, _ in series(registry)} == {"b", "c"}
    assert series(registry)["b", "convserve_principal_images_total", ""] == 1
    assert series(registry)["c", "convserve_principal_images_total", ""] == 0
