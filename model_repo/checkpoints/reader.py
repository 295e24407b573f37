"""Reads checkpoint files: the content that torch.save or safetensors wrote.

Code in a file never runs. The content decides the format, not the ending of the name. A file that
cannot be read gets one sentence that says what it is and what to do.
"""

from __future__ import annotations

import re
import warnings
import zipfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from model_repo.checkpoints.download import WeightsError
from model_repo.checkpoints.file_kinds import SAVE_STATE, is_safetensors, is_zip, why_no_checkpoint
from model_repo.checkpoints.pickled import LEGACY_MAGIC, pickled_names
from model_repo.checkpoints.protocols import rewritten
from model_repo.checkpoints.safe_types import allowed, is_allowed
from model_repo.checkpoints.shards import is_index, shard_files

MAX_NAMES_SHOWN = 3
CHUNK_BYTES = 1 << 20
# Classes that torch.load accepts: see torch.serialization.get_safe_globals and its built-in list.
SAFE_CLASS = re.compile(
    r"torch\.(\w+|_utils\.\w+|_tensor\.\w+|nn\.parameter\.\w+|storage\.\w+|serialization\.\w+)"
    r"|collections\.(OrderedDict|Counter)|_codecs\.encode|builtins\.(bytearray|set|complex)"
)


class WrongCheckpoint(WeightsError):
    """The file is not a checkpoint, or belongs to another network."""


def read_checkpoint(path: Path) -> Any:
    """What a checkpoint holds: often a dictionary, with the tensors by name somewhere in it.

    An index of several files gives the tensors of all of them. Raises WrongCheckpoint. The message
    continues a sentence: "net.pth " + "is a Git LFS pointer, ...".
    """
    if is_index(path):
        try:
            files = shard_files(path)
        except ValueError as error:
            raise WrongCheckpoint(str(error)) from None
        return _joined(files)
    if reason := why_no_checkpoint(path):
        raise WrongCheckpoint(reason)
    with path.open("rb") as file:
        head = file.read(len(LEGACY_MAGIC))
    if is_zip(head):
        _compare_checksums(path)
    try:
        return load_file(path) if is_safetensors(head) else _load_without_code(path)
    except Exception as error:  # for a damaged file both libraries raise many different types
        raise WrongCheckpoint(_why_unreadable(path, head)) from error


def shown(names: Sequence[str], most: int = MAX_NAMES_SHOWN) -> str:
    """The first names, for a message."""
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def _joined(files: Sequence[Path]) -> dict[str, Any]:
    """The tensors of several files. Raises WrongCheckpoint that names the file."""
    tensors: dict[str, Any] = {}
    for file in files:
        try:
            content = read_checkpoint(file)
        except WrongCheckpoint as error:
            raise WrongCheckpoint(f"has a part {file.name} that {error}") from error.__cause__
        if not isinstance(content, dict):
            raise WrongCheckpoint(f"has a part {file.name} without tensors by name")
        tensors |= content
    return tensors


def _load_without_code(path: Path) -> Any:
    protocol, names = 2, list[str]()
    with suppress(Exception):  # torch finds the damage again
        protocol, names = pickled_names(path)
    is_rewritten = protocol > 2 and zipfile.is_zipfile(path)
    # torch gets a file, because it would choose the format by the end of the name.
    opened = rewritten(path) if is_rewritten else path.open("rb")
    with warnings.catch_warnings(), opened as file:
        warnings.simplefilter("ignore")  # about formats; the errors say more
        with torch.serialization.safe_globals(allowed(names)):  # type: ignore[arg-type]
            return torch.load(file, map_location="cpu", weights_only=True)


def _compare_checksums(path: Path) -> None:
    """Compares the members of a zip archive with their checksums, as torch does not."""
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            if not member.CRC:  # torch has an option to write none
                continue
            try:
                with archive.open(member) as file:
                    while file.read(CHUNK_BYTES):
                        pass
            except Exception as error:  # from zipfile and from each decompressor
                raise WrongCheckpoint(
                    f"is damaged: {member.filename} in it differs from its checksum; "
                    "download or save it again"
                ) from error


def _why_unreadable(path: Path, head: bytes) -> str:
    damaged = "is damaged, or is not a file of torch.save or safetensors; download or save it again"
    if is_safetensors(head):
        return damaged
    try:
        protocol, names = pickled_names(path)
    except Exception:  # a damaged pickle fails in many ways
        return damaged
    unsafe = [name for name in names if not (SAFE_CLASS.fullmatch(name) or is_allowed(name))]
    if any(name.startswith("torch.nn.") for name in unsafe):
        return (
            f"contains a whole network ({unsafe[0]}), and loading it could run code; where it was "
            f"trained, {SAVE_STATE}"
        )
    if unsafe:
        return (
            f"contains Python objects ({shown(unsafe)}), and loading them could run code; where it "
            f"was trained, {SAVE_STATE}"
        )
    if not is_zip(head) and head != LEGACY_MAGIC:
        return f"is a pickle that torch.save did not write; {SAVE_STATE}"
    if protocol > 2:
        return f"is saved with pickle protocol {protocol}; save it with protocol 2, the default"
    return damaged
