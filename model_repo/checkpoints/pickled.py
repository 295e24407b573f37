"""Finds the classes and functions that a checkpoint names, without running its pickles."""

from __future__ import annotations

import pickletools
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from model_repo.checkpoints.file_kinds import is_zip

# torch.save before PyTorch 1.6 writes four pickles: this number, a version, a platform, the data.
LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
LEGACY_PICKLES = 4
# Modules of Python 2, whose names protocol 2 still writes.
RENAMED = {"__builtin__": "builtins", "copy_reg": "copyreg"}


def pickled_names(path: Path) -> tuple[int, list[str]]:
    """Protocol of the pickle in a checkpoint, and the full names of its classes and functions.

    A damaged pickle raises one of many types.
    """
    with path.open("rb") as file:
        head = file.read(len(LEGACY_MAGIC))
    if is_zip(head):
        with zipfile.ZipFile(path) as archive:
            (name,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
            with archive.open(name) as member:
                return _scan(member)
    protocol, names = 0, list[str]()
    with path.open("rb") as file:
        for _ in range(LEGACY_PICKLES if head == LEGACY_MAGIC else 1):
            protocol, found = _scan(file)
            names += found
    return protocol, list(dict.fromkeys(names))


def _scan(file: IO[bytes]) -> tuple[int, list[str]]:
    protocol, names = 0, dict[str, None]()
    for name, argument in _operations(file):
        if name == "PROTO":
            protocol = int(argument)
        else:
            module, _, rest = str(argument).partition(".")
            names[f"{RENAMED.get(module, module)}.{rest}"] = None
    return protocol, list(names)


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
