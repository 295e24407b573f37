"""Triton's own clients: sync and asyncio, over gRPC and HTTP."""

import tritonclient.grpc as sync
import tritonclient.grpc.aio as aio
import tritonclient.http as http
import tritonclient.http.aio as http_aio
from tritonclient.grpc import InferInput, InferRequestedOutput, service_pb2
from tritonclient.utils import InferenceServerException

__all__ = [
    "InferInput",
    "InferRequestedOutput",
    "InferenceServerException",
    "aio",
    "http",
    "http_aio",
    "service_pb2",
    "sync",
]
