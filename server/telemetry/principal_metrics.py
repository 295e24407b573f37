"""Metrics by principal, for the names in the auth file only: a closed set."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter

LABEL = "principal"
REFUSAL_REASONS = ("overloaded", "quota", "deadline_unreachable")


class PrincipalMetrics:
    """Counters by principal. Without an auth file they have no series."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def counter(name: str, help: str, *labels: str) -> Counter:
            return Counter(f"convserve_principal_{name}", help, (LABEL, *labels), registry=registry)

        self._requests = counter("requests", "Requests of a principal by status.", "code")
        self._images = counter("images", "Images classified for a principal.")
        text = "Requests of a principal refused before any work was done."
        self._refused = counter("refused", text, "reason")
        text = "Device time of a principal's images: its rows' part of each batch."
        self._device = counter("device_seconds", text)
        self._names: frozenset[str] = frozenset()

    def keep(self, principals: Iterable[str]) -> None:
        """Deletes the series of all principals but these, which start at 0."""
        names = frozenset(principals)
        for name in self._names - names:
            for instrument in (self._requests, self._images, self._refused, self._device):
                instrument.remove_by_labels({LABEL: name})
        for name in names - self._names:
            self._images.labels(name)
            self._device.labels(name)
            for reason in REFUSAL_REASONS:
                self._refused.labels(name, reason)
        self._names = names

    def request_ended(self, principal: str, code: str) -> None:
        if principal in self._names:
            self._requests.labels(principal, code).inc()

    def request_refused(self, principal: str, reason: str) -> None:
        if principal in self._names:
            self._refused.labels(principal, reason).inc()

    def images_answered(self, principal: str, images: int) -> None:
        if principal in self._names:
            self._images.labels(principal).inc(images)

    def device_used(self, principal: str, seconds: float) -> None:
        if principal in self._names:
            self._device.labels(principal).inc(seconds)
