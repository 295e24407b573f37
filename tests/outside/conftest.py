"""Servers with lenet5, and a digit to classify.

One server is plain. The other speaks TLS and wants a token.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pytest
import trustme
from PIL import Image

from server.security.identity.tokens import new_token
from tests.security.credentials import token_lines
from tests.support.tls_files import issue_server, write
from tests.transport.attacks.processes import ServerProcess, convserve

PRINCIPAL = """
[principals.outside]
roles = ["classify", "observe"]
"""


class Digit(NamedTuple):
    """An image file, and what it shows."""

    path: Path
    label: int


@dataclass(frozen=True)
class Service:
    """A running server, and what its clients need."""

    server: ServerProcess
    ca: Path | None = None  # the CA of its certificate
    token: str = ""

    @property
    def target(self) -> str:
        return f"127.0.0.1:{self.server.port}"

    @property
    def grpc(self) -> str:
        return f"{self._scheme}://{self.target}"

    @property
    def http(self) -> str:
        return f"{self._scheme}://127.0.0.1:{self.server.http_port}"

    @property
    def authorization(self) -> tuple[str, ...]:
        """Arguments of command lines that send the token."""
        return ("-H", f"authorization: Bearer {self.token}") if self.token else ()

    @property
    def trust(self) -> tuple[str | Path, ...]:
        """Arguments of curl that name the CA."""
        return ("--cacert", self.ca) if self.ca else ()

    @property
    def _scheme(self) -> str:
        return "https" if self.ca else "http"


@pytest.fixture(scope="package")
def plain(built_repository: Path) -> Iterator[Service]:
    with convserve(built_repository, "--models=lenet5") as server:
        yield Service(server)


@pytest.fixture(scope="package")
def guarded(built_repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder, authority, token = tmp_path_factory.mktemp("guarded"), trustme.CA(), new_token()
    files = write(folder, issue_server(authority))
    ca, auth = folder / "authority.pem", folder / "auth.toml"
    ca.write_bytes(authority.cert_pem.bytes())
    auth.touch(0o600)
    auth.write_text(PRINCIPAL + token_lines("outside", token))
    options = (f"--tls-cert={files.certificate}", f"--tls-key={files.key}", f"--auth={auth}")
    with convserve(built_repository, "--models=lenet5", *options) as server:
        yield Service(server, ca, token.text)


@pytest.fixture(params=["plain", "guarded"])
def service(request: pytest.FixtureRequest) -> Service:
    found: Service = request.getfixturevalue(request.param)
    return found


@pytest.fixture(scope="package")
def digit(tmp_path_factory: pytest.TempPathFactory) -> Digit:
    from model_repo.digits import held_out  # imports torch: only if a test needs it

    images, labels = held_out()
    path = tmp_path_factory.mktemp("digits") / "digit.png"
    Image.fromarray(images[0]).save(path)
    return Digit(path, int(labels[0]))
