"""A run sends requests when they are due and records each outcome once."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest

from convserve_client.loadgen.event_loop import clock
from convserve_client.loadgen.plan import RequestClass
from convserve_client.loadgen.protocols.classify import (
    CLASSIFY,
    ClassifyAdapter,
)
from convserve_client.loadgen.results.samples import NOT_SENT, OK
from convserve_client.loadgen.run import Run
from convserve_client.loadgen.wire.call import UnaryCall
from convserve_client.loadgen.wire.channel import Channel
from convserve_client.stubs import classify_pb2 as pb
from tests.clients.loadgen.plans import make_plan, open_loop_plan
from tests.support.scripted_classifier import (
    ANSWER,
    Context,
    ScriptedClassifier,
    answer,
    refuse,
    retry_info,
    serving,
)


@asynccontextmanager
async def prepared_run(service: ScriptedClassifier, **changes: Any) -> AsyncIterator[Run]:
    """A run that sends empty requests to the service."""
    slow = RequestClass(model="small", deadline_ms=20_000)
    async with serving(service) as target:
        channel = Channel(target, CLASSIFY)
        await channel.connect()
        plan = make_plan(target, slow, **changes)
        yield Run(plan, [channel], [[b""]], ClassifyAdapter(), zero_s=clock())
        await channel.close()


def with_class(index: int, times: Iterator[float]) -> Iterator[tuple[float, int]]:
    return ((due_s, index) for due_s in times)


async def test_a_closed_loop_keeps_the_given_number_of_callers() -> None:
    in_flight = max_in_flight = 0
    gate = asyncio.Event()

    async def count(request: pb.ClassifyRequest, context: Context) -> pb.ClassifyResponse:
        nonlocal in_flight, max_in_flight
        in_flight += 1
        max_in_flight = max(max_in_flight, in_flight)
        if in_flight == 3:
            gate.set()
        await gate.wait()
        in_flight -= 1
        return ANSWER

    async with prepared_run(ScriptedClassifier(count)) as run:
        await run.closed_loop(3, iter(lambda: 0, None), until_s=run.now_s() + 0.5)
    assert max_in_flight == 3


async def test_an_open_loop_does_not_wait_for_answers() -> None:
    all_there = asyncio.Event()

    async def answer_when_all_have_arrived(
        request: pb.ClassifyRequest, context: Context
    ) -> pb.ClassifyResponse:
        if len(service.requests) == 20:
            all_there.set()
        await all_there.wait()
        return ANSWER

    service = ScriptedClassifier(answer_when_all_have_arrived)
    arrivals = [n / 1000 for n in range(20)]
    async with prepared_run(service) as run:
        await run.open_loop(with_class(0, iter(arrivals)), until_s=1)
    assert sorted(sample.due_s for sample in run.samples) == arrivals
    assert {sample.status for sample in run.samples} == {OK}
    assert all(sample.due_s <= sample.sent_s <= sample.finished_s for sample in run.samples)


async def test_requests_beyond_max_in_flight_are_counted_but_not_sent() -> None:
    all_due = asyncio.Event()

    def arrivals() -> Iterator[float]:
        yield from [0.0] * 10
        all_due.set()

    async def answer_when_all_are_due(
        request: pb.ClassifyRequest, context: Context
    ) -> pb.ClassifyResponse:
        await all_due.wait()
        return ANSWER

    service = ScriptedClassifier(answer_when_all_are_due)
    async with prepared_run(service, max_in_flight=3) as run:
        await run.open_loop(with_class(0, arrivals()), until_s=1)
    statuses = sorted(sample.status for sample in run.samples)
    assert statuses == [NOT_SENT] * 7 + [OK] * 3
    assert len(service.requests) == 3


async def test_a_requested_wait_is_obeyed_with_the_option_and_always_recorded() -> None:
    refused = refuse(grpc.StatusCode.RESOURCE_EXHAUSTED, "later", retry_info(0.05))
    for obey, tries, status in ((True, 3, OK), (False, 1, "RESOURCE_EXHAUSTED")):
        service = ScriptedClassifier(refused, refused, answer)
        async with prepared_run(service, obey_retry_after=obey) as run:
            await run.open_loop(iter([(0.0, 0)]), until_s=1)
        (sample,) = run.samples
        assert (sample.status, sample.tries) == (status, tries)
        assert sample.retry_after_s == pytest.approx(0.05)
        if obey:
            assert sample.latency_s >= 0.1  # latency includes both waits


async def test_a_requested_wait_beyond_the_deadline_ends_the_request() -> None:
    hour = refuse(grpc.StatusCode.RESOURCE_EXHAUSTED, "later", retry_info(3600))
    async with prepared_run(ScriptedClassifier(hour), obey_retry_after=True) as run:
        await run.open_loop(iter([(0.0, 0)]), until_s=1)
    (sample,) = run.samples
    assert (sample.status, sample.tries) == ("RESOURCE_EXHAUSTED", 1)


async def test_requests_are_sent_at_their_due_time_not_at_the_next_millisecond() -> None:
    class AtOnce:
        def start(self, call: UnaryCall, body: bytes, timeout_s: float) -> None:
            call.answer = ANSWER.SerializeToString()
            asyncio.get_running_loop().call_soon(call.end, 0, "")

        def cancel(self, call: UnaryCall) -> None:
            raise AssertionError

    plan = open_loop_plan("", 1.0)
    run = Run(plan, [AtOnce()], [[b""]], ClassifyAdapter(), zero_s=clock())
    await run.open_loop(((n * 0.00137, 0) for n in range(300)), until_s=1)
    lags = sorted(sample.sent_s - sample.due_s for sample in run.samples)
    assert len(lags) == 300
    assert lags[0] >= 0
    assert (
        lags[len(lags) // 2] < 0.0004
    )  # the loop's own timers are half a millisecond late or more
