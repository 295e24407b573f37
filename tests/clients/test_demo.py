"""The demo shows what is so, and fails where that is not what it promises."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from PIL import Image

from tests.support.serving import publish

ROOT = Path(__file__).resolve().parent.parent.parent


def demo(folder: Path, *, right: int, wrong: int) -> subprocess.CompletedProcess[str]:
    """Runs it with engines that always say "class 0", and so many digits of that class and not."""
    repo, digits = folder / "engines", folder / "digits"
    repo.mkdir()
    digits.mkdir()
    publish(repo, "lenet5", shape=(8, 8, 1), trained=True)
    publish(repo, "resnet18")
    for number in range(right + wrong):
        label = "class 0" if number < right else "class 1"
        Image.new("L", (8, 8)).save(digits / f"{number:03d}-{label}.png")
    photo = folder / "photo.png"
    Image.new("RGB", (20, 10)).save(photo)
    return run(repo, digits, photo)


def run(repo: Path, digits: Path, photo: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "clients/demo.py", "--repo", str(repo), "--digits", str(digits)]
    return subprocess.run(
        [*command, "--photo", str(photo)], cwd=ROOT, capture_output=True, text=True, timeout=300
    )


def test_it_shows_accuracy_speed_untrained_answers_and_metrics_and_stops_cleanly(
    tmp_path: Path,
) -> None:
    shown = demo(tmp_path, right=40, wrong=0)
    assert shown.returncode == 0, shown.stdout + shown.stderr
    for promised in (
        "100.00%",
        "40 of 40",
        "latency p99",
        "resnet18 IS UNTRAINED",
        "convserve_requests_total",
        "exit status 0",
    ):
        assert promised in shown.stdout
    assert "lenet5 IS UNTRAINED" not in shown.stdout


def test_it_fails_where_too_many_digits_are_told_wrong(tmp_path: Path) -> None:
    shown = demo(tmp_path, right=196, wrong=4)
    assert shown.returncode == 1
    assert "98.00% of the digits were told right" in shown.stdout
    assert "exit status 0" in shown.stdout


def test_it_fails_where_there_is_nothing_to_serve(tmp_path: Path) -> None:
    (tmp_path / "digits").mkdir()
    Image.new("L", (8, 8)).save(tmp_path / "digits/1-1.png")
    shown = run(tmp_path / "none", tmp_path / "digits", tmp_path / "digits/1-1.png")
    assert shown.returncode == 1
    assert "the server did not start" in shown.stdout
    assert "is no folder" in shown.stdout
