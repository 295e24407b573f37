"""Opens grpcio's channels as the client needs them."""

from __future__ import annotations

import importlib
import sys
from typing import Any

import grpc

from convserve_client.security.tls import TlsOptions, channel_credentials
from convserve_client.security.token import METADATA_KEY, Token, bearer, current

Metadata = tuple[tuple[str, str], ...]


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
