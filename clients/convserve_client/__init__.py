"""Client for convserve: classifies images over gRPC, with deadlines, retries and plain errors.

    with Client("127.0.0.1:8001") as client:
        answer = client.classify(Path("cat.jpg"), model="resnet50")
        print(answer.results[0][0].label)

`AsyncClient` is the same for asyncio. Every failure is a ClassifierError; see `errors`.
"""

from convserve_client.async_client import DEFAULT_TIMEOUT_S, MAX_MESSAGE_BYTES, AsyncClient
from convserve_client.client import Client
from convserve_client.errors import (
    ClassifierError,
    DeadlineExceeded,
    EngineFailure,
    InvalidInput,
    ModelNotFound,
    ModelNotReady,
    Overloaded,
    PermissionDenied,
    QuotaExceeded,
    ServerUnreachable,
    TlsError,
    Unauthenticated,
    Violation,
)
from convserve_client.images import Image, PixelArray
from convserve_client.retry import NO_RETRY, RetryPolicy
from convserve_client.security.tls import TlsOptions
from convserve_client.values import Answer, ModelInfo, Prediction, Timing

__all__ = [
    "DEFAULT_TIMEOUT_S",
    "MAX_MESSAGE_BYTES",
    "NO_RETRY",
    "Answer",
    "AsyncClient",
    "ClassifierError",
    "Client",
    "DeadlineExceeded",
    "EngineFailure",
    "Image",
    "InvalidInput",
    "ModelInfo",
    "ModelNotFound",
    "ModelNotReady",
    "Overloaded",
    "PermissionDenied",
    "PixelArray",
    "Prediction",
    "QuotaExceeded",
    "RetryPolicy",
    "ServerUnreachable",
    "Timing",
    "TlsError",
    "TlsOptions",
    "Unauthenticated",
    "Violation",
]
