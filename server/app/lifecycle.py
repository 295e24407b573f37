"""The server from start to stop: what starts and ends in which order."""

from __future__ import annotations

import asyncio
import gc
import logging
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass

from server.api.rpc.health import ServingState
from server.app.access import Access, build_access, watcher_of
from server.app.composition import (
    Api,
    Models,
    Resources,
    Telemetry,
    build_api,
    build_models,
    build_telemetry,
    opened,
)
from server.errors import CannotServe
from server.models.loader import Loader
from server.models.registry import ModelRegistry
from server.models.startup import models_to_serve
from server.process.early_signals import STOP_SIGNALS
from server.process.load_thread import wait_until_idle
from server.repository.contents import RepositoryContents
from server.settings import Settings
from server.telemetry.metrics import Metrics
from server.transport.listening import address_fields, port_of

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Running:
    """A server that listens."""

    port: int  # of gRPC; 0 for a Unix socket
    http_port: int
    registry: ModelRegistry
    metrics: Metrics
    state: ServingState
    hurry: asyncio.Event  # when set, shutdown does not wait for the notice or for calls

    @property
    def accepting(self) -> bool:
        return self.state.is_accepting


async def serve(settings: Settings) -> None:
    """Serves until SIGTERM, SIGINT or SIGHUP, then drains. Raises CannotServe.

    A second SIGTERM or SIGINT ends the drain at once.
    """
    loop = asyncio.get_running_loop()
    signals: asyncio.Queue[str] = asyncio.Queue()
    for number in STOP_SIGNALS:
        if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:  # nohup's
            loop.add_signal_handler(number, signals.put_nowait, number.name)
    async with running(settings) as server:
        name = await signals.get()
        notice_s, grace_s = settings.drain_notice_s, settings.grace_s
        log.info("stopping", extra={"signal": name, "notice_s": notice_s, "grace_s": grace_s})
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, server.hurry.set)
    log.info("stopped")


@asynccontextmanager
async def running(settings: Settings, *, loader: Loader | None = None) -> AsyncIterator[Running]:
    """A server that listens at once and loads its models meanwhile. At the end it drains and stops.

    Raises CannotServe, also out of the body if no model could be loaded. Without a `loader` an
    EngineLoader loads the engines.
    """
    contents = models_to_serve(settings)
    telemetry = build_telemetry(settings)
    access = build_access(settings, telemetry.metrics)
    try:
        async with asyncio.TaskGroup() as background:
            with opened(settings) as resources:
                models = build_models(settings, loader, resources, telemetry, background)
                state = ServingState()
                api = build_api(settings, resources, telemetry, models, state, access)
                ports = port_of(resources.grpc_socket), port_of(resources.http_socket)
                server = Running(*ports, models.registry, telemetry.metrics, state, asyncio.Event())
                http_task = await start(api, resources, background)
                tasks = start_models(settings, models, contents, background)
                tasks += start_access(access, api, telemetry, background)
                if api.tls is not None:
                    tasks.append(background.create_task(api.tls.watch()))
                grpc_at = address_fields(resources.grpc_socket)
                http_at = address_fields(resources.http_socket, "http_")
                log.info("listening", extra=grpc_at | http_at)
                try:
                    yield server
                    await give_notice(settings, api, server)
                finally:
                    await drain(settings, api, server, models, tasks)
                    await stop(api, models, telemetry, http_task)
                    await wait_until_idle(resources.loading)
    except BaseExceptionGroup as group:
        raise cause_of(group) from None


async def start(
    api: Api, resources: Resources, background: asyncio.TaskGroup
) -> asyncio.Task[None]:
    """Accepts connections. Returns the task of the HTTP server."""
    await api.grpc_server.start(resources.grpc_socket)
    return background.create_task(api.http_server.serve(sockets=[resources.http_socket]))


def start_models(
    settings: Settings, models: Models, contents: RepositoryContents, background: asyncio.TaskGroup
) -> list[asyncio.Task[None]]:
    """Starts the tasks that load, watch, reconcile and check the models."""

    async def load_and_watch() -> None:
        await load_models(models.registry, contents)
        if settings.model_control == "watch":
            await models.watcher.watch()

    work = (load_and_watch(), models.registry.reconcile_forever(), models.golden_monitor.run())
    return [background.create_task(one) for one in work]


def start_access(
    access: Access, api: Api, telemetry: Telemetry, background: asyncio.TaskGroup
) -> list[asyncio.Task[None]]:
    """Starts the task that reads the auth file again when it changes."""
    use = access.file_use
    if use is None:
        return []

    def keep_principals() -> None:
        principals = use.file.identities.principals
        api.quotas.keep(principals)
        telemetry.metrics.principals.keep(principals)

    def on_change() -> None:
        api.grpc_server.recheck_access()
        api.health.on_change()  # callers may see other models now
        keep_principals()

    keep_principals()
    watcher = watcher_of(use, telemetry.metrics, on_change)
    return [background.create_task(watcher.run())]


async def load_models(registry: ModelRegistry, contents: RepositoryContents) -> None:
    """Raises CannotServe if no model could be loaded."""
    await registry.sync(contents.versions, contents.configs)
    # Loaded objects stay. A collection that visits them would stop the loop for 30 ms.
    gc.collect()
    gc.freeze()
    if not registry.serving_models():
        reasons = (
            f"{version.model_name} version {version.number}: {version.reason}"
            for version in registry.versions()
        )
        raise CannotServe("no model could be loaded: " + "; ".join(reasons))


async def give_notice(settings: Settings, api: Api, server: Running) -> None:
    """Reports NOT_SERVING but keeps serving, so that load balancers choose another server."""
    server.state.stop_accepting()
    api.health.retire()
    with suppress(TimeoutError):
        async with asyncio.timeout(settings.drain_notice_s):
            await server.hurry.wait()


async def drain(
    settings: Settings,
    api: Api,
    server: Running,
    models: Models,
    tasks: list[asyncio.Task[None]],
) -> None:
    """Accepts no new calls and waits for those in progress, at most the grace period."""
    server.state.stop_accepting()
    api.health.stop()
    api.streams_stopping.set()
    models.loader.stop()
    for task in tasks:
        task.cancel()

    async def stop_calls(grace_s: float | None) -> None:
        await asyncio.gather(api.grpc_server.stop(grace_s), api.http_calls.stop(grace_s))

    stopped = asyncio.create_task(stop_calls(settings.grace_s))
    hurried = asyncio.create_task(server.hurry.wait())
    await asyncio.wait({stopped, hurried}, return_when=asyncio.FIRST_COMPLETED)
    hurried.cancel()
    if not stopped.done():
        await stop_calls(None)
    await stopped


async def stop(
    api: Api, models: Models, telemetry: Telemetry, http_task: asyncio.Task[None]
) -> None:
    """Closes engines, shared memory and servers. No call is in progress any more."""
    models.watcher.stop()
    await models.registry.unload_all()
    if api.regions is not None:
        api.regions.unregister()
    if telemetry.tracing is not None:
        await asyncio.to_thread(telemetry.tracing.close)
    if api.tls is not None:
        api.tls.close()
    api.http_server.should_exit = True
    await http_task
    models.devices.stop()


def cause_of(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The exception to raise for a group from the body and the background tasks."""
    cannot_serve, others = group.split(CannotServe)
    if cannot_serve is not None and others is None:
        return cannot_serve.exceptions[0]
    return group.exceptions[0] if len(group.exceptions) == 1 else group
