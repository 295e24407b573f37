"""Builds engines to measure, and loads them."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import nn

from model_repo import cards, weights
from model_repo.architectures.registry import create
from model_repo.cards import MAX_BATCH
from model_repo.export import ServedNetwork, export
from model_repo.pipeline import BuildOptions, build
from server.engines.base import CompileOptions, Engine, backend
from server.engines.record import preference
from server.engines.tensorrt.cuda import Cuda
from server.errors import EngineFailure
from server.images.input_spec import InputSpec, Pixels
from server.process.cores import available_cores
from server.repository.contents import VersionEntry
from server.repository.manifest import EngineRecord
from tests.benchmarks.targets.bare import newest_version
from tests.gpu.measuring.report import Results

BUILD_FROM_ONNX = ("tensorrt", "openvino")  # backends that can add an engine to a version


def example_images(spec: InputSpec) -> Pixels:
    """The golden images if their packages are installed, else smooth random ones."""
    try:
        from model_repo.golden_images import golden_pixels

        return golden_pixels(spec)
    except (ImportError, OSError):  # scikit-image raises different errors by version
        random = np.random.default_rng(0)
        images = []
        for number in range(6):
            coarse = random.integers(0, 256, (4 + number, 4 + number, spec.channels), np.uint8)
            planes = torch.from_numpy(coarse).permute(2, 0, 1)[None].float()
            size = (spec.height, spec.width)
            fine = nn.functional.interpolate(planes, size, mode="bicubic").clamp(0, 255)
            images.append(fine[0].permute(1, 2, 0).byte().numpy())
        return np.stack(images)


def build_engine(repo: Path, backend_name: str, name: str, precision: str) -> Results:
    """Publishes a version, or adds an engine to it. The build includes the golden check."""
    options = BuildOptions(
        repo=repo,
        backend=backend_name,
        precision=precision,
        weights="random:0",
        images=example_images,
        add_engine=backend_name in BUILD_FROM_ONNX and (repo / name).is_dir(),
    )
    built = build(name, options)
    record = built.manifest.engines[-1]
    return {
        "engine": record.name,
        "seconds": built.seconds,
        "plan_bytes": sum(file.bytes for file in record.files),
        "deviation": record.deviation,
    }


def built_last(engines: Sequence[EngineRecord]) -> EngineRecord:
    return engines[-1]


def preferred_by_server(engines: Sequence[EngineRecord]) -> EngineRecord:
    return min(engines, key=preference)


@contextmanager
def newest_engine(
    repo: Path, name: str, choose: Callable[[Sequence[EngineRecord]], EngineRecord] = built_last
) -> Iterator[tuple[Engine, VersionEntry]]:
    """Loads an engine of a model's newest version."""
    version = newest_version(repo, name)
    assert version.manifest is not None
    record = choose(version.manifest.engines)
    shape = version.manifest.input.spec().shape
    engine = backend(record.backend).load(version.folder, record, shape, threads=available_cores())
    try:
        yield engine, version
    finally:
        engine.close()
        gc.collect()


def compile_plan(folder: Path, name: str) -> Results:
    """Compiles a network by TensorRT without running it, which needs no GPU."""
    card = cards.load(name)
    loaded = weights.load(card, "random:0")
    served = ServedNetwork(loaded.network, top_k=card.top_k, mean=card.mean, std=card.std)
    folder.mkdir(parents=True, exist_ok=True)
    export(served, folder / "model.onnx", shape=card.input.shape, max_batch=MAX_BATCH)
    began_s = time.monotonic()
    options = CompileOptions("fp16", card.gpu_max_batch, opt_batch=card.gpu_opt_batch)
    compiled = backend("tensorrt").compile(folder / "model.onnx", folder, options)
    return {
        "engine": compiled.name,
        "seconds": time.monotonic() - began_s,
        "plan_bytes": (folder / compiled.files[0]).stat().st_size,
    }


def probe_tensorrt(repo: Path) -> None:
    """Compiles ResNet-18 by TensorRT and compares it with eager PyTorch. Raises any error."""
    Cuda()
    options = BuildOptions(
        repo=repo,
        backend="tensorrt",
        precision="fp16",
        weights="random:0",
        images=example_images,
    )
    manifest = build("resnet18", options).manifest
    if not manifest.engines[0].deviation:
        raise EngineFailure(
            backend("tensorrt").incompatibility(manifest.engines[0])
            or "the engine was compiled but not run"
        )


def new_network(name: str) -> nn.Module:
    """A model's network with random weights."""
    card = cards.load(name)
    return create(card.architecture, card.classes).eval()
