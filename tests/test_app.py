"""A server starts with a plain word on what is wrong, and stops without losing an answer."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import httpx
import pytest
from grpc import StatusCode
from grpc_health.v1.health_pb2 import HealthCheckResponse
from PIL import Image

from server.api.stubs import classify_pb2 as pb
from server.app import Running, running
from server.errors import CannotServe, DeviceLost, EngineFailure
from server.models.loader import LoadedEngine, Loader
from server.repository.contents import VersionEntry
from server.repository.manifest import InvalidVersion, Manifest
from server.settings import Settings
from tests.support.serving import (
    SERVICE,
    FakeLoader,
    HeldLoader,
    Mirror,
    Mirrors,
    Served,
    loading,
    publish,
    raw,
    serve,
    until,
)

CLASSIFY = SERVICE + "Classify"
ROOT = Path(__file__).resolve().parent.parent


class Held:
    """Makes a Mirror whose batches end when the test says so."""

    def __init__(self) -> None:
        self.mirror: Mirror

    def __call__(self, manifest: Manifest) -> Mirror:
        self.mirror = Mirror(manifest, held=True)
        return self.mirror


class Stoppable(NamedTuple):
    """A server in a task of its own, and a channel that outlives it."""

    served: Served
    stop: asyncio.Event
    task: asyncio.Task[None]


@asynccontextmanager
async def stoppable(repo: Path, loader: Loader, **options: Any) -> AsyncIterator[Stoppable]:
    stop = asyncio.Event()
    started: asyncio.Future[Running] = asyncio.get_running_loop().create_future()
    usual: dict[str, Any] = {"host": "127.0.0.1", "port": 0, "http_port": 0}

    async def run() -> None:
        async with running(Settings(repo=repo, **usual | options), loader=loader) as server:
            started.set_result(server)
            await stop.wait()

    async with asyncio.timeout(100), asyncio.TaskGroup() as tasks:
        task = tasks.create_task(run())
        server = await started
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            yield Stoppable(Served(server, channel), stop, task)


async def get(address: str) -> httpx.Response:
    async with httpx.AsyncClient() as client:
        return await client.get(address)


async def not_ready(http: str) -> Any:
    """What /readyz says as soon as it is not 200."""
    async with httpx.AsyncClient() as client:
        while (response := await client.get(http + "/readyz")).status_code == 200:
            pass
    return response.json()


async def refusal(target: str) -> StatusCode:
    """How a caller fares who comes anew."""
    options = [("grpc.use_local_subchannel_pool", 1)]
    async with grpc.aio.insecure_channel(target, options=options) as channel:
        unary: Any = channel.unary_unary
        code: StatusCode = await unary(CLASSIFY)(raw(1).SerializeToString(), timeout=20).code()
        return code


async def cannot_serve(settings: Settings, **options: Any) -> str:
    """Why a server of these settings ends."""
    with pytest.raises(CannotServe) as caught:
        async with running(settings, **options):
            await asyncio.Event().wait()
    return str(caught.value)


def settings(repo: Path, **options: Any) -> Settings:
    usual: dict[str, Any] = {"host": "127.0.0.1", "port": 0, "http_port": 0}
    return Settings(repo=repo, **usual | options)


# --- stopping --------------------------------------------------------------------------------


async def test_stopping_answers_what_was_accepted_and_refuses_what_comes(tmp_path: Path) -> None:
    publish(tmp_path)
    held = Held()
    async with stoppable(tmp_path, loading(held), grace_s=60) as (served, stop, task):
        await until(served.channel, "", HealthCheckResponse.SERVING)
        accepted = asyncio.create_task(served.classify(raw(3), timeout=60))
        await held.mirror.started.wait()
        health = asyncio.create_task(until(served.channel, "tiny", HealthCheckResponse.NOT_SERVING))
        await served.call("ListModels", pb.ListModelsRequest())  # so the watch has begun
        stop.set()
        body = await not_ready(served.http)
        assert (body["ready"], body["accepting"]) == (False, False)
        assert body["models"] == [{"name": "tiny", "version": 1, "state": "READY", "reason": ""}]
        await health
        assert await refusal(served.target) == StatusCode.UNAVAILABLE
        assert not accepted.done()
        held.mirror.release()
        assert (await accepted).results[0].classes[0].index == 3
        await task
    assert held.mirror.closed


@pytest.mark.parametrize("how", ["hurry", "grace"])
async def test_who_is_not_answered_in_the_grace_is_told_to_go_elsewhere(
    tmp_path: Path, how: str
) -> None:
    publish(tmp_path)
    held = Held()
    grace_s = 0.05 if how == "grace" else 60.0
    async with stoppable(tmp_path, loading(held), grace_s=grace_s) as (served, stop, task):
        await until(served.channel, "", HealthCheckResponse.SERVING)
        unary: Any = served.channel.unary_unary
        call = unary(CLASSIFY)(raw(3).SerializeToString(), timeout=60)
        waiting = asyncio.ensure_future(call.code())
        await held.mirror.started.wait()
        stop.set()
        if how == "hurry":
            await not_ready(served.http)
            served.server.hurry.set()
        assert await waiting in (StatusCode.UNAVAILABLE, StatusCode.CANCELLED)
        held.mirror.release()  # its engine is closed only when its batch has ended
        await task
    assert held.mirror.closed


async def test_stopping_does_not_wait_until_all_is_loaded(tmp_path: Path) -> None:
    publish(tmp_path)
    loader = HeldLoader(Mirror)
    async with stoppable(tmp_path, loader, grace_s=60) as (served, stop, task):
        assert (await get(served.http + "/readyz")).status_code == 503
        await asyncio.to_thread(loader.entered.wait)
        stop.set()
        await task


# --- starting --------------------------------------------------------------------------------


async def test_what_keeps_a_server_from_starting_is_told_with_what_to_do(tmp_path: Path) -> None:
    missing = tmp_path / "nowhere"
    assert await cannot_serve(settings(missing)) == (
        f"the model repository {missing} is not a folder; build a model: "
        f"convserve build lenet5 --repo {missing}"
    )
    assert "has no models; build a model" in await cannot_serve(settings(tmp_path))
    publish(tmp_path)
    message = await cannot_serve(settings(tmp_path, models="tiny, big,huge"))
    assert message == f"{tmp_path} has no model big, huge; it has tiny"
    message = await cannot_serve(settings(tmp_path, backend="magic"))
    assert message.startswith("backend is 'magic'; it must be one of ")


async def test_a_server_without_a_sound_model_ends_with_every_reason(tmp_path: Path) -> None:
    publish(tmp_path)
    publish(tmp_path)
    publish(tmp_path, "other")
    (tmp_path / "tiny/2/golden.npz").unlink()

    class Refusing(FakeLoader):
        def load(self, version: VersionEntry, on_checking: Callable[[], None]) -> LoadedEngine:
            raise InvalidVersion("it is for another machine")

    assert await cannot_serve(settings(tmp_path), loader=Refusing(Mirror)) == (
        "no model could be loaded: other version 1: it is for another machine; "
        "tiny version 2: golden.npz is missing; tiny version 1: it is for another machine"
    )


async def test_only_the_models_asked_for_are_served(tmp_path: Path) -> None:
    publish(tmp_path, "a")
    publish(tmp_path, "b")
    async with serve(tmp_path, models="b") as served:
        listing = await served.call("ListModels", pb.ListModelsRequest())
    assert [model.name for model in listing.models] == ["b"]


@pytest.mark.parametrize("taken", ["port", "http_port"])
async def test_a_port_in_use_is_told_and_the_other_one_let_go(tmp_path: Path, taken: str) -> None:
    publish(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as occupied, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        ports = {"port": free.getsockname()[1], "http_port": free.getsockname()[1]}
        ports[taken] = occupied.getsockname()[1]
        free.close()
        message = await cannot_serve(settings(tmp_path, **ports))
        assert message.startswith(f"can't listen on 127.0.0.1:{ports[taken]}: ")
        (other,) = {"port", "http_port"} - {taken}
        socket.create_server(("127.0.0.1", ports[other])).close()


async def test_a_mistake_of_ours_in_the_background_ends_the_server(tmp_path: Path) -> None:
    publish(tmp_path)

    class Odd(Mirror):
        @property
        def device(self) -> str:  # type: ignore[override]
            raise RuntimeError("a part is missing")

    made: Any = Odd
    with pytest.raises(RuntimeError, match="a part is missing"):
        async with running(settings(tmp_path), loader=loading(made)):
            await asyncio.Event().wait()


async def test_an_error_of_the_body_comes_out_as_it_is(tmp_path: Path) -> None:
    publish(tmp_path)
    with pytest.raises(LookupError, match="mine"):
        async with running(settings(tmp_path)):
            raise LookupError("mine")


# --- HTTP ------------------------------------------------------------------------------------


async def test_health_and_readiness_over_http(tmp_path: Path) -> None:
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


# --- as a process ----------------------------------------------------------------------------


async def test_a_server_that_lost_its_device_says_that_it_is_to_be_started_anew(
    tmp_path: Path,
) -> None:
    publish(tmp_path)
    engines = Mirrors()
    async with serve(tmp_path, load=loading(engines)) as served:
        engines.made[0].failure = EngineFailure("a batch failed")
        with pytest.raises(grpc.aio.AioRpcError):
            await served.classify(raw(1))
        assert (await get(served.http + "/healthz")).status_code == 200, "that may pass"
        engines.made[0].failure = DeviceLost("CUDA: cudaErrorIllegalAddress")
        with pytest.raises(grpc.aio.AioRpcError):
            await served.classify(raw(1))
        alive = await get(served.http + "/healthz")
    assert alive.status_code == 503
    assert alive.text.startswith("the device mirror is lost: CUDA: cudaErr")


@asynccontextmanager
async def process(
    *arguments: str, run: Sequence[str] = ("-m", "server"), **environment: str
) -> AsyncIterator[asyncio.subprocess.Process]:
    """`python -m server` on free ports of the loopback, with JSON logs."""
    options = ("--host=127.0.0.1", "--port=0", "--http-port=0", "--log-format=json")
    started = await asyncio.create_subprocess_exec(
        sys.executable,
        *(*run, *options, *arguments),
        cwd=ROOT,
        env=environment,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(100):
            yield started
    finally:
        if started.returncode is None:
            started.kill()
            await started.wait()


async def event(started: asyncio.subprocess.Process, name: str) -> dict[str, Any]:
    """The next event of that name in the log."""
    assert started.stderr is not None
    async for text in started.stderr:
        line: dict[str, Any] = json.loads(text)
        if line["event"] == name:
            return line
    raise AssertionError(f"the log ended without {name}")


async def test_a_server_ends_in_order_when_its_terminal_goes(tmp_path: Path) -> None:
    publish(tmp_path)
    async with process("--repo", str(tmp_path)) as server:
        await event(server, "version_loaded")
        server.send_signal(signal.SIGHUP)
        assert (await event(server, "stopping"))["signal"] == "SIGHUP"
        assert await server.wait() == 0


async def test_a_server_without_standard_files_ends_with_its_status(tmp_path: Path) -> None:
    """What is opened next would be 0, 1 and 2, and libuv ends the process when it closes those."""
    command = f"exec {sys.executable} -m server --repo {tmp_path / 'nowhere'} <&- >&- 2>&-"
    ended = await asyncio.create_subprocess_shell(command)
    assert await ended.wait() == 1


async def test_sigterm_lets_accepted_calls_finish_and_ends_with_status_0(tmp_path: Path) -> None:
    publish(tmp_path)
    file = BytesIO()
    Image.linear_gradient("L").resize((3000, 2000)).convert("RGB").save(file, "JPEG")
    slow = pb.ClassifyRequest(model="tiny", images=[pb.Image(encoded=file.getvalue())] * 24)
    arguments = ("--repo", str(tmp_path), "--decode-threads=1", "--grace-s=60")
    async with process(*arguments, CONVSERVE_LOG_LEVEL="debug") as server:
        listening = await event(server, "listening")
        await event(server, "version_loaded")
        target, http = (f"127.0.0.1:{listening[name]}" for name in ("port", "http_port"))
        async with grpc.aio.insecure_channel(target) as channel:
            unary: Any = channel.unary_unary
            call = unary(CLASSIFY)(slow.SerializeToString(), timeout=90)
            while 'queue_rows{model="tiny"} 24' not in (await get(f"http://{http}/metrics")).text:
                assert not call.done(), "all was decoded before it was seen to wait"
            server.send_signal(signal.SIGTERM)
            assert (await event(server, "stopping"))["signal"] == "SIGTERM"
            assert (await not_ready(f"http://{http}"))["accepting"] is False
            assert await refusal(target) == StatusCode.UNAVAILABLE
            response = pb.ClassifyResponse.FromString(await call)
        assert len(response.results) == 24
        await event(server, "stopped")
        assert await server.wait() == 0


async def test_an_interrupt_while_models_load_ends_with_status_0(tmp_path: Path) -> None:
    publish(tmp_path)
    async with process("--repo", str(tmp_path)) as server:
        await event(server, "listening")
        server.send_signal(signal.SIGINT)
        await event(server, "stopped")
        assert await server.wait() == 0


HANGING = """
import sys, threading
from server import __main__
from server.models.loader import EngineLoader

EngineLoader.load = lambda *_: threading.Event().wait()
sys.exit(__main__.main())
"""


async def test_a_server_ends_though_what_it_loads_hangs(tmp_path: Path) -> None:
    """As a library may."""
    publish(tmp_path)
    async with process("--repo", str(tmp_path), run=("-c", HANGING)) as server:
        await event(server, "listening")
        server.send_signal(signal.SIGTERM)
        await event(server, "stopping")
        await event(server, "load_still_running_at_exit")
        await event(server, "stopped")
        assert await server.wait() == 0


async def test_a_server_that_cannot_serve_ends_with_status_1_and_one_plain_line(
    tmp_path: Path,
) -> None:
    publish(tmp_path)
    (tmp_path / "tiny/1/manifest.json").write_text("{}")
    async with process(CONVSERVE_REPO=str(tmp_path)) as server:
        _, text = await server.communicate()
    lines = [json.loads(line) for line in text.splitlines()]
    assert server.returncode == 1
    assert [line["event"] for line in lines] == ["listening", "version_failed", "cannot_serve"]
    assert lines[-1]["reason"].startswith("no model could be loaded: tiny version 1: ")


async def test_a_wrong_option_ends_with_status_2() -> None:
    async with process("--port=many") as server:
        _, text = await server.communicate()
    assert server.returncode == 2
    assert "argument --port: invalid int value: 'many'" in text.decode()
