"""gRPC server reflection v1 and v1alpha: grpcurl and others ask for the services and messages.

Both versions have the same messages under other names.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any

from google.protobuf.descriptor_pb2 import FileDescriptorProto
from google.protobuf.descriptor_pool import Default as default_pool
from google.protobuf.descriptor_pool import DescriptorPool
from grpc import StatusCode
from grpc_reflection.v1alpha import reflection_pb2 as pb

from server.api.in_flight import InFlightLimits
from server.api.rpc.health import parse_small
from server.api.rpc.streaming import answer_in_order, counted_stream
from server.api.stubs.pool import POOL
from server.transport.methods import Abort, Method, StreamingMethod, WireCall

METHOD = "ServerReflectionInfo"
V1ALPHA, V1 = PACKAGES = ("grpc.reflection.v1alpha", "grpc.reflection.v1")
SERVICES = tuple(f"{package}.ServerReflection" for package in PACKAGES)


class SymbolNotFoundError(Exception):
    """What a request asks for does not exist; the message says what."""


class Reflection:
    """Answers the requests of both versions from the descriptors of this process."""

    def __init__(self, services: Sequence[str]) -> None:
        self._services = sorted([*services, *SERVICES])
        # The messages of package `inference` are in a pool of their own, see api.stubs.pool.
        self._pools = (POOL, default_pool(), _pool_of_v1())
        self._files: dict[str, list[bytes]] = {}  # each file with those it imports

    def answer(self, request: pb.ServerReflectionRequest) -> pb.ServerReflectionResponse:
        response = pb.ServerReflectionResponse(valid_host=request.host, original_request=request)
        try:
            self._fill(response, request)
        except SymbolNotFoundError as error:
            response.error_response.error_code = StatusCode.NOT_FOUND.value[0]
            response.error_response.error_message = str(error)
        return response

    def _fill(
        self, response: pb.ServerReflectionResponse, request: pb.ServerReflectionRequest
    ) -> None:
        """Raises SymbolNotFoundError."""
        match request.WhichOneof("message_request"):
            case "list_services":
                for name in self._services:
                    response.list_services_response.service.add(name=name)
            case "file_by_filename":
                name = request.file_by_filename
                file = self._search("file", name, lambda pool: pool.FindFileByName(name))
                self._add_files(response, file)
            case "file_containing_symbol":
                self._add_files(response, self._file_of(request.file_containing_symbol))
            case "file_containing_extension":
                asked = request.file_containing_extension
                self._add_files(
                    response, self._extension(asked.containing_type, asked.extension_number)
                )
            case "all_extension_numbers_of_type":
                found = response.all_extension_numbers_response
                found.base_type_name, numbers = self._extensions(
                    request.all_extension_numbers_of_type
                )
                found.extension_number.extend(numbers)
            case _:
                response.error_response.error_code = StatusCode.INVALID_ARGUMENT.value[0]
                response.error_response.error_message = (
                    "message_request is missing; set one of its fields, for example list_services"
                )

    def _file_of(self, symbol: str) -> Any:
        """The file that defines a symbol: package.Service, package.Service.Method, a field."""
        name = symbol.strip(".").replace("/", ".")  # grpcurl also shows methods as Service/Method
        return self._search("symbol", symbol, lambda pool: _file_containing(pool, name))

    def _extension(self, type_name: str, number: int) -> Any:
        def find(pool: Any) -> Any:
            extended = pool.FindMessageTypeByName(type_name)
            return pool.FindExtensionByNumber(extended, number).file

        return self._search(f"extension {number} of", type_name, find)

    def _extensions(self, type_name: str) -> tuple[str, list[int]]:
        def find(pool: Any) -> tuple[str, list[int]]:
            extended = pool.FindMessageTypeByName(type_name)
            found = pool.FindAllExtensions(extended)
            return extended.full_name, sorted(extension.number for extension in found)

        answer: tuple[str, list[int]] = self._search("message", type_name, find)
        return answer

    def _search(self, kind: str, name: str, find: Callable[[Any], Any]) -> Any:
        """What `find` returns for the first pool that knows the name."""
        for pool in self._pools:
            with suppress(KeyError):
                return find(pool)
        raise SymbolNotFoundError(f"there is no {kind} {name[:200]!r} on this server")

    def _add_files(self, response: pb.ServerReflectionResponse, file: Any) -> None:
        """Adds a file, and those that it imports: most clients ask for them next."""
        if file.name not in self._files:
            self._files[file.name] = [one.serialized_pb for one in _with_imports(file, set())]
        response.file_descriptor_response.file_descriptor_proto.extend(self._files[file.name])


def reflection_methods(
    reflection: Reflection, in_flight: InFlightLimits, stopping: asyncio.Event
) -> dict[str, Method]:
    """The methods of both versions by path. A stream counts as a call in progress.

    Streams end when `stopping` is set.
    """

    async def respond(data: bytes) -> bytes:
        request = parse_small(pb.ServerReflectionRequest, data)
        response: bytes = reflection.answer(request).SerializeToString()
        return response

    async def info(requests: AsyncIterator[bytes], call: WireCall) -> None:
        with counted_stream(METHOD, in_flight, call.caller.principal) as unsent:
            try:
                # One at a time: a response is 400 times as large as its request.
                await answer_in_order(requests, call, respond, stopping, unsent, depth=1)
            except Abort:
                if not stopping.is_set():
                    raise

    return {f"/{service}/{METHOD}": StreamingMethod(info) for service in SERVICES}


def _file_containing(pool: Any, name: str) -> Any:
    """The file that defines a name. Raises KeyError. `pool` finds all but methods by itself."""
    with suppress(KeyError):
        return pool.FindFileContainingSymbol(name)
    return pool.FindMethodByName(name).containing_service.file


def _with_imports(file: Any, seen: set[str]) -> Iterator[Any]:
    seen.add(file.name)
    yield file
    for imported in file.dependencies:
        if imported.name not in seen:
            yield from _with_imports(imported, seen)


def _pool_of_v1() -> DescriptorPool:
    """The descriptors of version 1: grpcio has only those of v1alpha, which differ in the names."""
    file = FileDescriptorProto.FromString(pb.DESCRIPTOR.serialized_pb)
    file.name, file.package = "grpc/reflection/v1/reflection.proto", V1
    for message in file.message_type:
        for field in message.field:
            if field.type_name:  # it is a message
                field.type_name = field.type_name.replace(V1ALPHA, V1)
    for service in file.service:
        for method in service.method:
            method.input_type = method.input_type.replace(V1ALPHA, V1)
            method.output_type = method.output_type.replace(V1ALPHA, V1)
    pool = DescriptorPool()
    pool.Add(file)
    return pool
