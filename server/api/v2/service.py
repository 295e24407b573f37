"""gRPC service inference.GRPCInferenceService."""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec
from google.protobuf.message import Message

from server.api.context import CallContext
from server.api.inference import MAX_REQUEST_ID
from server.api.stubs import open_inference_pb2 as pb
from server.api.v2.infer import TensorInference
from server.api.v2.messages import infer_response, tensor_request
from server.api.v2.metadata import Metadata
from server.api.v2.model_control import ModelControl
from server.api.v2.shared_memory import RegionControl

SHARED_MEMORY_METHODS = frozenset(
    f"SystemSharedMemory{action}" for action in ("Status", "Register", "Unregister")
)
FINAL = "triton_final_response"  # parameter in a stream: no other response to this request follows

M = TypeVar("M", bound=Message)


class OpenInference:
    """The RPCs of GRPCInferenceService, called as server.api.rpc.handlers describes.

    Without `regions` the RPCs for shared memory must not be called.
    """

    def __init__(
        self,
        tensors: TensorInference,
        metadata: Metadata,
        control: ModelControl,
        regions: RegionControl | None = None,
    ) -> None:
        self._tensors = tensors
        self._metadata = metadata
        self._control = control
        self._regions = regions

    async def ServerLive(
        self, request: pb.ServerLiveRequest, context: CallContext
    ) -> pb.ServerLiveResponse:
        return pb.ServerLiveResponse(live=True)

    async def ServerReady(
        self, request: pb.ServerReadyRequest, context: CallContext
    ) -> pb.ServerReadyResponse:
        return pb.ServerReadyResponse(ready=self._metadata.is_ready())

    async def ModelReady(
        self, request: pb.ModelReadyRequest, context: CallContext
    ) -> pb.ModelReadyResponse:
        is_ready = self._metadata.is_model_ready(request.name, request.version, context)
        return pb.ModelReadyResponse(ready=is_ready)

    async def ServerMetadata(
        self, request: pb.ServerMetadataRequest, context: CallContext
    ) -> pb.ServerMetadataResponse:
        return _message(pb.ServerMetadataResponse, self._metadata.server())

    async def ModelMetadata(
        self, request: pb.ModelMetadataRequest, context: CallContext
    ) -> pb.ModelMetadataResponse:
        found = self._metadata.model(request.name, request.version, context)
        return _message(pb.ModelMetadataResponse, found)

    async def ModelInfer(
        self, request: pb.ModelInferRequest, context: CallContext
    ) -> pb.ModelInferResponse:
        response = await self._tensors.infer(tensor_request(request), context)
        message = infer_response(response)
        self._tensors.complete(response, context)
        return message

    async def ModelStreamInfer(
        self, request: pb.ModelInferRequest, context: CallContext
    ) -> pb.ModelStreamInferResponse:
        context.request_id = request.id
        message = await self.ModelInfer(request, context)
        message.parameters[FINAL].bool_param = True
        return pb.ModelStreamInferResponse(infer_response=message)

    async def ModelConfig(
        self, request: pb.ModelConfigRequest, context: CallContext
    ) -> pb.ModelConfigResponse:
        config = self._metadata.config(request.name, request.version, context)
        return pb.ModelConfigResponse(config=_message(pb.ModelConfig, config))

    async def ModelStatistics(
        self, request: pb.ModelStatisticsRequest, context: CallContext
    ) -> pb.ModelStatisticsResponse:
        found = self._metadata.statistics(request.name, request.version, context)
        return pb.ModelStatisticsResponse(
            model_stats=[_message(pb.ModelStatistics, one) for one in found]
        )

    async def RepositoryIndex(
        self, request: pb.RepositoryIndexRequest, context: CallContext
    ) -> pb.RepositoryIndexResponse:
        entries = self._metadata.index(request.repository_name, context, only_ready=request.ready)
        entry = pb.RepositoryIndexResponse.ModelIndex
        return pb.RepositoryIndexResponse(models=[_message(entry, one) for one in entries])

    async def RepositoryModelLoad(
        self, request: pb.RepositoryModelLoadRequest, context: CallContext
    ) -> pb.RepositoryModelLoadResponse:
        await self._control.load(
            context, request.repository_name, request.model_name, request.parameters
        )
        return pb.RepositoryModelLoadResponse()

    async def RepositoryModelUnload(
        self, request: pb.RepositoryModelUnloadRequest, context: CallContext
    ) -> pb.RepositoryModelUnloadResponse:
        await self._control.unload(
            context, request.repository_name, request.model_name, request.parameters
        )
        return pb.RepositoryModelUnloadResponse()

    async def SystemSharedMemoryStatus(
        self, request: pb.SystemSharedMemoryStatusRequest, context: CallContext
    ) -> pb.SystemSharedMemoryStatusResponse:
        response = pb.SystemSharedMemoryStatusResponse()
        for region in self._shared_memory().status(request.name):
            status = response.regions[region.name]
            status.name, status.key = region.name, region.key
            status.offset, status.byte_size = region.offset, region.byte_size
        return response

    async def SystemSharedMemoryRegister(
        self, request: pb.SystemSharedMemoryRegisterRequest, context: CallContext
    ) -> pb.SystemSharedMemoryRegisterResponse:
        self._shared_memory().register(
            context, request.name, request.key, request.offset, request.byte_size
        )
        return pb.SystemSharedMemoryRegisterResponse()

    async def SystemSharedMemoryUnregister(
        self, request: pb.SystemSharedMemoryUnregisterRequest, context: CallContext
    ) -> pb.SystemSharedMemoryUnregisterResponse:
        self._shared_memory().unregister(context, request.name)
        return pb.SystemSharedMemoryUnregisterResponse()

    def _shared_memory(self) -> RegionControl:
        assert self._regions is not None, "without regions these RPCs are not served"
        return self._regions


def stream_error(context: CallContext, message: str) -> pb.ModelStreamInferResponse:
    """The response in a stream to a request that failed."""
    request_id = context.request_id if len(context.request_id) <= MAX_REQUEST_ID else ""
    return pb.ModelStreamInferResponse(
        error_message=message, infer_response=pb.ModelInferResponse(id=request_id)
    )


def _message(message_class: type[M], value: msgspec.Struct) -> M:
    """A message with the fields of a plain value."""
    fields: dict[str, Any] = msgspec.to_builtins(value)
    return message_class(**fields)
