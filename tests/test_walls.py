"""Who may import whom: building and serving meet in files, and a layer sees only those below."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# What a side of the wall must never see, anywhere in its files.
FORBIDDEN = {
    "server": {"torch", "torchvision", "model_repo", "clients", "sklearn", "skimage", "rich"},
    "clients": {"torch", "torchvision", "model_repo", "server", "openvino", "onnx"},
    "model_repo": {"clients", "grpc", "proto", "uvicorn", "starlette"},
    "proto": {"server", "clients", "model_repo"},
}

# Each module of the server sees modules of earlier layers only. A new one is put into its layer.
LAYERS = (
    {
        "errors",
        "settings",
        "allocator",
        "logs",
        "backlog",
        "containers",
        "cuda",
        "gpu",
        "lifecycle",
        "probation",
    },
    {"precision", "metrics", "priority"},
    {"tracing", "transport"},
    {"engines", "images"},
    {"repository", "schedule", "shared_memory"},
    {"golden", "host", "memory"},
    {"loading"},
    {"catalog"},
    {"guard", "rollout"},
    {"service"},
    {"app"},
    {"__main__"},
)

LIBRARIES = {  # each is seen by one file
    "openvino": "server/engines/openvino.py",
    "torch": "server/engines/inductor.py",
    "tensorrt": "server/engines/tensorrt.py",
    "tensorrt_rtx_bindings": "server/engines/tensorrt.py",
    "cuda": "server/cuda.py",
    "pynvml": "server/gpu.py",
    "opentelemetry": "server/tracing.py",
    "hpack": "server/transport/headers.py",
}

TRANSPORT = {"grpc", "grpc_health", "grpc_reflection", "google", "proto", "starlette", "uvicorn"}

# Where a serving process runs, none of these need be installed.
NOT_FOR_SERVING = {
    *{"torch", "torchvision", "onnx", "onnxscript", "onnxruntime", "sklearn", "skimage", "scipy"},
    *{"tensorrt", "tensorrt_rtx_libs", "tensorrt_rtx_bindings", "cuda", "pynvml", "ml_dtypes"},
    *{"opentelemetry", "safetensors", "rich", "pandas", "matplotlib", "grpc_tools", "model_repo"},
}

SERVE_WITHOUT = """
import sys

BLOCKED = set(sys.argv[2].split())

class Wall:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ImportError(f"{name} is not installed where engines are served")

sys.meta_path.insert(0, Wall())

import asyncio, json
from pathlib import Path
import numpy as np
from clients.client import AsyncClient
from tests.serving import serve

async def main():
    async with serve(Path(sys.argv[1]), models="lenet5") as served:
        async with AsyncClient(served.target) as client:
            answer = await client.classify(np.zeros((3, 32, 32, 1), np.uint8), model="lenet5")
    print(json.dumps({
        "images": len(answer.results),
        "classes": len(answer.results[0]),
        "trained": answer.trained,
        "engine": served.server.metrics.render().decode().count('engine_info{backend="openvino"'),
        "alien": sorted(BLOCKED & {name.partition(".")[0] for name in sys.modules}),
    }))

asyncio.run(main())
"""


def sources(package: str) -> list[Path]:
    found = sorted((ROOT / package).rglob("*.py"))
    assert found, f"{package} has no files"
    return found


def name_of(source: Path) -> str:
    return source.relative_to(ROOT).as_posix()


def imported(source: Path) -> Iterator[str]:
    """Dotted names of what a file imports at run time; those for type checkers alone left out."""
    waiting: list[ast.AST] = [ast.parse(source.read_text())]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{source}: say where from in full"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        for_types = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        waiting += node.orelse if for_types else ast.iter_child_nodes(node)  # type: ignore[attr-defined]


def roots(source: Path) -> set[str]:
    return {name.partition(".")[0] for name in imported(source)}


@pytest.mark.parametrize("package", FORBIDDEN)
def test_a_package_keeps_to_its_side(package: str) -> None:
    for source in sources(package):
        allowed = {"torch"} if name_of(source) == LIBRARIES["torch"] else set()
        assert not (roots(source) - allowed) & FORBIDDEN[package], name_of(source)


def test_every_module_of_the_server_sees_only_the_layers_below_its_own() -> None:
    layer_of = {module: layer for layer, modules in enumerate(LAYERS) for module in modules}
    for source in sources("server"):
        module = source.relative_to(ROOT / "server").parts[0].removesuffix(".py")
        if module == "__init__":
            continue
        assert module in layer_of, f"{module} stands in no layer"
        for name in imported(source):
            package, _, rest = name.partition(".")
            other = rest.partition(".")[0]
            if package == "server" and other != module:
                assert layer_of[other] < layer_of[module], f"{name_of(source)} imports {name}"


def test_what_lies_below_the_service_knows_no_transport() -> None:
    above = ("server/service/", "server/transport/", "server/app.py", "server/__main__.py")
    for source in sources("server"):
        if not name_of(source).startswith(above):
            assert not roots(source) & TRANSPORT, name_of(source)


def test_the_policy_is_pure() -> None:
    """No clock, no loop, no thread, no file: it can be run in virtual time."""
    impure = {"asyncio", "time", "threading", "os", "pathlib", "socket", "random", "numpy"}
    assert not roots(ROOT / "server/schedule.py") & impure


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_library_is_seen_by_its_own_file_alone(library: str) -> None:
    for package in ("server", "clients") if library == "torch" else ("server", "model_repo"):
        for source in sources(package):
            assert library not in roots(source) or name_of(source) == LIBRARIES[library]


def test_only_the_edges_see_the_generated_stubs() -> None:
    edges = ("server/service/", "server/app.py", "clients/")
    for package in ("server", "model_repo", "clients"):
        for source in sources(package):
            assert "proto" not in roots(source) or name_of(source).startswith(edges)


def test_the_server_reads_the_environment_in_one_place() -> None:
    for source in sources("server"):
        names = {
            node.attr
            for node in ast.walk(ast.parse(source.read_text()))
            if isinstance(node, ast.Attribute)
        }
        reads = names & {"environ", "getenv", "environb"}
        assert not reads or name_of(source) == "server/__main__.py", name_of(source)


def test_serving_needs_nothing_that_only_building_needs(built_repository: Path) -> None:
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
    assert found == {"images": 3, "classes": 5, "trained": True, "engine": 1, "alien": []}
