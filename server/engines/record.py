"""The record of an engine that was just compiled, for the manifest."""

from __future__ import annotations

from pathlib import Path

from server.engines.base import CompiledEngine, CompileOptions
from server.repository.manifest import EngineRecord
from server.repository.writer import file_record


def engine_record(
    folder: Path,
    backend: str,
    compiled: CompiledEngine,
    target: CompileOptions,
    deviation: dict[str, float],
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
        files=tuple(file_record(folder / file) for file in compiled.files),
        deviation=deviation,
    )
