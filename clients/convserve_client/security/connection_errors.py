"""Says in one plain sentence why a connection with TLS, or without it, could not be made."""

from __future__ import annotations

import re
from os import fspath

from convserve_client.security.tls import TlsOptions

# What OpenSSL and grpcio's BoringSSL write, and what it means. The first that is found counts.
EXPLANATIONS = (
    (r"has expired", "the certificate of {target} has expired: renew it on the server"),
    (
        r"not yet valid",
        "the certificate of {target} is not valid yet: check the clocks of both machines",
    ),
    (
        r"(?i)hostname verification|hostname mismatch|ip address mismatch",
        "the certificate of {target} does not have the name {name}: connect by a name that it has,"
        " or give that name as the server name (--server-name)",
    ),
    (
        r"(?i)certificate.verify.failed",
        "the certificate of {target} is not signed by a CA in {ca}: give the file with the"
        " server's CA (--tls-ca)",
    ),
    (
        r"(?i)wrong.version.number|record.layer.failure|packet.length.too.long|http.request",
        "{target} does not speak TLS: connect without TLS, or to another port",
    ),
    (
        r"(?i)alpn|no.application.protocol",
        "{target} speaks TLS but not HTTP/2: use the port of gRPC",
    ),
    (
        r"(?i)alert.certificate.required|certificate.required|alert.handshake.failure",
        "{target} requires a certificate of the client: give one (--tls-cert, --tls-key)",
    ),
    (
        r"(?i)alert.(unknown.ca|bad.certificate|certificate)",
        "{target} does not accept the client's certificate{cert}",
    ),
)
CLOSED = re.compile(r"(?i)socket closed|connection (was )?(reset|closed|lost)|broken pipe")
# The system's error in grpcio's text, for example "...: connect: Connection refused (111)".
REFUSED = re.compile(r"remote host: (?:connect: )?([A-Z][A-Za-z ]+?)(?: \(\d+\))?$")
HTTP1 = re.compile(r"http1\.x server")

# Many servers answer so to plaintext on a port with TLS, convserve among them.
ANSWERS_IN_HTTP1 = (
    "answers in HTTP/1.1: use TLS if the port expects it (--tls, --tls-ca), or the port of gRPC"
)
EXPECTS_TLS = "expects TLS: use it (--tls, --tls-ca)"


def tls_failure(text: str, target: str, tls: TlsOptions | None) -> str | None:
    """What is wrong with TLS, from the text of a library's error. None if it does not say."""
    if tls is None:
        return None
    for pattern, explanation in EXPLANATIONS:
        if re.search(pattern, text):
            return explanation.format(
                target=target,
                name=tls.server_name or host_of(target),
                ca=fspath(tls.ca_file) if tls.ca_file else "the system's list",
                cert=f" in {fspath(tls.cert_file)}" if tls.cert_file else "",
            )
    return None


def connection_failure(text: str, target: str, tls: TlsOptions | None) -> str | None:
    """Why there is no connection, if the text says so; a likely reason if it was just closed."""
    if HTTP1.search(text):
        return f"{target} {ANSWERS_IN_HTTP1}"
    if refused := REFUSED.search(text):
        return f"{target} cannot be reached: {refused[1]}"
    if not CLOSED.search(text):
        return None
    if tls is None:
        return (
            f"{target} closed the connection before it answered: if the port expects TLS, use TLS"
            " (--tls, --tls-ca)"
        )
    if not tls.cert_file:
        return (
            f"{target} closed the connection after the TLS handshake: if it requires a certificate"
            " of the client, give one (--tls-cert, --tls-key)"
        )
    return (
        f"{target} closed the connection after the TLS handshake: check that it accepts the"
        f" certificate in {fspath(tls.cert_file)}"
    )


def host_of(target: str) -> str:
    """The host of "HOST:PORT", also in gRPC's form with a scheme."""
    address = re.sub(r"^(dns|ipv4|ipv6):/*([^/]*/)?", "", target)
    if address.startswith("["):
        return address[1:].partition("]")[0]
    return address.rpartition(":")[0] if address.count(":") == 1 else address
