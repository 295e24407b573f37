"""OpenVINO on the CPU: the embedded default.

Two ways to use the cores are compiled from one network: a wide instance that runs one batch on all
of them, for a caller alone, and narrow ones, a core each, that run side by side and give more
images a second once there are callers enough (measured for ResNet-50 on two cores: narrow ones at
batch 4 give 10 % more than the wide one at batch 8, and take half as long again at batch 1).
"""

from __future__ import annotations

import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakMethod

import numpy as np

from server.engines.base import (
    CompiledEngine,
    CompileOptions,
    OnDone,
    Outputs,
    Progress,
    ignore_progress,
    infer,
)
from server.errors import EngineFailure
from server.images.input_spec import Pixels

# OpenVINO's package reports its import to an outside address, from a forked process. Ours doesn't:
# without that module it takes a stub of its own.
sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]

import openvino as ov  # noqa: E402

if TYPE_CHECKING:
    from server.repository.manifest import EngineRecord

PRECISIONS = {"fp32": "f32", "bf16": "bf16", "fp16": "f16"}  # ours: OpenVINO's
NATIVE = {"bf16": {"avx512_bf16", "amx_bf16"}, "fp16": {"avx512_fp16", "amx_fp16"}}
OUTPUTS = ("classes", "scores", "probabilities")

# Below this a second thread costs more than it gives: waking it takes longer than half the work.
# Measured behind gRPC with LeNet-5 (0.09 ms a row): 7,490 against 5,240 calls a second.
TINY_S = 0.0005
TRIES, TRIES_S = 5, 0.1  # to find a run that nothing held up: so many, and for so long


def version() -> str:
    """As in "2026.4.1-21822-...": the exact build."""
    return str(ov.get_version())


def hardware() -> str:
    """The architecture with what makes reduced precision native, for example "x86_64 amx_bf16"."""
    relevant = sorted(_flags() & set().union(*NATIVE.values()))
    return " ".join([platform.machine(), *relevant])


def best_precision() -> str:
    return "bf16" if "bf16" in precisions() else "fp32"


def precisions() -> Sequence[str]:
    return ["fp32", *(name for name, flags in NATIVE.items() if flags & _flags())]


def compile(
    onnx: Path, folder: Path, target: CompileOptions, progress: Progress = ignore_progress
) -> CompiledEngine:
    """Writes OpenVINO's own representation; the last step, to machine code, is made at load.

    So one engine serves every CPU that has its precision natively.
    """
    if target.hardware:
        raise EngineFailure("OpenVINO compiles for any CPU at once; no hardware need be named")
    precision = target.precision
    try:
        model = ov.Core().read_model(onnx)
        row = model.input().partial_shape
        row[0] = ov.Dimension(1, target.max_batch)
        model.reshape(row)
        path = folder / f"openvino-{precision}.xml"
        # Reduced precision needs no more than half the bytes of its weights: fp16 keeps three more
        # bits than the bf16 that they are rounded to.
        ov.save_model(model, path, compress_to_fp16=precision != "fp32")
    except RuntimeError as error:
        raise EngineFailure(f"OpenVINO can't compile {onnx.name}: {error}") from error
    return CompiledEngine(
        path.stem, [path.name, path.with_suffix(".bin").name], hardware(), version()
    )


def incompatibility(record: EngineRecord) -> str | None:
    needed = NATIVE.get(record.precision, set())
    if record.precision not in PRECISIONS:
        return f"precision {record.precision!r} is unknown; there are {', '.join(PRECISIONS)}"
    if needed and not needed & _flags():
        return (
            f"it computes in {record.precision}, this CPU has none of {', '.join(sorted(needed))}; "
            "build it with --precision fp32"
        )
    if _release(record.backend_version) != _release(version()):
        return (
            f"it was compiled by OpenVINO {record.backend_version} and this is {version()}; "
            "build it again, or install that version"
        )
    return None


def load(
    folder: Path, record: EngineRecord, shape: tuple[int, int, int], *, threads: int
) -> OpenVinoEngine:
    try:
        return OpenVinoEngine(folder / record.files[0].name, record, shape, threads)
    except RuntimeError as error:
        raise EngineFailure(f"OpenVINO can't load {record.files[0].name}: {error}") from error


class OpenVinoInstance:
    """An infer request with the input memory it reads."""

    def __init__(self, request: ov.InferRequest, pixels: Pixels, units: int) -> None:
        self.pixels = pixels
        self.units = units
        self._request = request
        self._inputs = [
            ov.Tensor(pixels[:rows], shared_memory=True) for rows in range(1, len(pixels) + 1)
        ]
        self._rows = 0  # of the input tensor that is set
        self._outputs = [request.model_outputs.index(_port(request, name)) for name in OUTPUTS]
        self._done: OnDone | None = None
        finish = WeakMethod(self._finish)  # a request that held us would be held by us for ever

        def finished(_: object) -> None:
            if own := finish():
                own()

        request.set_callback(finished, None)

    def start(self, rows: int, done: OnDone) -> None:
        self._done = done
        try:
            if rows != self._rows:
                self._request.set_input_tensor(self._inputs[rows - 1])
                self._rows = rows
            self._request.start_async()
        except RuntimeError as error:
            self._done = None
            done(EngineFailure(f"OpenVINO: {error}"))

    def took_s(self) -> float:
        """The last batch's time, without the wait for Python's lock that `done` begins with."""
        return float(self._request.latency) / 1e3

    def _finish(self) -> None:
        done, self._done = self._done, None
        assert done is not None, "called once a start"
        try:
            outcome: Outputs | Exception = Outputs(
                *(self._request.get_output_tensor(index).data.copy() for index in self._outputs)
            )
        except Exception as error:
            outcome = EngineFailure(f"OpenVINO: {error}")
        done(outcome)


class OpenVinoEngine:
    """A network compiled for `threads` cores; see the top of this file for its instances."""

    device = "cpu"

    def __init__(
        self, path: Path, record: EngineRecord, shape: tuple[int, int, int], threads: int
    ) -> None:
        self.max_batch = record.max_batch
        self.units = threads
        self._shape = shape
        self._precision = PRECISIONS[record.precision]
        core = ov.Core()
        model = core.read_model(path)
        self.instances = self._instances(core, model, streams=threads, threads=threads)
        if threads > 1:
            if _is_tiny(self.instances[0]):
                self.instances = self._instances(core, model, streams=1, threads=1)
            else:
                self.instances[:0] = self._instances(core, model, streams=1, threads=threads)

    def computed_rows(self, rows: int) -> int:
        return rows

    def close(self) -> None:
        self.instances = []

    def _instances(
        self, core: ov.Core, model: ov.Model, *, streams: int, threads: int
    ) -> list[OpenVinoInstance]:
        """Those of one compilation. Only their requests hold on to it: the last of them frees it,
        and other than `CompiledModel` they let go of Python's lock meanwhile."""
        settings: dict[str, Any] = {
            "INFERENCE_PRECISION_HINT": self._precision,
            "NUM_STREAMS": str(streams),
            "INFERENCE_NUM_THREADS": str(threads),
            # The RPCs run on the same cores; a pinned thread would wait for its own to be free.
            "ENABLE_CPU_PINNING": False,
        }
        compiled = core.compile_model(model, "CPU", settings)
        return [
            OpenVinoInstance(
                compiled.create_infer_request(),
                np.zeros((self.max_batch, *self._shape), np.uint8),
                units=threads // streams,
            )
            for _ in range(streams)
        ]


def _is_tiny(instance: OpenVinoInstance) -> bool:
    """Whether a row is done within TINY_S, ever: on a busy machine a slow run says nothing."""
    runs, spent_s = 0, 0.0
    while runs < TRIES or spent_s < TRIES_S:
        infer(instance, instance.pixels[:1])
        took_s = instance.took_s()
        if took_s < TINY_S:
            return True
        runs, spent_s = runs + 1, spent_s + took_s
    return False


def _port(request: ov.InferRequest, name: str) -> Any:
    return next(port for port in request.model_outputs if name in port.names)


def _release(build: str) -> str:
    return build.split("-")[0]


def _flags() -> set[str]:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):
                return set(line.partition(":")[2].split())
    except OSError:
        pass
    return set()
