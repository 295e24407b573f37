"""A measurement counts every request once and reports what the server did."""

from itertools import takewhile

import grpc
import pytest

from convserve_client import ModelNotFound
from convserve_client.loadgen.arrivals import poisson
from convserve_client.loadgen.measure import measure
from convserve_client.loadgen.plan import RequestClass
from convserve_client.loadgen.results.samples import NOT_SENT, OK
from convserve_client.stubs import classify_pb2 as pb
from tests.clients.loadgen.plans import make_plan, open_loop_plan
from tests.support.scripted_classifier import (
    ANSWER,
    Context,
    ScriptedClassifier,
    answer,
    refuse,
    serving,
)


async def test_every_request_is_counted_with_its_final_status() -> None:
    refused = refuse(grpc.StatusCode.RESOURCE_EXHAUSTED)
    broken = refuse(grpc.StatusCode.INTERNAL)
    service = ScriptedClassifier(refused, answer, refused, broken, answer)
    async with serving(service) as target:
        report = await measure(make_plan(target))
    assert report.summary.total == len(service.requests)  # refusals are not retried
    assert report.summary.counts == {
        "RESOURCE_EXHAUSTED": 2,
        "INTERNAL": 1,
        OK: len(service.requests) - 3,
    }
    assert report.server.answers == report.summary.succeeded


async def test_the_warm_up_is_sent_but_not_counted() -> None:
    service = ScriptedClassifier()
    async with serving(service) as target:
        report = await measure(open_loop_plan(target, 100, warmup_s=0.3))
    due = list(takewhile(lambda due_s: due_s < 0.6, poisson(100, seed=1)))
    assert len(service.requests) == len(due)
    assert report.summary.counts == {OK: sum(due_s >= 0.3 for due_s in due)}
    assert report.server.answers == report.summary.succeeded


async def test_the_report_has_the_servers_own_timings() -> None:
    service = ScriptedClassifier()
    async with serving(service) as target:
        found = (await measure(make_plan(target, channels=2))).as_json()
    assert found["answered_by"] == [{"model": "small", "version": "3", "trained": True}]
    assert found["server_mean_ms"] == {"decode": 1, "queue": 2, "compute": 4, "total": 8}
    assert found["server_mean_batch_rows"] == pytest.approx(2.5)
    assert found["client_cpu_s_per_call"] > 0


async def test_each_channel_is_one_connection() -> None:
    peers: set[str] = set()

    async def note_peer(request: pb.ClassifyRequest, context: Context) -> pb.ClassifyResponse:
        peers.add(context.peer())
        return ANSWER

    async with serving(ScriptedClassifier(note_peer)) as target:
        await measure(make_plan(target, channels=3))
    assert len(peers) == 3


async def test_several_processes_together_send_the_same_load_as_one() -> None:
    service = ScriptedClassifier()
    async with serving(service) as target:
        report = await measure(
            open_loop_plan(target, 200, processes=2, warmup_s=0.1, duration_s=0.4)
        )
    due = list(takewhile(lambda due_s: due_s < 0.5, poisson(200, seed=1)))
    assert sorted(report.samples["due_s"]) == due
    assert len(service.requests) == len(due)
    assert report.summary.counts == {OK: sum(due_s >= 0.1 for due_s in due)}
    assert report.server.answers == report.summary.succeeded
    assert len(report.worker_cpu_s) == 2


async def test_a_long_result_of_a_worker_process_arrives_whole() -> None:
    async with serving(ScriptedClassifier()) as target:
        plan = open_loop_plan(target, 20_000, processes=2, max_in_flight=1)
        report = await measure(plan)
    due = list(takewhile(lambda due_s: due_s < 0.3, poisson(20_000, seed=1)))
    assert sorted(report.samples["due_s"]) == due  # 40 bytes each: more than a pipe's buffer
    assert report.summary.counts[NOT_SENT] > 2000


async def test_an_error_in_a_worker_process_is_raised_as_with_one_process() -> None:
    async with serving(ScriptedClassifier()) as target:
        with pytest.raises(ModelNotFound, match="nosuch"):
            await measure(make_plan(target, RequestClass(model="nosuch"), processes=2))


async def test_request_classes_are_sent_by_weight_and_reported_separately() -> None:
    often = RequestClass(model="small", images=2, priority=3, deadline_ms=5000, weight=3.0)
    seldom = RequestClass(model="small", deadline_ms=5000)
    service = ScriptedClassifier()
    async with serving(service) as target:
        report = await measure(open_loop_plan(target, 400, classes=(often, seldom), duration_s=0.5))
    counts = [part.total for part in report.by_class]
    assert sum(counts) == report.summary.total == len(service.requests)
    assert 2 < counts[0] / counts[1] < 4.5  # the seed is fixed
    sent = [(request.pixels.count, request.priority) for request in service.requests]
    assert {one: sent.count(one) for one in set(sent)} == {(2, 3): counts[0], (1, 0): counts[1]}


async def test_a_load_that_the_generator_cannot_send_is_not_valid() -> None:
    async with serving(ScriptedClassifier()) as target:
        report = await measure(open_loop_plan(target, 1e6, duration_s=0.01, max_in_flight=10_000))
    assert not report.is_valid
    assert report.summary.lag_p99_s is not None
    assert report.summary.lag_p99_s > 0.001
    assert "could not keep up" in report.faults[0]


async def test_windows_give_the_confidence_of_a_figure() -> None:
    async with serving(ScriptedClassifier()) as target:
        found = (await measure(make_plan(target, windows=4, duration_s=0.4))).as_json()
    sure = found["confidence_95"]["calls_hz"]
    assert sure["windows"] == 4
    assert sure["margin"] > 0
    assert sure["mean"] == pytest.approx(found["calls_hz"])
