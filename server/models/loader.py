"""Loads a published version into an engine and checks the engine on this machine.

The steps: check the manifest, memory and checksums, create the engine, compare its answers with the
golden ones, measure its latency profile, warm it up. A failure leaves nothing behind.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple, Protocol

import msgspec

from server.engines import golden_check as golden
from server.engines.base import (
    Backend,
    CompileOptions,
    Engine,
    Outputs,
    backend,
    instances_by_units,
)
from server.engines.record import engine_record, preference
from server.errors import EngineFailure
from server.models.memory_budget import check_memory
from server.models.profile_cache import ProfileCache
from server.repository import reader, writer
from server.repository.contents import VersionEntry
from server.repository.manifest import EngineRecord, InvalidVersion, Manifest
from server.scheduling.base import InstanceGroup

log = logging.getLogger(__name__)

# Backends that can compile the graph of a published version, in the order of trial, with the batch
# sizes to use if the version has no engine of this backend: tuned for (0: the maximum), maximum.
REBUILD_BATCHES = {"tensorrt": (64, 256), "openvino": (0, 8)}

_REFUSALS = (InvalidVersion, golden.GoldenMismatch, EngineFailure)


class LoadedEngine(NamedTuple):
    """An engine that passed its golden check on this machine, profiled and warmed up."""

    engine: Engine
    record: EngineRecord
    groups: list[InstanceGroup]
    labels: tuple[str, ...]
    skipped_engines: str = ""  # better engines of the version, and why they don't run here


class Loader(Protocol):
    """Turns published versions into engines."""

    def load(self, version: VersionEntry, on_checking: Callable[[], None]) -> LoadedEngine:
        """Loads the best engine of a version. Blocks.

        Calls `on_checking` when an engine is created and its golden check begins.
        Raises InvalidVersion.
        """

    def stop(self) -> None:
        """Ends a load in progress as soon as the backend allows it. Called from another thread."""


class EngineLoader:
    """Loader of the server: takes the first engine of a version that works on this machine.

    Used on one thread at a time; only `stop` may be called from another one.
    """

    def __init__(self, *, only_backend: str = "", threads: int, rebuild: bool = False) -> None:
        """`only_backend` is empty for any backend; `threads` is for CPU engines.

        With `rebuild`, a version without a working engine gets one compiled from its graph.
        """
        self._only_backend = only_backend
        self._threads = threads
        self._rebuild_engines = rebuild
        self._profiles = ProfileCache()
        self._stopping = threading.Event()

    def stop(self) -> None:
        self._stopping.set()

    def load(
        self, version: VersionEntry, on_checking: Callable[[], None] = lambda: None
    ) -> LoadedEngine:
        """See `Loader.load`. The message of InvalidVersion has a reason for each engine."""
        manifest = version.manifest
        if manifest is None:
            raise InvalidVersion(version.reason)
        refusals: list[str] = []
        for record in sorted(manifest.engines, key=preference):
            if self._only_backend and record.backend != self._only_backend:
                refusals.append(f"{record.name}: {self._only()}")
                continue
            try:
                loaded = self._load_engine(version, manifest, record, on_checking)
            except _REFUSALS as error:
                refusals.append(_skipped(version, record.name, error))
            else:
                skipped = "" if self._only_backend else "; ".join(refusals)
                return loaded._replace(skipped_engines=skipped)
        if self._rebuild_engines:
            for name in REBUILD_BATCHES:
                try:
                    return self._rebuild(version, manifest, name, on_checking)
                except (*_REFUSALS, OSError) as error:
                    refusals.append(_skipped(version, f"rebuilt {name} engine", error))
        raise InvalidVersion("; ".join(refusals))

    def _load_engine(
        self,
        version: VersionEntry,
        manifest: Manifest,
        record: EngineRecord,
        on_checking: Callable[[], None],
    ) -> LoadedEngine:
        self._check_stopping()
        try:
            chosen = backend(record.backend)
        except ValueError as error:
            raise InvalidVersion(str(error)) from None
        except ImportError as error:
            raise _not_installed(record.backend, error) from None
        if reason := chosen.incompatibility(record):
            raise InvalidVersion(reason)
        if record.precision not in golden.MAX_DEVIATION:
            known = ", ".join(golden.MAX_DEVIATION)
            raise InvalidVersion(f"precision {record.precision!r} is unknown; {known} are allowed")
        reader.verify_files(version.folder, manifest, record)
        return self._check_engine(version.folder, version, manifest, record, on_checking)[0]

    def _rebuild(
        self,
        version: VersionEntry,
        manifest: Manifest,
        name: str,
        on_checking: Callable[[], None],
    ) -> LoadedEngine:
        """Compiles an engine from the version's graph, checks it, and adds it to the version."""
        self._check_stopping()
        if self._only_backend and name != self._only_backend:
            raise InvalidVersion(self._only())
        try:
            chosen = backend(name)
            chosen.version()
        except ImportError as error:
            raise _not_installed(name, error) from None
        if chosen.hardware() == "none":
            raise InvalidVersion(f"this machine has no hardware for {name}")
        options = _compile_options(chosen, manifest, name)
        extra = {"model": version.model, "version": version.version, "backend": name}
        log.info("engine_rebuild_started", extra=extra)
        root = version.folder.parent.parent
        with writer.staging(root, version.model) as staged:
            reader.verify_files(version.folder, msgspec.structs.replace(manifest, engines=()))
            compiled = chosen.compile(version.folder / manifest.onnx.name, staged, options)
            record = engine_record(staged, name, compiled, options, deviation={})
            if reason := chosen.incompatibility(record):
                raise InvalidVersion(reason)
            loaded, deviation = self._check_engine(staged, version, manifest, record, on_checking)
            record = msgspec.structs.replace(record, deviation=deviation)
            try:
                writer.add_engine(root, staged, manifest, record)
            except BaseException:
                loaded.engine.close()
                raise
        return loaded._replace(record=record)

    def _check_engine(
        self,
        folder: Path,
        version: VersionEntry,
        manifest: Manifest,
        record: EngineRecord,
        on_checking: Callable[[], None],
    ) -> tuple[LoadedEngine, dict[str, float]]:
        """Creates the engine in `folder` and checks it. Also returns the golden check's result."""
        contents = reader.open_version(version.folder, manifest)
        row = manifest.input.spec().shape
        self._check_stopping()
        check_memory(record, row, self._threads)
        engine = backend(record.backend).load(folder, record, row, threads=self._threads)
        try:
            self._check_stopping()
            on_checking()
            deviation = golden.check(engine, contents.golden, record.precision)
            groups = self._profiles.instance_groups(engine, manifest, record)
            self._warm_up(engine)
        except BaseException:
            engine.close()
            raise
        return LoadedEngine(engine, record, groups, contents.labels), deviation

    def _warm_up(self, engine: Engine) -> None:
        """Runs every batch size once on every instance: the first run prepares its kernels.

        The instances of a group run in parallel, so that each of the threads behind them runs.
        """
        sizes = sorted({engine.computed_rows(rows) for rows in range(1, engine.max_batch + 1)})
        for group in instances_by_units(engine):
            for rows in sizes:
                self._check_stopping()
                finished: SimpleQueue[Outputs | Exception] = SimpleQueue()
                for instance in group:
                    instance.start(rows, finished.put)
                for _ in group:
                    outcome = finished.get()
                    if isinstance(outcome, Exception):
                        raise outcome

    def _check_stopping(self) -> None:
        if self._stopping.is_set():
            raise InvalidVersion("the server is stopping")

    def _only(self) -> str:
        return f"this server uses only {self._only_backend} engines"


def _not_installed(name: str, error: ImportError) -> InvalidVersion:
    return InvalidVersion(f"the library of {name} is not installed here ({error})")


def _compile_options(chosen: Backend, manifest: Manifest, name: str) -> CompileOptions:
    """The machine's best precision; batch sizes of the version's engine of this backend."""
    opt_batch, max_batch = REBUILD_BATCHES[name]
    for record in manifest.engines:
        if record.backend == name:
            opt_batch, max_batch = record.opt_batch, record.max_batch
    return CompileOptions(chosen.best_precision(), max_batch=max_batch, opt_batch=opt_batch)


def _skipped(version: VersionEntry, engine: str, error: Exception) -> str:
    extra = {
        "model": version.model,
        "version": version.version,
        "engine": engine,
        "reason": str(error),
    }
    log.warning("engine_skipped", extra=extra)
    return f"{engine}: {error}"
