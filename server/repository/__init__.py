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

import fcntl
import hashlib
import math
import os
import re
import shutil
import stat
import tempfile
import zipfile
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import msgspec
import numpy as np
from msgspec import Meta, Struct
from numpy.typing import NDArray

from server.engines import Compiled, Pixels, Target
from server.images.decode import InputSpec

FORMAT = 1  # of manifest.json; a reader refuses others
MANIFEST = "manifest.json"
ONNX = "model.onnx"
GOLDEN = "golden.npz"
LABELS = "labels.txt"

MODEL_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]{0,63}")
VERSION_NAME = re.compile(r"[1-9][0-9]{0,17}")  # below 2**63, so that it fits every wire format
FILE_NAME = r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}\Z"  # a plain name: no folder, nothing hidden
SHA256 = r"^[0-9a-f]{64}\Z"

# What a reader takes. Real ones have a few kilobytes, a megabyte and a few megabytes.
MANIFEST_LIMIT_BYTES = 1 << 20
LABELS_LIMIT_BYTES = 16 << 20
GOLDEN_LIMIT_BYTES = 256 << 20  # once unpacked
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


class Version(NamedTuple):
    """A folder that claims to be a version of a model, and whether it is one."""

    model: str
    version: int
    folder: Path
    manifest: Manifest | None
    reason: str  # why it can't be used, where there is no manifest; else empty
    stamp: tuple[int, int] = (0, 0)  # entries, and when one last changed: a failure is not for ever


class IgnoredEntry(NamedTuple):
    """Something in the repository that is no version of a model."""

    path: Path
    reason: str


class Golden(NamedTuple):
    """Inputs with the answers of eager float32 PyTorch."""

    pixels: Pixels  # [G, H, W, C]
    probabilities: NDArray[np.float32]  # [G, classes]


# --- reading ---------------------------------------------------------------------------------


def scan(root: Path) -> list[Version]:
    """Every version under `root`, by model name, the newest first; the unsound with their reason.

    Looks at manifests, file kinds and sizes only; `verify` reads the contents. What is hidden is
    passed over: writers have not finished it. What has no version's place is left to `strays`.
    Raises OSError when `root` can't be read.
    """
    found = []
    for home in _entries(root):
        if _not_a_model(home):
            continue
        with suppress(OSError):  # told by `strays`
            paths = [path for path in _entries(home) if VERSION_NAME.fullmatch(path.name)]
            found += [_version(path) for path in sorted(paths, key=lambda path: -int(path.name))]
    return found


def strays(root: Path) -> list[IgnoredEntry]:
    """What `scan` passes over, and why; hidden entries and plain files beside folders are no news.

    Raises OSError when `root` can't be read.
    """
    found = []
    for home in _entries(root):
        if reason := _not_a_model(home):
            if _is_folder(home) or home.is_symlink():
                found.append(IgnoredEntry(home, reason))
            continue
        try:
            paths = _entries(home)
        except OSError as error:
            found.append(IgnoredEntry(home, f"it can't be read: {error.strerror}"))
            continue
        for path in paths:
            if not VERSION_NAME.fullmatch(path.name) and (_is_folder(path) or path.is_symlink()):
                reason = "a version is named by a whole number from 1, of 18 digits at most"
                found.append(IgnoredEntry(path, reason))
    return found


def read(folder: Path) -> Manifest:
    """The manifest of a version whose files are all there with their sizes. Raises Unsound."""
    path = folder / MANIFEST
    try:
        if not stat.S_ISREG(path.lstat().st_mode):
            raise InvalidVersion(f"{MANIFEST} is not a regular file")
        with path.open("rb") as file:
            text = file.read(MANIFEST_LIMIT_BYTES + 1)
    except FileNotFoundError:
        raise InvalidVersion(f"{MANIFEST} is missing") from None
    except OSError as error:
        raise InvalidVersion(f"{MANIFEST} can't be read: {error.strerror}") from None
    if len(text) > MANIFEST_LIMIT_BYTES:
        raise InvalidVersion(f"{MANIFEST} is larger than {MANIFEST_LIMIT_BYTES} bytes")
    manifest = _decode(text)
    if (manifest.model, str(manifest.version)) != (folder.parent.name, folder.name):
        raise InvalidVersion(
            f"{MANIFEST} is of {manifest.model} version {manifest.version}, "
            f"but lies in the folder {_printable(folder.parent.name)}/{_printable(folder.name)}"
        )
    for record in manifest.files():
        _check_size(folder / record.name, record)
    return manifest


def verify(folder: Path, manifest: Manifest, engine: EngineRecord | None = None) -> None:
    """Compares the contents of a version's files with the manifest. Raises Unsound.

    With `engine`, of the engines' files only that one's.
    """
    unread = {
        file.name
        for other in manifest.engines
        if engine and other != engine
        for file in other.files
    }
    for record in manifest.files():
        if record.name not in unread:
            verify_file(folder, record)


def verify_file(folder: Path, record: FileRecord) -> None:
    """Compares the contents of one file with its record. Raises Unsound."""
    path = folder / record.name
    _check_size(path, record)
    if _sha256(path) != record.sha256:
        raise InvalidVersion(f"{record.name} is not what was published: its sha256 differs")


def read_labels(folder: Path, manifest: Manifest) -> tuple[str, ...]:
    """The class names by index. Raises Unsound."""
    name = manifest.labels.name
    if manifest.labels.bytes > LABELS_LIMIT_BYTES:
        raise InvalidVersion(f"{name} is larger than {LABELS_LIMIT_BYTES} bytes")
    try:
        text = (folder / name).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidVersion(f"{name} can't be read: {error}") from None
    labels = tuple(text.removesuffix("\n").split("\n"))  # splitlines would also split at U+2028
    if len(labels) != manifest.classes:
        raise InvalidVersion(f"{name} has {len(labels)} names for {manifest.classes} classes")
    return labels


def read_golden(folder: Path, manifest: Manifest) -> Golden:
    """The golden inputs and answers. Raises Unsound."""
    name = manifest.golden.name
    row = (manifest.input.height, manifest.input.width, manifest.input.channels)
    try:
        with zipfile.ZipFile(folder / name) as archive:
            pixels = _read_array(archive, "pixels", np.dtype(np.uint8), row)
            answer = (manifest.classes,)
            probabilities = _read_array(archive, "probabilities", np.dtype(np.float32), answer)
    except InvalidVersion as error:
        raise InvalidVersion(f"{name}: {error}") from None
    except Exception as error:  # zipfile, zlib and numpy raise a dozen kinds for a damaged file
        raise InvalidVersion(f"{name} can't be read: {type(error).__name__}: {error}") from error
    if len(pixels) != len(probabilities):
        raise InvalidVersion(f"{name} has {len(pixels)} inputs and {len(probabilities)} answers")
    sums = probabilities.sum(axis=1, dtype=np.float64)
    if not (probabilities.min() >= 0 and np.abs(sums - 1).max() <= 1e-3):  # NaN is neither
        raise InvalidVersion(f"{name} has answers that are no probabilities")
    return Golden(pixels, probabilities)


def _read_array(
    archive: zipfile.ZipFile, name: str, kind: np.dtype[Any], row: tuple[int, ...]
) -> NDArray[Any]:
    """[G, *row] of a .npz, G at least 1; told by its header before anything large is unpacked."""
    with archive.open(f"{name}.npy") as member:
        version = np.lib.format.read_magic(member)
        if version != (1, 0):
            raise InvalidVersion(f"{name} are in .npy version {version}; 1.0 is needed")
        shape, by_column, dtype = np.lib.format.read_array_header_1_0(member)
        count = shape[0] if shape else 0
        if dtype != kind or by_column or count < 1 or shape[1:] != row:
            raise InvalidVersion(
                f"{name} are {dtype} {list(shape)}; {kind} {['G', *row]} is needed"
            )
        size = math.prod(shape) * kind.itemsize
        if size > GOLDEN_LIMIT_BYTES:
            raise InvalidVersion(f"{name} take {size} bytes; at most {GOLDEN_LIMIT_BYTES} are read")
        content = member.read(size)
        if len(content) != size:
            raise InvalidVersion(f"{name} end after {len(content)} of {size} bytes")
        if member.read(1):  # the end is also where the checksum is compared
            raise InvalidVersion(f"{name} go on after their {size} bytes")
    return np.frombuffer(content, kind).reshape(shape)


def _decode(text: bytes) -> Manifest:
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


def _version(path: Path) -> Version:
    manifest, reason = None, ""
    try:
        if path.is_symlink() or not _is_folder(path):
            raise InvalidVersion(f"it is {'a symbolic link' if path.is_symlink() else 'no folder'}")
        manifest = read(path)
    except InvalidVersion as error:
        reason = str(error)
    return Version(path.parent.name, int(path.name), path, manifest, reason, _stamp(path))


def _stamp(folder: Path) -> tuple[int, int]:
    """How many entries a folder has, and when it or one of them last changed, in nanoseconds."""
    try:
        changed = [entry.stat(follow_symlinks=False).st_mtime_ns for entry in os.scandir(folder)]
        return len(changed), max([folder.lstat().st_mtime_ns, *changed])
    except OSError:
        return 0, 0


def _not_a_model(home: Path) -> str:
    """Why an entry of the root is no model's folder; empty when it is one."""
    if home.is_symlink():
        return "it is a symbolic link"
    if not _is_folder(home):
        return "it is no folder"
    if not MODEL_NAME.fullmatch(home.name):
        return f"a model's name must match {MODEL_NAME.pattern}"
    return ""


def _check_size(path: Path, record: FileRecord) -> None:
    try:
        status = path.lstat()
    except FileNotFoundError:
        raise InvalidVersion(f"{record.name} is missing") from None
    except OSError as error:
        raise InvalidVersion(f"{record.name} can't be read: {error.strerror}") from None
    if not stat.S_ISREG(status.st_mode):
        raise InvalidVersion(f"{record.name} is not a regular file")
    if status.st_size != record.bytes:
        raise InvalidVersion(
            f"{record.name} has {status.st_size} bytes; {record.bytes} were published"
        )


def _entries(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def _is_folder(path: Path) -> bool:
    try:
        return stat.S_ISDIR(path.lstat().st_mode)
    except OSError:
        return False


def _printable(name: str) -> str:
    """A file name as text that can be encoded, whatever its bytes are."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InvalidVersion(f"{path.name} can't be read: {error.strerror}") from None


# --- writing ---------------------------------------------------------------------------------


@contextmanager
def staging(root: Path, model: str) -> Iterator[Path]:
    """An empty hidden folder beside the versions of `model`, for `publish`; gone at the end.

    Also clears away what writers that died have left there. Raises ValueError for a name no model
    may have.
    """
    if not MODEL_NAME.fullmatch(model):
        raise ValueError(f"model name {model!r} must match {MODEL_NAME.pattern}")
    home = root / model
    for made in (root, home):
        if not made.is_dir():
            made.mkdir(parents=True, exist_ok=True)
            made.chmod(0o755)  # whatever the writer's mask: the server may be another user
    with ExitStack() as held:
        with locked(home):
            for left in home.glob(".staging-*"):
                with suppress(OSError), locked(left, wait=False):
                    shutil.rmtree(left)
            folder = Path(tempfile.mkdtemp(prefix=".staging-", dir=home))
            held.callback(shutil.rmtree, folder, ignore_errors=True)
            held.enter_context(locked(folder))  # how the next writer knows that we live
        folder.chmod(0o755)  # mkdtemp's 0700 would keep a server of another user out
        yield folder


def publish(root: Path, staged: Path, manifest: Manifest) -> Manifest:
    """Makes the staged folder the next version of its model and returns its manifest.

    `manifest.version` is replaced by the number it gets. On return the version is on disk for good.
    Raises Unsound when the folder does not hold exactly the files of the manifest.
    """
    home = root / manifest.model
    with locked(home):
        taken = (int(path.name) for path in home.iterdir() if VERSION_NAME.fullmatch(path.name))
        version = max(taken, default=0) + 1
        manifest = msgspec.structs.replace(manifest, format=FORMAT, version=version)
        _write_manifest(staged, manifest)
        for file in manifest.files():
            _check_size(staged / file.name, file)
        unnamed = {path.name for path in staged.iterdir()} - {MANIFEST}
        unnamed -= {file.name for file in manifest.files()}
        if unnamed:
            raise InvalidVersion(f"{sorted(unnamed)[0]} is not named in {MANIFEST}")
        for path in staged.iterdir():
            path.chmod(0o644)
            sync(path)
        sync(staged)
        staged.rename(home / str(version))
        sync(home)
    sync(root)
    with suppress(OSError):  # where `root` is new too; not everybody may read the folder above
        sync(root.resolve().parent)
    return manifest


def add_engine(root: Path, staged: Path, manifest: Manifest, engine: EngineRecord) -> Manifest:
    """Adds an engine, whose files lie in the staged folder, to a published version.

    `manifest` says which version. The files come first and the new manifest takes the old one's
    place at once, so a reader sees the version with the engine or without. Returns the new
    manifest. Raises Unsound where the version is not what it was, or has such an engine.
    """
    home = root / manifest.model
    folder = home / str(manifest.version)
    with locked(home):
        manifest = read(folder)  # another writer may have added one meanwhile
        if engine.name in {other.name for other in manifest.engines}:
            raise InvalidVersion(
                f"{manifest.model} version {manifest.version} has {engine.name} already"
            )
        manifest = msgspec.structs.replace(manifest, engines=(*manifest.engines, engine))
        written = _write_manifest(staged, manifest)
        for file in engine.files:
            path = staged / file.name
            _check_size(path, file)
            path.chmod(0o644)
            sync(path)
            path.rename(folder / file.name)  # over what a writer that died may have left
        sync(folder)
        written.chmod(0o644)
        sync(written)
        written.rename(folder / MANIFEST)
        sync(folder)
    return manifest


def _write_manifest(folder: Path, manifest: Manifest) -> Path:
    """Writes the manifest there, unless it is one that can't be read back: then raises Unsound."""
    text = msgspec.json.format(msgspec.json.encode(manifest), indent=2)
    _decode(text)
    path = folder / MANIFEST
    path.write_bytes(text + b"\n")
    return path


def record(path: Path) -> FileRecord:
    """The record of a file as it is now."""
    return FileRecord(name=path.name, bytes=path.stat().st_size, sha256=_sha256(path))


def engine_record(
    folder: Path, backend: str, compiled: Compiled, target: Target, deviation: dict[str, float]
) -> EngineRecord:
    """The record of an engine that has just been compiled into `folder`."""
    return EngineRecord(
        name=compiled.name,
        backend=backend,
        backend_version=compiled.version,
        precision=target.precision,
        hardware=compiled.hardware,
        max_batch=target.max_batch,
        opt_batch=target.opt_batch,
        min_batch=target.min_batch,
        files=tuple(record(folder / file) for file in compiled.files),
        deviation=deviation,
    )


def write_golden(path: Path, golden: Golden) -> None:
    """Writes what `read_golden` reads."""
    np.savez_compressed(path, pixels=golden.pixels, probabilities=golden.probabilities)


@contextmanager
def locked(folder: Path, *, wait: bool = True) -> Iterator[None]:
    """No other writer is in the folder meanwhile. Raises OSError, also where one is and we do not
    wait."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield
    finally:
        os.close(descriptor)


def sync(path: Path) -> None:
    """Has the file, or the folder's names, on disk for good."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
