"""OpenVINO on the CPU: the default backend.

One network is compiled in two ways that use the cores differently:

- One wide instance runs a batch on all cores. It answers a single caller the fastest.
- Narrow instances use one core each and run side by side. They have a higher throughput when many
  requests are waiting. Measured with ResNet-50 on two cores: narrow instances at batch 4 process
  10 % more images a second than the wide one at batch 8, but take 50 % longer at batch 1.
"""

from __future__ import annotations

import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
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
from server.repository.manifest import EngineRecord
from server.repository.writer import check_disk

# When the OpenVINO package is imported, it sends a usage report from a forked process. If this
# module can't be imported, OpenVINO uses a stub instead and sends nothing.
sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]

import openvino as ov  # noqa: E402

# Our name: the format in which OpenVINO computes what is not quantised.
PRECISIONS = {"fp32": "f32", "bf16": "bf16", "fp16": "f16", "int8": "f32"}
HALF = ("bf16", "fp16")
NATIVE = {"bf16": {"avx512_bf16", "amx_bf16"}, "fp16": {"avx512_fp16", "amx_fp16"}}
OUTPUTS = ("classes", "scores", "probabilities")

# A network that needs less time for a row is tiny. A second thread then costs more than it gains,
# because waking it takes longer than half of the work. Measured through gRPC with LeNet-5 (0.09 ms
# a row): 7,490 calls a second with one thread, 5,240 with two.
TINY_ROW_S = 0.0005
MIN_TINY_RUNS, MIN_TINY_RUNS_S = 5, 0.1  # least number and duration of the runs


def version() -> str:
    """The exact build, for example "2026.4.1-21822-..."."""
    return str(ov.get_version())


def hardware() -> str:
    """The architecture, and the CPU features for reduced precision: "x86_64 amx_bf16"."""
    relevant = sorted(_cpu_flags() & set().union(*NATIVE.values()))
    return " ".join([platform.machine(), *relevant])


def best_precision() -> str:
    return "bf16" if "bf16" in precisions() else "fp32"


def precisions() -> Sequence[str]:
    return ["fp32", *(name for name, flags in NATIVE.items() if flags & _cpu_flags()), "int8"]


def compile(
    onnx: Path, folder: Path, options: CompileOptions, progress: Progress = ignore_progress
) -> CompiledEngine:
    """Writes the network in OpenVINO's own format (IR).

    Machine code is generated when the engine is loaded. So one engine runs on every CPU that
    supports its precision natively.
    """
    if options.hardware:
        raise EngineFailure(
            f"OpenVINO engines run on any CPU; remove the hardware {', '.join(options.hardware)}"
        )
    precision = options.precision
    try:
        model = ov.Core().read_model(onnx)
        row = model.input().partial_shape
        row[0] = ov.Dimension(1, options.max_batch)
        model.reshape(row)
    except RuntimeError as error:
        raise EngineFailure(f"OpenVINO can't compile {onnx.name}: {error}") from error
    if precision == "int8":
        if options.quantize is None:
            raise EngineFailure("int8 needs images to calibrate it with (--calibration)")
        model = options.quantize(model)
    path = folder / f"openvino-{precision}.xml"
    try:
        # bf16 weights are stored as fp16 too, which has three more significant bits than bf16.
        ov.save_model(model, path, compress_to_fp16=precision in HALF)
    except RuntimeError as error:
        # OpenVINO deletes a file that it can't finish. The whole file is smaller than the ONNX.
        check_disk(folder, onnx.stat().st_size, error)
        raise EngineFailure(f"OpenVINO can't write {path.name}: {error}") from error
    files = [path.name, path.with_suffix(".bin").name]
    return CompiledEngine(path.stem, files, hardware(), version())


def incompatibility(record: EngineRecord) -> str | None:
    needed = NATIVE.get(record.precision, set())
    if record.precision not in PRECISIONS:
        return f"precision {record.precision!r} is unknown; OpenVINO has {', '.join(PRECISIONS)}"
    if needed and not needed & _cpu_flags():
        return (
            f"it computes in {record.precision}, but this CPU has none of "
            f"{', '.join(sorted(needed))}; build it with --precision fp32"
        )
    if _release(record.backend_version) != _release(version()):
        return (
            f"it was compiled by OpenVINO {record.backend_version}, but {version()} is installed; "
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
    """An OpenVINO infer request with its input memory."""

    def __init__(self, request: ov.InferRequest, pixels: Pixels, units: int) -> None:
        self.pixels = pixels
        self.units = units
        self._request = request
        self._inputs = [
            ov.Tensor(pixels[:rows], shared_memory=True) for rows in range(1, len(pixels) + 1)
        ]
        self._input_rows = 0  # rows of the input tensor that is set
        self._outputs = [
            request.model_outputs.index(_output_port(request, name)) for name in OUTPUTS
        ]
        self._on_done: OnDone | None = None
        # A strong reference from the request would form a cycle that is never collected.
        finish = WeakMethod(self._finish)

        def finished(_: object) -> None:
            if own := finish():
                own()

        request.set_callback(finished, None)

    def start(self, rows: int, on_done: OnDone) -> None:
        self._on_done = on_done
        try:
            if rows != self._input_rows:
                self._request.set_input_tensor(self._inputs[rows - 1])
                self._input_rows = rows
            self._request.start_async()
        except RuntimeError as error:
            self._on_done = None
            on_done(EngineFailure(f"OpenVINO: {error}"))

    def last_run_s(self) -> float:
        """The duration of the last batch, without the time `on_done` waits for the GIL."""
        return float(self._request.latency) / 1e3

    def _finish(self) -> None:
        on_done, self._on_done = self._on_done, None
        assert on_done is not None, "OpenVINO calls back once for each start"
        try:
            outcome: Outputs | Exception = Outputs(
                *(self._request.get_output_tensor(index).data.copy() for index in self._outputs)
            )
        except Exception as error:
            outcome = EngineFailure(f"OpenVINO: {error}")
        on_done(outcome)


class OpenVinoEngine:
    """A network compiled for `threads` cores, with wide and narrow instances (see the top)."""

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
        self.instances = self._compile(core, model, streams=threads, threads=threads)
        if threads > 1:
            if _is_tiny(self.instances[0]):
                self.instances = self._compile(core, model, streams=1, threads=1)
            else:
                self.instances[:0] = self._compile(core, model, streams=1, threads=threads)

    def computed_rows(self, rows: int) -> int:
        return rows

    def close(self) -> None:
        self.instances = []

    def _compile(
        self, core: ov.Core, model: ov.Model, *, streams: int, threads: int
    ) -> list[OpenVinoInstance]:
        """Compiles the model to machine code and makes one instance for each stream.

        Only the infer requests keep the compiled model alive, so the last one frees it. They
        release the GIL while they do so; `CompiledModel` does not.
        """
        settings: dict[str, Any] = {
            "INFERENCE_PRECISION_HINT": self._precision,
            "NUM_STREAMS": str(streams),
            "INFERENCE_NUM_THREADS": str(threads),
            # RPCs run on the same cores. A pinned thread would have to wait for its own core.
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
    """Whether a row takes less than TINY_ROW_S in any run.

    One fast run is enough, because other processes may slow down the rest.
    """
    runs, spent_s = 0, 0.0
    while runs < MIN_TINY_RUNS or spent_s < MIN_TINY_RUNS_S:
        infer(instance, instance.pixels[:1])
        run_s = instance.last_run_s()
        if run_s < TINY_ROW_S:
            return True
        runs, spent_s = runs + 1, spent_s + run_s
    return False


def _output_port(request: ov.InferRequest, name: str) -> Any:
    return next(port for port in request.model_outputs if name in port.names)


def _release(build: str) -> str:
    """ "2026.4.1-21822-..." -> "2026.4.1"."""
    return build.split("-")[0]


def _cpu_flags() -> set[str]:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):
                return set(line.partition(":")[2].split())
    except OSError:
        pass
    return set()
