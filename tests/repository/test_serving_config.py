"""Serving.json is checked when it is read, and replaced in one step."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from server.repository.contents import list_contents
from server.repository.manifest import InvalidVersion
from server.repository.serving_config import (
    ServingConfig,
    VersionPolicy,
    read_serving_config,
    write_serving_config,
)
from tests.support.serving import publish


def entries(root: Path) -> list[str]:
    return sorted(path.name for path in (root / "tiny").iterdir())


@pytest.mark.parametrize(
    ("text", "chosen"),
    [
        ("latest:1", [5]),
        ("latest:2", [5, 3]),
        ("latest:9", [5, 3, 2]),
        ("all", [5, 3, 2]),
        ("named:2", [2]),
        ("named:2,5,7", [5, 2]),
    ],
)
def test_a_version_policy_selects_from_the_valid_versions(text: str, chosen: list[int]) -> None:
    assert list(VersionPolicy.parse(text).choose([5, 3, 2])) == chosen


@pytest.mark.parametrize(
    "text",
    ["", "latest", "latest:0", "latest:-1", "latest:1,2", "all:1", "named:", "named:1,", "Latest:1"]
    + ["named:1,x", "latest:" + "9" * 19, "latest:\N{ARABIC-INDIC DIGIT ONE}", "latest:1\n"],
)
def test_a_malformed_version_policy_is_rejected(text: str) -> None:
    with pytest.raises(ValueError, match="it must be latest:N, all, or named:N,N"):
        VersionPolicy.parse(text)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_file_saved_by_any_editor_is_read(tmp_path: Path, encoding: str) -> None:
    text = '{\r\n  "labels": {"stable": 3} \r\n}\r\n\r\n'
    (tmp_path / "serving.json").write_bytes(text.encode(encoding))
    assert read_serving_config(tmp_path).version("stable") == 3


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "[" * 5000,
        '{"labels": {"best": 1}}',
        '{"labels": {"stable": 0}}',
        '{"labels": {"stable": "1"}}',
        '{"canary_percent": 101}',
        '{"canary_percent": NaN}',
        '{"versions": "newest"}',
        '{"version": "all"}',
        " " * (65 << 10),
    ],
)
def test_a_malformed_serving_config_is_reported_and_hides_no_version(
    tmp_path: Path, text: str
) -> None:
    publish(tmp_path)
    (tmp_path / "tiny/serving.json").write_text(text)
    with pytest.raises(InvalidVersion, match=r"serving\.json"):
        read_serving_config(tmp_path / "tiny")
    found = list_contents(tmp_path)
    assert [(one.model, one.version) for one in found.versions] == [("tiny", 1)]
    assert found.configs == {}
    assert [entry.path.name for entry in found.ignored] == ["serving.json"]


def test_a_serving_config_that_is_not_a_file_is_reported(tmp_path: Path) -> None:
    publish(tmp_path)
    os.mkfifo(tmp_path / "tiny/serving.json")
    with pytest.raises(InvalidVersion, match="not a regular file"):
        read_serving_config(tmp_path / "tiny")


def test_a_serving_config_is_replaced_in_one_step(tmp_path: Path) -> None:
    publish(tmp_path)
    for version in (1, 2):
        write_serving_config(tmp_path, "tiny", ServingConfig(labels={"stable": version}))
    assert read_serving_config(tmp_path / "tiny") == ServingConfig(labels={"stable": 2})
    assert entries(tmp_path) == ["1", "serving.json"]
    with pytest.raises(ValueError, match="must match"):
        write_serving_config(tmp_path, "../tiny", ServingConfig())
