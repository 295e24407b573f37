"""Both ports refuse every wrong credential, and accept the right one."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from grpc import StatusCode
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import ResponseReceived, StreamReset

from server.api.stubs import classify_pb2 as pb
from tests.security.credentials import (
    OBSERVER,
    RAW_VALUES,
    TEAM_A,
    WRONG_HEADERS,
    bearer,
)
from tests.security.guarded import (
    HIDDEN,
    SEEN,
    classify_request,
    guarded,
    infer_json,
    path_of,
)
from tests.support.http2_peers import ECHO

INFER = f"/v2/models/{SEEN}/infer"
OK = StatusCode.OK
UNAUTHENTICATED = StatusCode.UNAUTHENTICATED


async def test_wrong_credentials_are_refused_over_grpc(tmp_path: Path) -> None:
    async with guarded(tmp_path) as one:
        for name, headers in WRONG_HEADERS.items():
            code, details, _ = await one.call(path_of("Classify"), classify_request(), headers)
            assert code == UNAUTHENTICATED, name
            for secret in (TEAM_A.text[:30], "team-a", SEEN, HIDDEN):
                assert secret not in details, name
            code, _, _ = await one.call(path_of("Classify"), classify_request(), [bearer(TEAM_A)])
            assert code == OK, name


@pytest.mark.parametrize("name", RAW_VALUES)
async def test_bytes_that_no_client_library_sends_are_refused(tmp_path: Path, name: str) -> None:
    async with guarded(tmp_path) as one:
        reader, writer = await asyncio.open_connection("127.0.0.1", one.served.server.port)
        h2 = H2Connection(H2Configuration(validate_outbound_headers=False, header_encoding=False))
        h2.initiate_connection()
        fields = [(key, path_of("Classify") if key == ":path" else value) for key, value in ECHO]
        h2.send_headers(1, [*fields, ("authorization", RAW_VALUES[name])])
        writer.write(h2.data_to_send())
        answered = False
        while not answered:
            data = await reader.read(1 << 16)
            assert data, "the connection was closed"
            for event in h2.receive_data(data):
                if isinstance(event, ResponseReceived):
                    assert (b"grpc-status", b"16") in event.headers
                    answered = True
                answered = answered or isinstance(event, StreamReset)
        writer.close()


async def test_wrong_credentials_are_refused_over_http(tmp_path: Path) -> None:
    raw = {name: [("authorization", value)] for name, value in RAW_VALUES.items()}
    async with guarded(tmp_path) as one:
        for name, headers in (WRONG_HEADERS | raw).items():
            answer = await one.rest("POST", INFER, headers, json=infer_json())
            assert answer.status_code == 401, name
            challenge = 'Bearer realm="convserve"'
            if any(key == "authorization" for key, _ in headers):
                challenge += ', error="invalid_token"'
            assert answer.headers["www-authenticate"] == challenge
            assert answer.json()["code"] == "UNAUTHENTICATED"
            for secret in (TEAM_A.text[:30], "team-a", SEEN, HIDDEN):
                assert secret not in answer.text, name
        answer = await one.rest("POST", INFER, [bearer(TEAM_A)], json=infer_json())
        assert answer.status_code == 200
        assert one.count("missing") >= 1
        assert one.count("unknown_token") >= 1
        assert one.count("expired") >= 1


async def test_an_address_with_many_wrong_credentials_keeps_the_right_ones(
    tmp_path: Path,
) -> None:
    async with guarded(tmp_path, max_auth_failures_per_min=5) as one:
        right, wrong = [bearer(TEAM_A)], [("authorization", b"Bearer wrong")]
        assert (await one.rest("POST", INFER, right, json=infer_json())).status_code == 200
        for _ in range(5):
            answer = await one.rest("POST", INFER, wrong, json=infer_json())
            assert "try again" not in answer.text
        answer = await one.rest("POST", INFER, wrong, json=infer_json())
        assert answer.status_code == 401
        assert "too many wrong credentials came from this address; try again in" in answer.text
        code, details, _ = await one.call(
            path_of("ListModels"), pb.ListModelsRequest(), [bearer(OBSERVER)]
        )
        assert code == UNAUTHENTICATED
        assert "too many wrong credentials" in details
        assert (await one.rest("POST", INFER, right, json=infer_json())).status_code == 200
        assert (await one.call(path_of("Classify"), classify_request(), right))[0] == OK
        assert one.count("limited") == 2
