"""From a published version to an engine that has proved itself on this machine.

Passport, hashes, engine, golden inputs, warm-up and profile, in that order; blocking, so the caller
gives it a thread. Nothing is left behind when it fails.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple

import msgspec

from server.engines import golden_check as golden
from server.engines.base import (
    CompileOptions,
    Engine,
    Instance,
    Outputs,
    backend,
    infer,
    instances_by_units,
)
from server.engines.record import engine_record
from server.errors import EngineFailure
from server.execution.device import profile_groups
from server.models.memory_budget import check_memory
from server.repository import reader, writer
from server.repository.contents import VersionEntry
from server.repository.manifest import EngineRecord, InvalidVersion, Manifest
from server.scheduling.base import InstanceGroup

log = logging.getLogger(__name__)

# Which of the engines that fit this machine is taken: a GPU's first, nothing that computes nothing
# where something computes; of a backend's, the fastest precision first.
PREFERENCE = ("tensorrt", "inductor cuda", "openvino", "inductor", "null")

# What compiles the graph that a version has, and for how many rows (to tune for, and at most) where
# the version has no engine of its kind to tell.
REBUILT = {"tensorrt": (64, 256), "openvino": (0, 8)}

FASTEST = ("fp16", "bf16", "fp32")

PROFILE_RUNS = 3  # at least, of one size; and for so long:
PROFILE_S = 0.01


class LoadedEngine(NamedTuple):
    """An engine that gave the golden answers on this machine, timed and warm."""

    engine: Engine
    record: EngineRecord
    groups: list[InstanceGroup]
    labels: tuple[str, ...]
    passed_over: str = ""  # the better engines of the version, and why they do not serve


class Profiles:
    """The groups of the engines that were timed here. Used on the loader's thread only.

    What computes the same with other weights takes as long. So a new version of a model is not
    timed beside the calls that the one before answers: it would seem slower than it is, for good.
    """

    def __init__(self) -> None:
        self._known: dict[Hashable, list[InstanceGroup]] = {}

    def groups(
        self, engine: Engine, manifest: Manifest, record: EngineRecord
    ) -> list[InstanceGroup]:
        kinds = tuple((group[0].units, len(group)) for group in instances_by_units(engine))
        work = (
            *(manifest.architecture, manifest.parameters, manifest.classes, manifest.top_k),
            *(engine.instances[0].pixels.shape, kinds),
            *(record.backend, record.backend_version, record.precision, record.hardware),
            *(record.min_batch, record.opt_batch),
        )
        if work not in self._known:
            self._known[work] = profile_groups(engine, _measure)
        return self._known[work]


class _How(NamedTuple):
    """What the loading of every engine of a version has in common."""

    threads: int
    stopping: threading.Event
    checking: Callable[[], None]
    profiles: Profiles


def load(
    version: VersionEntry,
    *,
    only: str,
    threads: int,
    stopping: threading.Event,
    profiles: Profiles | None = None,
    rebuild: bool = False,
    checking: Callable[[], None] = lambda: None,
) -> LoadedEngine:
    """Loads the best engine of a version; `only` names a backend, or is empty for any.

    Where none fits, and `rebuild` says so, one is compiled from the version's graph and added to
    it. `checking` is called each time that an engine is made and about to be checked.
    Raises Unsound with the reason in plain words: of the version, or of each of its engines.
    Gives up soon after `stopping` is set, as far as the backend lets it.
    """
    manifest = version.manifest
    if manifest is None:
        raise InvalidVersion(version.reason)
    how = _How(threads, stopping, checking, profiles or Profiles())
    refusals = []
    for record in sorted(manifest.engines, key=_preference):
        if only and record.backend != only:
            refusals.append(
                f"{record.name}: it is for {record.backend}, and this server is to use {only} only"
            )
            continue
        try:
            loaded = _load(version, manifest, record, how)
            if only or not refusals:
                return loaded
            return loaded._replace(passed_over="; ".join(refusals))
        except (InvalidVersion, golden.GoldenMismatch, EngineFailure) as error:
            refusals.append(_passed_over(version, record.name, error))
    if rebuild:
        for name in REBUILT:
            try:
                return _rebuilt(version, manifest, name, only, how)
            except (InvalidVersion, golden.GoldenMismatch, EngineFailure, OSError) as error:
                refusals.append(_passed_over(version, f"a new one of {name}", error))
    raise InvalidVersion("; ".join(refusals))


def _passed_over(version: VersionEntry, engine: str, error: Exception) -> str:
    log.warning(
        "engine_passed_over",
        extra={
            "model": version.model,
            "version": version.version,
            "engine": engine,
            "reason": str(error),
        },
    )
    return f"{engine}: {error}"


def _rebuilt(
    version: VersionEntry,
    manifest: Manifest,
    name: str,
    only: str,
    how: _How,
) -> LoadedEngine:
    """An engine for this machine, from the version's graph; added to the version once it has
    proved itself."""
    _go_on(how)
    if only and name != only:
        raise InvalidVersion(f"this server is to use {only} only")
    try:
        chosen = backend(name)
        chosen.version()
    except ImportError as error:
        raise InvalidVersion(f"the library of {name} is not installed here ({error})") from None
    if chosen.hardware() == "none":
        raise InvalidVersion("this machine has nothing that it runs on")
    opt_batch, max_batch = REBUILT[name]
    for record in manifest.engines:
        if record.backend == name:
            opt_batch, max_batch = record.opt_batch, record.max_batch
    target = CompileOptions(chosen.best_precision(), max_batch=max_batch, opt_batch=opt_batch)
    log.info("rebuilding", extra={"model": version.model, "version": version.version, "to": name})
    root = version.folder.parent.parent
    with writer.staging(root, version.model) as staged:
        onnx = version.folder / manifest.onnx.name
        reader.verify_files(version.folder, msgspec.structs.replace(manifest, engines=()))
        compiled = chosen.compile(onnx, staged, target)
        record = engine_record(staged, name, compiled, target, deviation={})
        if reason := chosen.incompatibility(record):
            raise InvalidVersion(reason)
        loaded, deviation = _proved(staged, version, manifest, record, how)
        record = msgspec.structs.replace(record, deviation=deviation)
        try:
            writer.add_engine(root, staged, manifest, record)
        except BaseException:
            loaded.engine.close()
            raise
    return loaded._replace(record=record)


def _load(
    version: VersionEntry,
    manifest: Manifest,
    record: EngineRecord,
    how: _How,
) -> LoadedEngine:
    _go_on(how)
    try:
        chosen = backend(record.backend)
    except ValueError as error:
        raise InvalidVersion(str(error)) from None
    except ImportError as error:
        raise InvalidVersion(
            f"the library of {record.backend} is not installed here ({error})"
        ) from None
    if reason := chosen.incompatibility(record):
        raise InvalidVersion(reason)
    if record.precision not in golden.MAX_DEVIATION:
        raise InvalidVersion(f"nothing is known of precision {record.precision!r}")
    reader.verify_files(version.folder, manifest, record)
    return _proved(version.folder, version, manifest, record, how)[0]


def _proved(
    folder: Path,
    version: VersionEntry,
    manifest: Manifest,
    record: EngineRecord,
    how: _How,
) -> tuple[LoadedEngine, dict[str, float]]:
    """The engine whose files lie in `folder`, and its deviations as golden.check finds them."""
    contents = reader.open_version(version.folder, manifest)
    row = manifest.input.spec().shape
    _go_on(how)
    check_memory(record, row, how.threads)
    engine = backend(record.backend).load(folder, record, row, threads=how.threads)
    try:
        _go_on(how)
        how.checking()
        deviation = golden.check(engine, contents.golden, record.precision)
        groups = how.profiles.groups(engine, manifest, record)
        _warm(engine, how)
    except BaseException:
        engine.close()
        raise
    return LoadedEngine(engine, record, groups, contents.labels), deviation


def _go_on(how: _How) -> None:
    if how.stopping.is_set():
        raise InvalidVersion("the server is stopping")


def _warm(engine: Engine, how: _How) -> None:
    """Runs every instance at every size it computes once: the first time prepares its kernels.

    Instances of a kind run side by side, so that each of the threads behind them gets its turn.
    """
    sizes = sorted({engine.computed_rows(rows) for rows in range(1, engine.max_batch + 1)})
    for group in instances_by_units(engine):
        for rows in sizes:
            _go_on(how)
            finished: SimpleQueue[Outputs | Exception] = SimpleQueue()
            for instance in group:
                instance.start(rows, finished.put)
            for _ in group:
                outcome = finished.get()
                if isinstance(outcome, Exception):
                    raise outcome


def _measure(instance: Instance, rows: int) -> float:
    """Seconds of a warm batch of `rows`, the best of a few: the profile is a floor, see
    `schedule.Latency`, and a hiccup while loading must not raise it for good."""
    infer(instance, instance.pixels[:rows])
    seconds: list[float] = []
    while len(seconds) < PROFILE_RUNS or sum(seconds) < PROFILE_S:
        began = time.perf_counter()
        infer(instance, instance.pixels[:rows])
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def _preference(record: EngineRecord) -> tuple[int, int]:
    kind = record.backend + (" cuda" if record.hardware.startswith("cuda") else "")
    return _place(kind, PREFERENCE), _place(record.precision, FASTEST)


def _place(name: str, order: Sequence[str]) -> int:
    return order.index(name) if name in order else len(order)
