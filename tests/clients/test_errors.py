"""Every failure of a call becomes an error that says what the caller can do."""

import asyncio

import grpc
import pytest
from google.rpc import error_details_pb2

from convserve_client import (
    NO_RETRY,
    AsyncClient,
    ClassifierError,
    InvalidInput,
    Overloaded,
    QuotaExceeded,
    ServerUnreachable,
    Violation,
    errors,
)
from convserve_client.errors import ERRORS
from tests.support.scripted_classifier import (
    ScriptedClassifier,
    refuse,
    serving,
)

UNAVAILABLE = grpc.StatusCode.UNAVAILABLE


EXHAUSTED = grpc.StatusCode.RESOURCE_EXHAUSTED


@pytest.mark.parametrize("code", [c for c in grpc.StatusCode if c is not grpc.StatusCode.OK])
async def test_every_status_raises_its_error(code: grpc.StatusCode) -> None:
    async with (
        serving(ScriptedClassifier(refuse(code, "the reason"))) as target,
        AsyncClient(target, retry=NO_RETRY) as client,
    ):
        with pytest.raises(ClassifierError, match="the reason") as failure:
            await client.classify(b"", model="small")
    assert type(failure.value) is ERRORS.get(code, ClassifierError)
    assert failure.value.code is code


def test_every_error_belongs_to_a_status() -> None:
    others = {ServerUnreachable, QuotaExceeded}  # share a status with another error
    assert set(ClassifierError.__subclasses__()) == {*ERRORS.values(), *others}


def test_the_module_docstring_lists_every_error() -> None:
    tree = errors.__doc__ or ""
    assert all(f"+-- {error.__name__} " in tree for error in ClassifierError.__subclasses__())


async def test_invalid_input_names_the_fields() -> None:
    violations = [
        error_details_pb2.BadRequest.FieldViolation(field="images[3].raw", description="too short"),
        error_details_pb2.BadRequest.FieldViolation(field="top_k", description="too large"),
    ]
    details = error_details_pb2.BadRequest(field_violations=violations)
    service = ScriptedClassifier(refuse(grpc.StatusCode.INVALID_ARGUMENT, "bad", details))
    async with serving(service) as target, AsyncClient(target) as client:
        with pytest.raises(InvalidInput) as refused:
            await client.classify(b"", model="small")
    assert refused.value.violations == (
        Violation("images[3].raw", "too short"),
        Violation("top_k", "too large"),
    )


@pytest.mark.parametrize(
    "garbled",
    [
        b"\xff\xff\xff",  # not a google.rpc.Status
        # a Status with a RetryInfo that cannot be decoded
        b"\x1a\x32\x0a\x28type.googleapis.com/google.rpc.RetryInfo\x12\x06\xff\xff\xff\xff\xff\xff",
    ],
)
async def test_details_that_cannot_be_decoded_do_not_hide_the_error(garbled: bytes) -> None:
    step = refuse(EXHAUSTED, "full", trailing=(("grpc-status-details-bin", garbled),))
    async with serving(ScriptedClassifier(step)) as target, AsyncClient(target) as client:
        with pytest.raises(Overloaded, match="full") as refused:
            await client.classify(b"", model="small")
    assert refused.value.retry_after_s is None


async def test_a_message_over_the_servers_limit_is_invalid_input() -> None:
    service = ScriptedClassifier()
    async with (
        serving(service, max_message_bytes=1000) as target,
        AsyncClient(target) as client,
    ):
        with pytest.raises(InvalidInput, match="larger than max"):
            await client.classify(bytes(2000), model="small")
    assert service.requests == []


@pytest.mark.parametrize(
    "message",
    [
        "request: is 75,264,033 bytes; at most 67,108,864 are allowed",
        "request: is more than 67,108,864 bytes when decompressed; at most 67,108,864 are allowed",
        "metadata: is 20,000 bytes; at most 16,384 are allowed",
    ],
)
async def test_a_request_too_large_for_the_server_is_invalid_input(message: str) -> None:
    service = ScriptedClassifier(refuse(EXHAUSTED, message))
    async with serving(service) as target, AsyncClient(target) as client:
        with pytest.raises(InvalidInput, match="allowed") as refused:
            await client.classify(b"", model="small")
    assert refused.value.retry_after_s is None
    assert len(service.requests) == 1, "a retry would be as large"


async def test_a_message_over_the_clients_limit_is_invalid_input() -> None:
    service = ScriptedClassifier()
    async with (
        serving(service) as target,
        AsyncClient(target, max_message_bytes=1000) as client,
    ):
        with pytest.raises(InvalidInput, match="larger than max"):
            await client.classify(bytes(2000), model="small")
    assert service.requests == []


async def test_a_target_without_a_server_is_unreachable(unused_target: str) -> None:
    async with AsyncClient(unused_target, retry=NO_RETRY) as client:
        with pytest.raises(ServerUnreachable) as failure:
            await client.classify(b"", model="small")
    assert failure.value.code is UNAVAILABLE


async def test_a_server_that_closes_the_connection_is_unreachable() -> None:
    async def hang_up(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    async with await asyncio.start_server(hang_up, "127.0.0.1", 0) as server:
        host, port = server.sockets[0].getsockname()
        async with AsyncClient(f"{host}:{port}", retry=NO_RETRY) as client:
            with pytest.raises(ServerUnreachable):
                await client.classify(b"", model="small")
