"""The demo shows accuracy, predictions and metrics, and fails if one of them is wrong."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from PIL import Image

from tests.support.serving import publish

ROOT = Path(__file__).resolve().parent.parent.parent
MAX_LINES = 35


def demo(folder: Path, *, correct: int, wrong: int) -> subprocess.CompletedProcess[str]:
    """Runs the demo with engines that always predict "class 0", and digits of two classes."""
    repo, digits = folder / "engines", folder / "digits"
    repo.mkdir()
    digits.mkdir()
    publish(repo, "lenet5", shape=(8, 8, 1), trained=True)
    publish(repo, "resnet18")
    for number in range(correct + wrong):
        label = "class 0" if number < correct else "class 1"
        Image.new("L", (8, 8)).save(digits / f"{number:03d}-{label}.png")
    photo = folder / "photo.png"
    Image.new("RGB", (20, 10)).save(photo)
    return run(repo, digits, photo)


def run(repo: Path, digits: Path, photo: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "clients/demo.py", "--repo", str(repo), "--digits", str(digits)]
    return subprocess.run(
        [*command, "--photo", str(photo)], cwd=ROOT, capture_output=True, text=True, timeout=300
    )


def test_the_demo_shows_accuracy_speed_untrained_models_and_metrics(tmp_path: Path) -> None:
    shown = demo(tmp_path, correct=40, wrong=0)
    assert shown.returncode == 0, shown.stdout + shown.stderr
    for expected in (
        "100.00%",
        "40 of 40",
        "latency p99",
        "resnet18 IS UNTRAINED",
        "convserve_requests_total",
        "exit status 0",
        "demo passed",
    ):
        assert expected in shown.stdout
    assert "lenet5 IS UNTRAINED" not in shown.stdout
    assert "convserve_refused_total" not in shown.stdout, "its value is 0"
    assert shown.stdout.count("\n") <= MAX_LINES


def test_the_demo_fails_if_the_accuracy_is_too_low(tmp_path: Path) -> None:
    shown = demo(tmp_path, correct=196, wrong=4)
    assert shown.returncode == 1
    assert "accuracy 98.00% is below 98.50%" in shown.stdout
    assert "exit status 0" in shown.stdout


def test_the_demo_fails_if_there_is_nothing_to_serve(tmp_path: Path) -> None:
    (tmp_path / "digits").mkdir()
    Image.new("L", (8, 8)).save(tmp_path / "digits/1-1.png")
    shown = run(tmp_path / "none", tmp_path / "digits", tmp_path / "digits/1-1.png")
    assert shown.returncode == 1
    assert "the server did not start" in shown.stdout
    assert "folder" in shown.stdout
