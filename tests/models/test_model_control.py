"""With explicit model control, clients load and unload models; every change runs to its end."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from grpc import StatusCode
from tritonclient.utils import InferenceServerException

from server.models.loader import LoadedEngine
from server.repository.contents import VersionEntry
from tests.support import triton_clients as triton
from tests.support.serving import (
    FakeLoader,
    HeldLoader,
    Mirror,
    Mirrors,
    Served,
    loading,
    publish,
    raw,
    serve,
)
from tests.support.versions import states, under_load, wait_for_states


def client_of(served: Served) -> Any:
    return triton.aio.InferenceServerClient(served.target)


async def test_a_client_unloads_and_loads_a_model(tmp_path: Path) -> None:
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
            "UNLOADED: it is loaded only on request",
        )
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await served.classify(raw(1))
        assert caught.value.code() == StatusCode.UNAVAILABLE
        assert "version 1 is unloaded" in (caught.value.details() or "")
        publish(tmp_path)
        assert await states(served) == {1: "UNLOADED"}  # nothing is loaded without a request
        await client.load_model("tiny")
        assert await client.is_model_ready("tiny")
        assert (await served.classify(raw(1))).version == 2
        async with under_load(served) as results:
            publish(tmp_path)
            await client.load_model("tiny")
        assert results.codes.keys() == {"OK"}
        assert (await served.classify(raw(1))).version == 3


async def test_a_failed_load_returns_its_reason_to_the_client(tmp_path: Path) -> None:
    publish(tmp_path)
    async with (
        serve(tmp_path, model_control="explicit") as served,
        client_of(served) as client,
    ):
        publish(tmp_path)
        (tmp_path / "tiny/2/labels.txt").unlink()
        for name, words in (
            ("tiny", "version 2 can't be loaded: labels.txt is missing; version 1 answers"),
            ("tinny", "there is no model 'tinny'; known models: tiny"),
            ("../tiny", "there is no model"),
            ("", "model: is empty; known models: tiny"),
        ):
            with pytest.raises(InferenceServerException, match=words.replace(".", r"\.")):
                await client.load_model(name)
        with pytest.raises(InferenceServerException, match=r"parameters\[config\]: is not allowed"):
            await client.load_model("tiny", config="{}")
        with pytest.raises(InferenceServerException, match="there is no model 'other'"):
            await client.unload_model("other")
        assert (await served.classify(raw(0))).version == 1


async def test_other_models_are_loaded_only_on_request(
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


async def test_a_client_loads_and_unloads_over_http(tmp_path: Path) -> None:
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
async def test_a_change_continues_after_its_client_disconnects(
    protocol: str, tmp_path: Path
) -> None:
    """A change that is interrupted leaves a version LOADING forever."""
    publish(tmp_path, "a")
    publish(tmp_path, "b")
    engines = Mirrors()
    loader = HeldLoader(engines, model="b")

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
        tmp_path, load=loader, model_control="explicit", models="a", bake_time_s=0.0
    ) as served:
        await leave(served, "load")
        assert await states(served, "b") == {1: "LOADING"}
        loader.gate.set()
        await wait_for_states(served, {1: "READY"}, "b")
        engine = engines.made[-1]
        engine.held = True
        call = asyncio.create_task(served.classify(raw(1, model="b")))
        await engine.started.wait()
        await leave(served, "unload")
        assert await states(served, "b") == {1: "DRAINING"}
        engine.release()
        assert (await call).version == 1
        await wait_for_states(served, {1: "UNLOADED"}, "b")
        assert engine.closed
        async with client_of(served) as client:
            await client.load_model("b")
        assert await states(served, "b") == {1: "READY"}


async def test_an_unload_cancels_an_earlier_load_that_has_not_begun(
    tmp_path: Path,
) -> None:
    publish(tmp_path, "a")
    publish(tmp_path, "b")
    publish(tmp_path, "c")
    loader = HeldLoader(Mirror, model="b")

    async with (
        serve(
            tmp_path, load=loader, model_control="explicit", models="a", bake_time_s=0.0
        ) as served,
        client_of(served) as client,
    ):
        for model in ("b", "c"):  # the load of c waits for that of b
            with pytest.raises(InferenceServerException, match="(?i)deadline"):
                await client.load_model(model, client_timeout=0.3)
        unloading = asyncio.create_task(client.unload_model("c"))
        await asyncio.sleep(0.1)  # the unload waits too
        loader.gate.set()
        await unloading
        await wait_for_states(served, {1: "READY"}, "b")
        await client.load_model("b")  # runs after all earlier requests
        assert await states(served, "c") == {1: "UNAVAILABLE"}


async def test_a_server_stops_during_a_load_whose_client_disconnected(tmp_path: Path) -> None:
    publish(tmp_path, "a")
    publish(tmp_path, "b")
    stopped = threading.Event()

    class WaitingForStop(FakeLoader):
        def load(self, version: VersionEntry, on_checking: Callable[[], None]) -> LoadedEngine:
            if version.model == "b":
                self.stopping.wait()
                stopped.set()
            return super().load(version, on_checking)

    async with (
        serve(
            tmp_path, load=WaitingForStop(Mirror), model_control="explicit", models="a"
        ) as served,
        client_of(served) as client,
    ):
        with pytest.raises(InferenceServerException, match="(?i)deadline"):
            await client.load_model("b", client_timeout=0.3)
    assert stopped.is_set()


async def test_clients_see_the_states_of_a_version_while_it_loads(tmp_path: Path) -> None:
    """Requests go to the old version until the new one is checked."""
    publish(tmp_path)
    made, checked = threading.Event(), threading.Event()

    class Stepping(FakeLoader):
        """Waits before and after the notice that the golden check begins."""

        def load(self, version: VersionEntry, on_checking: Callable[[], None]) -> LoadedEngine:
            def stepping() -> None:
                if version.version > 1:
                    made.wait()
                on_checking()
                if version.version > 1:
                    checked.wait()

            return super().load(version, stepping)

    async with serve(tmp_path, load=Stepping(Mirror), bake_time_s=0.0) as served:
        publish(tmp_path)
        for expected, gate in (("LOADING", made), ("CHECKING", checked)):
            await wait_for_states(served, {1: "READY", 2: expected})
            assert (await served.classify(raw(1))).version == 1
            async with client_of(served) as client:
                index = (await client.get_model_repository_index()).models
            assert index[0].state == "LOADING"
            gate.set()
        await wait_for_states(served, {1: "UNLOADED", 2: "READY"})
