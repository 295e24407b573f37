"""Client for programs without an event loop."""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures
import threading
from collections.abc import Callable, Coroutine
from typing import Any, Concatenate, ParamSpec, Self, TypeVar

from convserve_client.async_client import DEFAULT_TIMEOUT_S, MAX_MESSAGE_BYTES, AsyncClient
from convserve_client.errors import closed_error
from convserve_client.retry import RetryPolicy
from convserve_client.security.tls import TlsOptions
from convserve_client.security.token import Token

P = ParamSpec("P")
R = TypeVar("R")


def _blocking(
    method: Callable[Concatenate[AsyncClient, P], Coroutine[Any, Any, R]],
) -> Callable[Concatenate[Client, P], R]:
    """The same method, but it blocks until the result is there."""

    def call(self: Client, /, *args: P.args, **kwargs: P.kwargs) -> R:
        return self._wait(lambda: method(self._client, *args, **kwargs))

    call.__name__ = method.__name__
    call.__doc__ = method.__doc__
    return call


class Client:
    """AsyncClient for callers without an event loop.

    One thread runs a private event loop with an AsyncClient. Any number of threads may call. A
    call from a thread with a running event loop blocks that loop.
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
    ) -> None:
        """The arguments are those of AsyncClient."""
        self._client = AsyncClient(
            target,
            timeout_s=timeout_s,
            retry=retry,
            max_message_bytes=max_message_bytes,
            tls=tls,
            token=token,
            allow_plaintext_token=allow_plaintext_token,
        )
        self._lock = threading.Lock()  # no call is sent to the loop after its stop
        self._closed = False
        started: concurrent.futures.Future[asyncio.AbstractEventLoop] = concurrent.futures.Future()
        self._stop = asyncio.Event()
        self._thread = threading.Thread(
            target=lambda: asyncio.run(self._serve(started)), name="classifier-client", daemon=True
        )
        self._thread.start()
        self._loop = started.result()
        atexit.register(self.close)  # a running loop may crash the interpreter while it exits

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends calls in progress with a ClassifierError, then the thread. Safe to call twice."""
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
            raise closed_error() from None
        finally:
            future.cancel()  # after a keyboard interrupt; does nothing to a finished call


def _ignore_shared_wakeups(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    # grpcio wakes all event loops of a process for every event; all but one then find nothing to
    # read: https://github.com/grpc/grpc/issues/25364
    if not isinstance(context.get("exception"), BlockingIOError):
        loop.default_exception_handler(context)
