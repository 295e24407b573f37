"""An invalid manifest is reported with a reason and affects no other version."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from server.images.input_spec import InputSpec
from server.repository.contents import list_versions
from tests.repository.versions import invalid_reason

Change = Callable[[dict[str, Any]], None]


def edit_manifest(root: Path, change: Change) -> None:
    """Changes the manifest of tiny/1."""
    path = root / "tiny" / "1" / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def test_a_missing_manifest_is_reported(root: Path) -> None:
    (root / "tiny" / "1" / "manifest.json").unlink()
    assert invalid_reason(root) == "manifest.json is missing"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "not JSON"),
        (b"\x00\xff\xfe", "not JSON"),
        (b"[" * 200_000, "not JSON"),
        (b'{"a":' * 100_000, "not JSON"),
        (b'{"format": NaN}', "not JSON"),
        (b'{"format": 1e999}', "not JSON"),
        (b'{"format": ' + b"9" * 100_000 + b"}", "manifest.json"),
        (b'{"format": "' + b"9" * 100_000 + b'"}', "has format '999"),
        (b"[]", "has format None; this server reads format 1"),
        (b'{"format": 2}', "has format 2; this server reads format 1"),
        (b'{"format": true}', "is malformed"),
        (b'{"format": 1}', "is malformed: Object missing required field"),
        (b" " * (10 << 20), "is larger than 1048576 bytes"),
    ],
    ids=lambda value: repr(value)[:24],
)
def test_a_malformed_manifest_is_reported(root: Path, content: bytes, words: str) -> None:
    (root / "tiny" / "1" / "manifest.json").write_bytes(content)
    assert words in invalid_reason(root)
    assert len(invalid_reason(root)) < 500


def test_a_manifest_of_an_older_build_is_read(root: Path) -> None:
    """It says nothing about the activation, the channel order and the newer ways to resize."""

    def forget(manifest: dict[str, Any]) -> None:
        del manifest["activation"]
        for key in ("antialias", "letterbox", "fill", "channel_order", "mean", "std"):
            del manifest["input"][key]

    edit_manifest(root, forget)
    (version,) = (each for each in list_versions(root) if each.model == "tiny")
    assert version.manifest is not None
    assert version.manifest.activation == "softmax"
    assert version.manifest.input.spec() == InputSpec(4, 5, 3)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("activation", "relu", "$.activation"),
        ("input.fill", [1, 2], "fill must be one number from 0 to 255"),
        ("input.fill", [], "$.input.fill"),
        ("input.channel_order", "gbr", "$.input.channel_order"),
        ("input.letterbox", 1, "$.input.letterbox"),
    ],
)
def test_a_wrong_way_to_prepare_images_is_reported(
    root: Path, key: str, value: Any, words: str
) -> None:
    edit_manifest(root, set_at(key, value))
    assert words in invalid_reason(root)


def set_at(path: str, value: Any) -> Change:
    """A function that sets the value at a path, as "engines.0.name"."""

    def change(manifest: dict[str, Any]) -> None:
        *parents, last = path.split(".")
        place: Any = manifest
        for key in parents:
            place = place[int(key) if key.isdigit() else key]
        place[int(last) if last.isdigit() else last] = value

    return change


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("model", "other", "is of other version 1, but the folder is tiny/1"),
        ("model", "x" * 100_000, "$.model"),
        ("version", 2, "is of tiny version 2, but the folder is tiny/1"),
        ("version", 0, "$.version"),
        ("version", -1, "$.version"),
        ("version", 1.5, "$.version"),
        ("version", "1", "$.version"),
        ("version", 10**30, "$.version"),
        ("parameters", 0, "$.parameters"),
        ("classes", 0, "$.classes"),
        ("classes", 10**12, "$.classes"),
        ("top_k", 4, "top_k is 4; at most the 3 classes"),
        ("objective_ms", 0, "$.objective_ms"),
        ("objective_ms", None, "$.objective_ms"),
        ("share", 0, "$.share"),
        ("share", 1e9, "$.share"),
        ("weights.trained", "yes", "$.weights.trained"),
        ("weights.sha256", "0" * 63, "$.weights.sha256"),
        ("weights.note", "x" * 5000, "$.weights.note"),
        ("input.height", 0, "$.input.height"),
        ("input.height", 1 << 40, "$.input.height"),
        ("input.channels", 2, "$.input.channels"),
        ("input.interpolation", "psychic", "interpolation must be one of"),
        ("engines", [], "$.engines"),
        ("engines", {}, "$.engines"),
        ("engines.0.files", [], "$.engines[0].files"),
        ("engines.0.max_batch", 0, "$.engines[0].max_batch"),
        ("engines.0.max_batch", 1 << 21, "$.engines[0].max_batch"),
        ("engines.0.deviation", {"1": "none"}, "$.engines[0].deviation"),
        ("engines.0.precision", "{}\n", "$.engines[0].precision"),
        ("engines.0.files.0.name", "../1/engine.bin", "files[0].name"),
        ("engines.0.files.0.name", "/etc/passwd", "files[0].name"),
        ("engines.0.files.0.name", "..", "files[0].name"),
        ("engines.0.files.0.name", ".hidden", "files[0].name"),
        ("engines.0.files.0.name", "", "files[0].name"),
        ("engines.0.files.0.name", "engine.bin\n", "files[0].name"),
        ("engines.0.files.0.name", "engine.bin\u0000", "files[0].name"),
        ("engines.0.files.0.name", "model.onnx", "has the name model.onnx 2 times"),
        ("engines.0.files.0.name", "manifest.json", "has the name manifest.json 2 times"),
        ("engines.0.files.0.name", "engine2.bin", "engine2.bin is missing"),
        ("engines.0.files.0.bytes", -1, "files[0].bytes"),
        ("engines.0.files.0.bytes", 5999, "engine.bin has 6000 bytes; 5999 were published"),
        ("onnx", None, "$.onnx"),
    ],
)
def test_a_wrong_value_in_a_manifest_is_reported(
    root: Path, path: str, value: Any, words: str
) -> None:
    edit_manifest(root, set_at(path, value))
    assert words in invalid_reason(root)
    assert len(invalid_reason(root)) < 500


def test_two_engines_with_one_name_are_reported(root: Path) -> None:
    def twice(manifest: dict[str, Any]) -> None:
        (engine,) = manifest["engines"]
        other = engine | {"files": [engine["files"][0] | {"name": "other.bin"}]}
        manifest["engines"].append(other)

    edit_manifest(root, twice)
    assert "has the name null-fp32 2 times" in invalid_reason(root)


def test_a_batch_that_is_too_large_is_reported(root: Path) -> None:
    def huge(manifest: dict[str, Any]) -> None:
        manifest["input"] |= {"height": 60_000, "width": 60_000}
        manifest["engines"][0]["max_batch"] = 1

    edit_manifest(root, huge)
    assert "a batch of 1 rows would take 10800000000 bytes" in invalid_reason(root)


def test_unknown_fields_of_a_later_build_are_ignored(root: Path) -> None:
    edit_manifest(root, set_at("mood", "sunny"))
    assert all(entry.manifest for entry in list_versions(root))
