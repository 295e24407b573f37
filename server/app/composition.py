"""The composition root: builds the server's objects from its settings."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from socket import socket
from typing import NamedTuple

from starlette.applications import Starlette
from starlette.routing import Route

from server.api.classify import Classifier
from server.api.context import DeferredCallbacks
from server.api.decoders import DecoderQueue
from server.api.http.access import HttpAccess
from server.api.http.app import application
from server.api.http.calls import HttpCalls
from server.api.http.metrics_page import MetricsPage
from server.api.http.probes import Probes
from server.api.http.protocol.server import HttpServer
from server.api.http.routes import BodyLimits, Rest
from server.api.in_flight import InFlightLimits
from server.api.inference import Inference
from server.api.rpc.field_limit import max_fields
from server.api.rpc.handlers import CallSupport, grpc_methods
from server.api.rpc.health import HEALTH, Health, ServingState, health_methods
from server.api.rpc.reflection import Reflection, reflection_methods
from server.api.stubs import classify_pb2, open_inference_pb2
from server.api.turns import WorkTurns
from server.api.v2.infer import TensorInference
from server.api.v2.metadata import Metadata
from server.api.v2.model_control import ModelControl
from server.api.v2.service import SHARED_MEMORY_METHODS, OpenInference, stream_error
from server.api.v2.shared_memory import RegionControl, SharedMemoryRegions
from server.api.visible_models import VisibleModels
from server.app.access import Access
from server.app.grpc_access import GrpcAccess
from server.errors import CannotServe
from server.execution.devices import Devices
from server.images.input_spec import ImageLimits
from server.images.memory import MemoryBudget
from server.models.changes import ChangeNotifier
from server.models.golden_monitor import GoldenMonitor
from server.models.loader import EngineLoader, Loader
from server.models.registry import ModelRegistry
from server.models.startup import version_policy
from server.models.watcher import RepositoryWatcher
from server.process.cores import available_cores
from server.process.load_thread import load_thread
from server.process.open_files import raise_open_files_limit
from server.scheduling.base import Scheduler
from server.scheduling.deadline import DeadlineScheduler
from server.scheduling.fixed import FixedScheduler
from server.security.audit import AuditLog
from server.security.principal import Principal
from server.security.quota import Quotas
from server.settings import Settings
from server.telemetry.loop_lag import LoopLag
from server.telemetry.metrics import Metrics
from server.telemetry.nvml import gpu_monitor
from server.telemetry.tracing import Tracing, TracingMissing
from server.transport.calls.calls_in_progress import TransportLimits
from server.transport.compression import Inflater
from server.transport.connection_limits import GRPC, SPEAKS_TLS, ConnectionLimits
from server.transport.grpc_server import GrpcServer
from server.transport.http2.frame_limits import REASONS
from server.transport.listening import listening
from server.transport.methods import Method
from server.transport.tls.handshake import Encrypt
from server.transport.tls.ports import Tls, encryption_of, tls_of

log = logging.getLogger(__name__)

SPARE_FILES = 256  # that are not connections: engines, model files, the log

OPEN_CALLS_FACTOR = 4  # times --max-calls: gRPC calls that may be open, most without their requests

MAX_DECODING_IMAGES = 512  # that wait for a decoder: 1 to 3 s of work


CLASSIFIER = classify_pb2.DESCRIPTOR.services_by_name["Classifier"]
OPEN_INFERENCE = open_inference_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"]
SERVICES = (CLASSIFIER.full_name, OPEN_INFERENCE.full_name)


class Resources(NamedTuple):
    """Threads and sockets, closed when the server ends."""

    decoding: ThreadPoolExecutor
    loading: ThreadPoolExecutor
    inflater: Inflater
    grpc_socket: socket
    http_socket: socket


class Telemetry(NamedTuple):
    metrics: Metrics
    loop_lag: LoopLag
    tracing: Tracing | None


class Models(NamedTuple):
    """The models, and the objects that keep them up to date."""

    registry: ModelRegistry
    changes: ChangeNotifier
    loader: Loader
    devices: Devices
    watcher: RepositoryWatcher
    golden_monitor: GoldenMonitor


class Operations(NamedTuple):
    """The operations that all protocols share; regions are None without shared memory."""

    inference: Inference
    tensors: TensorInference
    metadata: Metadata
    control: ModelControl
    models: VisibleModels
    quotas: Quotas
    regions: SharedMemoryRegions | None
    region_control: RegionControl | None


class Api(NamedTuple):
    """The servers, and the objects that need a signal when they stop."""

    grpc_server: GrpcServer
    http_server: HttpServer
    http_calls: HttpCalls
    health: Health
    streams_stopping: asyncio.Event
    quotas: Quotas
    regions: SharedMemoryRegions | None
    tls: Tls | None


@contextmanager
def opened(settings: Settings) -> Iterator[Resources]:
    """Raises CannotServe if an address is taken."""
    with (
        ThreadPoolExecutor(decoder_threads(settings), "decode") as decoding,
        load_thread() as loading,
        Inflater() as inflater,
        listening(settings.host, settings.port, settings.unix_socket) as grpc_socket,
        listening(settings.host, settings.http_port, settings.http_unix_socket) as http_socket,
    ):
        yield Resources(decoding, loading, inflater, grpc_socket, http_socket)


def in_flight_limits(settings: Settings) -> InFlightLimits:
    return InFlightLimits(
        max_fields=max_fields(settings.max_images_per_call),
        max_calls=settings.max_calls,
        max_bytes=settings.max_bytes_in_progress,
    )


def transport_limits(settings: Settings) -> TransportLimits:
    return TransportLimits(
        message_bytes=settings.max_message_bytes,
        receiving_bytes=settings.max_bytes_in_progress,
        streams=settings.max_streams_per_connection,
        calls=OPEN_CALLS_FACTOR * settings.max_calls,
        unsent_bytes=settings.max_unsent_bytes,
        connection_idle_s=settings.max_connection_idle_s,
        connection_age_s=settings.max_connection_age_s,
        connection_age_grace_s=settings.max_connection_age_grace_s,
    )


def decoder_threads(settings: Settings) -> int:
    return settings.decode_threads or settings.threads or available_cores()


def build_connection_limits(settings: Settings, metrics: Metrics) -> ConnectionLimits:
    """The limits of both ports. They never exceed what the system allows the process to open."""
    wanted, files = settings.max_connections, raise_open_files_limit()
    spare = SPARE_FILES + (settings.max_handshakes if settings.tls_cert else 0)
    possible = min(wanted, max(1, files - spare))
    if possible < wanted:
        extra = {"max_connections": possible, "wanted": wanted, "open_files_limit": files}
        log.warning("max_connections_lowered", extra=extra)
    limits = ConnectionLimits(
        possible,
        settings.max_connections_per_peer,
        settings.trusted_networks(),
        lambda port, reason: metrics.connections_cut.labels(port, reason).inc(),
    )
    for reason in (*REASONS, SPEAKS_TLS):  # start at 0, so that rate() sees the first one
        metrics.connections_cut.labels(GRPC, reason)
    metrics.read_connections(limits.open)
    return limits


def build_telemetry(settings: Settings) -> Telemetry:
    metrics, tracing = Metrics(), None
    if (gpus := gpu_monitor()) is not None:
        metrics.read_gpus(gpus)
    if settings.trace_endpoint:
        try:
            tracing = Tracing(settings.trace_endpoint, settings.trace_ratio)
        except TracingMissing as error:
            raise CannotServe(str(error)) from None
    return Telemetry(metrics, LoopLag(), tracing)


def build_models(
    settings: Settings,
    loader: Loader | None,
    resources: Resources,
    telemetry: Telemetry,
    background: asyncio.TaskGroup,
) -> Models:
    """Everything below the API: devices, the registry, and what watches over both."""

    def make_scheduler(units: int) -> Scheduler:
        if settings.scheduler == "fixed":
            size, delay_s = settings.fixed_batch, settings.fixed_delay_ms / 1e3
            return FixedScheduler(units, settings.queue_rows, size=size, delay_s=delay_s)
        return DeadlineScheduler(units, settings.queue_rows)

    metrics, loading = telemetry.metrics, resources.loading
    devices = Devices(make_scheduler, background, telemetry.loop_lag, telemetry.tracing)
    loader = loader or EngineLoader(
        only_backend=settings.backend,
        threads=settings.threads or available_cores(),
        rebuild=settings.rebuild_engines,
    )
    changes = ChangeNotifier()
    registry = ModelRegistry(
        loader=loader,
        load_thread=loading,
        executor_for=devices.executor_for,
        metrics=metrics,
        changes=changes,
        policy=version_policy(settings),
        bake_time_s=settings.bake_time_s,
        is_enabled=settings.serves,
    )
    metrics.read_queue_rows(registry.queued_rows)
    metrics.read_busy(devices.busy_ratios)
    watcher = RepositoryWatcher(
        settings.repo, registry, loading, settings.serves, settings.allowed_root_folders()
    )
    golden_monitor = GoldenMonitor(registry, metrics, loading, settings.golden_interval_s)
    return Models(registry, changes, loader, devices, watcher, golden_monitor)


def build_operations(
    settings: Settings,
    resources: Resources,
    models: Models,
    state: ServingState,
    in_flight: InFlightLimits,
    audit: AuditLog,
    metrics: Metrics,
) -> Operations:
    """The operations that all protocols share."""
    max_images = settings.max_images_per_call
    limits = ImageLimits(
        encoded_bytes=settings.max_image_bytes,
        pixels=settings.max_image_pixels,
        memory=MemoryBudget(settings.max_decoding_bytes),
    )
    max_waiting = min(settings.queue_rows, MAX_DECODING_IMAGES)
    decoders = DecoderQueue(
        resources.decoding, limits, threads=decoder_threads(settings), max_waiting=max_waiting
    )
    visible = VisibleModels(models.registry)
    quotas = Quotas()
    inference = Inference(visible, decoders, quotas, metrics.principals, max_images=max_images)
    regions = SharedMemoryRegions() if settings.allow_shared_memory else None
    has_control = settings.model_control == "explicit"
    metadata = Metadata(
        visible,
        state,
        max_images=max_images,
        has_shared_memory=regions is not None,
        has_model_control=has_control,
    )
    return Operations(
        inference,
        TensorInference(inference, in_flight, regions),
        metadata,
        ModelControl(models.watcher if has_control else None, visible, audit),
        visible,
        quotas,
        regions,
        None if regions is None else RegionControl(regions, audit),
    )


def build_api(
    settings: Settings,
    resources: Resources,
    telemetry: Telemetry,
    models: Models,
    state: ServingState,
    access: Access,
) -> Api:
    """The two servers, each with its protocols."""
    metrics = telemetry.metrics
    connections = build_connection_limits(settings, metrics)
    tls = tls_of(settings, metrics, connections)
    encryption = encryption_of(settings, tls)
    in_flight = in_flight_limits(settings)
    operations = build_operations(
        settings, resources, models, state, in_flight, access.audit, metrics
    )
    stopping, after_response = asyncio.Event(), DeferredCallbacks()
    health = Health(partial(serves, operations.models))
    models.changes.subscribe(health.on_change)
    turns = WorkTurns()
    support = CallSupport(metrics, in_flight, after_response, turns, stopping, telemetry.tracing)
    methods = {
        **health_methods(health, in_flight),
        **reflection_methods(Reflection([*SERVICES, HEALTH]), in_flight, stopping),
        **inference_methods(operations, support),
    }
    grpc_server = GrpcServer(
        methods,
        transport_limits(settings),
        resources.inflater,
        telemetry.loop_lag,
        GrpcAccess(access.control),
        connections,
        encryption.grpc,
    )

    http_access = HttpAccess(access.control)
    calls = HttpCalls(
        metrics, in_flight, after_response, resources.inflater, http_access, grpc_server.starts
    )
    needs_certificate = encryption.http_requires_certificate
    probes = Probes(operations.models, http_access, state, models.devices, needs_certificate)
    routes = [
        Route("/metrics", MetricsPage(metrics, http_access).get),
        *probes.routes(),
        *rest_routes(settings, calls, operations, in_flight, turns),
    ]
    app = application(routes, state, settings.cors_origins(), needs_certificate)
    http_server = build_http_server(settings, app, connections, encryption.http)
    servers = grpc_server, http_server, calls
    return Api(*servers, health, stopping, operations.quotas, operations.regions, tls)


def build_http_server(
    settings: Settings, app: Starlette, connections: ConnectionLimits, encrypt: Encrypt | None
) -> HttpServer:
    return HttpServer(
        app,
        settings.http_keep_alive_s,
        connections,
        encrypt,
        settings.max_connection_age_s,
    )


def inference_methods(operations: Operations, support: CallSupport) -> dict[str, Method]:
    """The methods of the two services for inference."""
    regions = operations.region_control
    open_inference = OpenInference(
        operations.tensors, operations.metadata, operations.control, regions
    )
    return {
        **grpc_methods(CLASSIFIER, Classifier(operations.models, operations.inference), support),
        **grpc_methods(
            OPEN_INFERENCE,
            open_inference,
            support,
            stream_error=stream_error,
            without=SHARED_MEMORY_METHODS if regions is None else frozenset(),
        ),
    }


def rest_routes(
    settings: Settings,
    calls: HttpCalls,
    operations: Operations,
    in_flight: InFlightLimits,
    turns: WorkTurns,
) -> list[Route]:
    rest = Rest(
        calls,
        operations.inference,
        operations.tensors,
        operations.metadata,
        operations.control,
        operations.region_control,
        max_fields=in_flight.max_fields,
        limits=BodyLimits(image=settings.max_image_bytes, infer=settings.max_message_bytes),
        turns=turns,
    )
    return rest.routes()


def serves(models: VisibleModels, principal: Principal, name: str) -> bool | None:
    """Whether a model answers, or the server as a whole; None for an unknown name."""
    if name in ("", *SERVICES):
        return models.is_ready
    return models.is_serving(principal, name)
