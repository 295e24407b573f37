"""The texts of libraries become plain sentences, whatever the library's version."""

from __future__ import annotations

from pathlib import Path

import pytest

from convserve_client import TlsOptions
from convserve_client.security.connection_errors import connection_failure, tls_failure
from tests.clients.security.certificates import Authority, client_tls

TARGET = "10.0.0.1:8001"
GRPCIO = "failed to connect to all addresses; last error: UNKNOWN: ipv4:10.0.0.1:8001: "
BORING = GRPCIO + "Tls handshake failed (TSI_PROTOCOL_FAILURE): SSL_ERROR_SSL: error:1000007d:SSL "
BORING += "routines:OPENSSL_internal:"
OPENSSL = "[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed: "

TLS_TEXTS = {
    f"{BORING}CERTIFICATE_VERIFY_FAILED: self signed certificate": "is not signed by a CA",
    f"{BORING}CERTIFICATE_VERIFY_FAILED: certificate has expired: OK": "has expired",
    f"{BORING}WRONG_VERSION_NUMBER: Invalid certificate verification context": "not speak TLS",
    f"{GRPCIO}Custom verification check failed with error: UNAUTHENTICATED: Hostname "
    "Verification Check failed.": "does not have the name 10.0.0.1",
    f"{GRPCIO}Cannot check peer: missing selected ALPN property.": "not HTTP/2",
    f"{OPENSSL}self-signed certificate in certificate chain (_ssl.c:992)": "is not signed by a CA",
    f"{OPENSSL}certificate is not yet valid (_ssl.c:992)": "is not valid yet",
    f"{OPENSSL}IP address mismatch, certificate is not valid for '10.0.0.1'.": "have the name",
    f"{OPENSSL}Hostname mismatch, certificate is not valid for 'a.org'.": "have the name",
    "[SSL: RECORD_LAYER_FAILURE] record layer failure (_ssl.c:1028)": "does not speak TLS",
    "[SSL: TLSV13_ALERT_CERTIFICATE_REQUIRED] tlsv13 alert certificate required": "requires a",
    "[SSL: TLSV1_ALERT_UNKNOWN_CA] tlsv1 alert unknown ca": "does not accept",
    "[SSL: TLSV1_ALERT_NO_APPLICATION_PROTOCOL] tlsv1 alert no application protocol": "not HTTP/2",
}
OTHER_TEXTS = {
    f"{GRPCIO}Failed to connect to remote host: connect: Connection refused (111)": (
        "cannot be reached: Connection refused"
    ),
    f"{GRPCIO}Failed to connect to remote host: Connection refused": (
        "cannot be reached: Connection refused"
    ),
    f"{GRPCIO}Failed to connect to remote host: connect: No route to host (113)": (
        "cannot be reached: No route to host"
    ),
    f"{GRPCIO}Trying to connect an http1.x server (HTTP status 400)": "answers in HTTP/1.1",
    f"{GRPCIO}Failed parsing HTTP/2 (Expected SETTINGS frame as the first frame, got frame type"
    " 80) (Trying to connect an http1.x server (HTTP status 400))": "answers in HTTP/1.1",
    f"{GRPCIO}Socket closed": "closed the connection before it answered: if the port expects TLS",
    "[Errno 104] Connection reset by peer": "closed the connection",
}


@pytest.mark.parametrize("text", TLS_TEXTS)
def test_failures_of_tls_are_explained(text: str) -> None:
    found = tls_failure(text, TARGET, TlsOptions())
    assert found is not None
    assert TLS_TEXTS[text] in found
    assert TARGET in found
    assert tls_failure(text, TARGET, None) is None


@pytest.mark.parametrize("text", OTHER_TEXTS)
def test_other_failures_are_explained(text: str) -> None:
    found = connection_failure(text, TARGET, None)
    assert found is not None
    assert found.startswith(TARGET)
    assert OTHER_TEXTS[text] in found
    assert tls_failure(text, TARGET, TlsOptions()) is None


def test_an_unknown_text_is_left_as_it_is() -> None:
    assert tls_failure("DNS resolution failed", TARGET, TlsOptions()) is None
    assert connection_failure("DNS resolution failed", TARGET, None) is None


def test_files_and_names_are_those_of_the_options(tmp_path: Path) -> None:
    authority = Authority(tmp_path, "ca")
    tls = client_tls(authority, authority.issue("client"), server_name="models.example.org")
    assert authority.file in str(tls_failure("certificate verify failed", TARGET, tls))
    assert "models.example.org" in str(tls_failure("Hostname mismatch", TARGET, tls))
    assert "ca-client.crt" in str(tls_failure("alert bad certificate", TARGET, tls))
    assert "ca-client.crt" in str(connection_failure("Socket closed", TARGET, tls))
