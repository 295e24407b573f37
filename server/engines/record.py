"""The manifest record of an engine that was just compiled."""

from __future__ import annotations

from pathlib import Path

from server.engines.base import CompiledEngine, CompileOptions
from server.repository.manifest import EngineRecord
from server.repository.writer import file_record


def engine_record(
    folder: Path,
    backend: str,
    compiled: CompiledEngine,
    options: CompileOptions,
    deviation: dict[str, float],
) -> EngineRecord:
    """Describes an engine whose files were just compiled into `folder`."""
    return EngineRecord(
        name=compiled.name,
        backend=backend,
        backend_version=compiled.version,
        precision=options.precision,
        hardware=compiled.hardware,
        max_batch=options.max_batch,
        opt_batch=options.opt_batch,
        min_batch=options.min_batch,
        files=tuple(file_record(folder / file) for file in compiled.files),
        deviation=deviation,
    )
