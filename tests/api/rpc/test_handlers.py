"""Calls that expire, are cancelled or fail are counted and answered."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from grpc import StatusCode

from server import errors
from tests.api.classify_calls import best, eventually, failure, metric
from tests.support.serving import (
    Mirror,
    Mirrors,
    loading,
    publish,
    raw,
    serve,
)


async def test_an_expired_call_is_counted_with_its_stage(tmp_path: Path) -> None:
    publish(tmp_path)
    mirrors = Mirrors(held=True)
    async with serve(tmp_path, load=loading(mirrors)) as served:
        error = await failure(served.classify(raw(1), timeout=0.3))
        assert error.code() == StatusCode.DEADLINE_EXCEEDED
        registry = served.server.metrics.registry
        missed = "convserve_deadline_missed_total"
        await eventually(lambda: metric(registry, missed, model="tiny", stage="compute") == 1)
        answered = {"model": "tiny", "version": "1", "method": "Classify"}
        assert (
            metric(registry, "convserve_requests_total", **answered, code="DEADLINE_EXCEEDED") == 1
        )
        assert metric(registry, "convserve_requests_total", **answered, code="CANCELLED") == 0
        mirrors.made[0].release()
        assert best(await served.classify(raw(2))) == [2]
        assert metric(registry, "convserve_wasted_compute_seconds_total", model="tiny") > 0


async def test_calls_that_arrive_expired_harm_no_other(tmp_path: Path) -> None:
    publish(tmp_path)
    async with serve(tmp_path, load=loading(Mirror)) as served:
        errors = await asyncio.gather(
            *(failure(served.classify(raw(1), timeout=1e-6)) for _ in range(20))
        )
        assert {error.code() for error in errors} == {StatusCode.DEADLINE_EXCEEDED}
        assert best(await served.classify(raw(2))) == [2]


async def test_a_cancelled_call_is_counted_and_never_reaches_the_engine(tmp_path: Path) -> None:
    publish(tmp_path)
    mirrors = Mirrors(held=True)
    async with serve(tmp_path, load=loading(mirrors)) as served:
        running = asyncio.create_task(served.classify(raw(1)))
        await eventually(lambda: bool(mirrors.made) and mirrors.made[0].started.is_set())
        leaving = asyncio.create_task(served.classify(raw(2, 3)))
        (executor,) = {model.executor for model in served.server.registry.serving_models()}
        await eventually(lambda: executor.queued_rows("tiny/1") == 2)
        leaving.cancel()
        registry = served.server.metrics.registry
        counted = {"model": "tiny", "version": "1", "method": "Classify", "code": "CANCELLED"}
        await eventually(lambda: metric(registry, "convserve_requests_total", **counted) == 1)
        assert executor.queued_rows("tiny/1") == 0
        mirrors.made[0].release()
        assert best(await running) == [1]
        assert list((await served.classify(raw(4))).timing.batch_rows) == [1]
        assert metric(registry, "convserve_batch_rows_sum", model="tiny") == 2


async def test_a_failed_batch_is_internal_without_details_and_the_next_one_runs(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    publish(tmp_path)
    mirrors = Mirrors()
    async with serve(tmp_path, load=loading(mirrors)) as served:
        for reason in (errors.EngineFailure("secret of the engine"), OSError("secret of the disk")):
            mirrors.made[0].failure = reason
            error = await failure(served.classify(raw(1)))
            assert error.code() == StatusCode.INTERNAL
            assert error.details() == "the engine failed; the request is not to blame"
        mirrors.made[0].failure = None
        assert best(await served.classify(raw(1))) == [1]
    assert "secret of the engine" in str([vars(record) for record in caplog.records])
    assert len(caplog.records) == 2  # one for each batch, none for a call


async def test_an_unexpected_exception_is_internal_without_details_and_logged_in_full(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    publish(tmp_path)

    class UnknownClasses(Mirror):
        """Returns classes that have no label."""

        def _answer(self, pixels: Any) -> Any:
            outputs = super()._answer(pixels)
            return outputs._replace(classes=outputs.classes + 1000)

    async with serve(tmp_path, load=loading(UnknownClasses)) as served:
        error = await failure(served.classify(raw(1)))
        registry = served.server.metrics.registry
        counted = {"model": "tiny", "version": "1", "method": "Classify", "code": "INTERNAL"}
        assert metric(registry, "convserve_requests_total", **counted) == 1
    assert (error.code(), error.details()) == (StatusCode.INTERNAL, "internal error")
    (record,) = (record for record in caplog.records if record.msg == "call_failed")
    assert record.exc_info is not None
    assert record.exc_info[0] is IndexError
