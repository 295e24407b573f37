"""Tracing: spans of sampled requests reach a real collector; other requests make no spans."""

from __future__ import annotations

import asyncio
import itertools
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as otlp
from opentelemetry.sdk.trace import TracerProvider

from convserve_client import AsyncClient
from server.errors import CannotServe
from tests.support.serving import (
    SERVICE,
    Mirrors,
    Served,
    loading,
    publish,
    raw,
    serve,
)

TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT = "00f067aa0ba902b7"
EXPORT = "/opentelemetry.proto.collector.trace.v1.TraceService/Export"


class Collector:
    """Receives spans by OTLP over gRPC, like an OpenTelemetry collector."""

    def __init__(self) -> None:
        self.spans: list[Any] = []

    def named(self, name: str) -> list[Any]:
        return [span for span in self.spans if span.name == name]

    async def export(self, request: otlp.ExportTraceServiceRequest, context: Any) -> Any:
        for resource in request.resource_spans:
            for scope in resource.scope_spans:
                self.spans += scope.spans
        return otlp.ExportTraceServiceResponse()


@asynccontextmanager
async def collecting() -> AsyncIterator[tuple[Collector, str]]:
    """A running collector and its address."""
    collector, server = Collector(), grpc.aio.server()
    handler = grpc.unary_unary_rpc_method_handler(
        collector.export,
        request_deserializer=otlp.ExportTraceServiceRequest.FromString,
        response_serializer=otlp.ExportTraceServiceResponse.SerializeToString,
    )
    service, _, method = EXPORT[1:].partition("/")
    generic = grpc.method_handlers_generic_handler(service, {method: handler})
    server.add_generic_rpc_handlers([generic])
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield collector, f"127.0.0.1:{port}"
    finally:
        await server.stop(None)


def context(sampled: bool, parent: str = PARENT) -> tuple[tuple[str, str], ...]:
    return (("traceparent", f"00-{TRACE_ID}-{parent}-0{sampled:d}"),)


async def classify(served: Served, metadata: Any, *classes: int) -> None:
    unary: Any = served.channel.unary_unary
    request = raw(*classes).SerializeToString()
    await unary(SERVICE + "Classify")(request, timeout=20, metadata=metadata)


async def test_a_sampled_request_has_spans_for_its_phases_and_its_batch(tmp_path: Path) -> None:
    publish(tmp_path)
    mirrors = Mirrors(held=True)
    began_ns = time.time_ns()
    async with collecting() as (collector, endpoint):
        async with serve(
            tmp_path, load=loading(mirrors), trace_endpoint=endpoint, trace_ratio=0.0
        ) as served:
            calls = [asyncio.create_task(classify(served, context(True), 1))]
            await mirrors.made[0].started.wait()
            for _ in range(2):  # these two wait and then share a batch
                calls.append(asyncio.create_task(classify(served, context(True), 1)))
            model = next(iter(served.server.registry.serving_models()))
            while model.executor.queued_rows(model.key) < 2:
                await asyncio.sleep(0)
            mirrors.made[0].release()
            await asyncio.gather(*calls)
            await classify(served, context(False), 1)  # the caller did not sample it
            await classify(served, (), 1)  # no traceparent, and the ratio is 0
            accept = {"accept": "application/openmetrics-text;version=1.0.0"}
            async with httpx.AsyncClient() as client:
                metrics = await client.get(served.http + "/metrics", headers=accept)
        # The server has exported all spans while it stopped.
        roots = collector.named("Classify")
        assert len(roots) == 3
        for root in roots:
            assert root.trace_id.hex() == TRACE_ID
            assert root.parent_span_id.hex() == PARENT
            assert root.kind == root.SPAN_KIND_SERVER
            children = [span for span in collector.spans if span.parent_span_id == root.span_id]
            phases = [span for span in children if span.name != "batch"]
            assert [span.name for span in phases] == ["decode", "queue", "compute", "respond"]
            for before, after in itertools.pairwise(phases):
                assert before.end_time_unix_nano == pytest.approx(after.start_time_unix_nano, abs=9)
            assert began_ns < root.start_time_unix_nano <= phases[0].start_time_unix_nano
            assert phases[-1].end_time_unix_nano <= root.end_time_unix_nano <= time.time_ns()
        batches = collector.named("batch")
        assert sorted(len(batch.links) for batch in batches) == [1, 2]
        linked = {link.span_id for batch in batches for link in batch.links}
        assert linked == {root.span_id for root in roots}
    assert f'# {{trace_id="{TRACE_ID}"}}' in metrics.text


async def test_the_span_of_a_failed_request_has_error_status(tmp_path: Path) -> None:
    publish(tmp_path)
    mirrors = Mirrors()
    async with collecting() as (collector, endpoint):
        async with serve(tmp_path, load=loading(mirrors), trace_endpoint=endpoint) as served:
            mirrors.made[0].failure = RuntimeError("broken")
            with pytest.raises(grpc.aio.AioRpcError):
                await classify(served, context(True), 1)
        (root,) = collector.named("Classify")
    assert root.status.code == root.status.STATUS_CODE_ERROR
    attributes = {attribute.key: attribute.value.string_value for attribute in root.attributes}
    assert attributes["rpc.response.status_code"] == "INTERNAL"


async def test_the_client_library_propagates_the_current_span_of_the_program(
    tmp_path: Path,
) -> None:
    publish(tmp_path)
    tracer = TracerProvider(shutdown_on_exit=False).get_tracer("a program")
    async with collecting() as (collector, endpoint):
        async with (
            serve(
                tmp_path, load=loading(Mirrors()), trace_endpoint=endpoint, trace_ratio=0.0
            ) as served,
            AsyncClient(served.target) as client,
        ):
            pixels = np.zeros((1, 8, 6, 3), np.uint8)
            await client.classify(pixels, model="tiny")  # outside of any span
            with tracer.start_as_current_span("work") as span:
                await client.classify(pixels, model="tiny")
        (root,) = collector.named("Classify")
    assert root.trace_id == span.get_span_context().trace_id.to_bytes(16, "big")
    assert root.parent_span_id == span.get_span_context().span_id.to_bytes(8, "big")


async def test_requests_are_answered_while_the_collector_is_unreachable(tmp_path: Path) -> None:
    publish(tmp_path)
    async with collecting() as (_, endpoint):
        pass
    async with serve(tmp_path, load=loading(Mirrors()), trace_endpoint=endpoint) as served:
        await classify(served, context(True), 1)


async def test_a_server_does_not_start_without_the_tracing_packages_it_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(tmp_path)
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(CannotServe, match=r"pip install 'convserve\[otel\]'"):
        async with serve(tmp_path, load=loading(Mirrors()), trace_endpoint="127.0.0.1:1"):
            pass
