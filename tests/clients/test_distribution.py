"""The client is a distribution of its own, with few dependencies and no clashing modules."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from tests.support.scripted_classifier import ScriptedClassifier, serving

ROOT = Path(__file__).resolve().parent.parent.parent
PROJECT = ROOT / "clients" / "convserve_client"
# proto-plus installs a module called `proto`, and google-cloud packages register google.rpc.
NEIGHBOURS = ("proto-plus", "google-cloud-language")

PROGRAM = """
import sys

import proto
from google.cloud import language_v1
from google.rpc import error_details_pb2

import convserve_client
from convserve_client import Client

assert issubclass(language_v1.Document, proto.Message)
assert error_details_pb2.RetryInfo
for optional in ("numpy", "PIL", "grpc_health", "rich", "ngh2", "uvloop"):
    assert optional not in sys.modules, optional
with Client(sys.argv[1]) as client:
    client.wait_ready()
    assert client.is_serving("small")
    answer = client.classify(b"image", model="small")
print(convserve_client.__file__)
print(answer.results[0][0].label)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The client's wheel, built from a copy of its folder: a build leaves files behind."""
    folder = tmp_path_factory.mktemp("wheel")
    files = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    for name in files:
        if (PROJECT / name).exists():
            (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / "source" / name).write_bytes((PROJECT / name).read_bytes())
    pip_or_skip(
        *(sys.executable, "-m", "pip", "wheel", "--no-deps", str(folder / "source")),
        *("--wheel-dir", str(folder)),
    )
    (built,) = folder.glob("*.whl")
    return built


def pip_or_skip(*command: str) -> None:
    """Runs pip. Skips the test if pip cannot reach an index; fails if pip fails otherwise."""
    done = subprocess.run(
        [*command, "--quiet", "--disable-pip-version-check", "--retries=1", "--timeout=10"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    unreachable = ("No matching distribution found", "Failed to establish a new connection")
    if done.returncode and any(text in done.stderr for text in unreachable):
        pytest.skip(f"pip cannot reach an index: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_wheel_holds_every_module_of_the_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    folders = {name.partition("/")[0] for name in names}
    assert sorted(folders) == ["convserve_client", "convserve_client-0.1.0.dist-info"]
    held = {name for name in names if name.startswith("convserve_client/")}
    wanted = {
        f"convserve_client/{path.relative_to(PROJECT).as_posix()}"
        for pattern in ("*.py", "*.pyi", "*.binpb", "py.typed")
        for path in PROJECT.rglob(pattern)
        if "build" not in path.relative_to(PROJECT).parts
    }
    assert held == wanted


def test_the_client_requires_only_grpcio_and_protobuf() -> None:
    declared = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert [one.partition(">")[0] for one in declared] == ["grpcio", "protobuf"]


@pytest.mark.slow
async def test_the_client_works_beside_packages_of_google_cloud(
    wheel: Path, tmp_path: Path
) -> None:
    def install() -> Path:
        subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
        python = tmp_path / "venv" / "bin" / "python"
        pip_or_skip(*(str(python), "-m", "pip", "install", "--no-compile", str(wheel), *NEIGHBOURS))
        return python

    python = await asyncio.to_thread(install)
    service = ScriptedClassifier()
    await service.health.set("", 1)
    await service.health.set("small", 1)
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    async with serving(service) as target:
        process = await asyncio.create_subprocess_exec(
            *(str(python), "-c", PROGRAM, target),
            cwd=tmp_path,
            env=clean,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        out, err = await process.communicate()
    assert process.returncode == 0, err.decode()
    where, label = out.decode().splitlines()
    assert where.startswith(str(tmp_path / "venv"))
    assert label == "dog"
