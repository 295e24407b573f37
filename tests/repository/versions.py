"""Small versions for the tests of the repository."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from server.repository.contents import list_versions
from server.repository.manifest import (
    MANIFEST_FORMAT,
    EngineRecord,
    InputRecord,
    Manifest,
    WeightsRecord,
)
from server.repository.reader import Golden
from server.repository.writer import file_record, publish, staging, write_golden

ENGINE = b"engine" * 1000


def write_version(staged: Path, model: str = "tiny", engine: bytes = ENGINE) -> Manifest:
    """Writes the files of a small version; returns its manifest, without a final version number."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (2, 4, 5, 3), np.uint8)
    probabilities = rng.dirichlet(np.ones(3), 2).astype(np.float32)
    (staged / "model.onnx").write_bytes(b"onnx")
    (staged / "labels.txt").write_text("cat\ndog\nsea cow\n")
    (staged / "engine.bin").write_bytes(engine)
    write_golden(staged / "golden.npz", Golden(pixels, probabilities))
    return Manifest(
        format=MANIFEST_FORMAT,
        model=model,
        version=1,
        created="2026-01-02T03:04:05Z",
        architecture="lenet5",
        parameters=61_706,
        weights=WeightsRecord(source="random:0", sha256="0" * 64, trained=False),
        card_sha256="1" * 64,
        input=InputRecord(height=4, width=5, channels=3, resize=0, interpolation="bilinear"),
        classes=3,
        top_k=3,
        objective_ms=5.0,
        onnx=file_record(staged / "model.onnx"),
        golden=file_record(staged / "golden.npz"),
        labels=file_record(staged / "labels.txt"),
        engines=(
            EngineRecord(
                name="null-fp32",
                backend="null",
                backend_version="1",
                precision="fp32",
                hardware="x86_64",
                max_batch=4,
                files=(file_record(staged / "engine.bin"),),
                deviation={"1": 0.0, "4": 1e-4},
            ),
        ),
    )


def publish_version(root: Path, model: str = "tiny", engine: bytes = ENGINE) -> Manifest:
    """Publishes a small version."""
    with staging(root, model) as staged:
        return publish(root, staged, write_version(staged, model, engine))


def invalid_reason(root: Path, model: str = "tiny", version: int = 1) -> str:
    """Why a version is invalid. Also checks that `other` is still valid."""
    found = {(entry.model, entry.version): entry for entry in list_versions(root)}
    assert found["other", 1].manifest is not None
    assert found[model, version].manifest is None
    return found[model, version].reason
