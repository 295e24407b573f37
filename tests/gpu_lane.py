"""Command: checks and measures the engines on this machine's GPU, in less than nine minutes.

    python -m tests.gpu_lane --out DIR [--wheels DIR] [--models resnet50,...] [--minutes 9]

Prints the machine; finds which TensorRT runs here, else takes inductor; holds every network against
eager PyTorch in float32 at every size of a CUDA graph; measures latency and throughput by batch
size beside torch eager and torch.compile, the bus, and the server with clients in several
processes. Writes results.json and results.md. What there is no time left for is listed, not
guessed. Without a GPU it compiles every network, says so, and ends with 0.

Packages that are missing, and TensorRT-RTX in one or several versions, are taken from wheels in the
folder --wheels: they are unpacked beside the results, nothing is installed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# In this order: 1.6.1 has been seen to run on a GPU that it does not list, 1.7.1 may refuse to.
RTX = ("1.6.1.120", "1.5.0.114", "1.7.1.116")
PROBE_S = 120


def main(arguments: Sequence[str] | None = None) -> int:
    """0 when all that was run gave right answers, 1 when not; wrong usage exits with 2."""
    given = parser_of("tests.gpu_lane", __doc__).parse_args(arguments)
    given.out.mkdir(parents=True, exist_ok=True)
    packages = given.out / "packages"
    versions = _unpack(given.wheels, packages) if given.wheels else {}
    path = [str(ROOT), str(packages)]
    backend, tried = given.backend, []
    if backend in ("auto", "tensorrt"):
        for name, folder in {"installed": None, **versions}.items():
            candidate = [str(folder), *path] if folder else path
            why = _probe(candidate, given.out)
            tried.append({"tensorrt": name, "runs": not why, "why": why})
            print(f"TensorRT {name}: {why or 'runs'}", flush=True)
            if not why:
                path, backend = candidate, "tensorrt"
                break
    command = [sys.executable, "-m", "tests.gpu_measure"]
    command += sys.argv[1:] if arguments is None else arguments
    command += ["--backend", backend, "--tried", json.dumps(tried)]
    return subprocess.run(command, cwd=ROOT, env=_environment(path)).returncode


def parser_of(module: str, description: str | None) -> argparse.ArgumentParser:
    """The options of the lane, which both of its processes know."""
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=description)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--wheels", type=Path, help="folder of wheels")
    parser.add_argument("--models", default="", help="with commas; else all, the usual ones first")
    parser.add_argument("--precisions", default="", help="with commas; else fp16,bf16")
    parser.add_argument("--backend", default="auto", help="auto, tensorrt, inductor or openvino")
    parser.add_argument("--minutes", type=float, default=8.5, help="begin nothing after so many")
    parser.add_argument("--seconds", type=float, default=0.5, help="of each measurement")
    parser.add_argument(
        "--peak-tflops",
        type=float,
        default=990.0,
        help="of the GPU in half precision, dense, for the roofline (H200: %(default)s)",
    )
    return parser


def _environment(path: Sequence[str]) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path)}


def _probe(path: Sequence[str], out: Path) -> str:
    """Why TensorRT found there does not run LeNet-5 here; empty where it does.

    In a process of its own: what crashes there does not end the lane.
    """
    command = [sys.executable, "-m", "tests.gpu_measure", "--probe", "--out", str(out)]
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=_environment(path),
            capture_output=True,
            text=True,
            timeout=PROBE_S,
        )
    except subprocess.TimeoutExpired:
        return f"no answer within {PROBE_S} s"
    if done.returncode == 0:
        return ""
    lines = (done.stdout + done.stderr).strip().splitlines()
    return lines[-1] if lines else f"the process ended with {done.returncode}"


def _unpack(wheels: Path, packages: Path) -> dict[str, Path]:
    """Unpacks what is not installed; gives TensorRT-RTX's folders by version, in order to try."""
    found: dict[str, Path] = {}
    for wheel in sorted(wheels.glob("*.whl")):
        name, version = wheel.name.split("-")[:2]
        if name.startswith("tensorrt_rtx"):
            folder = found[version] = packages.parent / f"tensorrt-rtx-{version}"
        elif _installed(name):
            continue
        else:
            folder = packages
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
    return {version: found[version] for version in (*RTX, *sorted(found)) if version in found}


def _installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
