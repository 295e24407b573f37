"""grpcio's channels as the client needs them."""

from __future__ import annotations

import importlib
import sys
from typing import Any

import grpc

from convserve_client.error_translation import translate
from convserve_client.errors import ClassifierError, TlsError
from convserve_client.security.tls import TlsOptions, channel_credentials, version_of
from convserve_client.security.token import METADATA_KEY, Token, bearer, current
from convserve_client.standard_messages import HealthCheckRequest, HealthCheckResponse
from convserve_client.stubs import classify_pb2_grpc

HEALTH = "/grpc.health.v1.Health/"

Metadata = tuple[tuple[str, str], ...]


class ClientChannel:
    """A channel of grpcio with the methods of the contract and of health checks."""

    def __init__(self, target: str, max_message_bytes: int, tls: TlsOptions | None) -> None:
        """Raises TlsError if a file cannot be used."""
        self._target = target
        self._tls = tls
        self._files = tls and version_of(tls)
        try:
            self._channel = open_channel(target, max_message_bytes, tls)
        except ValueError as error:
            raise TlsError(str(error)) from None
        self._rpcs = _rpcs_of(self._channel)

    @property
    def has_old_files(self) -> bool:
        """Whether a file of TLS has changed since the channel was opened."""
        return self._tls is not None and version_of(self._tls) != self._files

    def rpc(self, method: str) -> Any:
        """The callable of a method, as grpcio makes it."""
        return self._rpcs[method]

    def translate(self, failure: grpc.aio.AioRpcError) -> ClassifierError:
        """The client's error for a call that failed on this channel."""
        connected = self._channel.get_state() is grpc.ChannelConnectivity.READY
        return translate(failure, connected=connected, target=self._target, tls=self._tls)

    async def close(self) -> None:
        """Cancels the calls in progress."""
        await self._channel.close(None)


def open_channel(target: str, max_message_bytes: int, tls: TlsOptions | None) -> grpc.aio.Channel:
    """Raises ValueError if a file of `tls` cannot be used."""
    options: list[tuple[str, Any]] = [
        ("grpc.max_send_message_length", max_message_bytes),
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.enable_retries", 0),  # the client retries; two layers of retries would multiply
        # gRPC waits up to 120 s before it connects again. A server restarts faster than that.
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 2000),
    ]
    if tls is None:
        return grpc.aio.insecure_channel(target, options=options)
    if tls.server_name:
        options.append(("grpc.ssl_target_name_override", tls.server_name))
    return grpc.aio.secure_channel(target, channel_credentials(tls), options=options)


def metadata_for(token: Token | None) -> Metadata:
    """Metadata of a call: the trace context of OpenTelemetry, if the program uses it, and a token.

    Raises ValueError if the token has characters that no token may have.
    """
    found = _trace_context()
    return found if token is None else (*found, (METADATA_KEY, bearer(current(token))))


def _trace_context() -> Metadata:
    if "opentelemetry.trace" not in sys.modules:
        return ()
    carrier: dict[str, str] = {}
    importlib.import_module("opentelemetry.propagate").inject(carrier)
    return tuple(carrier.items())


def _rpcs_of(channel: Any) -> dict[str, Any]:
    """Callables of the channel, by the name of the method."""
    serialize, deserialize = HealthCheckRequest.SerializeToString, HealthCheckResponse.FromString
    stub: Any = classify_pb2_grpc.ClassifierStub
    return {
        **vars(stub(channel)),
        "Check": channel.unary_unary(HEALTH + "Check", serialize, deserialize),
        "Watch": channel.unary_stream(HEALTH + "Watch", serialize, deserialize),
    }
