"""Client for programs that run an asyncio event loop."""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Self

import grpc
from google.protobuf.message import Message

from convserve_client.channel import ClientChannel, metadata_for
from convserve_client.errors import (
    ClassifierError,
    DeadlineExceeded,
    InvalidInput,
    ModelNotReady,
    ServerUnreachable,
    TlsError,
    closed_error,
)
from convserve_client.images import Image, add_images
from convserve_client.retry import RetryBudget, RetryPolicy, is_retriable
from convserve_client.security.tls import TlsOptions
from convserve_client.security.token import Token, bearer, check_secrecy
from convserve_client.standard_messages import (
    SERVING,
    SERVING_STATUS,
    HealthCheckRequest,
)
from convserve_client.stubs import classify_pb2 as pb
from convserve_client.values import Answer, ModelInfo, answer_from, model_info_from

DEFAULT_TIMEOUT_S = 10.0
MAX_MESSAGE_BYTES = 64 * 2**20
MAX_READY_BACKOFFS = 4  # doublings while it waits for a server: asking again costs nothing


class AsyncClient:
    """Client of one server. It opens one channel when it is first needed, and keeps it.

    Belongs to the event loop of its first call; any number of coroutines of that loop may share
    it. Cancelling a coroutine cancels its call on the server. Every call has a deadline. Failed
    calls are sent again within the deadline and the retry budget. Failures are ClassifierError.
    """

    def __init__(
        self,
        target: str,
        *,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        retry: RetryPolicy | None = None,
        max_message_bytes: int = MAX_MESSAGE_BYTES,
        tls: TlsOptions | None = None,
        token: Token | None = None,
        allow_plaintext_token: bool = False,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
        rng: random.Random | None = None,
    ) -> None:
        """`target` is "host:port" or "unix:/path". `timeout_s` is the default of every call.

        Without `tls` the connection is plaintext. Raises ValueError if a `token` would cross the
        network unencrypted, unless `allow_plaintext_token`.
        """
        if token is not None:
            check_secrecy(target, has_tls=tls is not None, allow_plaintext=allow_plaintext_token)
        if isinstance(token, str):
            bearer(token)
        self._target = target
        self._tls = tls
        self._token = token
        self._timeout_s = _checked_timeout_s(timeout_s)
        self._retry = retry or RetryPolicy()
        self._budget = RetryBudget(self._retry.budget_ratio, self._retry.budget_burst)
        self._max_message_bytes = max_message_bytes
        self._clock = clock
        self._sleep = sleep
        self._rng = rng or random.Random()
        self._channel: ClientChannel | None = None
        self._old_channels: set[ClientChannel] = set()  # other calls may still wait on them
        self._closed = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Ends calls in progress with a ClassifierError. Safe to call twice."""
        self._closed = True
        for channel in (*self._old_channels, self._channel):
            if channel is not None:
                await channel.close()

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
        """Classifies one or several images: all of them, or none if the call fails.

        Give a `version` or a `label` ("stable", "canary"), or neither: then the server chooses.
        A higher `priority`, 0 to 9, goes first among waiting calls. One uint8 array
        [N, H, W, C] sends N images in the cheapest form. Raises ClassifierError, and OSError if
        a file cannot be read.
        """
        deadline_s = self._deadline_s(timeout_s)
        with _invalid_input():
            request = pb.ClassifyRequest(
                model=model,
                version=version,
                label=label,
                top_k=top_k,
                priority=priority,
                request_id=request_id,
            )
        await add_images(request, images)
        return answer_from(await self._call("Classify", request, deadline_s))

    async def list_models(self, *, timeout_s: float | None = None) -> tuple[ModelInfo, ...]:
        """Every model and version of the server, sorted by name, then newest version first."""
        deadline_s = self._deadline_s(timeout_s)
        response = await self._call("ListModels", pb.ListModelsRequest(), deadline_s)
        return tuple(model_info_from(model) for model in response.models)

    async def get_model(
        self, name: str, version: int = 0, *, timeout_s: float | None = None
    ) -> ModelInfo:
        """One version of a model, with its class labels; version 0 means the stable one."""
        deadline_s = self._deadline_s(timeout_s)
        with _invalid_input():
            request = pb.GetModelRequest(model=name, version=version)
        return model_info_from(await self._call("GetModel", request, deadline_s))

    async def is_serving(self, model: str = "", *, timeout_s: float | None = None) -> bool:
        """Whether a model answers calls; "" means the whole server.

        Raises ModelNotFound if the server does not know the model.
        """
        deadline_s = self._deadline_s(timeout_s)
        with _invalid_input():
            request = HealthCheckRequest(service=model)
        response = await self._call("Check", request, deadline_s)
        return bool(response.status == SERVING)

    async def wait_ready(self, timeout_s: float | None = None, *, model: str = "") -> None:
        """Waits until the server, or one model, is serving. The server need not run yet.

        Raises DeadlineExceeded with the last status that was seen.
        """
        deadline_s = self._deadline_s(timeout_s)
        with _invalid_input():
            request = HealthCheckRequest(service=model)
        last_seen = "no connection"
        for attempt in range(1, 1_000_000):
            channel = self._open_channel()
            watch = channel.rpc("Watch")(
                request,
                timeout=max(deadline_s - self._clock(), 1e-3),
                metadata=metadata_for(self._token),
            )
            try:
                async for update in watch:
                    if update.status == SERVING:
                        return
                    last_seen = SERVING_STATUS.get(update.status, str(update.status))
            except grpc.aio.AioRpcError as failure:
                error = self._translate(failure, channel)
                if isinstance(error, TlsError) or not isinstance(
                    error, ModelNotReady | ServerUnreachable | DeadlineExceeded
                ):
                    raise error from failure
                if isinstance(error, ServerUnreachable):
                    last_seen = str(error)
            except asyncio.CancelledError:
                self._explain_cancellation()
                raise
            finally:
                watch.cancel()
            # The stream ended because the server went away. It may come back in time.
            wait_s = self._retry.wait_s(min(attempt, MAX_READY_BACKOFFS), None, self._rng)
            if self._clock() + wait_s >= deadline_s:
                break
            await self._sleep(wait_s)
        raise DeadlineExceeded(
            f"{model or self._target} was not serving in time; last seen: {last_seen}",
            code=grpc.StatusCode.DEADLINE_EXCEEDED,
        )

    async def _call(self, method: str, request: Message, deadline_s: float) -> Any:
        """One call with its retries. Every RPC of the contract only reads: all can be retried."""
        self._budget.add_call()
        attempt = 0
        error: ClassifierError = DeadlineExceeded("the time was up before the request was sent")
        while True:
            left_s = deadline_s - self._clock()
            if left_s <= 0:  # to gRPC, 0 would mean "no deadline"
                raise error
            attempt += 1
            channel = self._open_channel()
            try:
                response = await channel.rpc(method)(
                    request, timeout=left_s, metadata=metadata_for(self._token)
                )
                if response is not None:
                    return response
                # grpcio 1.78 does this if the deadline passes while the answer arrives.
                raise DeadlineExceeded(
                    "the answer came too late to be read", code=grpc.StatusCode.DEADLINE_EXCEEDED
                )
            except grpc.aio.AioRpcError as failure:
                error = self._translate(failure, channel)
                wait_s = self._retry.wait_s(attempt, error.retry_after_s, self._rng)
                if (
                    not is_retriable(error)
                    or attempt == self._retry.attempts
                    or self._clock() + wait_s >= deadline_s
                    or not self._budget.take_retry()
                ):
                    raise error from failure
            except asyncio.CancelledError:
                self._explain_cancellation()
                raise
            await self._sleep(wait_s)

    def _open_channel(self) -> ClientChannel:
        """The open channel, or a new one. Raises TlsError if its files cannot be used."""
        if self._closed:
            raise RuntimeError("the client is closed")
        if self._channel is None:
            self._channel = ClientChannel(self._target, self._max_message_bytes, self._tls)
        return self._channel

    def _deadline_s(self, timeout_s: float | None) -> float:
        timeout_s = self._timeout_s if timeout_s is None else _checked_timeout_s(timeout_s)
        return self._clock() + timeout_s

    def _translate(self, failure: grpc.aio.AioRpcError, channel: ClientChannel) -> ClassifierError:
        error = channel.translate(failure)
        if isinstance(error, ServerUnreachable) and channel.has_old_files:
            if channel is self._channel:  # the next call opens another one with the new files
                self._channel = None
            self._old_channels.add(channel)
        return error

    def _explain_cancellation(self) -> None:
        """Raises ClassifierError if `close` caused the cancellation, not the caller."""
        task = asyncio.current_task()
        if self._closed and not (task and task.cancelling()):
            raise closed_error() from None


@contextmanager
def _invalid_input() -> Iterator[None]:
    """Reports as InvalidInput what a message cannot hold, for example a negative top_k."""
    try:
        yield
    except ValueError as error:
        raise InvalidInput(str(error)) from error


def _checked_timeout_s(timeout_s: float) -> float:
    if not 0 < timeout_s < math.inf:
        raise ValueError(f"timeout_s {timeout_s} must be positive and finite: every call ends")
    return timeout_s
