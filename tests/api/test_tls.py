"""Both ports over TLS: clients with and without certificates, probes, renewal under load, drain."""

from __future__ import annotations

import asyncio
import logging
import ssl
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
import trustme
from grpc import StatusCode
from grpc_health.v1.health_pb2 import HealthCheckResponse

from server.app.lifecycle import running
from server.errors import CannotServe
from server.settings import Settings
from tests.support.serving import SERVICE, Mirrors, Served, loading, publish, raw, serve, until
from tests.support.tls_files import HOST, Client, expired, issue_server, options, write

AUTHORITY, CLIENTS = trustme.CA(), trustme.CA()
CERTIFIED = Client(AUTHORITY, CLIENTS.issue_cert("client.example", common_name="client"))
PLAIN = Client(AUTHORITY)
WAIT_S = 20


def https(served: Served, client: Client) -> httpx.AsyncClient:
    return httpx.AsyncClient(
        base_url=f"https://{HOST}:{served.server.http_port}", verify=client.context(), timeout=20
    )


async def classify_as(served: Served, client: Client) -> StatusCode:
    """The status of a call on a new channel."""
    async with grpc.aio.secure_channel(served.target, client.credentials()) as channel:
        call: Any = channel.unary_unary(f"{SERVICE}Classify")  # type: ignore[call-arg]
        try:
            await call(raw(3).SerializeToString(), timeout=10)
        except grpc.aio.AioRpcError as error:
            return error.code()
        return StatusCode.OK


async def test_both_ports_speak_tls_and_only_tls(tmp_path: Path) -> None:
    publish(tmp_path / "repo")
    files = write(tmp_path / "tls", issue_server(AUTHORITY))
    tls = {"credentials": PLAIN.credentials(), **options(files), "cors_origin": "https://app.here"}
    async with serve(tmp_path / "repo", load=loading(Mirrors()), **tls) as served:
        answer = await served.classify(raw(3))
        assert answer.results[0].classes[0].index == 3
        async with https(served, PLAIN) as client:
            assert (await client.get("/readyz")).json()["ready"]
            page = await client.get("/metrics", headers={"origin": "https://app.here"})
            assert page.headers["access-control-allow-origin"] == "https://app.here"
            assert 'tls_handshakes_total{outcome="done",port="grpc"} 1.0' in page.text
            assert "convserve_tls_certificate_expiry_timestamp_seconds" in page.text
            body = await client.get("/v2/models/tiny")
            assert body.json()["name"] == "tiny"
        async with httpx.AsyncClient() as client:
            refusal = await client.get(f"{served.http}/readyz")
            assert (refusal.status_code, "needs TLS" in refusal.text) == (400, True)
        async with grpc.aio.insecure_channel(served.target) as channel:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await channel.unary_unary(f"{SERVICE}Classify")(b"", timeout=10)  # type: ignore[call-arg]
            assert caught.value.code() == StatusCode.UNAVAILABLE


async def test_clients_need_a_certificate_of_the_right_ca(tmp_path: Path) -> None:
    publish(tmp_path / "repo")
    files = write(tmp_path / "tls", issue_server(AUTHORITY), client_ca=CLIENTS)
    tls = {"credentials": CERTIFIED.credentials(), **options(files)}
    strangers = {
        "none": PLAIN,
        "other CA": Client(AUTHORITY, trustme.CA().issue_cert("client.example")),
        "expired": Client(AUTHORITY, expired(CLIENTS)),
    }
    async with serve(tmp_path / "repo", load=loading(Mirrors()), **tls) as served:
        assert await classify_as(served, CERTIFIED) == StatusCode.OK
        for kind, stranger in strangers.items():
            assert await classify_as(served, stranger) == StatusCode.UNAVAILABLE, kind
        async with https(served, CERTIFIED) as client:
            assert (await client.get("/v2/models/tiny")).status_code == 200
        async with https(served, PLAIN) as client:
            assert (await client.get("/healthz")).status_code == 200
            assert (await client.get("/readyz")).json() == {"ready": True, "accepting": True}
            for path in ("/metrics", "/v2", "/v2/models/tiny", "/healthz/", "//healthz"):
                answer = await client.get(path)
                assert answer.status_code == 403, path
                assert "requires a client certificate" in answer.json()["detail"]
        for kind in ("other CA", "expired"):
            with pytest.raises((httpx.HTTPError, ssl.SSLError)):
                async with https(served, strangers[kind]) as client:
                    await client.get("/healthz")


async def test_an_optional_certificate_is_checked_if_there_is_one(tmp_path: Path) -> None:
    publish(tmp_path / "repo")
    files = write(tmp_path / "tls", issue_server(AUTHORITY), client_ca=CLIENTS)
    tls = {"credentials": PLAIN.credentials(), **options(files), "tls_client": "optional"}
    async with serve(tmp_path / "repo", load=loading(Mirrors()), **tls) as served:
        assert await classify_as(served, PLAIN) == StatusCode.OK
        assert await classify_as(served, CERTIFIED) == StatusCode.OK
        stranger = Client(AUTHORITY, trustme.CA().issue_cert("client.example"))
        assert await classify_as(served, stranger) == StatusCode.UNAVAILABLE
        async with https(served, PLAIN) as client:
            assert (await client.get("/metrics")).status_code == 200


async def test_the_http_port_can_stay_plain(tmp_path: Path) -> None:
    publish(tmp_path / "repo")
    files = write(tmp_path / "tls", issue_server(AUTHORITY), client_ca=CLIENTS)
    tls = {"credentials": CERTIFIED.credentials(), **options(files), "http_tls": False}
    server = serve(tmp_path / "repo", load=loading(Mirrors()), **tls)
    async with server as served, httpx.AsyncClient() as client:
        assert (await client.get(f"{served.http}/metrics")).status_code == 200


async def test_unix_sockets_stay_plain(tmp_path: Path) -> None:
    publish(tmp_path / "repo")
    files = write(tmp_path / "tls", issue_server(AUTHORITY), client_ca=CLIENTS)
    at: dict[str, Any] = {
        "unix_socket": str(tmp_path / "grpc"),
        "http_unix_socket": str(tmp_path / "http"),
    }
    server = serve(tmp_path / "repo", load=loading(Mirrors()), wait=False, **at, **options(files))
    async with server:
        async with grpc.aio.insecure_channel(f"unix:{tmp_path / 'grpc'}") as channel:
            await until(channel, "", HealthCheckResponse.SERVING)
        transport = httpx.AsyncHTTPTransport(uds=str(tmp_path / "http"))
        async with httpx.AsyncClient(transport=transport) as client:
            assert (await client.get("http://here/metrics")).status_code == 200


async def test_certificates_are_renewed_under_load_without_a_lost_call(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Old connections live on; new ones, one for every few calls, get the new certificate."""
    caplog.set_level(logging.INFO, "server.security")
    publish(tmp_path / "repo")
    old, new = issue_server(AUTHORITY), issue_server(AUTHORITY)
    files = write(tmp_path / "tls", old)
    tls = {"credentials": PLAIN.credentials(), **options(files)}
    async with serve(tmp_path / "repo", load=loading(Mirrors()), **tls) as served:
        reloaded = asyncio.Event()
        statuses: list[StatusCode] = []

        async def keep_calling() -> None:
            while not reloaded.is_set():
                await served.classify(raw(3))
                statuses.append(StatusCode.OK)

        async def keep_connecting() -> None:
            while not reloaded.is_set():
                statuses.append(await classify_as(served, PLAIN))

        calling = [asyncio.create_task(keep_calling()) for _ in range(4)]
        calling.append(asyncio.create_task(keep_connecting()))
        assert await served_certificate(served) == der(old)
        write(tmp_path / "tls", new)
        async with asyncio.timeout(WAIT_S):
            while "tls_files_reloaded" not in caplog.messages:
                await asyncio.sleep(0.01)
        assert await served_certificate(served) == der(new)
        reloaded.set()
        await asyncio.gather(*calling)
        assert len(statuses) > 20
        assert set(statuses) == {StatusCode.OK}


async def test_a_drain_over_tls_answers_what_was_accepted(tmp_path: Path) -> None:
    publish(tmp_path / "repo")
    engines = Mirrors(held=True)
    files = write(tmp_path / "tls", issue_server(AUTHORITY))
    tls = {"credentials": PLAIN.credentials(), **options(files)}
    server = serve(tmp_path / "repo", load=loading(engines), grace_s=20, **tls)
    served = await server.__aenter__()
    async with grpc.aio.secure_channel(served.target, PLAIN.credentials()) as channel:
        call = asyncio.create_task(Served(served.server, channel).classify(raw(3)))
        await engines.made[0].started.wait()
        draining = asyncio.create_task(server.__aexit__(None, None, None))
        while served.server.accepting:
            await asyncio.sleep(0)
        engines.made[0].release()
        assert (await call).results[0].classes[0].index == 3
        await draining


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"tls_cert": "a.pem"}, "tls_cert is set, but tls_key is not"),
        ({"tls_key": "a.pem"}, "tls_key is set, but tls_cert is not"),
        ({"tls_client_ca": "a.pem"}, "tls_client_ca is set, but tls_cert and tls_key are not"),
        ({"tls_client": "required"}, "tls_client is 'required', but tls_client_ca is not set"),
        ({"tls_client": "sometimes"}, "tls_client is 'sometimes'; it must be required or optional"),
    ],
    ids=["no-key", "no-certificate", "only-ca", "no-ca", "other-word"],
)
def test_half_a_configuration_is_refused(given: dict[str, str], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Settings(**given)  # type: ignore[arg-type]


async def test_a_server_with_unusable_files_does_not_start(tmp_path: Path) -> None:
    publish(tmp_path / "repo")
    files = write(tmp_path / "tls", issue_server(AUTHORITY))
    files.key.write_bytes(issue_server(AUTHORITY).private_key_pem.bytes())
    settings = Settings(repo=tmp_path / "repo", host=HOST, port=0, http_port=0, **options(files))
    with pytest.raises(CannotServe, match="the key does not belong to the certificate"):
        async with running(settings, loader=loading(Mirrors())):
            pass


async def test_clients_that_speak_tls_to_plain_ports_are_counted_and_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    publish(tmp_path)
    async with serve(tmp_path, load=loading(Mirrors())) as served:
        with pytest.raises(ssl.SSLError, match="WRONG_VERSION_NUMBER"):
            await asyncio.open_connection(HOST, served.server.http_port, ssl=PLAIN.context())
        assert cut(served, "http", "client_speaks_tls") == 1
        with pytest.raises((ssl.SSLError, ConnectionError)):
            await asyncio.open_connection(HOST, served.server.port, ssl=PLAIN.context())
        assert cut(served, "grpc", "client_speaks_tls") == 1
    assert [vars(one)["reason"] for one in caplog.records if one.message == "connection_cut"]


def cut(served: Served, port: str, reason: str) -> float | None:
    name, labels = "convserve_connections_cut_total", {"port": port, "reason": reason}
    return served.server.metrics.registry.get_sample_value(name, labels)


def der(issued: trustme.LeafCert) -> bytes:
    return ssl.PEM_cert_to_DER_cert(issued.cert_chain_pems[0].bytes().decode())


async def served_certificate(served: Served) -> bytes:
    """What a new client of the gRPC port sees."""
    context = PLAIN.context("h2")
    _, writer = await asyncio.open_connection(HOST, served.server.port, ssl=context)
    certificate = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    writer.transport.abort()
    assert isinstance(certificate, bytes)
    return certificate
