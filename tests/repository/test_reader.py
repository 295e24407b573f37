"""Changed or malformed files of a version are found before they are used."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from server.repository.manifest import InvalidVersion
from server.repository.reader import open_version, read_golden, read_manifest, verify_files
from server.repository.writer import file_record, publish, staging
from tests.repository.versions import publish_version, write_version


def test_a_corrupted_file_of_the_right_size_is_found_by_its_checksum(root: Path) -> None:
    for name in ("engine.bin", "model.onnx", "golden.npz", "labels.txt"):
        path = root / "tiny" / "1" / name
        original = path.read_bytes()
        damaged = bytearray(original)
        damaged[len(damaged) // 2] ^= 1
        path.write_bytes(damaged)
        manifest = read_manifest(path.parent)
        with pytest.raises(InvalidVersion, match=f"{name} is not what was published"):
            verify_files(path.parent, manifest)
        path.write_bytes(original)
    verify_files(root / "tiny" / "1", read_manifest(root / "tiny" / "1"))


def test_verifying_one_engine_skips_the_files_of_the_others(root: Path) -> None:
    with staging(root, "two") as staged:
        manifest = write_version(staged, "two")
        (staged / "second.bin").write_bytes(b"second")
        second = msgspec.structs.replace(
            manifest.engines[0], name="second", files=(file_record(staged / "second.bin"),)
        )
        engines = (*manifest.engines, second)
        manifest = publish(root, staged, msgspec.structs.replace(manifest, engines=engines))
    folder = root / "two" / "1"
    (folder / "second.bin").write_bytes(b"sEcond")
    verify_files(folder, manifest, manifest.engines[0])
    for engine in (second, None):
        with pytest.raises(InvalidVersion, match=r"second\.bin"):
            verify_files(folder, manifest, engine)


def test_a_wrong_number_of_labels_is_reported(tmp_path: Path) -> None:
    manifest = publish_version(tmp_path)
    folder = tmp_path / "tiny" / "1"
    for content, words in (
        (b"cat\ndog\n", "has 2 names for 3 classes"),
        (b"cat\ndog\nsea cow\n\n", "has 4 names for 3 classes"),
        (b"\xff\n\n\n", "can't be read"),
    ):
        (folder / "labels.txt").write_bytes(content)
        with pytest.raises(InvalidVersion, match=words):
            open_version(folder, manifest)
    (folder / "labels.txt").write_text("one\u2028line\ndog\n\n", encoding="utf-8")
    assert open_version(folder, manifest).labels == ("one\u2028line", "dog", "")


def npz(**arrays: Any) -> bytes:
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)
    return file.getvalue()


PIXELS = np.zeros((2, 4, 5, 3), np.uint8)
PROBABILITIES = np.eye(3, dtype=np.float32)[:2]


def bomb() -> bytes:
    """A small file that declares an array of gigabytes."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "|u1", "fortran_order": False, "shape": (100_000_000, 4, 5, 3)}
    )
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("pixels.npy", header.getvalue() + bytes(1 << 20))
    return file.getvalue()


def cut() -> bytes:
    """An array that is shorter than its header declares."""
    whole = io.BytesIO()
    np.save(whole, PIXELS)
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("pixels.npy", whole.getvalue()[:-1])
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "can't be read"),
        (b"PK\x05\x06" + bytes(18), "can't be read"),
        (npz(pixels=PIXELS), "can't be read"),
        (npz(pixels=PIXELS, probabilities=PROBABILITIES)[:-30], "can't be read"),
        (npz(pixels=PIXELS[:0], probabilities=PROBABILITIES[:0]), "is needed"),
        (npz(pixels=PIXELS.astype(np.float32), probabilities=PROBABILITIES), "pixels is float32"),
        (npz(pixels=PIXELS[:, :3], probabilities=PROBABILITIES), r"pixels is uint8 \[2, 3, 5, 3\]"),
        (npz(pixels=np.uint8(1), probabilities=PROBABILITIES), r"pixels is uint8 \[\]"),
        (npz(pixels=np.array([{}], object), probabilities=PROBABILITIES), "pixels is object"),
        (
            npz(pixels=PIXELS, probabilities=PROBABILITIES[:, :2]),
            r"probabilities is float32 \[2, 2\]",
        ),
        (npz(pixels=PIXELS, probabilities=PROBABILITIES[:1]), "has 2 inputs and 1 answers"),
        (npz(pixels=PIXELS, probabilities=PROBABILITIES * np.nan), "not probabilities"),
        (npz(pixels=PIXELS, probabilities=PROBABILITIES * 0), "not probabilities"),
        (npz(pixels=PIXELS, probabilities=-PROBABILITIES), "not probabilities"),
        (bomb(), "pixels has 6000000000 bytes"),
        (cut(), "pixels has 119 of 120 bytes"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_malformed_golden_answers_are_reported(tmp_path: Path, content: bytes, words: str) -> None:
    manifest = publish_version(tmp_path)
    folder = tmp_path / "tiny" / "1"
    (folder / "golden.npz").write_bytes(content)
    with pytest.raises(InvalidVersion, match=words):
        read_golden(folder, manifest)
