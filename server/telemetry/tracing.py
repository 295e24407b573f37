"""Traces calls and exports them to an OpenTelemetry collector.

A traced call is a span with a child span for each phase. Its batch is a span that links to all
traced calls in it. The sampled flag of a W3C `traceparent` header decides whether its call is
traced; calls without the header are sampled. OpenTelemetry is imported only when tracing is on.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any

from server.telemetry.metrics import PHASES

HEADERS = ("traceparent", "tracestate")
EXPORT_S = 2.0  # timeout of one export, also of the last one at shutdown


class TracingMissing(Exception):
    """The packages for tracing are not installed."""


class Tracing:
    """Makes traces. An OpenTelemetry thread exports them. Used on the event loop's thread.

    Times are seconds of time.monotonic.
    """

    def __init__(self, endpoint: str, ratio: float) -> None:
        """Exports to `endpoint` (HOST:PORT) by OTLP over gRPC; samples the fraction `ratio`.

        Raises TracingMissing.
        """
        try:
            from opentelemetry import trace
            from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
        except ImportError as error:
            raise TracingMissing(
                f"tracing needs OpenTelemetry ({error.name} is missing): pip install "
                "'convserve[otel]'"
            ) from None
        resource = Resource.create({"service.name": "convserve"})
        self._provider = TracerProvider(
            sampler=ParentBased(TraceIdRatioBased(ratio)),
            resource=resource,
            shutdown_on_exit=False,
        )
        exporter = OTLPSpanExporter(endpoint=endpoint, insecure=True, timeout=EXPORT_S)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("convserve")
        self._extract = TraceContextTextMapPropagator().extract
        self._api = trace
        # Spans need Unix time. One fixed offset keeps the times of different spans consistent.
        self._epoch_ns = time.time_ns() - time.monotonic_ns()

    def begin(
        self, method: str, metadata: Iterable[tuple[str, Any]], arrived_s: float
    ) -> Trace | None:
        """The trace of a call that arrived; None if it is not sampled."""
        carrier = {key: str(value) for key, value in metadata if key in HEADERS}
        span = self._tracer.start_span(
            method,
            context=self._extract(carrier),
            kind=self._api.SpanKind.SERVER,
            start_time=self._ns(arrived_s),
        )
        return Trace(self, span, arrived_s) if span.is_recording() else None

    def batch(
        self,
        model: str,
        rows: int,
        started_s: float,
        done_s: float,
        traces: Sequence[Trace],
    ) -> None:
        """Records a batch. Its span is a child of the first call's, and links to all of them."""
        links = [self._api.Link(trace.span.get_span_context()) for trace in traces]
        span = self._tracer.start_span(
            "batch",
            context=traces[0].context,
            links=links,
            start_time=self._ns(started_s),
            attributes={"convserve.model": model, "convserve.rows": rows},
        )
        span.end(self._ns(done_s))

    def child(self, trace: Trace, name: str, started_s: float, ended_s: float) -> None:
        span = self._tracer.start_span(name, context=trace.context, start_time=self._ns(started_s))
        span.end(self._ns(ended_s))

    def end(self, span: Any, code: str) -> None:
        span.set_attribute("rpc.system", "grpc")
        span.set_attribute("rpc.response.status_code", code)
        if code in ("INTERNAL", "UNKNOWN", "UNAVAILABLE", "DEADLINE_EXCEEDED"):
            span.set_status(self._api.StatusCode.ERROR)
        span.end(self._ns(time.monotonic()))

    def context_of(self, span: Any) -> Any:
        return self._api.set_span_in_context(span)

    def close(self) -> None:
        """Exports the remaining spans. Blocks for some seconds if the collector does not answer."""
        self._provider.force_flush(round(EXPORT_S * 1e3))
        self._provider.shutdown()

    def _ns(self, seconds: float) -> int:
        return round(seconds * 1e9) + self._epoch_ns


class Trace:
    """One traced call."""

    __slots__ = ("_arrived_s", "_tracing", "context", "exemplar", "span")

    def __init__(self, tracing: Tracing, span: Any, arrived_s: float) -> None:
        self.span = span
        self.context = tracing.context_of(span)
        self.exemplar = {"trace_id": f"{span.get_span_context().trace_id:032x}"}
        self._tracing = tracing
        self._arrived_s = arrived_s

    def phases(self, model: str, images: int, *seconds: float) -> None:
        """Adds a child span for each phase, from its seconds in the order of metrics.PHASES."""
        self.span.set_attribute("convserve.model", model)
        self.span.set_attribute("convserve.images", images)
        began_s = self._arrived_s
        for name, spent_s in zip(PHASES, seconds, strict=True):
            self._tracing.child(self, name, began_s, began_s + spent_s)
            began_s += spent_s

    def end(self, code: str) -> None:
        """Ends the span now, with the call's status."""
        self._tracing.end(self.span, code)
