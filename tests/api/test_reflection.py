"""Reflection describes the contract."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from google.protobuf.descriptor_pb2 import FileDescriptorProto
from grpc import StatusCode
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from server.api.stubs import classify_pb2 as pb
from tests.support.serving import (
    publish,
    serve,
)

CLASSIFIER = pb.DESCRIPTOR.services_by_name["Classifier"]


async def test_reflection_describes_the_contract(tmp_path: Path) -> None:
    publish(tmp_path)
    async with serve(tmp_path) as served:
        stub: Any = reflection_pb2_grpc.ServerReflectionStub(served.channel)
        request = reflection_pb2.ServerReflectionRequest
        stream = stub.ServerReflectionInfo()
        await stream.write(request(list_services=""))
        listed = (await stream.read()).list_services_response.service
        await stream.write(request(file_containing_symbol=CLASSIFIER.full_name))
        files = (await stream.read()).file_descriptor_response.file_descriptor_proto
        await stream.write(request(file_by_filename="no such file"))
        unknown = (await stream.read()).error_response.error_code
        await stream.done_writing()
        assert not await stream.read()  # the end
    assert {service.name for service in listed} == {
        CLASSIFIER.full_name,
        "inference.GRPCInferenceService",
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
    }
    contract = FileDescriptorProto.FromString(files[0])
    assert contract.name == "convserve/v1/classify.proto"
    assert [method.name for method in contract.service[0].method] == [
        method.name for method in CLASSIFIER.methods
    ]
    assert unknown == StatusCode.NOT_FOUND.value[0]
