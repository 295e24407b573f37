"""Without an auth file everybody may call, but only callers on this machine may change anything."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from grpc import StatusCode

from server.api.stubs import classify_pb2 as pb
from server.api.stubs import open_inference_pb2 as oip
from tests.security.guarded import (
    CLASSIFIER,
    OPEN_INFERENCE,
    SEEN,
    classify_request,
    guarded,
    infer_json,
)

CHANGES: dict[str, Any] = {
    "RepositoryModelLoad": oip.RepositoryModelLoadRequest(model_name=SEEN),
    "RepositoryModelUnload": oip.RepositoryModelUnloadRequest(model_name="secret"),
    "SystemSharedMemoryRegister": oip.SystemSharedMemoryRegisterRequest(name="a", key="/none"),
    "SystemSharedMemoryUnregister": oip.SystemSharedMemoryUnregisterRequest(),
}
REST_CHANGES = (
    f"/v2/repository/models/{SEEN}/load",
    f"/v2/repository/models/{SEEN}/unload",
    "/v2/systemsharedmemory/region/a/register",
    "/v2/systemsharedmemory/unregister",
)
FORWARDED = {
    "x-forwarded-for": "127.0.0.1",
    "forwarded": "for=127.0.0.1",
    "x-real-ip": "127.0.0.1",
    "via": "1.1 proxy",
    "origin": "http://127.0.0.1:8000",
}
REFUSAL = "on this machine"


def outside_address() -> str:
    """An address of this machine that is not a loopback address; empty if it has none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing
        except OSError:
            return ""
        address: str = probe.getsockname()[0]
    return "" if address.startswith("127.") else address


async def code_of(channel: grpc.aio.Channel, method: str, **metadata: str) -> tuple[Any, str]:
    unary: Any = channel.unary_unary
    call = unary(OPEN_INFERENCE + method)(
        CHANGES[method].SerializeToString(), metadata=list(metadata.items()), timeout=20
    )
    return await call.code(), await call.details()


async def test_local_callers_may_change_everything(tmp_path: Path) -> None:
    async with guarded(tmp_path, "", allow_shared_memory=True) as one:
        for method in CHANGES:
            code, _ = await code_of(one.served.channel, method)
            assert code != StatusCode.PERMISSION_DENIED, method
        for path in REST_CHANGES:
            assert (await one.rest("POST", path)).status_code != 403
        assert (await one.rest("GET", "/metrics")).status_code == 200
        assert one.count("forbidden") == 0


@pytest.mark.parametrize("header", FORWARDED)
async def test_a_forwarded_request_is_not_local(tmp_path: Path, header: str) -> None:
    async with guarded(tmp_path, "", allow_shared_memory=True) as one:
        for method in CHANGES:
            unary: Any = one.served.channel.unary_unary
            call = unary(OPEN_INFERENCE + method)(
                CHANGES[method].SerializeToString(),
                metadata=[(header, FORWARDED[header])],
                timeout=20,
            )
            assert await call.code() == StatusCode.PERMISSION_DENIED, method
            assert REFUSAL in await call.details()
            assert "--allow-remote-admin" in await call.details()
        given = [(header, FORWARDED[header].encode())]
        for path in REST_CHANGES:
            answer = await one.rest("POST", path, given)
            assert answer.status_code == 403, path
            assert REFUSAL in answer.json()["detail"]
        # All else is open to it.
        answer = await one.rest("POST", f"/v2/models/{SEEN}/infer", given, json=infer_json())
        assert answer.status_code == 200
        assert SEEN in (await one.rest("GET", "/readyz", given)).text
        assert one.count("forbidden") == len(CHANGES) + len(REST_CHANGES)


@pytest.mark.skipif(not outside_address(), reason="this machine has only loopback addresses")
@pytest.mark.parametrize("allowed", [False, True])
async def test_callers_from_other_addresses_may_change_nothing_unless_it_is_allowed(
    tmp_path: Path, allowed: bool
) -> None:
    options: dict[str, Any] = {"host": "0.0.0.0", "allow_remote_admin": allowed}
    async with guarded(tmp_path, "", **options) as one:
        server, address = one.served.server, outside_address()
        async with (
            grpc.aio.insecure_channel(f"{address}:{server.port}") as channel,
            httpx.AsyncClient(base_url=f"http://{address}:{server.http_port}") as client,
        ):
            code, details = await code_of(channel, "RepositoryModelLoad")
            answer = await client.post(REST_CHANGES[0])
            if allowed:
                assert (code, answer.status_code) == (StatusCode.OK, 200)
            else:
                assert (code, answer.status_code) == (StatusCode.PERMISSION_DENIED, 403)
                assert REFUSAL in details
            unary: Any = channel.unary_unary
            for method, request in (
                ("Classify", classify_request()),
                ("ListModels", pb.ListModelsRequest()),
            ):
                await unary(CLASSIFIER + method)(request.SerializeToString(), timeout=20)


async def test_a_unix_socket_is_local(tmp_path: Path) -> None:
    path = str(tmp_path / "grpc.sock")
    async with (
        guarded(tmp_path, "", unix_socket=path, wait=False) as _,
        grpc.aio.insecure_channel(f"unix:{path}") as channel,
    ):
        stub: Any = channel.unary_unary
        call = stub(OPEN_INFERENCE + "RepositoryModelUnload")(
            oip.RepositoryModelUnloadRequest(model_name="x").SerializeToString(), timeout=20
        )
        assert await call.code() == StatusCode.NOT_FOUND
