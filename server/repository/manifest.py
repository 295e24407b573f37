"""The model repository: the folders that building writes and serving reads.

    <root>/<model>/<version>/manifest.json    the passport: what this is and what it was made from
                             model.onnx       the traced network
                             golden.npz       inputs with the answers of eager float32 PyTorch
                             labels.txt       one class name a line
                             <engine files>   one or more for each engine
    <root>/<model>/serving.json               what of it is to be served; see serving_config.py

A version is written into a hidden folder beside its place, synced to disk and renamed: a reader
sees all of it or nothing, whenever the writer stops. Versions are integers and a published one does
not change, but for engines that are added to it (`add_engine`). Whatever is not whole is reported
with its reason, and the rest still serves.

What lies in a version is not trusted: its sizes are checked before anything is read or allocated.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Struct

from server.images.decode import InputSpec

FORMAT = 1  # of manifest.json; a reader refuses others
MANIFEST = "manifest.json"
ONNX = "model.onnx"
GOLDEN = "golden.npz"
LABELS_FILE = "labels.txt"
MODEL_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]{0,63}")
VERSION_NAME = re.compile(r"[1-9][0-9]{0,17}")  # below 2**63, so that it fits every wire format
FILE_NAME = r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}\Z"  # a plain name: no folder, nothing hidden
SHA256 = r"^[0-9a-f]{64}\Z"
# What a reader takes. Real ones have a few kilobytes, a megabyte and a few megabytes.
MANIFEST_LIMIT_BYTES = 1 << 20
BATCH_LIMIT_BYTES = 2 << 30  # pixels of the largest batch
SHARES = (0.01, 100.0)  # of a device that models share, as weights; least and most
Text = Annotated[str, Meta(max_length=4096)]
Word = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.+-]{0,127}\Z")]
FileName = Annotated[str, Meta(pattern=FILE_NAME)]
Sha256 = Annotated[str, Meta(pattern=SHA256)]
Side = Annotated[int, Meta(ge=1, le=1 << 16)]
Count = Annotated[int, Meta(ge=1, le=1 << 20)]


class InvalidVersion(Exception):
    """A version can't be used; the message says why in plain words."""


class FileRecord(Struct, frozen=True, kw_only=True):
    """One file of a version, as it was when published."""

    name: FileName
    bytes: Annotated[int, Meta(ge=0)]
    sha256: Sha256


class WeightsRecord(Struct, frozen=True, kw_only=True):
    """Where the parameters came from."""

    source: Text  # as given to the build: "digits", "https://...", "random:0"
    sha256: Sha256  # of the checkpoint file, or of the parameters where there was none
    trained: bool
    note: Text = ""  # what is known of them, for example their accuracy


class InputRecord(Struct, frozen=True, kw_only=True):
    """The pixels the network takes and how an image becomes them; see server.images.InputSpec."""

    height: Side
    width: Side
    channels: Literal[1, 3]
    resize: Annotated[int, Meta(ge=0, le=1 << 16)]
    interpolation: Word

    @classmethod
    def of(cls, spec: InputSpec) -> InputRecord:
        return msgspec.convert(asdict(spec), cls)

    def spec(self) -> InputSpec:
        """The same as the server's images take it. Raises ValueError."""
        return InputSpec(**msgspec.structs.asdict(self))


class EngineRecord(Struct, frozen=True, kw_only=True):
    """One compiled engine: what made it, what it was made for, how far it is from the truth."""

    name: FileName  # for example "openvino-bf16"
    backend: Word
    backend_version: Text
    precision: Word
    hardware: Text  # the features it needs, as the backend names them
    max_batch: Count
    opt_batch: Annotated[int, Meta(ge=0)] = 0  # rows it is tuned for, where it is for some
    min_batch: Count = 1  # fewer rows are filled up to these
    files: Annotated[tuple[FileRecord, ...], Meta(min_length=1)]
    # By batch size: largest deviation from eager, see golden_check.py. Empty where the engine could
    # not be run on the machine that compiled it; it is checked wherever it is loaded.
    deviation: dict[str, Annotated[float, Meta(ge=0)]]


class Manifest(Struct, frozen=True, kw_only=True):
    """The passport of one version: all that is known of it before anything is loaded."""

    format: int
    model: Annotated[str, Meta(pattern=f"^{MODEL_NAME.pattern}\\Z")]
    version: Annotated[int, Meta(ge=1, lt=10**18)]
    created: Text  # UTC, ISO 8601
    architecture: Word
    parameters: Annotated[int, Meta(ge=1)]  # trainable ones of the served network
    weights: WeightsRecord
    card_sha256: Sha256
    input: InputRecord
    classes: Count
    top_k: Count
    objective_ms: Annotated[
        float, Meta(gt=0)
    ]  # the latency asked for where a caller sets no deadline
    share: Annotated[float, Meta(ge=SHARES[0], le=SHARES[1])] = 1.0  # weight beside other models
    onnx: FileRecord
    golden: FileRecord
    labels: FileRecord
    engines: Annotated[tuple[EngineRecord, ...], Meta(min_length=1)]

    def files(self) -> Iterator[FileRecord]:
        yield from (self.onnx, self.golden, self.labels)
        for engine in self.engines:
            yield from engine.files


def decode_manifest(text: bytes) -> Manifest:
    try:
        declared = msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidVersion(f"{MANIFEST} is not JSON: {error}") from None
    number = declared.get("format") if isinstance(declared, dict) else None
    if number != FORMAT:
        given = f"{number!r:.40}"
        raise InvalidVersion(f"{MANIFEST} has format {given}; this server reads format {FORMAT}")
    try:
        manifest = msgspec.convert(declared, Manifest)
        manifest.input.spec()
    except ValueError as error:  # msgspec's ValidationError is one too
        raise InvalidVersion(f"{MANIFEST} is not a manifest: {error}") from None
    names = Counter([MANIFEST, *(file.name for file in manifest.files())])
    engines = Counter(engine.name for engine in manifest.engines)
    for name, times in (names + engines).items():
        if names[name] > 1 or engines[name] > 1:
            raise InvalidVersion(f"{MANIFEST} names {name} {times} times; names must differ")
    if manifest.top_k > manifest.classes:
        raise InvalidVersion(f"{MANIFEST} has top_k {manifest.top_k} of {manifest.classes} classes")
    row_bytes = manifest.input.height * manifest.input.width * manifest.input.channels
    for engine in manifest.engines:
        if engine.max_batch * row_bytes > BATCH_LIMIT_BYTES:
            raise InvalidVersion(
                f"{MANIFEST}: a batch of {engine.max_batch} rows would take "
                f"{engine.max_batch * row_bytes} bytes; at most {BATCH_LIMIT_BYTES} are allowed"
            )
    return manifest
