"""Triton's own clients, sync and asyncio, over gRPC and HTTP, in the process of the server.

The messages of gRPC have the names of ours, and a descriptor pool holds a name once: the client
gets its own pool.
"""

from unittest import mock

from google.protobuf import descriptor_pool

with mock.patch.object(descriptor_pool, "Default", return_value=descriptor_pool.DescriptorPool()):
    import tritonclient.grpc as sync
    import tritonclient.grpc.aio as aio
    from tritonclient.grpc import InferInput, InferRequestedOutput, service_pb2
    from tritonclient.utils import InferenceServerException

import tritonclient.http as http
import tritonclient.http.aio as http_aio

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
