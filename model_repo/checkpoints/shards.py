"""Checkpoints in several files, as Hugging Face saves large ones.

An index, `model.safetensors.index.json` or `pytorch_model.bin.index.json`, lists the names of all
tensors and the file of each. The files lie beside it.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import msgspec
from msgspec import Struct

MAX_INDEX_BYTES = 64 << 20
PART = re.compile(r"-\d{5}-of-\d{5}\.\w+$")


class _Index(Struct):
    weight_map: dict[str, str]


def is_index(path: Path) -> bool:
    """Whether the file is such an index, by its content."""
    with path.open("rb") as file:
        if not file.read(4096).lstrip(b" \t\r\n\xef\xbb\xbf").startswith(b"{"):
            return False
        if path.stat().st_size > MAX_INDEX_BYTES:
            return False
        file.seek(0)
        return b'"weight_map"' in file.read()


def is_part(path: Path) -> bool:
    """Whether the name is that of one file of several: "model-00001-of-00002.safetensors"."""
    return PART.search(path.name) is not None


def shard_files(path: Path) -> list[Path]:
    """The files that an index lists. Raises ValueError; the text continues a sentence."""
    try:
        index = msgspec.json.decode(path.read_bytes(), type=_Index)
    except (ValueError, RecursionError) as error:  # not JSON of that form, or not UTF-8
        raise ValueError(f"is a damaged index of a checkpoint in several files: {error}") from None
    names = sorted(set(index.weight_map.values()))
    if not names:
        raise ValueError("is the index of a checkpoint in several files, but lists none")
    for name in names:
        if Path(name).name != name or name.startswith("."):
            raise ValueError(f"lists the file {name!r}, which is not beside it")
    if missing := [name for name in names if not (path.parent / name).is_file()]:
        raise ValueError(
            f"is the index of {len(names)} files, but {len(missing)} of them cannot be found "
            f"({missing[0]}); put all files beside it"
        )
    return [path.parent / name for name in names]


def content_sha256(path: Path) -> str:
    """The hash of a checkpoint: of its file, or of its index and the hashes of the parts."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    if is_index(path):
        for part in shard_files(path):
            with part.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
