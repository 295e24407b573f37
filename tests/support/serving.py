"""A complete server on free ports, and a model whose pixels decide its answers.

`Mirror` is an engine that returns the class in the first byte of each row. A test can hold its
batches and decide when they end, or make them fail.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import grpc
import msgspec
import numpy as np
from grpc_health.v1 import health_pb2_grpc
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse

from server.api.stubs import classify_pb2 as pb
from server.app.lifecycle import Running, running
from server.engines import null
from server.engines.base import Engine, Instance, OnDone, Outputs
from server.execution.device import profile_groups
from server.images.input_spec import Pixels
from server.models.loader import LoadedEngine, Loader
from server.repository import reader, writer
from server.repository.contents import VersionEntry
from server.repository.manifest import (
    GOLDEN_FILE,
    LABELS_FILE,
    MANIFEST_FORMAT,
    ONNX_FILE,
    EngineRecord,
    InputRecord,
    Manifest,
    WeightsRecord,
)
from server.repository.reader import Golden
from server.settings import Settings

SHAPE: tuple[int, int, Literal[1, 3]] = (8, 6, 3)
CLASSES = 12
MAX_BATCH = 4
SERVICE = "/convserve.v1.Classifier/"


def publish(
    root: Path,
    model: str = "tiny",
    *,
    shape: tuple[int, int, Literal[1, 3]] = SHAPE,
    classes: int = CLASSES,
    max_batch: int = MAX_BATCH,
    trained: bool = False,
    share: float = 1.0,
) -> Manifest:
    """The next version of a model with a null engine; its labels are "class 0", "class 1", ..."""
    with writer.staging(root, model) as staged:
        top_k = min(10, classes)
        (staged / ONNX_FILE).write_bytes(b"no graph: the null engine computes nothing")
        labels = "".join(f"class {index}\n" for index in range(classes))
        (staged / LABELS_FILE).write_text(labels)
        (staged / null.FILE).write_bytes(msgspec.json.encode(null.OutputSizes(classes, top_k)))
        answers = np.zeros((2, classes), np.float32)
        answers[:, 0] = 1
        golden = Golden(np.zeros((2, *shape), np.uint8), answers)
        writer.write_golden(staged / GOLDEN_FILE, golden)
        engine = EngineRecord(
            name="null-fp32",
            backend="null",
            backend_version=null.version(),
            precision="fp32",
            hardware=null.hardware(),
            max_batch=max_batch,
            files=(writer.file_record(staged / null.FILE),),
            deviation={},
        )
        manifest = Manifest(
            format=MANIFEST_FORMAT,
            model=model,
            version=1,
            created="2026-01-01T00:00:00Z",
            architecture="none",
            parameters=1,
            weights=WeightsRecord(source="random:0", sha256="0" * 64, trained=trained),
            card_sha256="0" * 64,
            input=InputRecord(
                height=shape[0],
                width=shape[1],
                channels=shape[2],
                resize=0,
                interpolation="nearest",
            ),
            classes=classes,
            top_k=top_k,
            objective_ms=100.0,
            share=share,
            onnx=writer.file_record(staged / ONNX_FILE),
            golden=writer.file_record(staged / GOLDEN_FILE),
            labels=writer.file_record(staged / LABELS_FILE),
            engines=(engine,),
        )
        return writer.publish(root, staged, manifest)


class Mirror:
    """An engine whose best class for a row is the row's first byte; the next classes follow.

    While `held`, batches wait for `release`. With a `failure` every batch ends in it.
    """

    device = "mirror"
    units = 1

    def __init__(self, manifest: Manifest, *, held: bool = False) -> None:
        self.max_batch = manifest.engines[0].max_batch
        self.held = held
        self.failure: Exception | None = None
        self.started = asyncio.Event()
        self.closed = False
        self._classes = manifest.classes
        self._top_k = manifest.top_k
        self.batches: list[int] = []  # the class of each one's first row
        self._waiting: list[Callable[[], None]] = []
        size = manifest.input
        pixels = np.zeros((self.max_batch, size.height, size.width, size.channels), np.uint8)
        self.instances: Sequence[Instance] = [_MirrorInstance(self, pixels)]

    def release(self) -> None:
        """Ends all held batches; later batches are not held."""
        self.held = False
        waiting, self._waiting = self._waiting, []
        for finish in waiting:
            finish()

    def computed_rows(self, rows: int) -> int:
        return rows

    def close(self) -> None:
        self.closed = True

    def run(self, pixels: Pixels, done: OnDone) -> None:
        self.batches.append(int(pixels[0, 0, 0, 0]))
        outcome: Outputs | Exception = self.failure or self._answer(pixels)
        self.started.set()
        if self.held:
            self._waiting.append(lambda: done(outcome))
        else:
            done(outcome)

    def _answer(self, pixels: Pixels) -> Outputs:
        first = pixels[:, 0, 0, 0].astype(np.int32)
        classes: Any = (
            first[:, np.newaxis] + np.arange(self._top_k, dtype=np.int32)
        ) % self._classes
        scores = np.tile(0.5 ** np.arange(1, self._top_k + 1, dtype=np.float32), (len(pixels), 1))
        probabilities = np.zeros((len(pixels), self._classes), np.float32)
        np.put_along_axis(probabilities, classes, scores, axis=1)
        return Outputs(classes, scores, probabilities)


class _MirrorInstance:
    units = 1

    def __init__(self, engine: Mirror, pixels: Pixels) -> None:
        self.pixels = pixels
        self._engine = engine

    def start(self, rows: int, done: OnDone) -> None:
        self._engine.run(self.pixels[:rows], done)


class Mirrors:
    """Makes the engines of a server and keeps them for the test."""

    def __init__(self, *, held: bool = False) -> None:
        self.held = held
        self.made: list[Mirror] = []

    def __call__(self, manifest: Manifest) -> Mirror:
        self.made.append(Mirror(manifest, held=self.held))
        return self.made[-1]


class FakeLoader:
    """Loader whose engines `engine` makes from the manifest.

    Their profile says that a batch of any size takes `batch_s`.
    """

    def __init__(self, engine: Callable[[Manifest], Engine], batch_s: float = 0.001) -> None:
        self._engine = engine
        self._batch_s = batch_s
        self.stopping = threading.Event()

    def load(self, version: VersionEntry, on_checking: Callable[[], None]) -> LoadedEngine:
        assert version.manifest is not None
        made = self._engine(version.manifest)
        on_checking()
        labels = reader.open_version(version.folder, version.manifest).labels
        groups = profile_groups(made, lambda instance, rows: self._batch_s)
        return LoadedEngine(made, version.manifest.engines[0], groups, labels)

    def stop(self) -> None:
        self.stopping.set()


class HeldLoader(FakeLoader):
    """Waits for `gate` before it loads a version of `model`; of any model if that is empty."""

    def __init__(self, engine: Callable[[Manifest], Engine], model: str = "") -> None:
        super().__init__(engine)
        self.gate = threading.Event()
        self.entered = threading.Event()
        self._model = model

    def load(self, version: VersionEntry, on_checking: Callable[[], None]) -> LoadedEngine:
        self.entered.set()
        if self._model in ("", version.model):
            self.gate.wait()
        return super().load(version, on_checking)

    def stop(self) -> None:
        super().stop()
        self.gate.set()


def loading(engine: Callable[[Manifest], Engine], batch_s: float = 0.001) -> FakeLoader:
    return FakeLoader(engine, batch_s)


@dataclass
class Served:
    """A running server with a channel to it."""

    server: Running
    channel: grpc.aio.Channel

    @property
    def target(self) -> str:
        return f"127.0.0.1:{self.server.port}"

    @property
    def http(self) -> str:
        return f"http://127.0.0.1:{self.server.http_port}"

    async def classify(self, request: pb.ClassifyRequest, timeout: float = 20) -> Any:
        return await self.call("Classify", request, timeout)

    async def call(self, method: str, request: Any, timeout: float = 20) -> Any:
        """Calls a method and returns its response; a request of type bytes is sent unchanged."""
        data = request if isinstance(request, bytes) else request.SerializeToString()
        unary: Any = self.channel.unary_unary
        answer = await unary(SERVICE + method)(data, timeout=timeout)
        name = {"Classify": "ClassifyResponse", "GetModel": "Model"}.get(
            method, f"{method}Response"
        )
        return getattr(pb, name).FromString(answer)


@asynccontextmanager
async def serve(
    repo: Path,
    *,
    load: Loader | None = None,
    wait: bool = True,
    limit_s: float = 100,
    credentials: grpc.ChannelCredentials | None = None,
    **options: Any,
) -> AsyncIterator[Served]:
    """A server of the repository. With `wait` its models are loaded; `load` replaces the loader.

    With `credentials` the channel speaks TLS.
    A test that takes longer than `limit_s` is stuck and fails.
    """
    defaults: dict[str, Any] = {"host": "127.0.0.1", "port": 0, "http_port": 0, "grace_s": 5.0}
    settings = Settings(repo=repo, **defaults | options)
    async with asyncio.timeout(limit_s), running(settings, loader=load) as server:
        address = f"127.0.0.1:{server.port}"
        unlimited = [("grpc.max_send_message_length", -1), ("grpc.use_local_subchannel_pool", 1)]
        if credentials is None:
            opening = grpc.aio.insecure_channel(address, options=unlimited)
        else:
            opening = grpc.aio.secure_channel(address, credentials, options=unlimited)
        async with opening as channel:
            served = Served(server, channel)
            if wait:
                await until(channel, "", HealthCheckResponse.SERVING)
            yield served


async def until(channel: grpc.aio.Channel, name: str, status: Any) -> None:
    """Watches grpc.health.v1 until the model or service has the status."""
    stub: Any = health_pb2_grpc.HealthStub(channel)
    watch = stub.Watch(HealthCheckRequest(service=name))
    async for response in watch:
        if response.status == status:
            watch.cancel()
            return
    raise AssertionError(f"the watch ended before {name!r} had status {status}")


def raw(*classes: int, shape: tuple[int, int, int] = SHAPE, **fields: Any) -> pb.ClassifyRequest:
    """A request with a row of pixels for each class; a Mirror answers a row with its class."""
    height, width, channels = shape
    rows = np.zeros((len(classes), *shape), np.uint8)
    rows[:, 0, 0, 0] = classes
    images = pb.RawImages(
        count=len(classes), height=height, width=width, channels=channels, data=rows.tobytes()
    )
    defaults: dict[str, Any] = {"model": "tiny", "pixels": images}
    return pb.ClassifyRequest(**defaults | fields)
