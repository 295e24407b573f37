"""What an attack is: the bytes of hostile connections, and what the server may pay for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from tests.support.http2_frames import classify_pixels

CLASSIFY = "/convserve.v1.Classifier/Classify"
GET_MODEL = "/convserve.v1.Classifier/GetModel"
LIST_MODELS = "/convserve.v1.Classifier/ListModels"
HEALTH_CHECK = "/grpc.health.v1.Health/Check"
HEALTH_WATCH = "/grpc.health.v1.Health/Watch"
INFER = "/inference.GRPCInferenceService/ModelInfer"
STREAM_INFER = "/inference.GRPCInferenceService/ModelStreamInfer"
DIGIT = classify_pixels(b"lenet5", 32, 32, 1)

MAX_GROWTH_BYTES = 64 << 20


@dataclass(frozen=True)
class Body:
    """The body of a gRPC call. It is sent in DATA frames as the server's windows allow."""

    stream: int
    data: bytes
    ends: bool = True


@dataclass(frozen=True)
class Close:
    """The connection is closed, and a new one begins."""


# The bytes that one connection sends, piece by piece. A number is a pause in seconds. When the
# pieces end, the connection stays open.
Pieces = Iterator[bytes | float | Body | Close]


@dataclass(frozen=True)
class Attack:
    """One kind of hostile client."""

    name: str
    pieces: Callable[[], Pieces]
    port: str = "grpc"  # or http
    connections: int = 2
    reads: bool = True  # whether it reads what the server sends
    max_growth_bytes: int = MAX_GROWTH_BYTES  # of the server's resident memory
    tls: bool = False  # whether the server speaks TLS, and so its victim
    is_overload: bool = False  # it makes valid calls, so that others may be refused as overload
