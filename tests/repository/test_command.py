"""People see what is in a repository, whether it is sound, and change who gets the calls."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from server.repository.__main__ import main
from server.repository.contents import list_contents
from server.repository.manifest import InvalidVersion
from server.repository.serving_config import (
    ServingConfig,
    VersionPolicy,
    read_serving_config,
    write_serving_config,
)
from tests.support.serving import publish

ROOT = Path(__file__).resolve().parent.parent.parent


def run(root: Path, *arguments: str) -> int:
    return main(["--repo", str(root), *arguments])


def versions(root: Path, model: str = "tiny") -> list[str]:
    return sorted(path.name for path in (root / model).iterdir())


def test_the_list_says_of_every_version_whether_it_is_sound(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(3):
        publish(tmp_path)
    (tmp_path / "tiny/2/labels.txt").unlink()
    (tmp_path / "tiny/odd").mkdir()
    assert run(tmp_path, "label", "tiny", "stable=1") == 0
    capsys.readouterr()
    assert run(tmp_path, "list", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert [(one["version"], one["sound"], one["reason"]) for one in told["versions"]] == [
        (3, True, ""),
        (2, False, "labels.txt is missing"),
        (1, True, ""),
    ]
    assert told["versions"][2]["labels"] == ["stable"]
    assert told["strays"][0].startswith(str(tmp_path / "tiny/odd"))
    assert run(tmp_path, "list") == 0
    text = capsys.readouterr().out
    assert "labels.txt is missing" in text
    assert "tiny: stable=1, versions as set in the server" in text


def test_verifying_reads_what_the_list_only_weighs(
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


def test_what_nobody_asks_for_may_go_and_goes_when_told_to(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(6):
        publish(tmp_path)
    (tmp_path / "tiny/3/labels.txt").unlink()
    (tmp_path / "tiny/.staging-dead").mkdir()
    assert run(tmp_path, "label", "tiny", "stable=1") == 0
    assert run(tmp_path, "gc") == 0
    assert versions(tmp_path) == [".staging-dead", *"123456", "serving.json"]
    assert "nothing was deleted" in capsys.readouterr().out
    assert run(tmp_path, "gc", "--delete") == 0
    assert versions(tmp_path) == ["1", "5", "6", "serving.json"]


def test_labels_are_given_moved_and_taken_away(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(3):
        publish(tmp_path)
    home = tmp_path / "tiny"
    arguments = ("stable=2", "canary=3", "--canary-percent=5", "--versions=latest:2")
    assert run(tmp_path, "label", "tiny", *arguments) == 0
    told = "tiny: stable=2, canary=3, 5% of requests to canary, versions latest:2\n"
    assert capsys.readouterr().out == told
    plan = ServingConfig(versions="latest:2", labels={"stable": 2, "canary": 3}, canary_percent=5)
    assert read_serving_config(home) == plan
    assert run(tmp_path, "label", "tiny") == 0
    assert capsys.readouterr().out == told
    assert run(tmp_path, "label", "tiny", "canary=", "stable=3") == 0
    assert read_serving_config(home) == ServingConfig(versions="latest:2", labels={"stable": 3})
    assert sorted(versions(tmp_path)) == ["1", "2", "3", "serving.json"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("other",), "has no model 'other'; it has tiny"),
        (("tiny", "stable=2"), "tiny has no version 2; it has 1"),
        (
            ("tiny", "best=1"),
            "not of the form LABEL=VERSION; a label is stable or canary, as",
        ),
        (("tiny", "stable=01"), "'stable=01' is not of the form LABEL=VERSION"),
        (("tiny", "--canary-percent=5"), "--canary-percent needs a canary"),
    ],
)
def test_a_wrong_label_is_refused_and_nothing_changes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    publish(tmp_path)
    assert run(tmp_path, "label", *arguments) == 1
    assert message in capsys.readouterr().err
    assert versions(tmp_path) == ["1"]


def test_an_unsound_version_gets_no_label(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    publish(tmp_path)
    (tmp_path / "tiny/1/labels.txt").unlink()
    assert run(tmp_path, "label", "tiny", "stable=1") == 1
    assert "version 1 is invalid: labels.txt is missing" in capsys.readouterr().err


@pytest.mark.parametrize(
    "option", ["--canary-percent=101", "--versions=newest", "--versions=all:1"]
)
def test_a_wrong_option_of_a_label_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str
) -> None:
    publish(tmp_path)
    with pytest.raises(SystemExit):
        run(tmp_path, "label", "tiny", option)
    assert option.split("=")[0] in capsys.readouterr().err


def test_it_is_a_command(tmp_path: Path) -> None:
    publish(tmp_path)
    command = [sys.executable, "-W", "error", "-m", "server.repository", "--repo"]
    ask = partial(subprocess.run, cwd=ROOT, capture_output=True, text=True, timeout=60)
    done = ask([*command, str(tmp_path), "verify"])
    assert (done.returncode, done.stdout, done.stderr) == (0, "tiny/1: valid\n", "")
    nowhere = tmp_path / "nowhere"
    done = ask([*command, str(nowhere), "list"])
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"{nowhere}: No such file or directory\n"


# --- the plan --------------------------------------------------------------------------------


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
def test_a_policy_chooses_of_the_sound_versions(text: str, chosen: list[int]) -> None:
    assert list(VersionPolicy.parse(text).choose([5, 3, 2])) == chosen


@pytest.mark.parametrize(
    "text",
    ["", "latest", "latest:0", "latest:-1", "latest:1,2", "all:1", "named:", "named:1,", "Latest:1"]
    + ["named:1,x", "latest:" + "9" * 19, "latest:\N{ARABIC-INDIC DIGIT ONE}", "latest:1\n"],
)
def test_a_policy_of_another_form_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="it must be latest:N, all, or named:N,N"):
        VersionPolicy.parse(text)


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
def test_an_absurd_plan_is_told_and_hides_nothing(tmp_path: Path, text: str) -> None:
    publish(tmp_path)
    (tmp_path / "tiny/serving.json").write_text(text)
    with pytest.raises(InvalidVersion, match=r"serving\.json"):
        read_serving_config(tmp_path / "tiny")
    found = list_contents(tmp_path)
    assert [(one.model, one.version) for one in found.versions] == [("tiny", 1)]
    assert found.configs == {}
    assert [stray.path.name for stray in found.ignored] == ["serving.json"]


def test_a_plan_that_is_no_file_is_told(tmp_path: Path) -> None:
    publish(tmp_path)
    os.mkfifo(tmp_path / "tiny/serving.json")
    with pytest.raises(InvalidVersion, match="not a regular file"):
        read_serving_config(tmp_path / "tiny")


def test_a_plan_is_replaced_whole(tmp_path: Path) -> None:
    publish(tmp_path)
    for version in (1, 2):
        write_serving_config(tmp_path, "tiny", ServingConfig(labels={"stable": version}))
    assert read_serving_config(tmp_path / "tiny") == ServingConfig(labels={"stable": 2})
    assert versions(tmp_path) == ["1", "serving.json"]
    with pytest.raises(ValueError, match="must match"):
        write_serving_config(tmp_path, "../tiny", ServingConfig())
