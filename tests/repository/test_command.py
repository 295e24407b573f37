"""The command shows and verifies versions, deletes unused ones and sets labels."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from server.repository.__main__ import main
from server.repository.serving_config import ServingConfig, read_serving_config
from tests.support.serving import publish

ROOT = Path(__file__).resolve().parent.parent.parent


def run(root: Path, *arguments: str) -> int:
    return main(["--repo", str(root), *arguments])


def entries(root: Path) -> list[str]:
    return sorted(path.name for path in (root / "tiny").iterdir())


def test_list_shows_for_each_version_whether_it_is_valid(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(3):
        publish(tmp_path)
    (tmp_path / "tiny/2/labels.txt").unlink()
    (tmp_path / "tiny/odd").mkdir()
    assert run(tmp_path, "label", "tiny", "stable=1") == 0
    capsys.readouterr()
    assert run(tmp_path, "list", "--json") == 0
    listed = json.loads(capsys.readouterr().out)
    assert [(one["version"], one["sound"], one["reason"]) for one in listed["versions"]] == [
        (3, True, ""),
        (2, False, "labels.txt is missing"),
        (1, True, ""),
    ]
    assert listed["versions"][2]["labels"] == ["stable"]
    assert listed["strays"][0].startswith(str(tmp_path / "tiny/odd"))
    assert run(tmp_path, "list") == 0
    text = capsys.readouterr().out
    assert "labels.txt is missing" in text
    assert "tiny: stable=1, versions as set in the server" in text


def test_verify_finds_changed_contents_that_list_does_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):
        publish(tmp_path)
    path = tmp_path / "tiny/1/null.json"
    path.write_bytes(path.read_bytes()[::-1])
    assert run(tmp_path, "verify") == 1
    assert capsys.readouterr().out.splitlines() == [
        "tiny/2: valid",
        "tiny/1: INVALID: null.json is not what was published: its sha256 differs",
    ]
    assert run(tmp_path, "verify", "tiny/2") == 0
    assert run(tmp_path, "verify", "tiny/3") == 1
    assert "there is no 'tiny/3'" in capsys.readouterr().err


def test_gc_shows_unused_versions_and_deletes_them_only_on_request(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(6):
        publish(tmp_path)
    (tmp_path / "tiny/3/labels.txt").unlink()
    (tmp_path / "tiny/.staging-dead").mkdir()
    assert run(tmp_path, "label", "tiny", "stable=1") == 0
    assert run(tmp_path, "gc") == 0
    assert entries(tmp_path) == [".staging-dead", *"123456", "serving.json"]
    assert "nothing was deleted" in capsys.readouterr().out
    assert run(tmp_path, "gc", "--delete") == 0
    assert entries(tmp_path) == ["1", "5", "6", "serving.json"]


def test_labels_are_set_moved_and_removed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(3):
        publish(tmp_path)
    home = tmp_path / "tiny"
    arguments = ("stable=2", "canary=3", "--canary-percent=5", "--versions=latest:2")
    assert run(tmp_path, "label", "tiny", *arguments) == 0
    text = "tiny: stable=2, canary=3, 5% of requests to canary, versions latest:2\n"
    assert capsys.readouterr().out == text
    config = ServingConfig(versions="latest:2", labels={"stable": 2, "canary": 3}, canary_percent=5)
    assert read_serving_config(home) == config
    assert run(tmp_path, "label", "tiny") == 0
    assert capsys.readouterr().out == text
    assert run(tmp_path, "label", "tiny", "canary=", "stable=3") == 0
    assert read_serving_config(home) == ServingConfig(versions="latest:2", labels={"stable": 3})
    assert sorted(entries(tmp_path)) == ["1", "2", "3", "serving.json"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("other",), "has no model 'other'; it has tiny"),
        (("tiny", "stable=2"), "tiny has no version 2; it has 1"),
        (
            ("tiny", "best=1"),
            "'best=1' is not of the form LABEL=VERSION; a label is stable or canary",
        ),
        (("tiny", "stable=01"), "'stable=01' is not of the form LABEL=VERSION"),
        (("tiny", "--canary-percent=5"), "--canary-percent needs a canary"),
    ],
)
def test_a_wrong_label_is_rejected_and_changes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    publish(tmp_path)
    assert run(tmp_path, "label", *arguments) == 1
    assert message in capsys.readouterr().err
    assert entries(tmp_path) == ["1"]


def test_an_invalid_version_can_not_be_labelled(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    publish(tmp_path)
    (tmp_path / "tiny/1/labels.txt").unlink()
    assert run(tmp_path, "label", "tiny", "stable=1") == 1
    assert "version 1 is invalid: labels.txt is missing" in capsys.readouterr().err


@pytest.mark.parametrize(
    "option", ["--canary-percent=101", "--versions=newest", "--versions=all:1"]
)
def test_a_wrong_option_of_label_is_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str
) -> None:
    publish(tmp_path)
    with pytest.raises(SystemExit):
        run(tmp_path, "label", "tiny", option)
    assert option.split("=")[0] in capsys.readouterr().err


def test_the_module_runs_as_a_command(tmp_path: Path) -> None:
    publish(tmp_path)
    command = [sys.executable, "-W", "error", "-m", "server.repository", "--repo"]
    run_command = partial(subprocess.run, cwd=ROOT, capture_output=True, text=True, timeout=60)
    done = run_command([*command, str(tmp_path), "verify"])
    assert (done.returncode, done.stdout, done.stderr) == (0, "tiny/1: valid\n", "")
    missing = tmp_path / "missing"
    done = run_command([*command, str(missing), "list"])
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"{missing}: No such file or directory\n"
