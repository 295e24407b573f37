"""Compiles an ONNX graph to a TensorRT plan."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from server.engines.base import CompileOptions, Progress
from server.engines.onnx_precision import convert_precision
from server.engines.tensorrt.cuda import Gpu
from server.engines.tensorrt.libraries import NAMES, fresh_logger
from server.errors import EngineFailure


def build_plan(
    trt: Any,
    variant: str,
    onnx: Path,
    options: CompileOptions,
    capabilities: Sequence[str],
    gpu: Gpu | None,
    progress: Progress,
) -> Any:
    """The serialised plan, a buffer of bytes.

    Raises EngineFailure. If the parser rejects a node, the error names it and says what to change.
    """
    logger = fresh_logger(trt)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(convert_precision(onnx, options.precision)):
        reason = _parser_errors(parser) or logger.last_errors()
        raise EngineFailure(f"{NAMES[variant]} can't compile {onnx.name}: {reason}")
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)  # keep full precision where the graph uses float32
    config.progress_monitor = monitor = _progress_monitor(trt, progress)
    config.add_optimization_profile(_batch_sizes(builder, network, options))
    if variant == "rtx":
        # Memory that TensorRT allocates itself can't be part of a CUDA graph.
        config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
        named = capabilities if gpu is None or options.hardware else ("CURRENT",)
        config.num_compute_capabilities = len(named)
        for index, name in enumerate(named):
            config.set_compute_capability(getattr(trt.ComputeCapability, name.upper()), index)
    with TimingCache(trt, config, variant, gpu, options.cache):
        plan = builder.build_serialized_network(network, config)
    del monitor  # kept alive until here, because the builder uses it
    if plan is None:
        raise EngineFailure(f"{NAMES[variant]} can't compile {onnx.name}: {logger.last_errors()}")
    return plan


def _batch_sizes(builder: Any, network: Any, options: CompileOptions) -> Any:
    """An optimisation profile with the smallest, the optimal and the largest batch size."""
    profile = builder.create_optimization_profile()
    pixels = network.get_input(0)
    row = tuple(pixels.shape)[1:]
    sizes = (options.min_batch, options.opt_batch or options.max_batch, options.max_batch)
    profile.set_shape(pixels.name, *((rows, *row) for rows in sizes))
    return profile


def _progress_monitor(trt: Any, progress: Progress) -> Any:
    """Reports the steps of the outermost phase, which cover the whole build."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.steps: dict[str, int] = {}

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            if not parent:
                self.steps[phase] = steps

        def step_complete(self, phase: str, step: int) -> bool:
            if phase in self.steps:
                progress(step + 1, self.steps[phase])
            return True

        def phase_finish(self, phase: str) -> None:
            self.steps.pop(phase, None)

    return Monitor()


def _parser_errors(parser: Any) -> str:
    """The rejected nodes and what to change. Empty if the parser names none."""
    errors = [parser.get_error(index) for index in range(parser.num_errors)]
    if not errors:
        return ""
    nodes = "; ".join(
        f"node {error.node_name() or error.node()} ({error.node_operator() or 'graph'}): "
        f"{error.desc()}"
        for error in errors[:3]
    )
    return f"{nodes}. Change that layer in its architecture, or how model_repo/export.py exports it"


class TimingCache:
    """Keeps TensorRT's kernel timings between compilations, one file per version and GPU.

    TensorRT-RTX does not time kernels, and would need a GPU if it were given a cache.
    """

    def __init__(
        self, trt: Any, config: Any, variant: str, gpu: Gpu | None, folder: Path | None
    ) -> None:
        self._config = config
        self._path: Path | None = None
        if variant == "tensorrt" and gpu is not None and folder is not None:
            self._path = folder / f"tensorrt-{trt.__version__}-{gpu.capability}.timing"

    def __enter__(self) -> None:
        if self._path is None:
            return
        stored = b""
        with suppress(OSError):  # there is none yet, or this user may not read it
            stored = self._path.read_bytes()
        if not self._use(stored):
            self._use(b"")  # the file is damaged or belongs to another GPU: start with an empty one

    def __exit__(self, *_: object) -> None:
        if self._path is None or (cache := self._config.get_timing_cache()) is None:
            return
        with suppress(OSError):  # the next compilation is slower, but works
            self._path.parent.mkdir(parents=True, exist_ok=True)
            new = self._path.with_suffix(".new")
            new.write_bytes(cache.serialize())
            new.replace(self._path)

    def _use(self, content: bytes) -> bool:
        cache = self._config.create_timing_cache(content)
        return cache is not None and bool(self._config.set_timing_cache(cache, False))
