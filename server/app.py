"""The composition root: what is made, and in which order it starts and stops."""

from __future__ import annotations

import asyncio
import gc
import logging
import signal
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from functools import partial

import uvicorn
from starlette.applications import Starlette

from server.api.classify import Classifier
from server.api.content import Decoders
from server.api.context import DeferredCallbacks
from server.api.handlers import CallSupport, grpc_methods
from server.api.health import HEALTH, Health, ServingState, health_methods
from server.api.http.app import HttpConnection, application
from server.api.http.calls import HttpCalls
from server.api.http.routes import BodyLimits, Rest
from server.api.in_flight import InFlightLimits
from server.api.inference import Inference
from server.api.reflection import Reflection, reflection_methods
from server.api.stubs import classify_pb2, open_inference_pb2
from server.api.v2.infer import TensorInference
from server.api.v2.metadata import Metadata
from server.api.v2.model_control import ModelControl
from server.api.v2.service import SHARED_MEMORY_METHODS, OpenInference, stream_error
from server.api.v2.shared_memory import SharedMemoryRegions
from server.engines.base import BACKENDS, Engine
from server.execution.device import DeviceExecutor
from server.images.input_spec import ImageLimits
from server.models.changes import ChangeNotifier
from server.models.golden_monitor import GoldenMonitor
from server.models.loader import EngineLoader, Loader
from server.models.registry import ModelRegistry
from server.models.watcher import RepositoryWatcher
from server.process.cores import available_cores
from server.process.load_thread import load_thread, wait_until_idle
from server.repository.contents import RepositoryContents, list_contents
from server.repository.serving_config import VersionPolicy
from server.scheduling.base import Scheduler
from server.scheduling.deadline import DeadlineScheduler
from server.scheduling.fixed import FixedScheduler
from server.settings import Settings
from server.telemetry.loop_lag import LoopLag
from server.telemetry.metrics import Metrics
from server.telemetry.nvml import gpu_monitor
from server.telemetry.tracing import Tracing, TracingMissing
from server.transport.calls_in_progress import TransportLimits
from server.transport.grpc_server import GrpcServer

log = logging.getLogger(__name__)

# Fields of a message: those of a request, what an image takes (at most six: itself, raw and its
# four), and as many again for what a later version of the contract may bring.
FIELDS = 64
FIELDS_PER_IMAGE = 12

ENDING = (signal.SIGTERM, signal.SIGINT)

# Images that decoders have been given, and that may come out of them at once: 1 to 3 s of work.
DECODING = 512

# Of one connection, beyond all those that a server takes: they are refused with a word on why.
CALLS_BEYOND = 1024

CLASSIFIER = classify_pb2.DESCRIPTOR.services_by_name["Classifier"]
OPEN_INFERENCE = open_inference_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"]
SERVICES = (CLASSIFIER.full_name, OPEN_INFERENCE.full_name)


class CannotServe(Exception):
    """The server can't start; the message says why and what to do."""


@dataclass(slots=True)
class Running:
    """A server that listens."""

    port: int  # of gRPC
    http_port: int
    registry: ModelRegistry
    metrics: Metrics
    hurry: asyncio.Event  # set it to end calls in progress without the rest of notice and grace
    state: ServingState

    @property
    def accepting(self) -> bool:
        return self.state.is_accepting


async def serve(settings: Settings) -> None:
    """Serves until SIGTERM, SIGINT or SIGHUP (its terminal has gone), then answers what was
    accepted. Raises CannotServe.

    A second signal takes the rest of the notice, and of their grace from the calls in progress.
    """
    signals: asyncio.Queue[str] = asyncio.Queue()
    loop = asyncio.get_running_loop()
    for number in ENDING:
        loop.add_signal_handler(number, signals.put_nowait, number.name)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as nohup has it
        loop.add_signal_handler(signal.SIGHUP, signals.put_nowait, "SIGHUP")
    async with running(settings) as server:
        name = await signals.get()
        notice_s, grace_s = settings.drain_notice_s, settings.grace_s
        log.info("stopping", extra={"signal": name, "notice_s": notice_s, "grace_s": grace_s})
        for number in ENDING:
            loop.add_signal_handler(number, server.hurry.set)
    log.info("stopped")


@asynccontextmanager
async def running(settings: Settings, *, loader: Loader | None = None) -> AsyncIterator[Running]:
    """A server that listens at once and loads its models meanwhile; at the end it gives notice,
    drains and stops.

    Raises CannotServe, out of the body too, when no model could be loaded. Without a `loader` an
    EngineLoader with these settings loads the engines.
    """
    policy, lying = _policy_of_versions(settings), _found(settings)
    threads = settings.threads or available_cores()
    metrics = Metrics()
    if (found := gpu_monitor()) is not None:
        metrics.read_gpus(found)
    tracing = _tracing(settings)
    hosts: dict[str, DeviceExecutor] = {}
    loop_lag = LoopLag()
    watching: list[asyncio.Task[None]] = []
    stopping = asyncio.Event()
    if loader is None:
        loader = EngineLoader(
            only_backend=settings.backend, threads=threads, rebuild=settings.rebuild_engines
        )
    try:
        async with asyncio.TaskGroup() as background:

            def executor_for(engine: Engine) -> DeviceExecutor:
                if engine.device not in hosts:
                    policy = _policy(settings, engine.units)
                    hosts[engine.device] = host = DeviceExecutor(
                        engine.device, engine.units, policy, loop_lag, tracing
                    )
                    watching.append(background.create_task(host.watch_for_stalls()))
                return hosts[engine.device]

            with (
                ThreadPoolExecutor(settings.decode_threads or threads, "decode") as decoders,
                load_thread() as loading,
                _listening(settings.host, settings.port) as grpc_socket,
                _listening(settings.host, settings.http_port) as http_socket,
            ):
                changes = ChangeNotifier()
                registry = ModelRegistry(
                    loader=loader,
                    load_thread=loading,
                    executor_for=executor_for,
                    metrics=metrics,
                    changes=changes,
                    policy=policy,
                    bake_time_s=settings.bake_time_s,
                    is_enabled=settings.serves,
                )
                watcher = RepositoryWatcher(settings.repo, registry, loading, settings.serves)
                golden_monitor = GoldenMonitor(
                    registry, metrics, loading, settings.golden_interval_s
                )
                health = Health(partial(_serving, registry))
                changes.subscribe(health.on_change)
                metrics.read_queue_rows(registry.queued_rows)
                metrics.read_busy(lambda: {name: host.busy_ratio() for name, host in hosts.items()})
                inference = Inference(
                    registry,
                    Decoders(
                        decoders,
                        ImageLimits(
                            encoded_bytes=settings.max_image_bytes, pixels=settings.max_image_pixels
                        ),
                        max_waiting=min(settings.queue_rows, DECODING),
                    ),
                    max_images=settings.max_images_per_call,
                )
                in_flight = InFlightLimits(
                    max_fields=FIELDS + FIELDS_PER_IMAGE * settings.max_images_per_call,
                    max_calls=settings.max_calls,
                    max_bytes=settings.max_bytes_in_progress,
                )
                regions = SharedMemoryRegions() if settings.allow_shared_memory else None
                tensors = TensorInference(inference, in_flight, regions)
                serving = ServingState()
                explicit = settings.model_control == "explicit"
                control = ModelControl(watcher if explicit else None)
                metadata = Metadata(
                    registry,
                    serving,
                    max_images=settings.max_images_per_call,
                    has_shared_memory=regions is not None,
                    has_model_control=explicit,
                )
                after_response = DeferredCallbacks()
                support = CallSupport(metrics, in_flight, after_response, stopping, tracing)
                reflection = Reflection([*SERVICES, HEALTH], stopping)
                methods = {
                    **health_methods(health, in_flight),
                    **reflection_methods(reflection, in_flight),
                    **grpc_methods(CLASSIFIER, Classifier(registry, inference), support),
                    **grpc_methods(
                        OPEN_INFERENCE,
                        OpenInference(tensors, metadata, control, regions),
                        support,
                        stream_error=stream_error,
                        without=SHARED_MEMORY_METHODS if regions is None else frozenset(),
                    ),
                }
                server = GrpcServer(methods, _limits(settings), loop_lag)
                state = Running(
                    port=grpc_socket.getsockname()[1],
                    http_port=http_socket.getsockname()[1],
                    registry=registry,
                    metrics=metrics,
                    hurry=asyncio.Event(),
                    state=serving,
                )
                calls = HttpCalls(metrics, in_flight, after_response)
                rest = Rest(
                    calls,
                    inference,
                    tensors,
                    metadata,
                    control,
                    regions,
                    max_fields=in_flight.max_fields,
                    limits=BodyLimits(
                        image=settings.max_image_bytes, infer=settings.max_message_bytes
                    ),
                )
                http = HttpServer(application(metrics, registry, serving, hosts, rest.routes()))
                await server.start(grpc_socket)
                serving_http = background.create_task(http.serve(sockets=[http_socket]))
                watch = watcher if settings.model_control == "watch" else None
                changing = [
                    background.create_task(_load(registry, lying, watch)),
                    background.create_task(registry.reconcile_forever()),
                    background.create_task(golden_monitor.run()),
                ]
                log.info("listening", extra={"port": state.port, "http_port": state.http_port})
                try:
                    yield state
                    serving.stop_accepting()
                    health.retire()
                    await _within(settings.drain_notice_s, state.hurry)
                finally:
                    serving.stop_accepting()
                    health.stop()
                    stopping.set()
                    loader.stop()
                    for task in changing:
                        task.cancel()
                    await _drain([server.stop, calls.stop], settings.grace_s, state.hurry)
                    watcher.stop()
                    await registry.unload_all()
                    if regions is not None:
                        regions.unregister()
                    if tracing is not None:
                        await asyncio.to_thread(tracing.close)
                    http.should_exit = True
                    await serving_http
                    for host in hosts.values():
                        host.stop()
                    for task in watching:
                        task.cancel()
                    await wait_until_idle(loading)
    except BaseExceptionGroup as group:  # of the body and the background tasks; mostly it is one
        cannot_serve, others = group.split(CannotServe)
        if cannot_serve is not None and others is None:
            raise cannot_serve.exceptions[0] from None
        if len(group.exceptions) == 1:
            raise group.exceptions[0] from None
        raise


class HttpServer(uvicorn.Server):
    """Uvicorn as a guest in our loop: signals are ours."""

    def __init__(self, app: Starlette) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=HttpConnection,
                log_config=None,
                access_log=False,
                lifespan="off",
                timeout_graceful_shutdown=1,  # seconds for who is slow to read
            )
        )

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _policy_of_versions(settings: Settings) -> VersionPolicy:
    try:
        return VersionPolicy.parse(settings.version_policy)
    except ValueError as error:
        raise CannotServe(f"version_policy {error}") from None


def _found(settings: Settings) -> RepositoryContents:
    """What lies in the repository, as far as it is to be served. Raises CannotServe."""
    if settings.backend and settings.backend not in BACKENDS:
        raise CannotServe(
            f"backend {settings.backend!r} is unknown; there are {', '.join(BACKENDS)}"
        )
    if not settings.repo.is_dir():
        raise CannotServe(
            f"the model repository {settings.repo} is no folder; build a model into it: "
            f"python -m model_repo.build lenet5 --repo {settings.repo}"
        )
    try:
        versions, plans, strays = list_contents(settings.repo)
    except OSError as error:
        raise CannotServe(
            f"the model repository {settings.repo} can't be read: {error.strerror}"
        ) from None
    for stray in strays:
        log.warning("entry_ignored", extra={"path": str(stray.path), "reason": stray.reason})
    names = settings.model_names()
    if missing := sorted(set(names) - {version.model for version in versions}):
        there = ", ".join(sorted({version.model for version in versions})) or "none"
        raise CannotServe(f"{settings.repo} has no model {', '.join(missing)}; it has {there}")
    if not versions:
        raise CannotServe(
            f"the model repository {settings.repo} holds no version of any model; build one: "
            f"python -m model_repo.build lenet5 --repo {settings.repo}"
        )
    if settings.model_control != "explicit":  # there the others may be asked for
        versions = [version for version in versions if settings.serves(version.model)]
    return RepositoryContents(versions, plans, strays)


def _policy(settings: Settings, units: int) -> Scheduler:
    if settings.scheduler == "fixed":
        size, delay_s = settings.fixed_batch, settings.fixed_delay_ms / 1e3
        return FixedScheduler(units, settings.queue_rows, size=size, delay_s=delay_s)
    return DeadlineScheduler(units, settings.queue_rows)


def _tracing(settings: Settings) -> Tracing | None:
    if not settings.trace_endpoint:
        return None
    try:
        return Tracing(settings.trace_endpoint, settings.trace_ratio)
    except TracingMissing as error:
        raise CannotServe(str(error)) from None


def _limits(settings: Settings) -> TransportLimits:
    return TransportLimits(
        message_bytes=settings.max_message_bytes,
        receiving_bytes=settings.max_bytes_in_progress,
        streams=settings.max_calls + CALLS_BEYOND,
    )


@contextmanager
def _listening(host: str, port: int) -> Iterator[socket.socket]:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # The protocol is named for asyncio, which else leaves Nagle's algorithm on: 40 ms an answer.
    with socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except OSError as error:
            raise CannotServe(f"can't listen on {_address(host, port)}: {error.strerror}") from None
        listener.listen()  # now, so that nobody is turned away before Uvicorn has started
        yield listener


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


async def _load(
    registry: ModelRegistry, found: RepositoryContents, watch: RepositoryWatcher | None
) -> None:
    await registry.sync(found.versions, found.configs)
    # What is there now stays, and looking for garbage among it stops the loop for 30 ms.
    gc.collect()
    gc.freeze()
    if not registry.serving_models():
        reasons = (
            f"{status.model_name} version {status.number}: {status.reason}"
            for status in registry.versions()
        )
        raise CannotServe("no model could be loaded: " + "; ".join(reasons))
    if watch is not None:
        await watch.watch()


async def _within(seconds: float, event: asyncio.Event) -> None:
    """Waits so long, or until the event."""
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()


async def _drain(
    stops: Sequence[Callable[[float | None], Awaitable[None]]], grace_s: float, hurry: asyncio.Event
) -> None:
    """Takes no new calls; ends when those in progress have, at the latest after the grace."""

    async def stop(grace_s: float | None) -> None:
        await asyncio.gather(*(stop(grace_s) for stop in stops))

    stopped = asyncio.create_task(stop(grace_s))
    hurried = asyncio.create_task(hurry.wait())
    await asyncio.wait({stopped, hurried}, return_when=asyncio.FIRST_COMPLETED)
    hurried.cancel()
    if not stopped.done():
        await stop(None)
    await stopped


def _serving(registry: ModelRegistry, name: str) -> bool | None:
    """Whether a model, or the server as a whole, answers; None where nothing has that name."""
    if name in ("", *SERVICES):
        return registry.is_ready
    return registry.is_serving(name)
