"""The client library: images in, classes out, over one gRPC channel.

    async with AsyncClient("127.0.0.1:8001") as client:
        answer = await client.classify(Path("cat.jpg"), model="resnet50")
        print(answer.results[0][0].label)

`Client` is the same for programs without an event loop. Every call has a deadline; calls that are
safe to repeat are repeated, within the deadline and within a budget. Every failure is one of:

    ClassifierError
    +-- InvalidInput        the request can't be right: mend it
    +-- ModelNotFound       no such model or version: choose another
    +-- ModelNotReady       the server is there, the model is not: try again later
    +-- ServerUnreachable   nobody answers at the target: check the address, or wait for the server
    +-- Overloaded          the server can't serve you in time: wait as long as it says
    +-- DeadlineExceeded    no answer in the time you gave: allow more, or ask less
    +-- EngineFailure       it broke on the server's side: the input is not to blame
"""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures
import importlib
import math
import os
import random
import re
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, Self, TypeVar, cast

import grpc
import numpy as np
from google.protobuf.message import DecodeError, Message
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from numpy.typing import NDArray

from convserve_client.stubs import classify_pb2 as pb
from convserve_client.stubs import classify_pb2_grpc

DEFAULT_TIMEOUT_S = 10.0
MAX_MESSAGE_BYTES = 64 * 2**20

Image = bytes | os.PathLike[str] | NDArray[np.uint8]
"""An encoded file's bytes, the path of one, or pixels [H, W, C] or [H, W]."""

P = ParamSpec("P")
R = TypeVar("R")
M = TypeVar("M", bound=Message)


class ClassifierError(Exception):
    """Any failure of a call. `code` is gRPC's; None when the request never left this process."""

    def __init__(
        self,
        message: str,
        *,
        code: grpc.StatusCode | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.retry_after_s = retry_after_s  # the server's word; infinite: it asked for no retry


@dataclass(frozen=True, slots=True)
class Violation:
    """What is wrong with one field of a request, for example field "images[3].raw"."""

    field: str
    description: str


class InvalidInput(ClassifierError):
    """The request can't be right; `violations` name the fields."""

    def __init__(
        self,
        message: str,
        *,
        code: grpc.StatusCode | None = None,
        retry_after_s: float | None = None,
        violations: tuple[Violation, ...] = (),
    ) -> None:
        super().__init__(message, code=code, retry_after_s=retry_after_s)
        self.violations = violations


class ModelNotFound(ClassifierError):
    """There is no such model or version; the message names those there are."""


class ModelNotReady(ClassifierError):
    """The server answered that the model is loading, draining or failed its check."""


class ServerUnreachable(ClassifierError):
    """There is no connection to the server, or it broke before the answer came."""


class Overloaded(ClassifierError):
    """The server refused the call; `retry_after_s` is when it is worth another try."""


class DeadlineExceeded(ClassifierError):
    """The answer did not come in time, or the server knows that it can't."""


class EngineFailure(ClassifierError):
    """The server broke. It tells no details; they stand in its log."""


ERRORS: dict[grpc.StatusCode, type[ClassifierError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidInput,
    grpc.StatusCode.NOT_FOUND: ModelNotFound,
    grpc.StatusCode.UNAVAILABLE: ModelNotReady,  # ServerUnreachable without a connection
    grpc.StatusCode.RESOURCE_EXHAUSTED: Overloaded,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.INTERNAL: EngineFailure,
}


# Of a request or an answer that is larger than somebody allows, in grpcio's words and the server's.
TOO_LARGE = re.compile(r"message larger than max|is (more than )?[\d,]+ bytes\b.* allowed")


@dataclass(frozen=True, slots=True)
class Prediction:
    index: int
    label: str
    probability: float


@dataclass(frozen=True, slots=True)
class Timing:
    """Where the call spent its time inside the server; the fields are those of the contract."""

    decode_ms: float
    queue_ms: float
    compute_ms: float
    total_ms: float
    batch_rows: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Answer:
    """What the server said of each image, in the order they were given, best class first."""

    results: tuple[tuple[Prediction, ...], ...]
    model: str
    version: int
    trained: bool  # False: the parameters were drawn at random, the classes mean nothing
    timing: Timing
    request_id: str


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """One version of one model; the fields are those of the contract."""

    name: str
    version: int
    state: str  # a name of the contract's Model.State, as READY
    reason: str
    architecture: str
    trained: bool
    weights: str
    input_shape: tuple[int, int, int]  # height, width, channels
    classes: int
    top_k: int
    max_batch: int
    backend: str
    precision: str
    labels: tuple[str, ...]  # names of the classes; empty in a listing
    version_labels: tuple[str, ...]  # those that lead to this version: "stable", "canary"

    @property
    def ready(self) -> bool:
        return self.state == "READY"


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """How often a failed call is repeated, and how long it waits before.

    Retries over all calls of a client stay below `budget_burst + budget_ratio * calls`: when most
    calls fail, repeating them all would multiply the load on a server that has too much of it.
    """

    attempts: int = 4  # of one call, the first included; 1 never retries
    first_backoff_s: float = 0.05  # upper end of the first wait; it doubles with every attempt
    max_backoff_s: float = 2.0
    budget_ratio: float = 0.1
    budget_burst: int = 10

    def __post_init__(self) -> None:
        if not 1 <= self.attempts <= 100:
            raise ValueError(f"attempts {self.attempts} must be 1 to 100")
        if not 0 < self.first_backoff_s <= self.max_backoff_s < math.inf:
            raise ValueError(
                f"first_backoff_s {self.first_backoff_s} must be above 0 and"
                f" at most max_backoff_s {self.max_backoff_s}, which is finite"
            )
        if not 0 <= self.budget_ratio <= 1:
            raise ValueError(f"budget_ratio {self.budget_ratio} must be 0 to 1")
        if self.budget_burst < 0:
            raise ValueError(f"budget_burst {self.budget_burst} must not be negative")

    def wait_s(self, attempt: int, hint_s: float | None, rng: random.Random) -> float:
        """How long to wait after the `attempt`-th failure, the first being 1.

        Full jitter, on top of the server's hint: callers refused together don't return together.
        """
        ceiling_s = min(self.max_backoff_s, self.first_backoff_s * 2 ** (attempt - 1))
        return (hint_s or 0.0) + rng.uniform(0, ceiling_s)


NO_RETRY = RetryPolicy(attempts=1)


class RetryBudget:
    """Tokens for retries: every call brings a fraction of one, every retry costs a whole one."""

    def __init__(self, ratio: float, burst: int) -> None:
        # Thousandths, because ten floats of 0.1 do not make 1.
        self._gain = round(ratio * 1000)
        self._most = burst * 1000 + self._gain
        self._tokens = burst * 1000

    def deposit(self) -> None:
        self._tokens = min(self._tokens + self._gain, self._most)

    def withdraw(self) -> bool:
        """Takes one retry's worth, if there is as much."""
        if self._tokens < 1000:
            return False
        self._tokens -= 1000
        return True


class AsyncClient:
    """Calls one server over one channel, which it opens when first needed and then keeps.

    Belongs to the event loop that made its first call; any number of coroutines there may share it.
    Cancelling a caller cancels its call on the server.
    """

    def __init__(
        self,
        target: str,
        *,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        retry: RetryPolicy | None = None,
        max_message_bytes: int = MAX_MESSAGE_BYTES,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
        rng: random.Random | None = None,
    ) -> None:
        """`target` is "host:port" or "unix:/path". `timeout_s` is for calls that name none."""
        self._target = target
        self._timeout_s = _checked_timeout(timeout_s)
        self._retry = retry or RetryPolicy()
        self._budget = RetryBudget(self._retry.budget_ratio, self._retry.budget_burst)
        self._max_message_bytes = max_message_bytes
        self._clock = clock
        self._sleep = sleep
        self._rng = rng or random.Random()
        self._channel: grpc.aio.Channel | None = None
        self._closed = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Ends calls under way with a ClassifierError. Safe to call twice."""
        self._closed = True
        if self._channel is not None:
            await self._channel.close(None)

    async def classify(
        self,
        images: Image | Sequence[Image],
        *,
        model: str,
        version: int = 0,
        label: str = "",
        top_k: int = 5,
        priority: int = 0,
        timeout_s: float | None = None,
        request_id: str = "",
    ) -> Answer:
        """Classifies one or several images, whole or not at all.

        A version, or a label instead ("stable", "canary"), may be named; without, the server
        chooses as the model's labels say. Of calls that wait those of a higher priority go first,
        0 (the usual) to 9.
        A single array [N, H, W, C] is N images in the cheapest form. Arrays are uint8. Raises
        ClassifierError, and OSError when a path can't be read.
        """
        deadline = self._deadline(timeout_s)
        if isinstance(images, bytes | os.PathLike | np.ndarray):
            images = images if isinstance(images, np.ndarray) and images.ndim == 4 else [images]
        with _field_errors():
            request = pb.ClassifyRequest(
                model=model,
                version=version,
                label=label,
                top_k=top_k,
                priority=priority,
                request_id=request_id,
            )
        await _add_images(request, images)
        answer = await self._call("Classify", request, deadline)
        return Answer(
            results=tuple(
                tuple(Prediction(c.index, c.label, c.probability) for c in result.classes)
                for result in answer.results
            ),
            model=answer.model,
            version=answer.version,
            trained=answer.trained,
            timing=Timing(
                decode_ms=answer.timing.decode_ms,
                queue_ms=answer.timing.queue_ms,
                compute_ms=answer.timing.compute_ms,
                total_ms=answer.timing.total_ms,
                batch_rows=tuple(answer.timing.batch_rows),
            ),
            request_id=answer.request_id,
        )

    async def list_models(self, *, timeout_s: float | None = None) -> tuple[ModelInfo, ...]:
        """Every model and version the server knows of, by name, the newest version first."""
        deadline = self._deadline(timeout_s)
        listing = await self._call("ListModels", pb.ListModelsRequest(), deadline)
        return tuple(_model_info(model) for model in listing.models)

    async def get_model(
        self, name: str, version: int = 0, *, timeout_s: float | None = None
    ) -> ModelInfo:
        """One version of one model, with its labels; 0 is the one that most calls get."""
        deadline = self._deadline(timeout_s)
        with _field_errors():
            request = pb.GetModelRequest(model=name, version=version)
        return _model_info(await self._call("GetModel", request, deadline))

    async def is_serving(self, model: str = "", *, timeout_s: float | None = None) -> bool:
        """Whether that model would answer a call; "" asks for the whole server.

        Raises ModelNotFound for a model the server never heard of.
        """
        deadline = self._deadline(timeout_s)
        with _field_errors():
            request = health_pb2.HealthCheckRequest(service=model)
        answer = await self._call("Check", request, deadline)
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

    async def wait_ready(self, timeout_s: float | None = None, *, model: str = "") -> None:
        """Returns once the server, or that model, is serving; the server need not be up yet.

        Raises DeadlineExceeded with the last that was seen of it.
        """
        deadline = self._deadline(timeout_s)
        with _field_errors():
            request = health_pb2.HealthCheckRequest(service=model)
        seen = "no connection"
        for attempt in range(1, 1_000_000):
            watch = self._rpc("Watch")(
                request, timeout=max(deadline - self._clock(), 1e-3), wait_for_ready=True
            )
            try:
                async for update in watch:
                    if update.status == health_pb2.HealthCheckResponse.SERVING:
                        return
                    seen = health_pb2.HealthCheckResponse.ServingStatus.Name(update.status)
            except grpc.aio.AioRpcError as failure:
                error = self._translated(failure)
                if not isinstance(error, ModelNotReady | ServerUnreachable | DeadlineExceeded):
                    raise error from failure
            except asyncio.CancelledError:
                self._explain_cancellation()
                raise
            finally:
                watch.cancel()
            # The server went away in the middle: it may come back in time.
            wait_s = self._retry.wait_s(min(attempt, 100), None, self._rng)
            if self._clock() + wait_s >= deadline:
                break
            await self._sleep(wait_s)
        raise DeadlineExceeded(
            f"{model or self._target} was not serving in time; last seen: {seen}",
            code=grpc.StatusCode.DEADLINE_EXCEEDED,
        )

    async def _call(self, method: str, request: Message, deadline: float) -> Any:
        """One call and its retries. Every RPC of the contract only reads: all may be repeated."""
        self._budget.deposit()
        attempt = 0
        error: ClassifierError = DeadlineExceeded("the time was up before the request was sent")
        while True:
            left_s = deadline - self._clock()
            if left_s <= 0:  # gRPC would take 0 for "no deadline"
                raise error
            attempt += 1
            try:
                answer = await self._rpc(method)(request, timeout=left_s, **_trace_context())
                if answer is not None:
                    return answer
                # Seen in grpcio 1.78 where the deadline passed as the answer came.
                raise DeadlineExceeded(
                    "the answer came too late to be read", code=grpc.StatusCode.DEADLINE_EXCEEDED
                )
            except grpc.aio.AioRpcError as failure:
                error = self._translated(failure)
                wait_s = self._retry.wait_s(attempt, error.retry_after_s, self._rng)
                if (
                    not _may_pass(error)
                    or attempt == self._retry.attempts
                    or self._clock() + wait_s >= deadline
                    or not self._budget.withdraw()
                ):
                    raise error from failure
            except asyncio.CancelledError:
                self._explain_cancellation()
                raise
            await self._sleep(wait_s)

    def _rpc(self, method: str) -> Any:
        if self._closed:
            raise RuntimeError("the client is closed")
        if self._channel is None:
            self._channel = grpc.aio.insecure_channel(
                self._target, options=channel_options(self._max_message_bytes)
            )
            stubs: list[Any] = [classify_pb2_grpc.ClassifierStub, health_pb2_grpc.HealthStub]
            self._methods = {k: v for stub in stubs for k, v in vars(stub(self._channel)).items()}
        return self._methods[method]

    def _deadline(self, timeout_s: float | None) -> float:
        timeout_s = self._timeout_s if timeout_s is None else _checked_timeout(timeout_s)
        return self._clock() + timeout_s

    def _translated(self, failure: grpc.aio.AioRpcError) -> ClassifierError:
        assert self._channel is not None
        connected = self._channel.get_state() is grpc.ChannelConnectivity.READY
        return translated(failure, connected=connected)

    def _explain_cancellation(self) -> None:
        """Closing the channel cancels the calls on it, though nobody cancelled their callers."""
        task = asyncio.current_task()
        if self._closed and not (task and task.cancelling()):
            raise _closed_meanwhile() from None


def _trace_context() -> dict[str, Any]:
    """The metadata that carries the W3C context of the caller's own trace to the server, where the
    program traces with OpenTelemetry; else nothing."""
    if "opentelemetry.trace" not in sys.modules:
        return {}
    carrier: dict[str, str] = {}
    importlib.import_module("opentelemetry.propagate").inject(carrier)
    return {"metadata": tuple(carrier.items())} if carrier else {}


def channel_options(max_message_bytes: int) -> list[tuple[str, int]]:
    return [
        ("grpc.max_send_message_length", max_message_bytes),
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.enable_retries", 0),  # retries are ours: two layers of them multiply
        # gRPC waits up to 120 s before it connects again; a restarted server is back sooner.
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 2000),
    ]


def translated(failure: grpc.aio.AioRpcError, *, connected: bool) -> ClassifierError:
    """The error that a failed call means; `connected` says whether the channel still was."""
    code = failure.code()
    message = failure.details() or code.name.lower()
    status = _status_details(failure)
    hint_s = _hint_s(failure, status)
    if code is grpc.StatusCode.INVALID_ARGUMENT:
        violations = tuple(
            Violation(violation.field, violation.description)
            for bad_request in _unpacked(status, error_details_pb2.BadRequest)
            for violation in bad_request.field_violations
        )
        return InvalidInput(message, code=code, retry_after_s=hint_s, violations=violations)
    kind = ERRORS.get(code, ClassifierError)
    if code is grpc.StatusCode.UNAVAILABLE and not connected and not status.details:
        kind = ServerUnreachable
    elif kind is Overloaded and hint_s is None and TOO_LARGE.search(message):
        kind = InvalidInput  # it is not about load, though the status is the same
    elif kind is ClassifierError:
        message = f"{code.name}: {message}"
    return kind(message, code=code, retry_after_s=hint_s)


def _may_pass(error: ClassifierError) -> bool:
    """Whether the same request may succeed a moment later.

    Without a hint a refusal need not be about load: a quota or a limit refuses again.
    """
    if isinstance(error, Overloaded):
        return error.retry_after_s is not None
    return isinstance(error, ModelNotReady | ServerUnreachable)


def _trailing(failure: grpc.aio.AioRpcError) -> list[tuple[str, str | bytes]]:
    return list(cast(Any, failure.trailing_metadata()) or ())


def _status_details(failure: grpc.aio.AioRpcError) -> status_pb2.Status:
    """The google.rpc.Status that came with the failure; empty when none or a garbled one did."""
    for key, value in _trailing(failure):
        if key == "grpc-status-details-bin" and isinstance(value, bytes):
            try:
                return status_pb2.Status.FromString(value)
            except DecodeError:
                break
    return status_pb2.Status()


def _unpacked(status: status_pb2.Status, kind: type[M]) -> list[M]:
    found = []
    for detail in status.details:
        message = kind()
        try:
            if detail.Unpack(message):
                found.append(message)
        except DecodeError:
            continue
    return found


def _hint_s(failure: grpc.aio.AioRpcError, status: status_pb2.Status) -> float | None:
    """How long the server asks to wait, by google.rpc.RetryInfo or by gRPC's own pushback."""
    hints = [
        max(0.0, info.retry_delay.seconds + info.retry_delay.nanos / 1e9)
        for info in _unpacked(status, error_details_pb2.RetryInfo)
    ]
    for key, value in _trailing(failure):
        if key == "grpc-retry-pushback-ms":
            # gRPC's retry design: negative or not a number means "do not retry".
            text = value.decode("latin-1") if isinstance(value, bytes) else value
            hints.append(int(text) / 1000 if text.isascii() and text.isdigit() else math.inf)
    return max(hints, default=None)


async def _add_images(
    request: pb.ClassifyRequest, images: NDArray[np.uint8] | Sequence[Image]
) -> None:
    if isinstance(images, np.ndarray):
        _check_pixels("pixels", images)
        count, height, width, channels = images.shape
        request.pixels.count = count
        request.pixels.height = height
        request.pixels.width = width
        request.pixels.channels = channels
        request.pixels.data = images.tobytes()
        return
    for index, image in enumerate(images):
        if isinstance(image, np.ndarray):
            _check_pixels(f"images[{index}]", image)
            if image.ndim not in (2, 3):
                raise _invalid(
                    f"images[{index}]", f"shape {image.shape} is not [H, W, C] or [H, W]"
                )
            raw = request.images.add().raw
            raw.height, raw.width = image.shape[:2]
            raw.channels = image.shape[2] if image.ndim == 3 else 1
            raw.data = image.tobytes()
        elif isinstance(image, os.PathLike):
            request.images.add().encoded = await asyncio.to_thread(Path(image).read_bytes)
        elif isinstance(image, bytes):
            request.images.add().encoded = image
        else:
            raise TypeError(
                f"images[{index}] is {type(image).__name__}; it may be bytes, a pathlib.Path"
                " or a numpy array"
            )


def _check_pixels(field: str, pixels: NDArray[Any]) -> None:
    if pixels.dtype != np.uint8:
        raise _invalid(field, f"dtype {pixels.dtype} given; pixels are uint8, 0 to 255")


def _invalid(field: str, description: str) -> InvalidInput:
    return InvalidInput(f"{field}: {description}", violations=(Violation(field, description),))


class _field_errors:
    """What protobuf refuses to hold (a negative top_k, half a character) is InvalidInput."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, ValueError):
            raise InvalidInput(str(error)) from error


def _model_info(model: pb.Model) -> ModelInfo:
    states = pb.Model.State
    return ModelInfo(
        name=model.name,
        version=model.version,
        state=states.Name(model.state) if model.state in states.values() else str(model.state),
        reason=model.reason,
        architecture=model.architecture,
        trained=model.trained,
        weights=model.weights,
        input_shape=(model.height, model.width, model.channels),
        classes=model.classes,
        top_k=model.top_k,
        max_batch=model.max_batch,
        backend=model.backend,
        precision=model.precision,
        labels=tuple(model.labels),
        version_labels=tuple(model.version_labels),
    )


def _checked_timeout(timeout_s: float) -> float:
    if not 0 < timeout_s < math.inf:
        raise ValueError(f"timeout_s {timeout_s} must be positive and finite: every call ends")
    return timeout_s


def _closed_meanwhile() -> ClassifierError:
    return ClassifierError(
        "the client was closed before the answer came", code=grpc.StatusCode.CANCELLED
    )


def _blocking(
    method: Callable[Concatenate[AsyncClient, P], Coroutine[Any, Any, R]],
) -> Callable[Concatenate[Client, P], R]:
    """The same method for callers without an event loop."""

    def call(self: Client, /, *args: P.args, **kwargs: P.kwargs) -> R:
        return self._wait(lambda: method(self._client, *args, **kwargs))

    call.__name__ = method.__name__
    call.__doc__ = method.__doc__
    return call


class Client:
    """AsyncClient for callers without an event loop of their own.

    One thread runs a private loop with an AsyncClient in it. Any number of threads may call, also
    threads in which some other loop is running (it stands still meanwhile).
    """

    def __init__(
        self,
        target: str,
        *,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        retry: RetryPolicy | None = None,
        max_message_bytes: int = MAX_MESSAGE_BYTES,
    ) -> None:
        self._client = AsyncClient(
            target, timeout_s=timeout_s, retry=retry, max_message_bytes=max_message_bytes
        )
        self._lock = threading.Lock()  # nothing is handed to the loop after it was told to stop
        self._closed = False
        started: concurrent.futures.Future[asyncio.AbstractEventLoop] = concurrent.futures.Future()
        self._stop = asyncio.Event()
        self._thread = threading.Thread(
            target=lambda: asyncio.run(self._serve(started)), name="classifier-client", daemon=True
        )
        self._thread.start()
        self._loop = started.result()
        atexit.register(self.close)  # a loop still running while the interpreter ends may crash it

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends calls under way with a ClassifierError, then the thread. Safe to call twice."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()
        atexit.unregister(self.close)

    classify = _blocking(AsyncClient.classify)
    list_models = _blocking(AsyncClient.list_models)
    get_model = _blocking(AsyncClient.get_model)
    is_serving = _blocking(AsyncClient.is_serving)
    wait_ready = _blocking(AsyncClient.wait_ready)

    async def _serve(self, started: concurrent.futures.Future[asyncio.AbstractEventLoop]) -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(_ignore_shared_wakeups)
        started.set_result(loop)
        await self._stop.wait()
        await self._client.close()

    def _wait(self, call: Callable[[], Coroutine[Any, Any, R]]) -> R:
        with self._lock:
            if self._closed:
                raise RuntimeError("the client is closed")
            future = asyncio.run_coroutine_threadsafe(call(), self._loop)
        try:
            return future.result()
        except concurrent.futures.CancelledError:
            raise _closed_meanwhile() from None
        finally:
            future.cancel()  # for a keyboard interrupt; one that is done stays as it is


def _ignore_shared_wakeups(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    # All loops of a process wake up for every gRPC event and all but one find nothing to read:
    # https://github.com/grpc/grpc/issues/25364
    if not isinstance(context.get("exception"), BlockingIOError):
        loop.default_exception_handler(context)
