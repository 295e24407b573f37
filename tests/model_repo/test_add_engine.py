"""Adding an engine to a published version."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from model_repo.pipeline import BuildError, BuildOptions, build
from server.repository import reader
from server.repository.manifest import Manifest


def manifest_of(root: Path) -> Manifest:
    return reader.read_manifest(root / "lenet5" / "1")


def test_an_engine_is_added_to_the_newest_version_and_keeps_the_others(tmp_path: Path) -> None:
    build("lenet5", BuildOptions(repo=tmp_path, weights="random:0", precision="fp32"))
    before = manifest_of(tmp_path)
    for capability in ("8.9", "12.0"):
        options = BuildOptions(
            repo=tmp_path, backend="tensorrt", add_engine=True, hardware=(capability,)
        )
        build("lenet5", options)
    after = manifest_of(tmp_path)
    assert after.engines[0] == before.engines[0]
    assert [engine.hardware for engine in after.engines[1:]] == ["sm89", "sm120"]
    assert msgspec.structs.replace(after, engines=before.engines) == before
    reader.verify_files(tmp_path / "lenet5" / "1", after)
    with pytest.raises(BuildError, match=r"version 1 already has engine tensorrt-fp16-sm120-"):
        build("lenet5", options)
    assert manifest_of(tmp_path) == after
    assert {path.name for path in (tmp_path / "lenet5").iterdir()} == {"1"}, "nothing else is left"


def test_adding_an_engine_needs_a_published_version(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="no valid version of lenet5 to add an engine to"):
        build("lenet5", BuildOptions(repo=tmp_path, backend="tensorrt", add_engine=True))


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"backend": "tensorrt,abacus"}, "backend 'abacus' is unknown"),
        ({"backend": "null,tensorrt"}, "null must be the only one"),
        ({"backend": "tensorrt,tensorrt"}, "several backends must differ"),
        ({"backend": "null", "add_engine": True}, "cannot be added"),
        ({"opt_batch": 9, "max_batch": 8}, "--opt-batch must be 1 to 8, not 9"),
        ({"min_batch": 5, "opt_batch": 4}, "--min-batch must be 1 to 4, not 5"),
    ],
)
def test_invalid_options_are_rejected(fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        BuildOptions(repo=Path(), **fields)
