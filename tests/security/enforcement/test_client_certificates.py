"""Client certificates as credentials, in real TLS handshakes on both ports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
import trustme
from cryptography import x509
from grpc import StatusCode

from tests.security.credentials import OPERATOR, TEAM_A, Header, bearer
from tests.security.guarded import (
    CLASSIFIER,
    SEEN,
    Guarded,
    as_metadata,
    classify_request,
    guarded,
    infer_json,
)
from tests.support.tls_files import HOST, Client, issue, issue_server, options, write

SERVERS, CLIENTS, STRANGERS = trustme.CA(), trustme.CA(), trustme.CA()
OK, UNAUTHENTICATED = StatusCode.OK, StatusCode.UNAUTHENTICATED
DENIED = StatusCode.PERMISSION_DENIED

CERTIFICATES: dict[str, tuple[trustme.LeafCert | None, StatusCode]] = {
    "CN": (issue(CLIENTS, "team-a"), OK),
    "DNS": (issue(CLIENTS, "any", x509.DNSName("a.example")), OK),
    "URI": (issue(CLIENTS, "any", x509.UniformResourceIdentifier("spiffe://cluster/team-a")), OK),
    "another role": (issue(CLIENTS, "any", x509.DNSName("operator.example")), DENIED),
    "unknown names": (issue(CLIENTS, "team-b", x509.DNSName("b.example")), UNAUTHENTICATED),
    "a subdomain": (issue(CLIENTS, "any", x509.DNSName("x.a.example")), UNAUTHENTICATED),
    "a longer URI": (
        issue(CLIENTS, "any", x509.UniformResourceIdentifier("spiffe://cluster/team-a/x")),
        UNAUTHENTICATED,
    ),
    "CN of another kind": (issue(CLIENTS, "a.example"), UNAUTHENTICATED),
    "DNS of another kind": (issue(CLIENTS, "x", x509.DNSName("team-a")), UNAUTHENTICATED),
    "two principals": (
        issue(CLIENTS, "team-a", x509.DNSName("operator.example")),
        UNAUTHENTICATED,
    ),
    "none": (None, UNAUTHENTICATED),
}


def tls(folder: Path) -> dict[str, Any]:
    files = write(folder / "tls", issue_server(SERVERS), CLIENTS)
    return {
        **options(files),
        "tls_client": "optional",
        "credentials": Client(SERVERS).credentials(),
    }


async def statuses(
    one: Guarded, certificate: trustme.LeafCert | None, *headers: Header
) -> tuple[StatusCode, int]:
    """The status of an inference by gRPC and by REST, each on a new connection."""
    client = Client(SERVERS, certificate)
    server = one.served.server
    async with grpc.aio.secure_channel(f"{HOST}:{server.port}", client.credentials()) as channel:
        unary: Any = channel.unary_unary
        call = unary(CLASSIFIER + "Classify")(
            classify_request().SerializeToString(), metadata=as_metadata(headers), timeout=20
        )
        code: StatusCode = await call.code()
    address = f"https://{HOST}:{server.http_port}"
    async with httpx.AsyncClient(base_url=address, verify=client.context(), timeout=20) as rest:
        given = [(name.encode(), value) for name, value in headers]
        answer = await rest.post(f"/v2/models/{SEEN}/infer", json=infer_json(), headers=given)
    return code, answer.status_code


HTTP = {OK: 200, UNAUTHENTICATED: 401, DENIED: 403}


async def test_the_names_of_a_certificate_decide(tmp_path: Path) -> None:
    async with guarded(tmp_path, **tls(tmp_path)) as one:
        for name, (certificate, code) in CERTIFICATES.items():
            assert await statuses(one, certificate) == (code, HTTP[code]), name
        assert one.count("unknown_certificate") >= 2 * 6


async def test_a_token_counts_more_than_a_certificate(tmp_path: Path) -> None:
    team, _ = CERTIFICATES["CN"]
    async with guarded(tmp_path, **tls(tmp_path)) as one:
        assert await statuses(one, team, bearer(OPERATOR)) == (DENIED, 403)
        assert await statuses(one, team, ("authorization", b"Bearer x")) == (UNAUTHENTICATED, 401)
        unknown, _ = CERTIFICATES["unknown names"]
        assert await statuses(one, unknown, bearer(TEAM_A)) == (OK, 200)


async def test_a_certificate_of_another_authority_opens_nothing(tmp_path: Path) -> None:
    stranger = issue(STRANGERS, "team-a")
    async with guarded(tmp_path, **tls(tmp_path)) as one:
        with pytest.raises((httpx.TransportError, OSError)):
            await statuses(one, stranger)
        client = Client(SERVERS, stranger)
        target = f"{HOST}:{one.served.server.port}"
        async with grpc.aio.secure_channel(target, client.credentials()) as channel:
            unary: Any = channel.unary_unary
            call = unary(CLASSIFIER + "Classify")(b"", timeout=20, metadata=[])
            assert await call.code() == StatusCode.UNAVAILABLE


async def test_a_certificate_loses_its_principal_with_a_reload(tmp_path: Path) -> None:
    certificate, _ = CERTIFICATES["CN"]
    client = Client(SERVERS, certificate)
    async with guarded(tmp_path, **tls(tmp_path)) as one:
        target = f"{HOST}:{one.served.server.port}"
        async with grpc.aio.secure_channel(target, client.credentials()) as channel:
            unary: Any = channel.unary_unary
            request = classify_request().SerializeToString()

            async def code() -> StatusCode:
                found: StatusCode = await unary(CLASSIFIER + "Classify")(request, timeout=20).code()
                return found

            assert await code() == OK
            one.auth_path.write_text(one.auth_path.read_text().replace("CN:team-a", "CN:team-c"))
            while await code() == OK:  # on the same connection
                pass
            assert await code() == UNAUTHENTICATED
