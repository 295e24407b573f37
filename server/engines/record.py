"""Records of engines in the manifest: how to make one, and which engine to try first."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from server.engines.base import CompiledEngine, CompileOptions
from server.repository.manifest import EngineRecord
from server.repository.writer import file_record

# Order in which the engines of a version are tried: GPU backends first, the null backend last;
# within a backend the fastest precision first.
BACKEND_ORDER = ("tensorrt", "inductor cuda", "openvino", "inductor", "null")
PRECISION_ORDER = ("int8", "fp16", "bf16", "fp32")


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


def preference(record: EngineRecord) -> tuple[int, int]:
    """Sort key of an engine: the engine to try first has the smallest."""
    kind = record.backend + (" cuda" if record.hardware.startswith("cuda") else "")
    return _rank(kind, BACKEND_ORDER), _rank(record.precision, PRECISION_ORDER)


def _rank(name: str, order: Sequence[str]) -> int:
    """Position in the order; unknown names come last."""
    return order.index(name) if name in order else len(order)
