"""Promises of the model repository: all of a version or nothing, a reason for what is not sound."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from server.repository.contents import list_ignored, list_versions
from server.repository.manifest import (
    MANIFEST_FORMAT,
    EngineRecord,
    InputRecord,
    InvalidVersion,
    Manifest,
    WeightsRecord,
)
from server.repository.reader import Golden, open_version, read_golden, read_manifest, verify_files
from server.repository.writer import file_record, publish, staging, write_golden

ROOT = Path(__file__).resolve().parent.parent.parent
ENGINE = b"engine" * 1000
Mutate = Callable[[dict[str, Any]], None]


def put(root: Path, model: str = "tiny", engine: bytes = ENGINE) -> Manifest:
    """Publishes a small version, as a build would."""
    with staging(root, model) as staged:
        return publish(root, staged, fill(staged, model, engine))


def fill(staged: Path, model: str = "tiny", engine: bytes = ENGINE) -> Manifest:
    """Writes a small version's files and returns its manifest, its version yet to be given."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (2, 4, 5, 3), np.uint8)
    probabilities = rng.dirichlet(np.ones(3), 2).astype(np.float32)
    (staged / "model.onnx").write_bytes(b"onnx")
    (staged / "labels.txt").write_text("cat\ndog\nsea cow\n")
    (staged / "engine.bin").write_bytes(engine)
    write_golden(staged / "golden.npz", Golden(pixels, probabilities))
    return Manifest(
        format=MANIFEST_FORMAT,
        model=model,
        version=1,
        created="2026-01-02T03:04:05Z",
        architecture="lenet5",
        parameters=61_706,
        weights=WeightsRecord(source="random:0", sha256="0" * 64, trained=False),
        card_sha256="1" * 64,
        input=InputRecord(height=4, width=5, channels=3, resize=0, interpolation="bilinear"),
        classes=3,
        top_k=3,
        objective_ms=5.0,
        onnx=file_record(staged / "model.onnx"),
        golden=file_record(staged / "golden.npz"),
        labels=file_record(staged / "labels.txt"),
        engines=(
            EngineRecord(
                name="null-fp32",
                backend="null",
                backend_version="1",
                precision="fp32",
                hardware="x86_64",
                max_batch=4,
                files=(file_record(staged / "engine.bin"),),
                deviation={"1": 0.0, "4": 1e-4},
            ),
        ),
    )


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with one sound version of `tiny` and one of `other`."""
    root = tmp_path_factory.mktemp("published")
    put(root, "other")
    put(root, "tiny")
    return root


@pytest.fixture
def root(published: Path, tmp_path: Path) -> Path:
    """A copy of that repository, to be spoilt."""
    return shutil.copytree(published, tmp_path / "repository")


def reason(root: Path, model: str = "tiny", version: int = 1) -> str:
    """Why a version is not sound; and makes sure that `other` still is."""
    found = {(entry.model, entry.version): entry for entry in list_versions(root)}
    assert found["other", 1].manifest is not None
    assert found[model, version].manifest is None
    return found[model, version].reason


def rewrite(root: Path, mutate: Mutate) -> None:
    """Changes the manifest of tiny/1 as a hand with an editor would."""
    path = root / "tiny" / "1" / "manifest.json"
    manifest = json.loads(path.read_text())
    mutate(manifest)
    path.write_text(json.dumps(manifest))


# --- publishing ------------------------------------------------------------------------------


def test_what_was_published_is_read_back_as_it_was(tmp_path: Path) -> None:
    published = put(tmp_path)
    assert published.version == 1
    (found,) = list_versions(tmp_path)
    assert (found.model, found.version, found.reason) == ("tiny", 1, "")
    assert found.folder == tmp_path / "tiny" / "1"
    assert found.manifest == published
    verify_files(found.folder, published)
    assert open_version(found.folder).labels == ("cat", "dog", "sea cow")
    golden = read_golden(found.folder, published)
    rng = np.random.default_rng(0)
    assert np.array_equal(golden.pixels, rng.integers(0, 256, (2, 4, 5, 3), np.uint8))
    assert np.array_equal(golden.probabilities, rng.dirichlet(np.ones(3), 2).astype(np.float32))


def test_versions_count_up_and_the_newest_comes_first(tmp_path: Path) -> None:
    for number in range(1, 12):
        assert put(tmp_path).version == number
    assert [entry.version for entry in list_versions(tmp_path)] == list(range(11, 0, -1))


def test_a_broken_version_keeps_its_number(tmp_path: Path) -> None:
    put(tmp_path)
    (tmp_path / "tiny" / "7").mkdir()
    (tmp_path / "tiny" / "9").write_text("no folder")
    assert put(tmp_path).version == 10


def test_a_published_version_can_be_read_by_everybody_and_holds_nothing_else(
    tmp_path: Path,
) -> None:
    before = os.umask(0o077)
    try:
        put(tmp_path)
    finally:
        os.umask(before)
    folder = tmp_path / "tiny" / "1"
    for each in (folder, folder.parent):
        assert each.stat().st_mode & 0o777 == 0o755
    assert {path.name: path.stat().st_mode & 0o777 for path in folder.iterdir()} == dict.fromkeys(
        ["manifest.json", "model.onnx", "golden.npz", "labels.txt", "engine.bin"], 0o644
    )
    assert [path.name for path in folder.parent.iterdir()] == ["1"]


def test_a_folder_that_is_not_as_its_manifest_says_is_not_published(tmp_path: Path) -> None:
    def extra(staged: Path) -> None:
        (staged / "cache").mkdir()

    def missing(staged: Path) -> None:
        (staged / "engine.bin").unlink()

    def shorter(staged: Path) -> None:
        (staged / "engine.bin").write_bytes(b"")

    def linked(staged: Path) -> None:
        (staged / "engine.bin").rename(tmp_path / "elsewhere")
        (staged / "engine.bin").symlink_to(tmp_path / "elsewhere")

    for spoil, words in (
        (extra, "cache is not listed in manifest.json"),
        (missing, "engine.bin is missing"),
        (shorter, "engine.bin has 0 bytes; 6000 were published"),
        (linked, "engine.bin is not a regular file"),
    ):
        with staging(tmp_path, "tiny") as staged:
            manifest = fill(staged)
            spoil(staged)
            with pytest.raises(InvalidVersion, match=words):
                publish(tmp_path, staged, manifest)
    assert list_versions(tmp_path) == []


def test_a_manifest_that_could_not_be_read_back_is_not_published(tmp_path: Path) -> None:
    with staging(tmp_path, "tiny") as staged:
        manifest = msgspec.structs.replace(fill(staged), objective_ms=float("nan"))
        with pytest.raises(InvalidVersion, match="objective_ms"):
            publish(tmp_path, staged, manifest)
    assert list_versions(tmp_path) == []


def test_a_name_that_no_model_may_have_is_refused(tmp_path: Path) -> None:
    for name in ("", "../tiny", "a/b", "Tiny", ".hidden", "a" * 65, "tiny\n"):
        with pytest.raises(ValueError, match="model name"), staging(tmp_path, name):
            pass
    assert list(tmp_path.iterdir()) == []


def test_when_all_numbers_are_used_up_publishing_says_so(tmp_path: Path) -> None:
    (tmp_path / "tiny" / ("9" * 18)).mkdir(parents=True)
    with staging(tmp_path, "tiny") as staged, pytest.raises(InvalidVersion, match="version"):
        publish(tmp_path, staged, fill(staged))


def test_an_abandoned_build_leaves_nothing(tmp_path: Path) -> None:
    def build() -> None:
        with staging(tmp_path, "tiny") as staged:
            fill(staged)
            raise Crash

    with pytest.raises(Crash):
        build()
    assert list((tmp_path / "tiny").iterdir()) == []


def test_what_a_dead_writer_left_is_cleared_away_and_a_living_one_is_not(tmp_path: Path) -> None:
    with staging(tmp_path, "tiny") as living:
        dead = tmp_path / "tiny" / ".staging-dead"
        dead.mkdir()
        (dead / "engine.bin").write_bytes(ENGINE)
        with staging(tmp_path, "tiny") as second:
            assert living.is_dir()
            assert second.is_dir()
            assert not dead.exists()
        manifest = fill(living)
        publish(tmp_path, living, manifest)
    assert [path.name for path in (tmp_path / "tiny").iterdir()] == ["1"]


# --- crashes ---------------------------------------------------------------------------------


class Crash(BaseException):
    """The machine stops here."""


def steps(monkeypatch: pytest.MonkeyPatch, stop_at: int | None) -> list[str]:
    """Counts the steps that reach the disk, and stops at the one numbered `stop_at`."""
    done: list[str] = []

    def stepwise(name: str, step: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **settings: Any) -> Any:
            if len(done) == stop_at:
                raise Crash
            done.append(name)
            return step(*args, **settings)

        return run

    for name in ("fsync", "rename", "chmod", "mkdir"):
        monkeypatch.setattr(os, name, stepwise(name, getattr(os, name)))
    return done


def test_a_crash_at_any_step_leaves_the_old_state_or_the_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path / "whole")
    with monkeypatch.context() as patch:
        taken = steps(patch, None)
        put(tmp_path / "whole")
    assert "rename" in taken
    assert taken[: taken.index("rename")].count("fsync") == 6, "five files and their folder"
    for stop_at in range(len(taken)):
        root = tmp_path / str(stop_at)
        put(root, engine=b"old")
        with monkeypatch.context() as patch:
            steps(patch, stop_at)
            patch.setattr("shutil.rmtree", lambda *_, **__: None)  # the dead clear nothing away
            with pytest.raises(Crash):
                put(root, engine=b"new")
        entries = list_versions(root)
        assert all(entry.manifest for entry in entries), entries
        for entry in entries:
            assert entry.manifest is not None
            verify_files(entry.folder, entry.manifest)
        assert [entry.version for entry in entries] in ([1], [2, 1])
        assert put(root, engine=b"next").version == len(entries) + 1
        assert not list((root / "tiny").glob(".*")), "what the dead left is gone"


PUBLISH_FOR_EVER = textwrap.dedent("""
    import sys
    from pathlib import Path
    from tests.repository.test_repository import put
    print("ready", flush=True)
    while True:
        put(Path(sys.argv[1]), engine=bytes(200_000))
""")


def test_a_killed_publisher_never_leaves_an_unsound_version(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    for _ in range(3):
        command = [sys.executable, "-c", PUBLISH_FOR_EVER, str(tmp_path)]
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
            before = len(list(tmp_path.glob("tiny/[0-9]*")))
            while len(list(tmp_path.glob("tiny/[0-9]*"))) < before + 2:
                assert process.poll() is None
            for _ in range(rng.integers(0, 5_000)):  # anywhere in the next publication
                pass
            process.send_signal(signal.SIGKILL)
        entries = list_versions(tmp_path)
        assert len(entries) >= before + 2
        for entry in entries:
            assert entry.manifest is not None, entry.reason
            verify_files(entry.folder, entry.manifest)
    newest = put(tmp_path)
    assert newest.version == len(list_versions(tmp_path))
    assert not list((tmp_path / "tiny").glob(".*"))


def test_publishers_at_the_same_time_get_different_versions(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    with context.Pool(4) as pool:
        published = pool.map(put, [tmp_path] * 24, chunksize=1)
    assert sorted(manifest.version for manifest in published) == list(range(1, 25))
    assert all(entry.manifest for entry in list_versions(tmp_path))


def test_a_reader_never_sees_half_a_version(tmp_path: Path) -> None:
    put(tmp_path)
    last = 40
    writer = threading.Thread(target=lambda: [put(tmp_path) for _ in range(last - 1)])
    writer.start()
    seen = set()
    while last not in seen:
        assert writer.is_alive() or len(list((tmp_path / "tiny").iterdir())) == last
        for entry in list_versions(tmp_path):
            assert entry.manifest is not None, entry.reason
            if entry.version not in seen:
                verify_files(entry.folder, entry.manifest)
                read_golden(entry.folder, entry.manifest)
            seen.add(entry.version)
    writer.join()
    assert seen == set(range(1, last + 1))


# --- broken versions -------------------------------------------------------------------------


def test_a_version_without_a_manifest_says_so(root: Path) -> None:
    (root / "tiny" / "1" / "manifest.json").unlink()
    assert reason(root) == "manifest.json is missing"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "not JSON"),
        (b"\x00\xff\xfe", "not JSON"),
        (b"[" * 200_000, "not JSON"),
        (b'{"a":' * 100_000, "not JSON"),
        (b'{"format": NaN}', "not JSON"),
        (b'{"format": 1e999}', "not JSON"),
        (b'{"format": ' + b"9" * 100_000 + b"}", "manifest.json"),
        (b'{"format": "' + b"9" * 100_000 + b'"}', "has format '999"),
        (b"[]", "has format None; this server reads format 1"),
        (b'{"format": 2}', "has format 2; this server reads format 1"),
        (b'{"format": true}', "is malformed"),
        (b'{"format": 1}', "is malformed: Object missing required field"),
        (b" " * (10 << 20), "is larger than 1048576 bytes"),
    ],
    ids=lambda value: repr(value)[:24],
)
def test_a_file_that_is_no_manifest_is_told(root: Path, content: bytes, words: str) -> None:
    (root / "tiny" / "1" / "manifest.json").write_bytes(content)
    assert words in reason(root)
    assert len(reason(root)) < 500


def at(path: str, value: Any) -> Mutate:
    """Sets what stands at a path as "engines.0.name"."""

    def mutate(manifest: dict[str, Any]) -> None:
        *folders, last = path.split(".")
        place: Any = manifest
        for key in folders:
            place = place[int(key) if key.isdigit() else key]
        place[int(last) if last.isdigit() else last] = value

    return mutate


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("model", "other", "is of other version 1, but the folder is tiny/1"),
        ("model", "x" * 100_000, "$.model"),
        ("version", 2, "is of tiny version 2, but the folder is tiny/1"),
        ("version", 0, "$.version"),
        ("version", -1, "$.version"),
        ("version", 1.5, "$.version"),
        ("version", "1", "$.version"),
        ("version", 10**30, "$.version"),
        ("parameters", 0, "$.parameters"),
        ("classes", 0, "$.classes"),
        ("classes", 10**12, "$.classes"),
        ("top_k", 4, "top_k is 4; at most the 3 classes"),
        ("objective_ms", 0, "$.objective_ms"),
        ("objective_ms", None, "$.objective_ms"),
        ("share", 0, "$.share"),
        ("share", 1e9, "$.share"),
        ("weights.trained", "yes", "$.weights.trained"),
        ("weights.sha256", "0" * 63, "$.weights.sha256"),
        ("weights.note", "x" * 5000, "$.weights.note"),
        ("input.height", 0, "$.input.height"),
        ("input.height", 1 << 40, "$.input.height"),
        ("input.channels", 2, "$.input.channels"),
        ("input.interpolation", "psychic", "interpolation must be one of"),
        ("engines", [], "$.engines"),
        ("engines", {}, "$.engines"),
        ("engines.0.files", [], "$.engines[0].files"),
        ("engines.0.max_batch", 0, "$.engines[0].max_batch"),
        ("engines.0.max_batch", 1 << 21, "$.engines[0].max_batch"),
        ("engines.0.deviation", {"1": "none"}, "$.engines[0].deviation"),
        ("engines.0.precision", "{}\n", "$.engines[0].precision"),
        ("engines.0.files.0.name", "../1/engine.bin", "files[0].name"),
        ("engines.0.files.0.name", "/etc/passwd", "files[0].name"),
        ("engines.0.files.0.name", "..", "files[0].name"),
        ("engines.0.files.0.name", ".hidden", "files[0].name"),
        ("engines.0.files.0.name", "", "files[0].name"),
        ("engines.0.files.0.name", "engine.bin\n", "files[0].name"),
        ("engines.0.files.0.name", "engine.bin\u0000", "files[0].name"),
        ("engines.0.files.0.name", "model.onnx", "has the name model.onnx 2 times"),
        ("engines.0.files.0.name", "manifest.json", "has the name manifest.json 2 times"),
        ("engines.0.files.0.name", "engine2.bin", "engine2.bin is missing"),
        ("engines.0.files.0.bytes", -1, "files[0].bytes"),
        ("engines.0.files.0.bytes", 5999, "engine.bin has 6000 bytes; 5999 were published"),
        ("onnx", None, "$.onnx"),
    ],
)
def test_a_manifest_that_makes_no_sense_is_told(
    root: Path, path: str, value: Any, words: str
) -> None:
    rewrite(root, at(path, value))
    assert words in reason(root)
    assert len(reason(root)) < 500


def test_two_engines_of_one_name_are_told(root: Path) -> None:
    def twice(manifest: dict[str, Any]) -> None:
        (engine,) = manifest["engines"]
        other = engine | {"files": [engine["files"][0] | {"name": "other.bin"}]}
        manifest["engines"].append(other)

    rewrite(root, twice)
    assert "has the name null-fp32 2 times" in reason(root)


def test_a_batch_that_would_eat_the_memory_is_told(root: Path) -> None:
    def huge(manifest: dict[str, Any]) -> None:
        manifest["input"] |= {"height": 60_000, "width": 60_000}
        manifest["engines"][0]["max_batch"] = 1

    rewrite(root, huge)
    assert "a batch of 1 rows would take 10800000000 bytes" in reason(root)


def test_fields_of_a_later_build_are_no_trouble(root: Path) -> None:
    rewrite(root, at("mood", "sunny"))
    assert all(entry.manifest for entry in list_versions(root))


def test_a_missing_file_is_told(root: Path) -> None:
    for name in ("model.onnx", "golden.npz", "labels.txt", "engine.bin"):
        (root / "tiny" / "1" / name).rename(root / name)
        assert reason(root) == f"{name} is missing"
        (root / name).rename(root / "tiny" / "1" / name)


def test_a_truncated_file_is_told(root: Path) -> None:
    os.truncate(root / "tiny" / "1" / "engine.bin", 100)
    assert reason(root) == "engine.bin has 100 bytes; 6000 were published"


def test_a_file_that_is_a_link_a_folder_or_a_pipe_is_told(root: Path) -> None:
    for name in ("engine.bin", "manifest.json"):
        path, aside = root / "tiny" / "1" / name, root / "aside"
        path.rename(aside)
        for make in (
            lambda path: path.symlink_to(root / "aside"),
            lambda path: path.mkdir(),
            lambda path: os.mkfifo(path),
        ):
            make(path)
            assert reason(root) == f"{name} is not a regular file"
            path.rmdir() if path.is_dir() else path.unlink()
        aside.rename(path)


def test_a_corrupted_file_of_the_right_size_is_found_by_its_hash(root: Path) -> None:
    for name in ("engine.bin", "model.onnx", "golden.npz", "labels.txt"):
        path = root / "tiny" / "1" / name
        sound = path.read_bytes()
        spoiled = bytearray(sound)
        spoiled[len(spoiled) // 2] ^= 1
        path.write_bytes(spoiled)
        manifest = read_manifest(path.parent)
        with pytest.raises(InvalidVersion, match=f"{name} is not what was published"):
            verify_files(path.parent, manifest)
        path.write_bytes(sound)
    verify_files(root / "tiny" / "1", read_manifest(root / "tiny" / "1"))


def test_of_an_engine_that_is_not_asked_for_the_files_are_not_read(root: Path) -> None:
    with staging(root, "two") as staged:
        manifest = fill(staged, "two")
        (staged / "second.bin").write_bytes(b"second")
        second = msgspec.structs.replace(
            manifest.engines[0], name="second", files=(file_record(staged / "second.bin"),)
        )
        engines = (*manifest.engines, second)
        manifest = publish(root, staged, msgspec.structs.replace(manifest, engines=engines))
    folder = root / "two" / "1"
    (folder / "second.bin").write_bytes(b"sEcond")
    verify_files(folder, manifest, manifest.engines[0])
    for engine in (second, None):
        with pytest.raises(InvalidVersion, match=r"second\.bin"):
            verify_files(folder, manifest, engine)


def test_what_bears_a_version_number_and_is_no_folder_is_told(root: Path) -> None:
    (root / "tiny" / "2").write_text("a file")
    (root / "tiny" / "3").symlink_to(root / "tiny" / "1")
    assert reason(root, version=2) == "it is not a folder"
    assert reason(root, version=3) == "it is a symbolic link"


def test_entries_with_alien_names_are_passed_over_with_their_reason(root: Path) -> None:
    sound = list_versions(root)
    strange = os.fsencode(root) + b"/tiny/\xff\xfe"
    os.mkdir(strange)
    for name in ("0", "01", "-1", "1.0", "v2", "١", "9" * 19, "9" * 200, "latest"):
        (root / "tiny" / name).mkdir()
    (root / "tiny" / "newest").symlink_to(root / "tiny" / "1")
    (root / "tiny" / "notes.txt").write_text("files are no news")
    (root / "README").write_text("files are no news")
    (root / ".git").mkdir()
    (root / "tiny" / ".staging-x").mkdir()
    (root / "Upper Case" / "1").mkdir(parents=True)
    (root / "link").symlink_to(root / "tiny")
    (root / "empty").mkdir()
    assert list_versions(root) == sound
    told = {os.fsencode(stray.path.name): stray.reason for stray in list_ignored(root)}
    named = "a version must be named by a whole number from 1, of at most 18 digits"
    alien = [b"0", b"01", b"-1", b"1.0", b"v2", "١".encode(), b"9" * 19, b"9" * 200, b"latest"]
    assert told == dict.fromkeys([*alien, b"\xff\xfe", b"newest"], named) | {
        b"Upper Case": "the name of a model must match [a-z0-9][a-z0-9_.-]{0,63}",
        b"link": "it is a symbolic link",
    }


@pytest.fixture
def forbidden() -> Iterator[Path]:
    """A repository read by a user who may not read everything in it."""
    with tempfile.TemporaryDirectory() as folder:  # pytest's own folders are closed to others
        root = Path(folder)
        root.chmod(0o755)
        for model in ("closed", "other", "tiny"):
            put(root, model)
        yield root
        (root / "closed").chmod(0o755)


def test_what_may_not_be_read_is_told(forbidden: Path) -> None:
    engine = forbidden / "tiny" / "1"
    (engine / "manifest.json").chmod(0)
    (forbidden / "closed").chmod(0)
    with unprivileged():
        assert reason(forbidden) == "manifest.json can't be read: Permission denied"
        assert [entry.model for entry in list_versions(forbidden)] == ["other", "tiny"]
        (stray,) = list_ignored(forbidden)
        assert stray == (forbidden / "closed", "it can't be read: Permission denied")
    (engine / "manifest.json").chmod(0o644)
    (engine / "engine.bin").chmod(0)
    with unprivileged(), pytest.raises(InvalidVersion, match=r"engine\.bin can't be read"):
        verify_files(engine, read_manifest(engine))


class unprivileged:
    """Nobody's rights, for a while, where the tests are run by root; else our own."""

    def __enter__(self) -> None:
        self._user = os.geteuid()
        if self._user == 0:
            os.seteuid(65534)

    def __exit__(self, *_: object) -> None:
        os.seteuid(self._user)


def test_a_repository_that_is_not_there_is_an_error_and_not_an_empty_one(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        list_versions(tmp_path / "nowhere")
    assert list_versions(tmp_path) == []


# --- contents --------------------------------------------------------------------------------


def test_labels_that_are_not_one_a_class_are_told(tmp_path: Path) -> None:
    manifest = put(tmp_path)
    folder = tmp_path / "tiny" / "1"
    for content, words in (
        (b"cat\ndog\n", "has 2 names for 3 classes"),
        (b"cat\ndog\nsea cow\n\n", "has 4 names for 3 classes"),
        (b"\xff\n\n\n", "can't be read"),
    ):
        (folder / "labels.txt").write_bytes(content)
        with pytest.raises(InvalidVersion, match=words):
            open_version(folder, manifest)
    (folder / "labels.txt").write_text("one\u2028line\ndog\n\n", encoding="utf-8")
    assert open_version(folder, manifest).labels == ("one\u2028line", "dog", "")


def npz(**arrays: Any) -> bytes:
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)
    return file.getvalue()


PIXELS = np.zeros((2, 4, 5, 3), np.uint8)
SURE = np.eye(3, dtype=np.float32)[:2]


def bomb() -> bytes:
    """Kilobytes that say they are gigabytes."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "|u1", "fortran_order": False, "shape": (100_000_000, 4, 5, 3)}
    )
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("pixels.npy", header.getvalue() + bytes(1 << 20))
    return file.getvalue()


def cut() -> bytes:
    """An array shorter than its header says."""
    whole = io.BytesIO()
    np.save(whole, PIXELS)
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("pixels.npy", whole.getvalue()[:-1])
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "can't be read"),
        (b"PK\x05\x06" + bytes(18), "can't be read"),
        (npz(pixels=PIXELS), "can't be read"),
        (npz(pixels=PIXELS, probabilities=SURE)[:-30], "can't be read"),
        (npz(pixels=PIXELS[:0], probabilities=SURE[:0]), "is needed"),
        (npz(pixels=PIXELS.astype(np.float32), probabilities=SURE), "pixels is float32"),
        (npz(pixels=PIXELS[:, :3], probabilities=SURE), r"pixels is uint8 \[2, 3, 5, 3\]"),
        (npz(pixels=np.uint8(1), probabilities=SURE), r"pixels is uint8 \[\]"),
        (npz(pixels=np.array([{}], object), probabilities=SURE), "pixels is object"),
        (npz(pixels=PIXELS, probabilities=SURE[:, :2]), r"probabilities is float32 \[2, 2\]"),
        (npz(pixels=PIXELS, probabilities=SURE[:1]), "has 2 inputs and 1 answers"),
        (npz(pixels=PIXELS, probabilities=SURE * np.nan), "not probabilities"),
        (npz(pixels=PIXELS, probabilities=SURE * 0), "not probabilities"),
        (npz(pixels=PIXELS, probabilities=-SURE), "not probabilities"),
        (bomb(), "pixels has 6000000000 bytes"),
        (cut(), "pixels has 119 of 120 bytes"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_golden_answers_that_lie_are_told(tmp_path: Path, content: bytes, words: str) -> None:
    manifest = put(tmp_path)
    folder = tmp_path / "tiny" / "1"
    (folder / "golden.npz").write_bytes(content)
    with pytest.raises(InvalidVersion, match=words):
        read_golden(folder, manifest)
