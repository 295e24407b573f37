"""Every error has a status, and messages to callers stay short."""

from __future__ import annotations

from pathlib import Path

import pytest
from grpc import StatusCode

from server import errors
from server.api.status import HTTP_STATUS, STATUS
from tests.api.classify_calls import failure, violation
from tests.support.serving import (
    publish,
    raw,
    serve,
)


def test_every_serving_error_has_a_status() -> None:
    found, kinds = set(), [errors.ServingError]
    while kinds:
        kinds = [sub for kind in kinds for sub in kind.__subclasses__()]
        found |= set(kinds)
    assert found == set(STATUS)


@pytest.mark.parametrize(
    "name",
    ["x" * 100_000, "ä" * 50_000, "a\nb\r\0c\x1b[31m", "'\"%0A{}$(x)", "\U0001f40d" * 3000],
    ids=["long", "long and wide", "control characters", "quotes", "snakes"],
)
async def test_any_name_can_be_part_of_an_error(tmp_path: Path, name: str) -> None:
    publish(tmp_path)
    async with serve(tmp_path) as served:
        error = await failure(served.classify(raw(1, model=name)))
    assert error.code() == StatusCode.NOT_FOUND
    assert error.details() == f"there is no model {name[:80]!r}; known models: tiny"


async def test_error_messages_have_a_limited_length(tmp_path: Path) -> None:
    for number in range(20):
        publish(tmp_path, f"model-{number:02}-{'x' * 50}", classes=2)
    async with serve(tmp_path) as served:
        error = await failure(served.classify(raw(1, model="ä" * 100)))
        other = await failure(served.classify(raw(1, model="")))
    assert error.code() == StatusCode.NOT_FOUND
    assert other.code() == StatusCode.INVALID_ARGUMENT
    assert len(error.details() or "") <= 600
    assert len(violation(other)[1]) <= 600


def test_every_status_has_an_http_status() -> None:
    assert HTTP_STATUS.keys() == set(STATUS.values())
