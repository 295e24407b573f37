"""deploy/Dockerfile and deploy/healthcheck.py. No container engine is needed."""

from __future__ import annotations

import asyncio
import os
import re
import runpy
import shutil
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import trustme

from server.settings import parse
from tests.deploy.files import COMPOSE, DOCKERFILE, ROOT, copied_sources, stage
from tests.support.serving import publish, serve
from tests.support.tls_files import Client, issue_server, write
from tests.support.tls_files import options as tls_options

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_the_serving_image_has_no_root_user_and_no_torch_and_stops_cleanly() -> None:
    serve = stage("serve")
    assert re.search(r"^USER 10001:10001$", serve, flags=re.MULTILINE)
    assert re.search(r"^STOPSIGNAL SIGTERM$", serve, flags=re.MULTILINE)
    assert re.search(r"^HEALTHCHECK ", serve, flags=re.MULTILINE)
    assert "model_repo" not in serve
    extras = PROJECT["optional-dependencies"]
    assert "torch" not in " ".join(PROJECT["dependencies"] + extras["cpu"])
    assert "torch==" in " ".join(extras["build"])


@pytest.mark.parametrize(("name", "extras"), [("serve", "${EXTRA}"), ("build", "${EXTRA} build")])
def test_the_dependency_layer_needs_only_pyproject_toml(name: str, extras: str) -> None:
    before, install, after = stage(name).partition("uv pip install -r pyproject.toml")
    assert install
    assert f"$(printf -- '--extra %s ' {extras})" in after
    assert copied_sources(before) == []


def test_every_extra_that_the_images_install_exists() -> None:
    extras = set(PROJECT["optional-dependencies"])
    assert set(re.findall(r"^ARG EXTRA=(.*)$", DOCKERFILE, flags=re.MULTILINE)) <= extras
    for service in COMPOSE["services"].values():
        text = service.get("build", {}).get("args", {}).get("EXTRA", "")
        assert set(re.sub(r"\$\{EXTRA:-(.*)\}", r"\1", text).split()) <= extras


def test_all_copied_files_exist_and_are_not_ignored() -> None:
    patterns = [
        line
        for line in (ROOT / ".dockerignore").read_text().splitlines()
        if line and not line.startswith("#")
    ]
    for source in copied_sources(DOCKERFILE):
        assert (ROOT / source).exists(), source
        ignored = False
        for pattern in patterns:
            if fnmatch(source.rstrip("/"), pattern.removeprefix("!")):
                ignored = not pattern.startswith("!")
        assert not ignored, source


def test_the_serving_image_contains_everything_that_a_server_imports(tmp_path: Path) -> None:
    for source in copied_sources(stage("base")) + copied_sources(stage("serve")):
        target = tmp_path / source
        target.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / source).is_dir():
            shutil.copytree(ROOT / source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / source, target)
    blocked = (
        "import sys\nfor name in ('torch', 'model_repo', 'clients'): sys.modules[name] = None\n"
    )
    started = subprocess.run(
        [sys.executable, "-c", blocked + "from server.__main__ import main\nsys.exit(main())"],
        cwd=tmp_path,
        env={"PATH": os.environ["PATH"], "CONVSERVE_REPO": str(tmp_path / "missing")},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert started.returncode == 1, started.stderr
    assert "cannot_serve" in started.stderr


@contextmanager
def probes(live: int, ready: int) -> Iterator[int]:
    """Serves /healthz and /readyz with these statuses; yields the port."""
    statuses = {"/healthz": live, "/readyz": ready}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(statuses.get(self.path, 404))
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


def check(*arguments: str, **environment: str) -> int:
    """The exit status of the health check."""
    proxy = {"http_proxy": "http://127.0.0.1:1"}  # must not be used
    command = [sys.executable, str(ROOT / "deploy/healthcheck.py"), *arguments]
    return subprocess.run(command, env=proxy | environment, capture_output=True).returncode


@pytest.mark.parametrize(
    ("arguments", "live", "ready", "status"),
    [
        ([], 200, 503, 0),  # models are loading, or the server drains: no reason for a restart
        ([], 503, 200, 1),
        (["live"], 200, 503, 0),
        (["ready"], 200, 503, 1),
        (["ready"], 200, 200, 0),
        (["other"], 200, 200, 2),
    ],
)
def test_the_health_check_asks_for_life_unless_it_is_told_otherwise(
    arguments: list[str], live: int, ready: int, status: int
) -> None:
    with probes(live, ready) as port:
        assert check(*arguments, CONVSERVE_HTTP_PORT=str(port)) == status
    assert check(*arguments, CONVSERVE_HTTP_PORT=str(port)) == (2 if status == 2 else 1)


def test_image_and_compose_check_life_and_not_readiness() -> None:
    assert re.search(r'CMD \["python", "deploy/healthcheck.py"\]', DOCKERFILE)
    for name in ("server-cpu", "server-gpu"):
        test = COMPOSE["services"][name]["healthcheck"]["test"]
        assert test == ["CMD", "python", "deploy/healthcheck.py"]


@pytest.mark.parametrize(
    ("variables", "host", "port"),
    [
        ({}, "127.0.0.1", 8000),
        ({"CONVSERVE_HTTP_PORT": "9000"}, "127.0.0.1", 9000),
        # Kubernetes sets this for a service called convserve-http.
        ({"CONVSERVE_HTTP_PORT": "tcp://10.0.0.1:8000"}, "127.0.0.1", 8000),
        ({"CONVSERVE_HOST": "10.0.0.5"}, "10.0.0.5", 8000),
        ({"CONVSERVE_HOST": "[::]"}, "127.0.0.1", 8000),
        ({"CONVSERVE_HOST": "[::1]"}, "::1", 8000),
        ({"CONVSERVE_HTTP_UNIX_SOCKET": "/run/http.sock"}, "/run/http.sock", 80),
    ],
)
def test_the_health_check_connects_where_the_server_listens(
    variables: dict[str, str], host: str, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    module = runpy.run_path(str(ROOT / "deploy/healthcheck.py"))
    connection = module["connection"]()
    assert (connection.host, connection.port) == (host, port)
    if "CONVSERVE_HTTP_UNIX_SOCKET" not in variables:
        assert parse([], variables).http_port == port


async def test_the_health_check_works_through_tls(tmp_path: Path) -> None:
    """It has no certificate, and asks for none of a known CA."""
    publish(tmp_path / "repo")
    authority = trustme.CA()
    files = write(tmp_path / "tls", issue_server(authority), client_ca=authority)
    client = Client(authority, authority.issue_cert("client.example"))
    tls = {"credentials": client.credentials(), **tls_options(files)}
    async with serve(tmp_path / "repo", **tls) as served:
        variables = {"CONVSERVE_HTTP_PORT": str(served.server.http_port)}
        variables["CONVSERVE_TLS_CERT"] = str(files.certificate)
        assert await asyncio.to_thread(check, "ready", **variables) == 0
        variables["CONVSERVE_HTTP_TLS"] = "false"
        assert await asyncio.to_thread(check, "ready", **variables) == 1


async def test_the_health_check_works_through_a_unix_socket(tmp_path: Path) -> None:
    publish(tmp_path / "repo")
    path = str(tmp_path / "http.sock")
    async with serve(tmp_path / "repo", http_unix_socket=path):
        assert await asyncio.to_thread(check, "ready", CONVSERVE_HTTP_UNIX_SOCKET=path) == 0
