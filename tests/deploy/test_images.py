"""deploy/Dockerfile and deploy/healthcheck.py. No container engine is needed."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
import sys
import threading
import tomllib
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from server.settings import parse
from tests.deploy.files import COMPOSE, DOCKERFILE, ROOT, copied_sources, stage

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
def readiness(status: int) -> Iterator[int]:
    """Serves /readyz with that status; yields the port."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if self.path == "/readyz" else 404)
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


@pytest.mark.parametrize(("status", "healthy"), [(200, True), (503, False)])
def test_the_health_check_reports_the_status_of_readyz(status: int, healthy: bool) -> None:
    with readiness(status) as port:
        environment = {
            "CONVSERVE_HTTP_PORT": str(port),
            "http_proxy": "http://127.0.0.1:1",  # must not be used
        }
        checked = subprocess.run(
            [sys.executable, ROOT / "deploy/healthcheck.py"], env=environment, capture_output=True
        )
    assert (checked.returncode == 0) is healthy


@pytest.mark.parametrize("variable", ["", "tcp://10.0.0.1:8000"])
def test_the_health_check_uses_the_same_port_as_the_server(
    variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kubernetes sets the second value for a service called convserve-http."""
    opened: list[str] = []

    class Opener:
        def open(self, url: str, timeout: float) -> Any:
            opened.append(url)
            return nullcontext()

    monkeypatch.setenv("CONVSERVE_HTTP_PORT", variable)
    monkeypatch.setattr(urllib.request, "build_opener", lambda *_: Opener())
    module = runpy.run_path(str(ROOT / "deploy/healthcheck.py"))
    assert module["main"]() == 0
    port = parse([], {"CONVSERVE_HTTP_PORT": variable}).http_port
    assert opened == [f"http://127.0.0.1:{port}/readyz"]
