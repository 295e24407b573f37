"""Tensors are read from each format of checkpoint. Other content gets one plain sentence."""

from __future__ import annotations

import argparse
import pickle
import sys
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path, PurePosixPath, PureWindowsPath
from types import ModuleType, SimpleNamespace
from typing import Any
from uuid import UUID

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from model_repo.checkpoints.reader import WrongCheckpoint, read_checkpoint

STATE = {"0.weight": torch.arange(12.0).reshape(3, 4), "0.bias": torch.ones(3)}
SAVE_STATE = "save the parameters with torch.save(network.state_dict(), PATH)"


def refusal(path: Path) -> str:
    """The message about a file that cannot be read: one line, without a library's text."""
    with pytest.raises(WrongCheckpoint) as caught:
        read_checkpoint(path)
    message = str(caught.value)
    assert "\n" not in message
    assert "weights_only" not in message
    assert len(message) < 250
    return message


def saved(path: Path, content: Any, **options: Any) -> Path:
    torch.save(content, path, **options)
    return path


def is_state(content: dict[str, Tensor]) -> bool:
    return content.keys() == STATE.keys() and all(
        torch.equal(content[name], STATE[name]) for name in STATE
    )


@pytest.mark.parametrize("name", ["net.pth", "net", "net.safetensors"])
def test_the_content_decides_the_format_and_not_the_name(tmp_path: Path, name: str) -> None:
    assert is_state(read_checkpoint(saved(tmp_path / name, STATE)))
    legacy = saved(tmp_path / name, STATE, _use_new_zipfile_serialization=False)
    assert is_state(read_checkpoint(legacy))
    save_file(STATE, tmp_path / name)
    assert is_state(read_checkpoint(tmp_path / name))


def test_a_checkpoint_without_checksums_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        path = saved(tmp_path / "net.pth", STATE)
    finally:
        torch.serialization.set_crc32_options(True)
    assert is_state(read_checkpoint(path))


class Code:
    """A pickled object that creates a file when it is loaded."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return Path.touch, (Path("pwned"),)  # type: ignore[return-value]


def test_code_in_a_checkpoint_is_not_executed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    message = refusal(saved(tmp_path / "net.pth", {"0.weight": Code()}))
    assert message.startswith("contains Python objects (")
    assert not Path("pwned").exists()


class Options:
    """A class of a training script."""


@pytest.mark.parametrize(
    "options", [{}, {"pickle_protocol": 4}, {"_use_new_zipfile_serialization": False}]
)
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            nn.Sequential(nn.Linear(4, 3)),
            "contains a whole network (torch.nn.modules.container.Sequential), and loading it "
            f"could run code; where it was trained, {SAVE_STATE}",
        ),
        (
            {"epoch": 3, "model": nn.Linear(4, 3)},
            "contains a whole network (torch.nn.modules.linear.Linear), and loading it "
            f"could run code; where it was trained, {SAVE_STATE}",
        ),
        (
            {"state_dict": STATE, "by": Options(), "rate": partial(print, 3)},
            "contains Python objects (tests.model_repo.checkpoints.test_reader.Options, "
            "functools.partial, builtins.print), and loading them could run code; where it was "
            f"trained, {SAVE_STATE}",
        ),
    ],
)
def test_a_type_that_is_not_allowed_is_named(
    tmp_path: Path, content: object, message: str, options: dict[str, Any]
) -> None:
    assert refusal(saved(tmp_path / "net.pth", content, **options)) == message


@pytest.mark.parametrize("zipped", [True, False])
def test_values_of_training_scripts_are_allowed_beside_the_tensors(
    tmp_path: Path, zipped: bool
) -> None:
    beside = {
        "accuracy": np.float64(0.9),
        "losses": [np.float32(0.5), np.int64(3), np.bool_(True), np.float16(1)],
        "history": np.arange(3.0),
        "options": argparse.Namespace(rate=0.1, data=Path("/data"), windows=PureWindowsPath("C:/")),
        "by_class": defaultdict(list, {"cat": [1]}),
        "saved": datetime(2026, 1, 2, tzinfo=UTC),
        "took": timedelta(seconds=3),
        "sizes": torch.Size([3, 4]),
        "seen": {1, 2},
        "frozen": frozenset({"a"}),
        "kind": torch.float16,
        "random": np.random.default_rng(0).bit_generator.state,
        "place": torch.device("cuda:1"),
        "more": SimpleNamespace(a=1),
        "empty": b"",
        "id": UUID(int=3),
    }
    path = saved(
        tmp_path / "net.pth", {"model": STATE, **beside}, _use_new_zipfile_serialization=zipped
    )
    content = read_checkpoint(path)
    assert is_state(content["model"])
    assert content["accuracy"] == 0.9
    assert content["options"].rate == 0.1
    assert content["by_class"] == {"cat": [1]}


def test_options_in_the_containers_of_other_packages_are_read_without_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = ModuleType("omegaconf.dictconfig")

    class DictConfig(dict[str, Any]):
        pass

    DictConfig.__module__, DictConfig.__qualname__ = module.__name__, "DictConfig"
    vars(module)["DictConfig"] = DictConfig
    config = DictConfig(rate=0.1)
    vars(config)["_metadata"] = {"key": None}
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "omegaconf", ModuleType("omegaconf"))
        patched.setitem(sys.modules, module.__name__, module)
        path = saved(tmp_path / "net.ckpt", {"state_dict": STATE, "hyper_parameters": config})
    content = read_checkpoint(path)
    assert is_state(content["state_dict"])
    assert content["hyper_parameters"] == {"rate": 0.1}
    assert type(content["hyper_parameters"]) is OrderedDict


def test_tensors_of_a_gpu_are_read_without_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.serialization.location_tag", lambda storage: "cuda:3")
    assert is_state(read_checkpoint(saved(tmp_path / "net.pth", STATE)))
    legacy = saved(tmp_path / "old.pth", STATE, _use_new_zipfile_serialization=False)
    assert b"cuda:3" in legacy.read_bytes()
    assert is_state(read_checkpoint(legacy))


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_every_pickle_protocol_is_read(tmp_path: Path, protocol: int) -> None:
    beside = {
        "accuracy": np.float64(0.9),
        "options": argparse.Namespace(rate=0.1, path=Path("/data"), same="rate"),
        "raw": b"\xff\x00",
        "big": 1 << 40,
        "again": [STATE["0.bias"], "rate", "rate"],
    }
    path = tmp_path / "net.pth"
    content = read_checkpoint(saved(path, {"model": STATE, **beside}, pickle_protocol=protocol))
    assert is_state(content["model"])
    assert (content["accuracy"], content["raw"], content["big"]) == (0.9, b"\xff\x00", 1 << 40)
    assert vars(content["options"]) == {"rate": 0.1, "path": PurePosixPath("/data"), "same": "rate"}
    assert content["again"][1:] == ["rate", "rate"]


def test_a_pickle_that_protocol_2_cannot_say_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "net.pth", {"model": STATE, "seen": {1, 2}}, pickle_protocol=4)
    assert refusal(path) == "is saved with pickle protocol 4; save it with protocol 2, the default"


def test_code_in_another_protocol_is_not_executed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    message = refusal(saved(tmp_path / "net.pth", {"0.weight": Code()}, pickle_protocol=4))
    assert message.startswith("contains Python objects (")
    assert not Path("pwned").exists()


def test_a_pickle_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "net.pth").write_bytes(pickle.dumps(STATE, protocol=2))
    assert (
        refusal(tmp_path / "net.pth") == f"is a pickle that torch.save did not write; {SAVE_STATE}"
    )


@pytest.mark.parametrize("content", [b"\x80\x02", b"\xff" * 100, b"\x80\x02}q\x00."[:4]])
def test_a_damaged_file_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "net.pth").write_bytes(content)
    assert refusal(tmp_path / "net.pth").startswith("is damaged, or is not a file of torch.save")


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_a_truncated_checkpoint_is_refused(tmp_path: Path, zipped: bool, share: float) -> None:
    path = saved(tmp_path / "net.pth", STATE, _use_new_zipfile_serialization=zipped)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    assert refusal(path).startswith("is incomplete: it ends after" if zipped else "is damaged, or")


def test_changed_bytes_in_a_tensor_are_found(tmp_path: Path) -> None:
    path = saved(tmp_path / "net.pth", STATE)
    content = bytearray(path.read_bytes())
    content[content.index(STATE["0.weight"].numpy().tobytes()) + 9] ^= 0x40
    path.write_bytes(content)
    assert refusal(path) == (
        "is damaged: net/data/0 in it differs from its checksum; download or save it again"
    )
