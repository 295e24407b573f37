"""Start and stop: errors at the start are clear, and stopping loses no accepted request."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from grpc import StatusCode
from grpc_health.v1.health_pb2 import HealthCheckResponse

from server.api.stubs import classify_pb2 as pb
from server.app.lifecycle import running
from server.errors import CannotServe, DeviceLost, EngineFailure
from server.models.loader import LoadedEngine
from server.repository.contents import VersionEntry
from server.repository.manifest import InvalidVersion
from server.settings import Settings
from tests.support.server_process import (
    CLASSIFY,
    code_for_new_client,
    get,
    local_settings,
    stoppable,
    wait_until_not_ready,
)
from tests.support.serving import (
    FakeLoader,
    HeldLoader,
    Mirror,
    Mirrors,
    loading,
    publish,
    raw,
    serve,
    until,
)


async def cannot_serve(settings: Settings, **options: Any) -> str:
    """The reason why a server with these settings stops."""
    with pytest.raises(CannotServe) as caught:
        async with running(settings, **options):
            await asyncio.Event().wait()
    return str(caught.value)


async def test_stopping_answers_accepted_requests_and_refuses_new_ones(tmp_path: Path) -> None:
    publish(tmp_path)
    engines = Mirrors(held=True)
    async with stoppable(tmp_path, loading(engines), grace_s=60) as (served, stop, task):
        await until(served.channel, "", HealthCheckResponse.SERVING)
        accepted = asyncio.create_task(served.classify(raw(3), timeout=60))
        await engines.made[0].started.wait()
        health = asyncio.create_task(until(served.channel, "tiny", HealthCheckResponse.NOT_SERVING))
        await served.call("ListModels", pb.ListModelsRequest())  # after it the watch has begun
        stop.set()
        body = await wait_until_not_ready(served.http)
        assert (body["ready"], body["accepting"]) == (False, False)
        assert body["models"] == [{"name": "tiny", "version": 1, "state": "READY", "reason": ""}]
        await health
        assert await code_for_new_client(served.target) == StatusCode.UNAVAILABLE
        assert not accepted.done()
        engines.made[0].release()
        assert (await accepted).results[0].classes[0].index == 3
        await task
    assert engines.made[0].closed


@pytest.mark.parametrize("how", ["hurry", "grace"])
async def test_a_request_that_outlasts_the_grace_period_fails_as_unavailable(
    tmp_path: Path, how: str
) -> None:
    publish(tmp_path)
    engines = Mirrors(held=True)
    grace_s = 0.05 if how == "grace" else 60.0
    async with stoppable(tmp_path, loading(engines), grace_s=grace_s) as (served, stop, task):
        await until(served.channel, "", HealthCheckResponse.SERVING)
        unary: Any = served.channel.unary_unary
        call = unary(CLASSIFY)(raw(3).SerializeToString(), timeout=60)
        waiting = asyncio.ensure_future(call.code())
        await engines.made[0].started.wait()
        stop.set()
        if how == "hurry":
            await wait_until_not_ready(served.http)
            served.server.hurry.set()
        assert await waiting in (StatusCode.UNAVAILABLE, StatusCode.CANCELLED)
        engines.made[0].release()  # the engine closes only after its batch has ended
        await task
    assert engines.made[0].closed


async def test_stopping_does_not_wait_for_models_that_load(tmp_path: Path) -> None:
    publish(tmp_path)
    loader = HeldLoader(Mirror)
    async with stoppable(tmp_path, loader, grace_s=60) as (served, stop, task):
        assert (await get(served.http + "/readyz")).status_code == 503
        await asyncio.to_thread(loader.entered.wait)
        stop.set()
        await task


async def test_an_error_at_the_start_says_what_to_do(tmp_path: Path) -> None:
    missing = tmp_path / "nowhere"
    assert await cannot_serve(local_settings(missing)) == (
        f"the model repository {missing} is not a folder; build a model: "
        f"convserve build lenet5 --repo {missing}"
    )
    assert "has no models; build a model" in await cannot_serve(local_settings(tmp_path))
    publish(tmp_path)
    message = await cannot_serve(local_settings(tmp_path, models="tiny, big,huge"))
    assert message == f"{tmp_path} has no model big, huge; it has tiny"
    message = await cannot_serve(local_settings(tmp_path, backend="magic"))
    assert message.startswith("backend is 'magic'; it must be one of ")


async def test_a_server_without_a_valid_model_stops_with_the_reason_for_each(
    tmp_path: Path,
) -> None:
    publish(tmp_path)
    publish(tmp_path)
    publish(tmp_path, "other")
    (tmp_path / "tiny/2/golden.npz").unlink()

    class RejectingLoader(FakeLoader):
        def load(self, version: VersionEntry, on_checking: Callable[[], None]) -> LoadedEngine:
            raise InvalidVersion("it is for another machine")

    assert await cannot_serve(local_settings(tmp_path), loader=RejectingLoader(Mirror)) == (
        "no model could be loaded: other version 1: it is for another machine; "
        "tiny version 2: golden.npz is missing; tiny version 1: it is for another machine"
    )


async def test_only_the_selected_models_are_served(tmp_path: Path) -> None:
    publish(tmp_path, "a")
    publish(tmp_path, "b")
    async with serve(tmp_path, models="b") as served:
        listing = await served.call("ListModels", pb.ListModelsRequest())
    assert [model.name for model in listing.models] == ["b"]


@pytest.mark.parametrize("taken", ["port", "http_port"])
async def test_a_port_in_use_is_reported_and_the_other_port_is_released(
    tmp_path: Path, taken: str
) -> None:
    publish(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as occupied, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        ports = {"port": free.getsockname()[1], "http_port": free.getsockname()[1]}
        ports[taken] = occupied.getsockname()[1]
        free.close()
        message = await cannot_serve(local_settings(tmp_path, **ports))
        assert message.startswith(f"can't listen on 127.0.0.1:{ports[taken]}: ")
        (other,) = {"port", "http_port"} - {taken}
        socket.create_server(("127.0.0.1", ports[other])).close()


async def test_an_unexpected_error_in_the_background_stops_the_server(tmp_path: Path) -> None:
    publish(tmp_path)

    class BrokenMirror(Mirror):
        @property
        def device(self) -> str:  # type: ignore[override]
            raise RuntimeError("no device")

    broken: Any = BrokenMirror
    with pytest.raises(RuntimeError, match="no device"):
        async with running(local_settings(tmp_path), loader=loading(broken)):
            await asyncio.Event().wait()


async def test_an_error_in_the_body_is_raised_unchanged(tmp_path: Path) -> None:
    publish(tmp_path)
    with pytest.raises(LookupError, match="mine"):
        async with running(local_settings(tmp_path)):
            raise LookupError("mine")


async def test_http_reports_health_and_readiness(tmp_path: Path) -> None:
    publish(tmp_path)
    publish(tmp_path)
    publish(tmp_path, "other")
    (tmp_path / "other/1/labels.txt").write_text("")
    loader = HeldLoader(Mirror)
    async with serve(tmp_path, load=loader, wait=False) as served:
        alive = await get(served.http + "/healthz")
        early = await get(served.http + "/readyz")
        loader.gate.set()
        await until(served.channel, "", HealthCheckResponse.SERVING)
        late = await get(served.http + "/readyz")
        unknown = await get(served.http + "/models")
        async with httpx.AsyncClient() as client:
            posted = await client.post(served.http + "/metrics", content=b"x" * 10_000)
    assert (alive.status_code, alive.text) == (200, "ok\n")
    assert early.status_code == 503
    assert [model["state"] for model in early.json()["models"]] == [
        "FAILED",
        "LOADING",
        "UNAVAILABLE",
    ]
    assert late.status_code == 200
    reason = "labels.txt has 0 bytes; 98 were published"
    assert late.json() == {
        "ready": True,
        "accepting": True,
        "models": [
            {"name": "other", "version": 1, "state": "FAILED", "reason": reason},
            {"name": "tiny", "version": 2, "state": "READY", "reason": ""},
            {"name": "tiny", "version": 1, "state": "UNAVAILABLE", "reason": "version 2 is served"},
        ],
    }
    assert (unknown.status_code, posted.status_code) == (404, 405)


async def test_healthz_fails_after_the_device_is_lost_so_that_the_server_is_restarted(
    tmp_path: Path,
) -> None:
    publish(tmp_path)
    engines = Mirrors()
    async with serve(tmp_path, load=loading(engines)) as served:
        engines.made[0].failure = EngineFailure("a batch failed")
        with pytest.raises(grpc.aio.AioRpcError):
            await served.classify(raw(1))
        assert (await get(served.http + "/healthz")).status_code == 200, (
            "an ordinary failure may pass"
        )
        engines.made[0].failure = DeviceLost("CUDA: cudaErrorIllegalAddress")
        with pytest.raises(grpc.aio.AioRpcError):
            await served.classify(raw(1))
        alive = await get(served.http + "/healthz")
    assert alive.status_code == 503
    assert alive.text.startswith("the device mirror is lost: CUDA: cudaErr")
