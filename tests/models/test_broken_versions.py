"""Broken versions never serve, whatever is wrong with them."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from server.engines import null
from server.repository import writer
from server.repository.manifest import GOLDEN_FILE, LABELS_FILE, MANIFEST_FILE, ONNX_FILE
from server.repository.reader import Golden
from tests.support.serving import (
    CLASSES,
    SHAPE,
    publish,
    serve,
)
from tests.support.versions import (
    change_manifest,
    reasons,
    under_load,
    wait_for_requests,
    wait_for_states,
)

Break = Callable[[Path], None]


def with_hash(folder: Path, part: str, name: str) -> None:
    """Updates the hash of a file in the manifest."""
    record = msgspec.to_builtins(writer.file_record(folder / name))

    def change(manifest: dict[str, Any]) -> None:
        if part == "engine":
            manifest["engines"][0]["files"] = [record]
        else:
            manifest[part] = record

    change_manifest(folder, change)


def truncate(name: str) -> Break:
    def broken(folder: Path) -> None:
        path = folder / name
        path.write_bytes(path.read_bytes()[:-5])

    return broken


def flip(name: str) -> Break:
    def broken(folder: Path) -> None:
        data = bytearray((folder / name).read_bytes())
        data[len(data) // 2] ^= 1
        (folder / name).write_bytes(data)

    return broken


def missing(name: str) -> Break:
    return lambda folder: (folder / name).unlink()


def linked(name: str) -> Break:
    """The file is a link to one outside of the repository."""

    def broken(folder: Path) -> None:
        outside = folder.parents[2] / f"outside-{folder.name}-{name}"
        (folder / name).rename(outside)
        (folder / name).symlink_to(outside)

    return broken


def manifest(**fields: Any) -> Break:
    return lambda folder: change_manifest(folder, lambda found: found.update(fields))


def engine(**fields: Any) -> Break:
    return lambda folder: change_manifest(folder, lambda found: found["engines"][0].update(fields))


def text(content: str) -> Break:
    def broken(folder: Path) -> None:
        (folder / MANIFEST_FILE).write_text(content)

    return broken


def truncated_with_new_hash(folder: Path) -> None:
    truncate(null.FILE)(folder)
    with_hash(folder, "engine", null.FILE)


def golden_of_another(folder: Path) -> None:
    answers = np.zeros((2, CLASSES), np.float32)
    answers[:, 1] = 1
    truth = Golden(np.zeros((2, *SHAPE), np.uint8), answers)
    writer.write_golden(folder / GOLDEN_FILE, truth)
    with_hash(folder, "golden", GOLDEN_FILE)


def golden_no_archive(folder: Path) -> None:
    (folder / GOLDEN_FILE).write_bytes(b"PK\x03\x04 no archive")
    with_hash(folder, "golden", GOLDEN_FILE)


def pipe(folder: Path) -> None:
    (folder / null.FILE).unlink()
    os.mkfifo(folder / null.FILE)


BROKEN: dict[str, Break] = {
    "engine truncated": truncate(null.FILE),
    "engine truncated, with its new hash": truncated_with_new_hash,
    "engine flipped": flip(null.FILE),
    "engine missing": missing(null.FILE),
    "engine linked": linked(null.FILE),
    "engine file is a pipe": pipe,
    "engine of another version": engine(backend_version="0", backend="openvino"),
    "engine of an unknown backend": engine(backend="magic"),
    "engine of an unknown precision": engine(precision="fp3"),
    "engine file outside the folder": engine(
        files=[{"name": "../x", "bytes": 1, "sha256": "0" * 64}]
    ),
    "engine with a huge maximum batch": engine(max_batch=1 << 30),
    "engine without files": engine(files=[]),
    "graph truncated": truncate(ONNX_FILE),
    "graph flipped": flip(ONNX_FILE),
    "graph linked": linked(ONNX_FILE),
    "golden wrong": golden_of_another,
    "golden no archive": golden_no_archive,
    "golden flipped": flip(GOLDEN_FILE),
    "golden missing": missing(GOLDEN_FILE),
    "golden linked": linked(GOLDEN_FILE),
    "labels truncated": truncate(LABELS_FILE),
    "labels missing": missing(LABELS_FILE),
    "manifest missing": missing(MANIFEST_FILE),
    "manifest linked": linked(MANIFEST_FILE),
    "manifest empty": text(""),
    "manifest no JSON": text("{"),
    "manifest a thousand deep": text("[" * 100_000),
    "manifest of another model": manifest(model="other"),
    "manifest of a future format": manifest(format=99),
    "manifest of a trillion classes": manifest(classes=10**12),
    "manifest without an objective": manifest(objective_ms=0),
    "manifest huge": text(" " * ((1 << 20) + 1)),
}


async def test_broken_versions_never_serve_and_do_not_disturb_requests(
    tmp_path: Path,
) -> None:
    root, workshop = tmp_path / "repository", tmp_path / "workshop"
    publish(root)
    async with serve(root, bake_time_s=0.0) as served, under_load(served) as results:
        await wait_for_requests(results)
        for number, (_, damage) in enumerate(BROKEN.items(), start=2):
            await asyncio.to_thread(publish_broken, root, workshop, number, damage)
        numbers = range(2, 2 + len(BROKEN))
        await wait_for_states(served, dict.fromkeys(numbers, "FAILED"))
        found = await reasons(served)
        assert all(found[number] for number in numbers)
        await wait_for_requests(results)
        valid = publish(root).version
        await wait_for_states(served, {1: "UNLOADED", valid: "READY"})
        await wait_for_requests(results)
    assert len(BROKEN) >= 30
    assert results.codes.keys() == {"OK"}, results.messages
    assert results.answered_by.keys() == {1, valid}


def publish_broken(root: Path, workshop: Path, number: int, damage: Break) -> None:
    """Publishes a damaged version with one rename."""
    shutil.rmtree(workshop, ignore_errors=True)
    publish(workshop)
    folder = workshop / "tiny" / str(number)
    (workshop / "tiny/1").rename(folder)
    change_manifest(folder, lambda found: found.update(version=number))
    damage(folder)
    folder.rename(root / "tiny" / str(number))
