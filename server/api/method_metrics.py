"""Metrics of one RPC method, the same for every protocol."""

from __future__ import annotations

import logging
from typing import Any

from grpc import StatusCode

from server.api.context import CallContext
from server.api.status import STATUS
from server.errors import DeadlineUnreachable, Overloaded, QuotaExceeded, ServingError
from server.security.principal import ANONYMOUS
from server.telemetry.metrics import INFERENCE_METHODS, Metrics

log = logging.getLogger(__name__)

REFUSAL_REASON: dict[type[ServingError], str] = {
    Overloaded: "overloaded",
    QuotaExceeded: "quota",
    DeadlineUnreachable: "deadline_unreachable",
}


class MethodMetrics:
    """Counts the calls of one method. Each call ends in exactly one of these functions."""

    def __init__(self, method: str, metrics: Metrics) -> None:
        self._method = method
        self._metrics = metrics
        self._is_inference = method in INFERENCE_METHODS
        self._counters = metrics.bound_series()
        self._durations = metrics.bound_series()
        self._shed = metrics.requests.labels("", "", method, StatusCode.RESOURCE_EXHAUSTED.name)
        self._shed_reason = metrics.refused.labels("", REFUSAL_REASON[Overloaded])

    def succeeded(self, context: CallContext, seconds: float) -> None:
        self.count(context, StatusCode.OK)
        key = (context.model, context.version if self._is_inference else "")
        duration = self._durations.get(key)
        if duration is None:
            duration = self._metrics.request_duration.labels(*key, self._method)
            self._durations[key] = duration
        duration.observe(seconds, None if context.trace is None else context.trace.exemplar)

    def failed(self, context: CallContext, error: ServingError) -> None:
        self.count(context, STATUS[type(error)])
        # Later stages have admitted the call. If it expires then, the executor counts it as missed.
        if context.stage == "decode" and (reason := REFUSAL_REASON.get(type(error))):
            self._metrics.refused.labels(context.model, reason).inc()
            principal = context.caller.principal.name
            self._metrics.principals.request_refused(principal, reason)

    def cancelled(self, context: CallContext, *, expired: bool) -> None:
        """The caller cancelled, or the deadline passed."""
        self.count(context, StatusCode.DEADLINE_EXCEEDED if expired else StatusCode.CANCELLED)
        if expired and context.model:
            self._metrics.deadline_missed.labels(context.model, context.stage).inc()

    def crashed(self, context: CallContext) -> None:
        """An unexpected exception ended the call. Must be called while it is handled."""
        log.exception("call_failed", extra={"method": self._method, "model": context.model})
        self.count(context, StatusCode.INTERNAL)

    def shed(self, principal: str) -> None:
        """The transport refused the call under overload, before there was a context."""
        self._shed.inc()
        self._shed_reason.inc()
        if principal != ANONYMOUS:
            self._metrics.principals.request_ended(principal, StatusCode.RESOURCE_EXHAUSTED.name)
            self._metrics.principals.request_refused(principal, REFUSAL_REASON[Overloaded])

    def rejected(self, code: StatusCode) -> None:
        """The transport ended the call before its message was complete."""
        self._counter("", "", code).inc()

    def count(self, context: CallContext, code: StatusCode) -> None:
        self._counter(context.model, context.version, code).inc()
        principal = context.caller.principal.name
        if principal != ANONYMOUS:
            self._metrics.principals.request_ended(principal, code.name)
        if context.trace is not None:
            context.trace.end(code.name)

    def _counter(self, model: str, version: str, code: StatusCode) -> Any:
        key = (model, version, code.name)
        counter = self._counters.get(key)
        if counter is None:
            counter = self._metrics.requests.labels(model, version, self._method, code.name)
            self._counters[key] = counter
        return counter
