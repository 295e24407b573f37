"""A trusted proxy names its callers in a header, on both ports."""

from __future__ import annotations

from pathlib import Path

import pytest
from grpc import StatusCode

from server.api.stubs import classify_pb2 as pb
from tests.security.credentials import OPERATOR, PROXY_HEADER, Header, auth_file, bearer
from tests.security.guarded import CLASSIFIER, SEEN, classify_request, guarded, infer_json

ALICE: Header = (PROXY_HEADER, b"alice@example.org")

# Headers, and the status by gRPC and by HTTP.
REQUESTS: dict[str, tuple[list[Header], StatusCode, int]] = {
    "a known user": ([ALICE], StatusCode.OK, 200),
    "a user and a foreign token": (
        [("authorization", b"Bearer a.foreign.token"), ALICE],
        StatusCode.OK,
        200,
    ),
    "another user": ([(PROXY_HEADER, b"mallory")], StatusCode.UNAUTHENTICATED, 401),
    "the name of a principal": ([(PROXY_HEADER, b"team-a")], StatusCode.UNAUTHENTICATED, 401),
    "an empty user": ([(PROXY_HEADER, b"")], StatusCode.UNAUTHENTICATED, 401),
    "a user twice": ([ALICE, ALICE], StatusCode.UNAUTHENTICATED, 401),
    "two users": ([(PROXY_HEADER, b"mallory"), ALICE], StatusCode.UNAUTHENTICATED, 401),
    "a joined list": (
        [(PROXY_HEADER, b"mallory, alice@example.org")],
        StatusCode.UNAUTHENTICATED,
        401,
    ),
    "another user with a right token": (
        [(PROXY_HEADER, b"mallory"), bearer(OPERATOR)],
        StatusCode.UNAUTHENTICATED,
        401,
    ),
    "a token without a user": ([bearer(OPERATOR)], StatusCode.PERMISSION_DENIED, 403),
    "nothing": ([], StatusCode.UNAUTHENTICATED, 401),
}


@pytest.mark.parametrize("addresses", ['"127.0.0.1"', '"10.0.0.0/8", "127.0.0.0/8"'])
async def test_the_header_counts_on_connections_from_the_proxy(
    tmp_path: Path, addresses: str
) -> None:
    async with guarded(tmp_path, auth_file(proxy_addresses=addresses)) as one:
        for name, (headers, code, status) in REQUESTS.items():
            answer = await one.call(f"{CLASSIFIER}Classify", classify_request(), headers)
            assert answer[0] == code, name
            path = f"/v2/models/{SEEN}/infer"
            rest = await one.rest("POST", path, headers, json=infer_json())
            assert rest.status_code == status, name


async def test_wrong_users_of_a_proxy_do_not_lock_it_out(tmp_path: Path) -> None:
    text = auth_file(proxy_addresses='"127.0.0.1"')
    async with guarded(tmp_path, text, max_auth_failures_per_min=3) as one:
        for _ in range(10):
            answer = await one.call(
                f"{CLASSIFIER}ListModels", pb.ListModelsRequest(), [(PROXY_HEADER, b"mallory")]
            )
            assert answer[0] == StatusCode.UNAUTHENTICATED
        answer = await one.call(f"{CLASSIFIER}Classify", classify_request(), [ALICE])
        assert answer[0] == StatusCode.OK
