"""Files that are not checkpoints get one sentence that says what they are and what to do."""

from __future__ import annotations

import gzip
import io
import struct
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest

from model_repo.checkpoints.file_kinds import why_no_checkpoint

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21461\nsize 46830571\n"
DVC = b"outs:\n- md5: a304afb96060aad90176268345e10355\n  size: 46830571\n  path: net.pth\n"


def zipped(*names: str) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name in names:
            archive.writestr(name, b"content")
    return file.getvalue()


def tarred(name: str) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        archive.addfile(tarfile.TarInfo(name))
    return file.getvalue()


def numpy_file(*, archive: bool) -> bytes:
    file = io.BytesIO()
    np.savez(file, weight=np.zeros(3)) if archive else np.save(file, np.zeros(3))
    return file.getvalue()


def safetensors(header: bytes, content: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header + content


TENSOR = b'{"a":{"dtype":"F32","shape":[3],"data_offsets":[0,12]}}'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (LFS, "is a Git LFS pointer, not the checkpoint itself; run `git lfs pull` in its"),
        (b"\xef\xbb\xbf" + LFS.replace(b"\n", b"\r\n"), "is a Git LFS pointer, not the checkpoint"),
        (b"/annex/objects/SHA256E-s4--1.pth\n", "is a git-annex pointer, .*; run `git annex get`"),
        (DVC, "is a DVC pointer, not the checkpoint itself; run `dvc pull` in its"),
        (
            b"\n <!DOCTYPE html>\n<html></html>",
            "is an HTML page, not a checkpoint; its address may",
        ),
        (b"<HTML><BODY>", "is an HTML page, not a checkpoint; its address may need a login"),
        (b"<?xml version='1.0'?><Error/>", "is an XML document, not a checkpoint; its address"),
        (b'{"error": "not found"}', "is JSON text, not a checkpoint; its address may need a login"),
        (b"hello\n", "is text, not a checkpoint; choose the file that torch.save or safetensors"),
        ("h\u00e4llo\r\n".encode("utf-16"), "is text, not a checkpoint; choose the file"),
        ("\u00e4".encode() * 5000, "is text, not a checkpoint; choose the file"),
        (b"", "is empty; download it again"),
        (bytes(10_000), "starts with zero bytes, so its content was never written; download it"),
        (
            gzip.compress(b"content", mtime=0),
            "is a gzip archive, not a checkpoint; unpack it first",
        ),
        (tarred("net.pth"), "is a tar archive, not a checkpoint; unpack it first"),
        (zipped("net.pth"), "is a zip archive that contains net.pth, not a checkpoint; unpack it"),
        (zipped("notes.txt"), "is a zip archive without parameters, not a checkpoint; choose"),
        (zipped("net/data.pkl", "net/constants.pkl"), "is a TorchScript program, which is"),
        (zipped("net/archive_format", "net/models/m.json"), "is a program of torch.export; save"),
        (zipped("config.json", "model.weights.h5"), "is a Keras model, not a checkpoint"),
        (zipped("net/data.pkl", "net/data/0")[:-1], "is incomplete: it ends after .* bytes; down"),
        (zipped("net/data.pkl")[:40], "is incomplete: it ends after 40 bytes; download it again"),
        (numpy_file(archive=False), "is a NumPy array, not a checkpoint; only parameters of PyTo"),
        (numpy_file(archive=True), "is a NumPy archive, not a checkpoint; only parameters"),
        (
            b"\x89HDF\r\n\x1a\n",
            "is an HDF5 file, as Keras writes, not a checkpoint; only parameters",
        ),
        (b"\x08\x08\x12\x07pytorch", "is an ONNX graph, not a checkpoint; name it as the arch"),
        (b"\xff\xd8\xff\xe0", "is a JPEG image, not a checkpoint; choose the file"),
        (
            safetensors(TENSOR, bytes(11)),
            "is incomplete: it ends after 74 bytes; download it again",
        ),
        (safetensors(TENSOR)[:30], "is incomplete: it ends after 30 bytes; download it again"),
    ],
    ids=lambda value: value if isinstance(value, str) else "file",  # the same in every process
)
def test_a_file_that_cannot_be_a_checkpoint_is_recognised(
    tmp_path: Path, content: bytes, message: str
) -> None:
    (tmp_path / "net.pth").write_bytes(content)
    reason = why_no_checkpoint(tmp_path / "net.pth")
    assert reason.startswith(message.partition(".*")[0])
    assert message.rpartition(".*")[2] in reason
    assert "\n" not in reason


@pytest.mark.parametrize(
    "content",
    [
        zipped("net/data.pkl", "net/data/0"),
        safetensors(TENSOR, bytes(12)),
        safetensors(b'{"__metadata__":{"format":"pt"}}'),
        b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.",
        b"\xff" * 100,
    ],
)
def test_a_possible_checkpoint_is_left_to_its_reader(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "net.pth").write_bytes(content)
    assert why_no_checkpoint(tmp_path / "net.pth") == ""
