"""Checkpoint files: zip archives of torch.save, its older form, and safetensors.

Some have pickled calls put in, whose effect would be a new folder.
"""

from __future__ import annotations

import io
import pickletools
import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from random import Random

from tests.fuzz.mutate import mutated, sometimes_mutated
from tests.fuzz.target import Feed, Target

# Relative, so that the same input has the same bytes everywhere.
EFFECT = "fuzzed_code_has_run"
CALLS = tuple(
    b"c" + function + b"\n(V" + EFFECT.encode() + b"\ntR0"  # call it, drop the result
    for function in (b"os\nmkdir", b"posix\nmkdir", b"os\nmakedirs", b"nt\nmkdir", b"pathlib\nPath")
) + (
    b"cbuiltins\nexec\n(Vimport os; os.mkdir('" + EFFECT.encode() + b"')\ntR0",
    b"cbuiltins\neval\n(V__import__('os').mkdir('" + EFFECT.encode() + b"')\ntR0",
    b"ctorch._utils\n_rebuild_tensor_v2\n(VEFFECT\ntR0",
    b"ctorch\nload\n(V" + EFFECT.encode() + b"\ntR0",
)  # fmt: skip


class CodeHasRun(AssertionError):
    """A checkpoint made its reader do something."""


@cache
def valid_files() -> tuple[bytes, ...]:
    import torch  # slow: only if checkpoints are fuzzed
    from safetensors.torch import save

    state = {"conv.weight": torch.arange(6.0).reshape(2, 3), "conv.bias": torch.zeros(2)}
    zipped, legacy = io.BytesIO(), io.BytesIO()
    torch.save({"state_dict": state, "epoch": 3}, zipped)
    torch.save(state, legacy, _use_new_zipfile_serialization=False)
    return zipped.getvalue(), legacy.getvalue(), save(state)


def with_call(pickled: bytes, draw: Random) -> bytes:
    """Puts a call between two operations of a pickle."""
    places = []
    try:
        places += [position for _, _, position in pickletools.genops(pickled) if position]
    except ValueError:
        places.append(len(pickled) - 1)
    place = draw.choice(places or [0])
    return pickled[:place] + draw.choice(CALLS) + pickled[place:]


def rezipped(archive: bytes, draw: Random) -> bytes:
    """The archive with a changed pickle, and right checksums."""
    changed = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(archive)) as old, zipfile.ZipFile(changed, "w") as new:
        for entry in old.infolist():
            data = old.read(entry)
            if entry.filename.endswith("data.pkl"):
                data = with_call(data, draw) if draw.random() < 0.5 else mutated(data, draw)
            new.writestr(zipfile.ZipInfo(entry.filename), data)
    return changed.getvalue()


def make(draw: Random) -> bytes:
    zipped, legacy, safetensors = valid_files()
    match draw.randrange(5):
        case 0:
            return sometimes_mutated(safetensors, draw, 0.8)
        case 1:
            return sometimes_mutated(zipped, draw, 0.8)
        case 2:
            return sometimes_mutated(legacy, draw, 0.9)
        case 3:
            return with_call(legacy, draw)
    return rezipped(zipped, draw)


@contextmanager
def files() -> Iterator[Feed]:
    from model_repo.checkpoints.reader import WrongCheckpoint, read_checkpoint

    effect = Path(EFFECT)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "net.pth")

        def feed(data: bytes) -> bool:
            path.write_bytes(data)
            try:
                read_checkpoint(path)
            except WrongCheckpoint:
                return False
            finally:
                if effect.exists():
                    shutil.rmtree(effect)
                    raise CodeHasRun
            return True

        yield feed


TARGETS = (Target("checkpoints", make, files, 0.003),)
