"""Import rules: build and server share only files; a room imports only from the layers below."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Packages that no file of a side may import.
FORBIDDEN = {
    "server": {
        "torch",
        "torchvision",
        "model_repo",
        "convserve_client",
        "sklearn",
        "skimage",
        "rich",
    },
    "clients": {"torch", "model_repo", "server", "openvino", "onnx"},
    "model_repo": {"convserve_client", "grpc", "uvicorn", "starlette"},
}

# A room of the server imports only from rooms of earlier layers. This includes imports for types.
LAYERS = (
    {"errors", "settings", "process", "telemetry"},
    {"security"},
    {"images", "scheduling", "transport"},
    {"repository"},
    {"engines"},
    {"execution"},
    {"models"},
    {"api"},
    {"app"},
    {"__main__", "cli"},
)

LIBRARIES = {  # each library is imported by one file or folder only
    "openvino": "server/engines/openvino.py",
    "torch": "server/engines/inductor.py",
    "tensorrt": "server/engines/tensorrt/libraries.py",
    "tensorrt_rtx_bindings": "server/engines/tensorrt/libraries.py",
    "cuda": "server/engines/tensorrt/cuda.py",
    "pynvml": "server/telemetry/nvml.py",
    "opentelemetry": "server/telemetry/tracing.py",
    "ngh2": "server/transport/http2/",
}

TRANSPORT = {"grpc", "grpc_health", "grpc_reflection", "google", "starlette", "uvicorn"}

# Packages that a server does not need.
NOT_FOR_SERVING = {
    *{"torch", "torchvision", "onnx", "onnxscript", "onnxruntime", "sklearn", "skimage", "scipy"},
    *{"tensorrt", "tensorrt_rtx_libs", "tensorrt_rtx_bindings", "cuda", "pynvml", "ml_dtypes"},
    *{"opentelemetry", "safetensors", "rich", "pandas", "matplotlib", "grpc_tools", "model_repo"},
}

SERVE_WITHOUT = """
import sys

BLOCKED = set(sys.argv[2].split())

class ImportBlocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ImportError(f"a server must not import {name}")

sys.meta_path.insert(0, ImportBlocker())

import asyncio, json
from pathlib import Path
import numpy as np
from convserve_client import AsyncClient
from tests.support.serving import serve

async def main():
    async with serve(Path(sys.argv[1]), models="lenet5") as served:
        async with AsyncClient(served.target) as client:
            answer = await client.classify(np.zeros((3, 32, 32, 1), np.uint8), model="lenet5")
    print(json.dumps({
        "images": len(answer.results),
        "classes": len(answer.results[0]),
        "trained": answer.trained,
        "engine": served.server.metrics.render().decode().count('engine_info{backend="openvino"'),
        "forbidden": sorted(BLOCKED & {name.partition(".")[0] for name in sys.modules}),
    }))

asyncio.run(main())
"""

# It measures a running server, and says what to install if the client is missing.
CLIENT_OF_THE_BUILD = "model_repo/evaluation/remote.py"


def sources(package: str) -> list[Path]:
    found = sorted((ROOT / package).rglob("*.py"))
    assert found, f"{package} has no files"
    return found


def name_of(source: Path) -> str:
    return source.relative_to(ROOT).as_posix()


def imported(source: Path) -> Iterator[str]:
    """Dotted names of all imports of a file, including those for types."""
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{source}: use absolute imports"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def roots(source: Path) -> set[str]:
    return {name.partition(".")[0] for name in imported(source)}


def module_name(source: Path) -> str:
    parts = source.relative_to(ROOT).with_suffix("").parts
    if parts[:2] == ("clients", "convserve_client"):  # a distribution of its own
        parts = parts[1:]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def module_of(name: str, modules: set[str]) -> str:
    """The module that an import of `name` loads; empty if it is not one of ours."""
    while name and name not in modules:
        name = name.rpartition(".")[0]
    return name


def test_no_modules_import_each_other_in_a_circle() -> None:
    files = {
        module_name(source): source
        for package in ("server", "model_repo", "clients")
        for source in sources(package)
    }
    modules = set(files)
    graph = {
        module: {module_of(name, modules) for name in imported(source)} - {"", module}
        for module, source in files.items()
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


def test_no_room_of_the_server_exports_through_its_package() -> None:
    """Each name has one place to import it from, so that a circle can't hide."""
    for source in sources("server"):
        if source.name == "__init__.py" and "stubs" not in source.parts:
            assert not list(imported(source)), name_of(source)


@pytest.mark.parametrize("package", FORBIDDEN)
def test_a_side_imports_nothing_of_the_other_sides(package: str) -> None:
    for source in sources(package):
        allowed = {"torch"} if name_of(source) == LIBRARIES["torch"] else set()
        if name_of(source) == CLIENT_OF_THE_BUILD:
            allowed = {"convserve_client"}
        assert not (roots(source) - allowed) & FORBIDDEN[package], name_of(source)


def test_a_room_of_the_server_imports_only_from_layers_below() -> None:
    layer_of = {room: layer for layer, rooms in enumerate(LAYERS) for room in rooms}
    for source in sources("server"):
        room = source.relative_to(ROOT / "server").parts[0].removesuffix(".py")
        if room == "__init__":
            continue
        assert room in layer_of, f"add {room} to LAYERS"
        for name in imported(source):
            package, _, rest = name.partition(".")
            other = rest.partition(".")[0]
            if package == "server" and other != room:
                assert layer_of[other] < layer_of[room], f"{name_of(source)} imports {name}"


def test_only_the_edges_of_the_server_import_transport_libraries() -> None:
    above = ("server/api/", "server/transport/", "server/app/")
    for source in sources("server"):
        if not name_of(source).startswith(above):
            assert not roots(source) & TRANSPORT, name_of(source)


def test_scheduling_is_pure() -> None:
    """Without a clock, an event loop, threads or files, it can run in virtual time."""
    impure = {"asyncio", "time", "threading", "os", "pathlib", "socket", "random", "numpy"}
    for source in sources("server/scheduling"):
        assert not roots(source) & impure, name_of(source)


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_library_is_imported_in_one_place_only(library: str) -> None:
    for package in ("server", "clients") if library == "torch" else ("server", "model_repo"):
        for source in sources(package):
            place = LIBRARIES[library]
            assert library not in roots(source) or name_of(source).startswith(place)


def test_only_the_edges_of_the_server_import_generated_stubs() -> None:
    for source in sources("server"):
        stubs = any(name.startswith("server.api.stubs") for name in imported(source))
        assert not stubs or name_of(source).startswith(("server/api/", "server/app/"))


def test_only_the_command_reads_the_environment() -> None:
    for source in sources("server"):
        names = {
            node.attr
            for node in ast.walk(ast.parse(source.read_text()))
            if isinstance(node, ast.Attribute)
        }
        reads = names & {"environ", "getenv", "environb"}
        assert not reads or name_of(source) == "server/app/run.py", name_of(source)


def test_serving_needs_no_package_of_the_build(built_repository: Path) -> None:
    command = [sys.executable, "-W", "error", "-c", SERVE_WITHOUT]
    child = subprocess.run(
        [*command, str(built_repository), " ".join(NOT_FOR_SERVING)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert child.returncode == 0, child.stderr
    found = json.loads(child.stdout.splitlines()[-1])
    assert found == {"images": 3, "classes": 5, "trained": True, "engine": 1, "forbidden": []}
