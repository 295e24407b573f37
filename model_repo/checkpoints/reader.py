"""Reads checkpoint files: tensors by name, saved by torch.save or in the safetensors format.

Code in a file never runs. The content decides the format, not the ending of the name. A file that
cannot be read gets one sentence that says what it is and what to do.
"""

from __future__ import annotations

import pickletools
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from model_repo.checkpoints.download import WeightsError
from model_repo.checkpoints.file_kinds import SAVE_STATE, is_safetensors, is_zip, why_no_checkpoint

MAX_NAMES_SHOWN = 3
CHUNK_BYTES = 1 << 20
# torch.save before PyTorch 1.6 writes four pickles: this number, a version, a platform, the data.
LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
LEGACY_PICKLES = 4
# Classes that torch.load accepts: see torch.serialization.get_safe_globals and its built-in list.
SAFE_CLASS = re.compile(
    r"torch\.(\w+|_utils\.\w+|_tensor\.\w+|nn\.parameter\.\w+|storage\.\w+|serialization\.\w+)"
    r"|collections\.(OrderedDict|Counter)|_codecs\.encode|(builtins|__builtin__)\.\w+"
)


class WrongCheckpoint(WeightsError):
    """The file is not a checkpoint, or belongs to another network."""


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint by name. Raises WrongCheckpoint.

    The message continues a sentence: "net.pth " + "is a Git LFS pointer, ...".
    """
    if reason := why_no_checkpoint(path):
        raise WrongCheckpoint(reason)
    with path.open("rb") as file:
        head = file.read(len(LEGACY_MAGIC))
    if is_zip(head):
        _compare_checksums(path)
    try:
        content = load_file(path) if is_safetensors(head) else _load_without_code(path)
    except Exception as error:  # for a damaged file both libraries raise many different types
        raise WrongCheckpoint(_why_unreadable(path, head)) from error
    if reason := _why_no_state(content):
        raise WrongCheckpoint(reason)
    return dict(content)


def _load_without_code(path: Path) -> Any:
    # torch gets a file, because it would choose the format by the end of the name.
    with warnings.catch_warnings(), path.open("rb") as file:
        warnings.simplefilter("ignore")  # about formats; the errors say more
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
        protocol, classes = _pickled_classes(path, head)
    except Exception:  # a damaged pickle fails in many ways
        return damaged
    unsafe = [name for name in dict.fromkeys(classes) if not SAFE_CLASS.fullmatch(name)]
    if any(name.startswith("torch.nn.") for name in unsafe):
        return (
            f"contains a whole network ({unsafe[0]}), and loading it could run code; {SAVE_STATE}"
        )
    if unsafe and all(name.startswith("numpy.") for name in unsafe):
        return f"contains NumPy values ({_shown(unsafe)}), not only tensors; {SAVE_STATE}"
    if unsafe:
        return (
            f"contains Python objects ({_shown(unsafe)}), and loading them could run code; "
            f"{SAVE_STATE}"
        )
    if not is_zip(head) and head != LEGACY_MAGIC:
        return f"is a pickle that torch.save did not write; {SAVE_STATE}"
    if protocol > 2:
        return f"is saved with pickle protocol {protocol}; save it with protocol 2, the default"
    return damaged


def _pickled_classes(path: Path, head: bytes) -> tuple[int, list[str]]:
    """Protocol of the pickle in a checkpoint, and the names of all its classes and functions."""
    if is_zip(head):
        with zipfile.ZipFile(path) as archive:
            (name,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
            with archive.open(name) as file:
                return _scan(file)
    protocol, classes = 0, []
    with path.open("rb") as file:
        for _ in range(LEGACY_PICKLES if head == LEGACY_MAGIC else 1):
            protocol, names = _scan(file)
            classes += names
    return protocol, classes


def _scan(file: IO[bytes]) -> tuple[int, list[str]]:
    protocol, names = 0, list[str]()
    for name, argument in _operations(file):
        if name == "PROTO":
            protocol = int(argument)
        else:
            names.append(str(argument))
    return protocol, names


def _operations(file: IO[bytes]) -> Iterator[tuple[str, Any]]:
    """The protocol and the globals of a pickle, without running it."""
    pushed, memo = ["", ""], list[str]()
    argument: Any
    for operation, argument, _ in pickletools.genops(file):
        if operation.name == "PROTO":
            yield "PROTO", argument
        elif operation.name in ("GLOBAL", "INST"):
            yield "GLOBAL", str(argument).replace(" ", ".", 1)
        elif operation.name == "STACK_GLOBAL":
            yield "GLOBAL", ".".join(pushed[-2:])
        elif operation.name == "MEMOIZE":
            memo.append(pushed[-1])
        elif operation.name in ("BINGET", "LONG_BINGET") and argument < len(memo):
            pushed.append(memo[argument])
        elif "UNICODE" in operation.name:
            pushed.append(str(argument))


def _why_no_state(content: object) -> str:
    """Why the content is not real tensors by name. Empty if it is."""
    if not isinstance(content, Mapping):
        kind = type(content).__name__
        return f"contains a value of type {kind}, not tensors by name; {SAVE_STATE}"
    if not content:
        return f"contains no tensors; {SAVE_STATE}"
    for name, value in content.items():
        if isinstance(value, Mapping) and any(isinstance(each, Tensor) for each in value.values()):
            return (
                f"keeps its tensors in an entry {name!r}; "
                f"save that entry alone: torch.save(checkpoint[{name!r}], PATH)"
            )
    others = [
        repr(name)
        for name, value in content.items()
        if not isinstance(name, str) or not isinstance(value, Tensor)
    ]
    if others:
        return f"contains entries that are not tensors by name ({_shown(others)}); {SAVE_STATE}"
    special = [name for name, tensor in content.items() if not _is_plain(tensor)]
    if special:
        return (
            f"contains tensors that are sparse, complex, quantised or without values "
            f"({_shown(special)}); save dense real tensors"
        )
    return ""


def _is_plain(tensor: Tensor) -> bool:
    return (
        tensor.layout == torch.strided
        and not tensor.is_complex()
        and not tensor.is_quantized
        and not tensor.is_meta
    )


def _shown(names: list[str]) -> str:
    return ", ".join(names[:MAX_NAMES_SHOWN]) + (", ..." if len(names) > MAX_NAMES_SHOWN else "")
