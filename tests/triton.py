"""Triton's own gRPC client, sync and asyncio, in the process of the server it asks.

Its messages have the names of ours, and a descriptor pool holds a name once: it gets its own pool.
"""

from unittest import mock

from google.protobuf import descriptor_pool

with mock.patch.object(descriptor_pool, "Default", return_value=descriptor_pool.DescriptorPool()):
    import tritonclient.grpc as sync
    import tritonclient.grpc.aio as aio
    from tritonclient.grpc import InferInput, InferRequestedOutput, service_pb2
    from tritonclient.utils import InferenceServerException

__all__ = [
    "InferInput",
    "InferRequestedOutput",
    "InferenceServerException",
    "aio",
    "service_pb2",
    "sync",
]
