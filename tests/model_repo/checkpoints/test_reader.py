"""Tensors are read from each format of checkpoint. Other content gets one plain sentence."""

from __future__ import annotations

import argparse
import pickle
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

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


@pytest.mark.parametrize(
    "options", [{}, {"pickle_protocol": 4}, {"_use_new_zipfile_serialization": False}]
)
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            nn.Sequential(nn.Linear(4, 3)),
            "contains a whole network (torch.nn.modules.container.Sequential), and loading it "
            f"could run code; {SAVE_STATE}",
        ),
        (
            {"epoch": 3, "model": nn.Linear(4, 3)},
            "contains a whole network (torch.nn.modules.linear.Linear), and loading it "
            f"could run code; {SAVE_STATE}",
        ),
        (
            {"state_dict": STATE, "accuracy": np.float64(0.9)},
            f"contains NumPy values ({np.float64(0).__reduce__()[0].__module__}.scalar, "
            f"numpy.dtype), not only tensors; {SAVE_STATE}",
        ),
        (
            {"state_dict": STATE, "options": argparse.Namespace(rate=0.1), "by": defaultdict(list)},
            "contains Python objects (argparse.Namespace, collections.defaultdict), and loading "
            f"them could run code; {SAVE_STATE}",
        ),
    ],
)
def test_content_besides_tensors_is_named(
    tmp_path: Path, content: object, message: str, options: dict[str, Any]
) -> None:
    assert refusal(saved(tmp_path / "net.pth", content, **options)) == message


def test_another_pickle_protocol_is_named(tmp_path: Path) -> None:
    path = saved(tmp_path / "net.pth", STATE, pickle_protocol=4)
    assert refusal(path) == "is saved with pickle protocol 4; save it with protocol 2, the default"


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


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (torch.zeros(3), "contains a value of type Tensor, not tensors by name; save the param"),
        ([torch.zeros(3)], "contains a value of type list, not tensors by name; save the param"),
        ({}, "contains no tensors; save the parameters with"),
        ({"epoch": 3}, "contains entries that are not tensors by name ('epoch'); save the param"),
        ({**STATE, "epoch": 3}, "contains entries that are not tensors by name ('epoch'); save"),
        ({1: torch.zeros(3)}, "contains entries that are not tensors by name (1); save the"),
        (
            {"epoch": 3, "state_dict": STATE},
            "keeps its tensors in an entry 'state_dict'; save that entry alone: torch.save(",
        ),
        ({"a": torch.zeros(3).to_sparse()}, "contains tensors that are sparse, complex, quant"),
        ({"a": torch.zeros(3, dtype=torch.complex64)}, "contains tensors that are sparse, comp"),
        ({"a": torch.zeros(3, device="meta")}, "contains tensors that are sparse, complex, qua"),
    ],
)
def test_content_that_is_not_real_tensors_by_name_is_described(
    tmp_path: Path, content: object, message: str
) -> None:
    assert refusal(saved(tmp_path / "net.pth", content)).startswith(message)
