"""Container health check: exit status 0 if the server is alive, else 1 with the reason.

    python deploy/healthcheck.py [live | ready]

`live`, the default, asks /healthz: a restart helps if it fails. `ready` asks /readyz, which also
fails while models are loading, so it is for scripts that wait for the start, not for restarts.

Uses only the standard library, because the image has no curl.
"""

import http.client
import os
import socket
import ssl
import sys

PATHS = {"live": "/healthz", "ready": "/readyz"}
TIMEOUT_S = 3
LOOPBACK = "127.0.0.1"


class UnixConnection(http.client.HTTPConnection):
    """A connection to a Unix socket, whose path stands in place of the host."""

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(TIMEOUT_S)
        self.sock.connect(self.host)


def connection() -> http.client.HTTPConnection:
    """A connection to where the server's variables say that it listens. No proxy is used."""
    path = os.environ.get("CONVSERVE_HTTP_UNIX_SOCKET", "")
    if path:
        return UnixConnection(path, timeout=TIMEOUT_S)
    port = os.environ.get("CONVSERVE_HTTP_PORT", "")
    if not port.isdecimal():  # empty, or an address that Kubernetes sets: the server uses 8000
        port = "8000"
    host = os.environ.get("CONVSERVE_HOST", "").strip().removeprefix("[").removesuffix("]")
    if host in ("", "0.0.0.0", "::"):  # all addresses
        host = LOOPBACK
    if os.environ.get("CONVSERVE_TLS_CERT") and uses_tls():
        # The certificate is for the names that clients use, not for this address.
        context = ssl._create_unverified_context()
        return http.client.HTTPSConnection(host, int(port), timeout=TIMEOUT_S, context=context)
    return http.client.HTTPConnection(host, int(port), timeout=TIMEOUT_S)


def uses_tls() -> bool:
    """Whether the HTTP port speaks TLS if the server has a certificate."""
    return os.environ.get("CONVSERVE_HTTP_TLS", "").lower() not in ("false", "0")


def main() -> int:
    kind = sys.argv[1] if len(sys.argv) > 1 else "live"
    if kind not in PATHS:
        print(f"{kind!r} is no health check; use {' or '.join(PATHS)}")
        return 2
    try:
        checked = connection()
        checked.request("GET", PATHS[kind])
        response = checked.getresponse()
        text = response.read().decode(errors="replace").strip()
    except (OSError, http.client.HTTPException) as error:
        print(error)
        return 1
    if response.status == 200:
        return 0
    print(f"{response.status}: {text}")
    return 1


if __name__ == "__main__":
    sys.exit(main())
