"""The classify command prints predictions, and fails with one plain line."""

import asyncio
import json
import sys
from pathlib import Path

import pytest

from convserve_client import (
    classify,
)
from convserve_client.stubs import classify_pb2 as pb
from tests.support.scripted_classifier import (
    ANSWER,
    SMALL,
    Context,
    ScriptedClassifier,
    serving,
)

ROOT = Path(__file__).resolve().parent.parent.parent


async def run_command(*arguments: str) -> int:
    return await asyncio.to_thread(classify.main, arguments)


async def test_the_command_prints_each_image_with_its_classes(tmp_path: Path) -> None:
    """Run as a user runs it, from the root of the repository."""
    (tmp_path / "pet.jpg").write_bytes(b"image")
    service = ScriptedClassifier()
    async with serving(service) as target:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "clients/classify.py",
            str(tmp_path / "pet.jpg"),
            f"--target={target}",
            cwd=ROOT,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        out, err = await process.communicate()
    assert (process.returncode, err) == (0, b"")
    for shown in ("small version 3", "dog", "75.00%", "cat", "25.00%"):
        assert shown in out.decode()
    assert "UNTRAINED" not in out.decode()
    assert (service.requests[0].model, service.requests[0].images[0].encoded) == ("small", b"image")


async def test_the_command_warns_about_an_untrained_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "pet.jpg").write_bytes(b"image")

    async def untrained(request: pb.ClassifyRequest, context: Context) -> pb.ClassifyResponse:
        return pb.ClassifyResponse(results=ANSWER.results, model="small", version=3)

    async with serving(ScriptedClassifier(untrained)) as target:
        command = (str(tmp_path / "pet.jpg"), "--target", target)
        assert await run_command(*command) == 0
        warning = "UNTRAINED: random parameters, these classes mean nothing"
        assert warning in capsys.readouterr().out
        assert await run_command(*command, "--json") == 0
    answered = json.loads(capsys.readouterr().out)
    assert answered["trained"] is False
    assert answered["results"][0][0]["label"] == "dog"


async def test_the_command_fails_in_one_plain_line(
    tmp_path: Path, unused_target: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "pet.jpg").write_bytes(b"image")
    image, missing = str(tmp_path / "pet.jpg"), str(tmp_path / "nosuch.jpg")
    other = pb.Model(name="other", version=1, state=pb.Model.READY)
    async with serving(ScriptedClassifier(models=(SMALL, other))) as target:
        for arguments, said in (
            ((image, "--target", target), "other, small"),
            ((missing, "--target", target, "--model", "small"), "nosuch.jpg"),
            ((image, "--target", unused_target, "--timeout-s", "2"), unused_target),
        ):
            assert await run_command(*arguments) == 1
            shown = capsys.readouterr()
            assert (shown.out, shown.err.count("\n")) == ("", 1)
            assert said in shown.err


@pytest.mark.parametrize("wrong", ["--top-k=0", "--timeout-s=0", "--timeout-s=nan"])
def test_wrong_usage_exits_with_status_2(wrong: str) -> None:
    with pytest.raises(SystemExit) as ended:
        classify.main(["pet.jpg", wrong])
    assert ended.value.code == 2
