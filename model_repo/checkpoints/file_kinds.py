"""Recognises files that are not checkpoints, from their first bytes and the names in an archive.

People get such files from a repository without its large files, from a download that needs a login,
or from another framework.
"""

from __future__ import annotations

import codecs
import re
import zipfile
from collections.abc import Collection
from pathlib import Path

import msgspec
from msgspec import Struct

HEAD_BYTES = 4096
BLANKS = b" \t\r\n\xef\xbb\xbf"  # with the bytes of a byte-order mark
SAFETENSORS_LENGTH_BYTES = 8  # a safetensors file starts with the length of its header, then JSON

# Files that stand for another one: start of the content, name, what to do.
POINTERS = (
    (rb"version https?://(git-lfs\.github\.com|hawser\.github\.com)/", "Git LFS", "git lfs pull"),
    (rb"/annex/objects/|(\.\./)*\.git/annex/objects/", "git-annex", "git annex get"),
    (rb"(?s)(md5: |wdir: |frozen: |deps:|outs:).*\bmd5: ", "DVC", "dvc pull"),
    (rb"# xet version ", "Git Xet", "git lfs pull"),
)
# Start of the content -> what the file is and, after a semicolon, what to do.
PACKED = "unpack it first"
OTHER_FRAMEWORK = "only parameters of PyTorch networks are loaded"
NAME_IT = 'name it as the architecture of a card: architecture = "FILE.onnx"'
DOWNLOAD_AGAIN = "download it again"
DOWNLOAD_ITSELF = "its address may need a login or another path, so download the file itself"
CHOOSE_OTHER = "choose the file that torch.save or safetensors wrote"
FORMATS = (
    (rb"(?i)<!doctype html|<!--|<html|<head|<body|<script", f"an HTML page; {DOWNLOAD_ITSELF}"),
    (rb"<\?xml|<[A-Za-z]", f"an XML document; {DOWNLOAD_ITSELF}"),
    (rb"\x1f\x8b", f"a gzip archive; {PACKED}"),
    (rb"BZh[1-9]", f"a bzip2 archive; {PACKED}"),
    (rb"\xfd7zXZ\x00", f"an xz archive; {PACKED}"),
    (rb"\x28\xb5\x2f\xfd", f"a Zstandard archive; {PACKED}"),
    (rb"\x04\x22\x4d\x18", f"an LZ4 archive; {PACKED}"),
    (rb"7z\xbc\xaf\x27\x1c", f"a 7z archive; {PACKED}"),
    (rb"Rar!\x1a\x07", f"a RAR archive; {PACKED}"),
    (rb"(?s).{257}ustar", f"a tar archive; {PACKED}"),
    (rb"\x89HDF\r\n\x1a\n", f"an HDF5 file, as Keras writes; {OTHER_FRAMEWORK}"),
    (rb"(?s).{4}TFL3", f"a TensorFlow Lite model; {OTHER_FRAMEWORK}"),
    (rb"(?s)\x08[\x01-\x20](\x12.\w|[\x3a\x42])", f"an ONNX graph; {NAME_IT}"),
    (rb"GGUF", f"a GGUF file; {OTHER_FRAMEWORK}"),
    (rb"\x93NUMPY", f"a NumPy array; {OTHER_FRAMEWORK}"),
    (rb"MATLAB 5\.0 MAT-file", f"a MATLAB file; {OTHER_FRAMEWORK}"),
    (rb"\x7fELF", f"a compiled program or library; {OTHER_FRAMEWORK}"),
    (rb"\x89PNG\r\n\x1a\n", f"a PNG image; {CHOOSE_OTHER}"),
    (rb"\xff\xd8\xff", f"a JPEG image; {CHOOSE_OTHER}"),
    (rb"%PDF-", f"a PDF document; {CHOOSE_OTHER}"),
)
SAVE_STATE = "save the parameters with torch.save(network.state_dict(), PATH)"


def why_no_checkpoint(path: Path) -> str:
    """Why a file cannot be a checkpoint, and what to do. Empty if it may be one.

    The text continues a sentence: "net.pth " + "is a Git LFS pointer, ...".
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(HEAD_BYTES)
    if not size:
        return f"is empty; {DOWNLOAD_AGAIN}"
    if not head.strip(b"\0"):
        return f"starts with zero bytes, so its content was never written; {DOWNLOAD_AGAIN}"
    if is_zip(head):
        return _why_no_zip_checkpoint(path, size)
    if is_safetensors(head):
        return _incomplete(size) if _safetensors_bytes(path) > size else ""
    return _pointer(head) or _format(head) or _text(head)


def is_zip(head: bytes) -> bool:
    """Whether a file with this start is a zip archive, as torch.save writes since PyTorch 1.6."""
    return head.startswith(b"PK\x03\x04")


def is_safetensors(head: bytes) -> bool:
    length, brace = head[:SAFETENSORS_LENGTH_BYTES], head[SAFETENSORS_LENGTH_BYTES:][:1]
    return brace == b"{" and int.from_bytes(length, "little") < 1 << 32


def _safetensors_bytes(path: Path) -> int:
    """Size of a complete file, from its header. 0 if the header is damaged."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(SAFETENSORS_LENGTH_BYTES), "little")
        header = file.read(length)
    if len(header) < length:
        return SAFETENSORS_LENGTH_BYTES + length
    try:
        tensors = msgspec.json.decode(header, type=dict[str, _TensorRecord])
    except (ValueError, RecursionError):  # not JSON of that form, or not UTF-8
        return 0
    ends = [record.data_offsets[1] for record in tensors.values()]
    return SAFETENSORS_LENGTH_BYTES + length + max(ends, default=0)


class _TensorRecord(Struct):
    """An entry of a safetensors header."""

    data_offsets: tuple[int, int] = (0, 0)  # the entry __metadata__ has none


def _incomplete(size: int) -> str:
    return f"is incomplete: it ends after {size:,} bytes; {DOWNLOAD_AGAIN}"


def _why_no_zip_checkpoint(path: Path, size: int) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except zipfile.BadZipFile:  # the list of contents is at the end of the file
        return _incomplete(size)
    except Exception:  # zipfile raises many types for a damaged list of contents
        return f"is a damaged zip archive; {DOWNLOAD_AGAIN}"
    return _zip_content(names)


def _zip_content(names: Collection[str]) -> str:
    folders = {name.partition("/")[2] for name in names}
    if "constants.pkl" in folders:
        return (
            f"is a TorchScript program, which is code; load it with torch.jit.load and {SAVE_STATE}"
        )
    if "data.pkl" in folders:
        return ""
    if any(name.endswith("archive_format") for name in names):
        return f"is a program of torch.export; {SAVE_STATE}"
    if any(name.endswith(".npy") for name in names):
        return f"is a NumPy archive, not a checkpoint; {OTHER_FRAMEWORK}"
    if any(name.endswith(".weights.h5") for name in names):
        return f"is a Keras model, not a checkpoint; {OTHER_FRAMEWORK}"
    packed = [name for name in names if name.endswith((".pth", ".pt", ".safetensors", ".bin"))]
    if packed:
        return f"is a zip archive that contains {packed[0]}, not a checkpoint; {PACKED}"
    return f"is a zip archive without parameters, not a checkpoint; {CHOOSE_OTHER}"


def _pointer(head: bytes) -> str:
    content = head.lstrip(BLANKS)
    for start, name, command in POINTERS:
        if re.match(start, content):
            return (
                f"is a {name} pointer, not the checkpoint itself; run `{command}` in its repository"
            )
    return ""


def _format(head: bytes) -> str:
    for content in (head, head.lstrip(BLANKS)):
        for start, name in FORMATS:
            if re.match(start, content):
                what, _, advice = name.partition("; ")
                return f"is {what}, not a checkpoint; {advice}"
    return ""


def _text(head: bytes) -> str:
    """Pickles of protocol 0 are text too, but they are refused for another reason."""
    encoding = "utf-16" if head.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig"
    try:  # the decoder accepts that the head may end within a character
        content = codecs.getincrementaldecoder(encoding)().decode(head)
    except UnicodeDecodeError:
        return ""
    if not all(character.isprintable() or character.isspace() for character in content):
        return ""
    if content.lstrip().startswith(("{", "[")):
        return f"is JSON text, not a checkpoint; {DOWNLOAD_ITSELF}"
    return f"is text, not a checkpoint; {CHOOSE_OTHER}"
