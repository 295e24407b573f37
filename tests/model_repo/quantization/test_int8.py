"""INT8 engines: calibrated with real images, as accurate as float32, and refused without images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import openvino as ov
import pytest
import torch
from PIL import Image

from model_repo import digits
from model_repo.architectures.registry import create
from model_repo.build import main
from model_repo.evaluation.gate import Gate
from model_repo.pipeline import BuildOptions, build
from model_repo.quantization.calibration import CHECKED, CalibrationError, read_calibration
from model_repo.quantization.openvino import float_layers
from server.images.input_spec import InputSpec

GREY = InputSpec(height=32, width=32, channels=1)


def write_images(folder: Path, count: int) -> Path:
    """Digits that LeNet-5 was trained with, without labels."""
    folder.mkdir()
    images, _, is_held_out = digits._split()
    for number, image in enumerate(images[~is_held_out][:count]):
        Image.fromarray(image).save(folder / f"{number:04d}.png")
    return folder


def test_int8_lenet5_is_as_accurate_as_float32(tmp_path: Path, digit_files: Path) -> None:
    calibration = write_images(tmp_path / "images", 400)
    options = BuildOptions(
        repo=tmp_path / "repo",
        precision="int8",
        calibration=calibration,
        gate=Gate(data=digit_files, max_drop=0.005),
    )
    (record,) = build("lenet5", options).manifest.engines
    assert (record.name, record.precision) == ("openvino-int8", "int8")
    assert record.quantization is not None
    assert record.quantization.calibration == "images"
    assert record.quantization.calibration_images == 200
    assert record.quantization.check_images == CHECKED
    assert record.quantization.confident_images > CHECKED / 2
    assert record.quantization.agreement >= 0.99
    assert record.quantization.float_layers == ()
    model = ov.Core().read_model(tmp_path / "repo" / "lenet5" / "1" / "openvino-int8.xml")
    kinds = [operation.get_type_name() for operation in model.get_ops()]
    assert "FakeQuantize" in kinds
    assert float_layers(model) == ()


def test_sensitive_layers_go_back_to_float32(tmp_path: Path) -> None:
    """Random parameters make classes nearly equal, so 8 bits change many answers."""
    torch.manual_seed(1)
    torch.save(create("lenet5", 10).state_dict(), tmp_path / "net.pth")
    options = BuildOptions(
        repo=tmp_path / "repo",
        weights=str(tmp_path / "net.pth"),
        precision="int8",
        calibration=write_images(tmp_path / "images", 60),
        min_agreement=1.0,
    )
    (record,) = build("lenet5", options).manifest.engines
    assert record.quantization is not None
    assert record.quantization.confident_images == 0
    assert record.quantization.agreement == 1
    assert record.quantization.float_layers


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--precision", "int8"], "needs --calibration DIR"),
        (["--calibration", "x"], "--calibration is for --precision int8"),
        (
            ["--precision", "int8", "--calibration", "x", "--min-agreement", "99"],
            "must be a fraction from 0 to 1, not 99",
        ),
    ],
)
def test_int8_needs_images(
    arguments: Sequence[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["lenet5", *arguments])
    assert message in " ".join(capsys.readouterr().err.split())


def test_images_calibrate_or_check_but_not_both(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "images", 30)
    (folder / "deep").mkdir()
    (folder / "deep" / "broken.png").write_bytes(b"no image")
    (folder / "notes.txt").write_text("ignored")
    found = read_calibration(folder, GREY)
    assert found.calibration.shape == (15, 32, 32, 1)
    assert found.check.shape == (CHECKED, 32, 32, 1)  # 15 images, and crops of them
    assert found.checked_files == 15
    assert len(found.unreadable) == 1
    calibrating = {row.tobytes() for row in found.calibration}
    assert not calibrating & {row.tobytes() for row in found.check}
    again = read_calibration(folder, GREY)
    assert (again.check == found.check).all()


@pytest.mark.parametrize("count", [0, 1])
def test_too_few_images_are_refused(tmp_path: Path, count: int) -> None:
    folder = write_images(tmp_path / "images", count)
    with pytest.raises(CalibrationError, match=f"has {count} images that can be read; at least 2"):
        read_calibration(folder, GREY)


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="is not a folder"):
        read_calibration(tmp_path / "none", GREY)
