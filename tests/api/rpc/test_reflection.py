"""Reflection describes the contract, in both versions of its protocol."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from google.protobuf.descriptor_pool import DescriptorPool
from grpc import StatusCode
from grpc_reflection.v1alpha.reflection_pb2 import (
    ServerReflectionRequest,
    ServerReflectionResponse,
)

from server.api.rpc.reflection import Reflection
from server.api.stubs import classify_pb2 as pb
from tests.support.serving import Served, publish, serve

CLASSIFIER = pb.DESCRIPTOR.services_by_name["Classifier"]
OPEN_INFERENCE = "inference.GRPCInferenceService"
VERSIONS = ("v1", "v1alpha")


async def ask(
    served: Served, version: str, *requests: ServerReflectionRequest
) -> list[ServerReflectionResponse]:
    """The responses of one stream."""
    path = f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo"
    stream: Any = served.channel.stream_stream(path)(  # type: ignore[call-arg]
        request.SerializeToString() for request in requests
    )
    return [ServerReflectionResponse.FromString(data) async for data in stream]


def symbol(name: str) -> ServerReflectionRequest:
    return ServerReflectionRequest(file_containing_symbol=name)


def files(response: ServerReflectionResponse) -> list[FileDescriptorProto]:
    found = response.file_descriptor_response.file_descriptor_proto
    return [FileDescriptorProto.FromString(data) for data in found]


@pytest.mark.parametrize("version", VERSIONS)
async def test_reflection_describes_the_contract(version: str, tmp_path: Path) -> None:
    publish(tmp_path)
    async with serve(tmp_path) as served:
        services, contract, unknown = await ask(
            served,
            version,
            ServerReflectionRequest(list_services=""),
            symbol(CLASSIFIER.full_name),
            ServerReflectionRequest(file_by_filename="no such file"),
        )
    assert [service.name for service in services.list_services_response.service] == [
        CLASSIFIER.full_name,
        "grpc.health.v1.Health",
        "grpc.reflection.v1.ServerReflection",
        "grpc.reflection.v1alpha.ServerReflection",
        OPEN_INFERENCE,
    ]
    file = files(contract)[0]
    assert file.name == "convserve/v1/classify.proto"
    assert [method.name for method in file.service[0].method] == [
        method.name for method in CLASSIFIER.methods
    ]
    assert unknown.error_response.error_code == StatusCode.NOT_FOUND.value[0]
    assert "no such file" in unknown.error_response.error_message


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("convserve.v1.Classifier", "convserve/v1/classify.proto"),
        ("convserve.v1.Classifier.Classify", "convserve/v1/classify.proto"),
        ("convserve.v1.Classifier/Classify", "convserve/v1/classify.proto"),
        (".convserve.v1.ClassifyRequest", "convserve/v1/classify.proto"),
        ("convserve.v1.ClassifyRequest.pixels", "convserve/v1/classify.proto"),
        ("convserve.v1.Image.content", "convserve/v1/classify.proto"),
        ("convserve.v1.Model.State", "convserve/v1/classify.proto"),
        ("convserve.v1.Model.READY", "convserve/v1/classify.proto"),
        ("inference.GRPCInferenceService.ModelInfer", "open_inference.proto"),
        ("inference.ModelInferRequest.inputs", "open_inference.proto"),
        ("grpc.health.v1.Health.Watch", "grpc_health/v1/health.proto"),
        ("grpc.reflection.v1.ServerReflection", "grpc/reflection/v1/reflection.proto"),
        (
            "grpc.reflection.v1alpha.ServerReflection.ServerReflectionInfo",
            "grpc_reflection/v1alpha/reflection.proto",
        ),
    ],
)
def test_a_symbol_leads_to_files_that_a_client_can_load(name: str, file: str) -> None:
    response = Reflection([CLASSIFIER.full_name]).answer(symbol(name))
    assert response.original_request == symbol(name)
    assert load(files(response)).FindFileByName(files(response)[0].name)
    assert files(response)[0].name.endswith(file)


def load(found: Iterable[FileDescriptorProto]) -> DescriptorPool:
    """A pool of the files, as a client makes it: a file comes after those that it imports."""
    pool = DescriptorPool()
    for file in reversed(list(found)):
        pool.Add(file)
    return pool


@pytest.mark.parametrize(
    ("code", "words", "request_fields"),
    [
        (5, "no symbol 'convserve.v1.Nothing'", {"file_containing_symbol": "convserve.v1.Nothing"}),
        (5, "no symbol", {"file_containing_symbol": "convserve.v1.Classifier.Nothing"}),
        (5, "no symbol ''", {"file_containing_symbol": ""}),
        (5, "no message 'a.B'", {"all_extension_numbers_of_type": "a.B"}),
        (
            5,
            "no extension 7 of 'convserve.v1.Image'",
            {
                "file_containing_extension": {
                    "containing_type": "convserve.v1.Image",
                    "extension_number": 7,
                }
            },
        ),
        (3, "message_request is missing", {"host": "here"}),
    ],
    ids=["symbol", "method", "empty", "type", "extension", "nothing"],
)
def test_errors_say_what_is_missing(code: int, words: str, request_fields: Any) -> None:
    request = ServerReflectionRequest(**request_fields)
    response = Reflection([]).answer(request)
    assert response.error_response.error_code == code
    assert words in response.error_response.error_message
    assert response.original_request == request


def test_extensions_are_listed_and_found() -> None:
    reflection = Reflection([])
    asked = ServerReflectionRequest(all_extension_numbers_of_type="convserve.v1.Image")
    found = reflection.answer(asked).all_extension_numbers_response
    assert (found.base_type_name, list(found.extension_number)) == ("convserve.v1.Image", [])
