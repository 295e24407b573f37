"""The build command: its output and exit status."""

from __future__ import annotations

from pathlib import Path

import pytest

from model_repo import build, progress
from model_repo.progress import STAGES
from server.repository.contents import list_versions


def test_the_command_publishes_prints_a_table_and_exits_with_0(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "LONG_STAGE_S", 0.0)  # every stage is printed
    command = ["lenet5", "--repo", str(tmp_path), "--weights", "random:0", "--precision", "f32"]
    assert build.main(command) == 0
    printed = capsys.readouterr()
    assert "UNTRAINED" in printed.out
    assert "openvino-fp32 x64" in printed.out
    stages = [line.split()[1] for line in printed.out.splitlines() if line.startswith("lenet5  ")]
    assert stages == [each for each in STAGES if each != "evaluate"]
    assert printed.err == ""


def test_the_other_models_are_built_if_one_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "alexnet").write_text("a file where a folder must be")
    command = ["alexnet", "lenet5", "--repo", str(tmp_path), "--backend", "null"]
    assert build.main(command) == 1
    printed = capsys.readouterr()
    valid = [version for version in list_versions(tmp_path) if version.manifest is not None]
    assert [version.model for version in valid] == ["lenet5"]
    assert printed.err.startswith("alexnet was not built: ")
    assert "1 of 2 models were not built" in printed.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name the models to build, or use --all"),
        (["lenet5", "--name", "mine"], "--name builds one model without a card; remove the names"),
        (["--name", "mine"], "--name needs --base and --weights and --labels too, or a card"),
        (["lenet5", "--base", "lenet5"], "--base is for a model without a card; add --name NAME"),
        (["lenet5", "--all"], "name the models to build, or use --all"),
        (["lenet6"], "there is no card 'lenet6'; cards: alexnet,"),
        (["lenet5", "resnet18", "--weights", "random:0"], "--weights is for one model, not for 2"),
        (
            ["lenet5", "--backend", "abacus"],
            "backend 'abacus' is unknown; choose one of openvino, tensorrt, inductor, null",
        ),
        (["lenet5", "--precision", "fp7"], "invalid choice: 'fp7'"),
        (["lenet5", "--max-batch", "0"], "--max-batch must be 1 to 1024, not 0"),
    ],
)
def test_wrong_usage_prints_the_reason_and_exits_with_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        build.main(arguments)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_a_repository_that_cannot_be_written_fails_before_the_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("not a folder")
    assert build.main(["lenet5", "--repo", str(tmp_path / "file")]) == 1
    printed = capsys.readouterr()
    assert "weights" not in printed.out
    assert f"lenet5 was not built: Not a directory: {tmp_path}/file" in printed.err


def test_a_missing_file_of_weights_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert build.main(["lenet5", "--repo", str(tmp_path), "--weights", "my/net.pth"]) == 1
    assert "there is no file my/net.pth" in capsys.readouterr().err
