"""Where a server is told to, callers load and unload; and a server that is to end says so first."""

from __future__ import annotations

import asyncio
import signal
import threading
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from grpc import StatusCode
from grpc_health.v1 import health_pb2_grpc
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from tritonclient.utils import InferenceServerException

from server.models.loader import LoadedEngine
from server.repository.contents import VersionEntry
from tests.models.test_watcher import once, states, under_load
from tests.support import triton_clients as triton
from tests.support.serving import (
    Mirror,
    Mirrors,
    Served,
    loading,
    publish,
    raw,
    serve,
    until,
)
from tests.test_app import event, not_ready, process, stoppable


def client_of(served: Served) -> Any:
    return triton.aio.InferenceServerClient(served.target)


async def test_a_caller_unloads_and_loads_a_model(tmp_path: Path) -> None:
    publish(tmp_path)
    engines = Mirrors()
    options: dict[str, Any] = {"model_control": "explicit", "bake_time_s": 0.0}
    async with (
        serve(tmp_path, load=loading(engines), **options) as served,
        client_of(served) as client,
    ):
        assert "model_repository" in (await client.get_server_metadata()).extensions
        await client.unload_model("tiny")
        assert not await client.is_model_ready("tiny")
        assert not await client.is_server_ready()
        assert engines.made[0].closed
        (entry,) = (await client.get_model_repository_index()).models
        assert (entry.state, entry.reason) == (
            "UNAVAILABLE",
            "UNLOADED: it is loaded by request only",
        )
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await served.classify(raw(1))
        assert caught.value.code() == StatusCode.UNAVAILABLE
        assert "version 1 is unloaded" in (caught.value.details() or "")
        publish(tmp_path)
        assert await states(served) == {1: "UNLOADED"}  # nobody has looked
        await client.load_model("tiny")
        assert await client.is_model_ready("tiny")
        assert (await served.classify(raw(1))).version == 2
        async with under_load(served) as load:
            publish(tmp_path)
            await client.load_model("tiny")
        assert load.codes.keys() == {"OK"}
        assert (await served.classify(raw(1))).version == 3


async def test_what_can_not_be_loaded_is_told_to_who_asked(tmp_path: Path) -> None:
    publish(tmp_path)
    async with (
        serve(tmp_path, model_control="explicit") as served,
        client_of(served) as client,
    ):
        publish(tmp_path)
        (tmp_path / "tiny/2/labels.txt").unlink()
        for name, words in (
            ("tiny", "version 2 can't be loaded: labels.txt is missing; version 1 answers"),
            ("tinny", "there is no model 'tinny'; there are tiny"),
            ("../tiny", "there is no model"),
            ("", "there is no model ''"),
        ):
            with pytest.raises(InferenceServerException, match=words.replace(".", r"\.")):
                await client.load_model(name)
        with pytest.raises(InferenceServerException, match=r"parameters\[config\]: is not allowed"):
            await client.load_model("tiny", config="{}")
        with pytest.raises(InferenceServerException, match="there is no model 'other'"):
            await client.unload_model("other")
        assert (await served.classify(raw(0))).version == 1


async def test_only_the_models_named_are_loaded_until_the_others_are_asked_for(
    tmp_path: Path,
) -> None:
    publish(tmp_path, "a")
    publish(tmp_path, "b")
    async with (
        serve(tmp_path, model_control="explicit", models="a") as served,
        client_of(served) as client,
    ):
        assert await states(served, "b") == {1: "UNAVAILABLE"}
        await client.load_model("b")
        assert await states(served, "b") == {1: "READY"}


async def test_curl_loads_and_unloads_too(tmp_path: Path) -> None:
    publish(tmp_path)
    path = "/v2/repository/models/tiny/"
    async with (
        serve(tmp_path, model_control="explicit") as served,
        httpx.AsyncClient(base_url=served.http) as client,
    ):
        body = {"parameters": {"unload_dependents": False}}
        assert (await client.post(path + "unload", json=body)).status_code == 200
        assert await states(served) == {1: "UNLOADED"}
        assert (await client.post(path + "load")).status_code == 200
        assert await states(served) == {1: "READY"}
        refused = await client.post(path + "load", json={"parameters": {"config": "{}"}})
        assert refused.status_code == 400
        assert "parameters[config]" in refused.text


@pytest.mark.parametrize("protocol", ["grpc", "http"])
async def test_a_change_goes_on_though_who_asked_for_it_leaves(
    protocol: str, tmp_path: Path
) -> None:
    """Cut off, it left a version LOADING for good, and ended the server at the next change."""
    publish(tmp_path, "a")
    publish(tmp_path, "b")
    go_on = threading.Event()
    engines = Mirrors()

    def slow(version: VersionEntry, **options: Any) -> LoadedEngine:
        if version.model == "b":
            go_on.wait()
        return loading(engines)(version, **options)

    async def leave(served: Served, change: str) -> None:
        if protocol == "http":
            async with httpx.AsyncClient(base_url=served.http, timeout=0.3) as client:
                with pytest.raises(httpx.ReadTimeout):
                    await client.post(f"/v2/repository/models/b/{change}")
        else:
            async with client_of(served) as client:
                ask = client.load_model if change == "load" else client.unload_model
                with pytest.raises(InferenceServerException, match="(?i)deadline"):
                    await ask("b", client_timeout=0.3)

    async with serve(
        tmp_path, load=slow, model_control="explicit", models="a", bake_time_s=0.0
    ) as served:
        await leave(served, "load")
        assert await states(served, "b") == {1: "LOADING"}
        go_on.set()
        await once(served, {1: "READY"}, "b")
        engine = engines.made[-1]
        engine.held = True
        call = asyncio.create_task(served.classify(raw(1, model="b")))
        await engine.started.wait()
        await leave(served, "unload")
        assert await states(served, "b") == {1: "DRAINING"}
        engine.release()
        assert (await call).version == 1
        await once(served, {1: "UNLOADED"}, "b")
        assert engine.closed
        async with client_of(served) as client:
            await client.load_model("b")
        assert await states(served, "b") == {1: "READY"}


async def test_an_unload_stands_though_a_load_that_nobody_waits_for_comes_before_it(
    tmp_path: Path,
) -> None:
    publish(tmp_path, "a")
    publish(tmp_path, "b")
    publish(tmp_path, "c")
    go_on = threading.Event()

    def slow(version: VersionEntry, **options: Any) -> LoadedEngine:
        if version.model == "b":
            go_on.wait()
        return loading(Mirror)(version, **options)

    async with (
        serve(tmp_path, load=slow, model_control="explicit", models="a", bake_time_s=0.0) as served,
        client_of(served) as client,
    ):
        for model in ("b", "c"):  # c's waits behind b's
            with pytest.raises(InferenceServerException, match="(?i)deadline"):
                await client.load_model(model, client_timeout=0.3)
        unloading = asyncio.create_task(client.unload_model("c"))
        await asyncio.sleep(0.1)  # it waits too
        go_on.set()
        await unloading
        await once(served, {1: "READY"}, "b")
        await client.load_model("b")  # behind all that was asked for before
        assert await states(served, "c") == {1: "UNAVAILABLE"}


async def test_a_server_ends_though_a_change_that_nobody_waits_for_goes_on(tmp_path: Path) -> None:
    publish(tmp_path, "a")
    publish(tmp_path, "b")
    stopped = threading.Event()

    def slow(version: VersionEntry, *, stopping: threading.Event, **options: Any) -> LoadedEngine:
        if version.model == "b":
            stopping.wait()
            stopped.set()
        return loading(Mirror)(version, stopping=stopping, **options)

    async with (
        serve(tmp_path, load=slow, model_control="explicit", models="a") as served,
        client_of(served) as client,
    ):
        with pytest.raises(InferenceServerException, match="(?i)deadline"):
            await client.load_model("b", client_timeout=0.3)
    assert stopped.is_set()


async def test_loading_is_seen_as_it_goes_on(tmp_path: Path) -> None:
    """The states of a version, and that calls go to the old one until the new one is checked."""
    publish(tmp_path)
    made, checked = threading.Event(), threading.Event()

    def slow(version: VersionEntry, *, checking: Any, **options: Any) -> LoadedEngine:
        def told() -> None:
            if version.version > 1:
                made.wait()
            checking()
            if version.version > 1:
                checked.wait()

        return loading(Mirror)(version, checking=told, **options)

    async with serve(tmp_path, load=slow, bake_time_s=0.0) as served:
        publish(tmp_path)
        for expected, gate in (("LOADING", made), ("CHECKING", checked)):
            await once(served, {1: "READY", 2: expected})
            assert (await served.classify(raw(1))).version == 1
            async with client_of(served) as client:
                index = (await client.get_model_repository_index()).models
            assert index[0].state == "LOADING"
            gate.set()
        await once(served, {1: "UNLOADED", 2: "READY"})


# --- notice ----------------------------------------------------------------------------------


async def test_a_server_on_notice_answers_and_says_that_it_will_not(tmp_path: Path) -> None:
    publish(tmp_path)
    async with stoppable(tmp_path, loading(Mirror), grace_s=60, drain_notice_s=60.0) as (
        served,
        stop,
        task,
    ):
        await until(served.channel, "", HealthCheckResponse.SERVING)
        stub: Any = health_pb2_grpc.HealthStub(served.channel)
        watch = stub.Watch(HealthCheckRequest(service="tiny"))
        assert (await watch.read()).status == HealthCheckResponse.SERVING
        stop.set()
        assert (await watch.read()).status == HealthCheckResponse.NOT_SERVING
        body = await not_ready(served.http)
        assert (body["ready"], body["accepting"]) == (False, False)
        async with client_of(served) as client:  # a new connection
            assert not await client.is_server_ready()
        health = await stub.Check(HealthCheckRequest())
        assert health.status == HealthCheckResponse.NOT_SERVING
        async with under_load(served) as load:
            while load.codes.total() < 50:
                await asyncio.sleep(0.001)
        assert load.codes.keys() == {"OK"}
        assert not task.done()
        served.server.hurry.set()
        await task


async def test_sigterm_gives_notice_and_a_second_one_ends_it(tmp_path: Path) -> None:
    publish(tmp_path)
    async with process("--repo", str(tmp_path), "--drain-notice-s=600") as server:
        listening = await event(server, "listening")
        await event(server, "model_ready")
        target = f"127.0.0.1:{listening['port']}"
        async with grpc.aio.insecure_channel(target) as channel:
            served = Served(None, channel)  # type: ignore[arg-type]
            server.send_signal(signal.SIGTERM)
            assert (await event(server, "stopping"))["notice_s"] == 600
            await not_ready(f"http://127.0.0.1:{listening['http_port']}")
            assert (await served.classify(raw(0))).version == 1
            server.send_signal(signal.SIGTERM)
            await event(server, "stopped")
        assert await server.wait() == 0


async def test_a_client_that_goes_elsewhere_at_the_notice_loses_no_call(tmp_path: Path) -> None:
    """As in a rollout of Kubernetes without a preStop: balancers look at readiness."""
    publish(tmp_path)
    async with (
        serve(tmp_path) as other,
        process("--repo", str(tmp_path), "--drain-notice-s=0.5", "--grace-s=60") as server,
    ):
        listening = await event(server, "listening")
        await event(server, "model_ready")
        ready = f"http://127.0.0.1:{listening['http_port']}/readyz"
        codes: list[StatusCode] = []
        async with (
            grpc.aio.insecure_channel(f"127.0.0.1:{listening['port']}") as channel,
            httpx.AsyncClient() as http,
        ):
            old = Served(None, channel)  # type: ignore[arg-type]
            elsewhere = asyncio.Event()

            async def calls() -> None:
                while True:
                    gone = elsewhere.is_set()
                    await (other if gone else old).classify(raw(0))
                    codes.append(StatusCode.OK)
                    if gone:
                        return

            async with asyncio.TaskGroup() as tasks:
                for _ in range(4):
                    tasks.create_task(calls())
                while len(codes) < 50:
                    await asyncio.sleep(0.001)
                server.send_signal(signal.SIGTERM)
                while (await http.get(ready)).status_code == 200:
                    pass
                elsewhere.set()
        await event(server, "stopped")
        assert await server.wait() == 0
