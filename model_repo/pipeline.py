"""Builds one model: card -> weights -> ONNX -> engines -> golden check -> published version.

An engine that differs too much from eager PyTorch is not published. An engine that cannot run on
this machine is checked on each machine that loads it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import torch

from model_repo import cards, weights
from model_repo.card_files.labels import repeated_names
from model_repo.card_files.sources import CardSource
from model_repo.cards import MAX_BATCH, Card, CardError
from model_repo.checkpoints.download import (
    DownloadRetries,
    WeightsError,
    WeightsUnavailable,
    WrongHash,
)
from model_repo.compile import GPU_BACKENDS, CompileJob, compile_engine
from model_repo.evaluation.dataset import DataError
from model_repo.evaluation.gate import Gate, GateClosed
from model_repo.evaluation.published import check_accuracy, read_gate_data
from model_repo.export import ExportError, export, trace
from model_repo.golden_images import golden_pixels
from model_repo.progress import BuildProgress
from model_repo.quantization.calibration import (
    MAX_CALIBRATION,
    MIN_CALIBRATION,
    CalibrationError,
    CalibrationImages,
    read_calibration,
)
from model_repo.quantization.engine import (
    DEFAULT_MIN_AGREEMENT,
    Int8Options,
    NotAccurate,
    compile_int8,
)
from model_repo.served import normalised, served_network
from model_repo.weights import Weights
from server.engines.base import BACKENDS, CompileOptions, backend
from server.engines.golden_check import GoldenMismatch
from server.errors import EngineFailure
from server.images.input_spec import InputSpec, Pixels
from server.repository import reader, writer
from server.repository.contents import list_versions
from server.repository.manifest import (
    GOLDEN_FILE,
    LABELS_FILE,
    MANIFEST_FORMAT,
    ONNX_FILE,
    EngineRecord,
    InputRecord,
    InvalidVersion,
    Manifest,
    WeightsRecord,
)
from server.repository.reader import Golden

UNTRAINED = "random:0"
# With --or-random the build has an alternative, so it waits less for a server that does not answer.
SHORT_WAIT = DownloadRetries(timeout_s=10, attempts=2)


class BuildError(Exception):
    """A model cannot be built. The message says why and what to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildOptions:
    """Options of a build; they apply to every model in it."""

    repo: Path
    backend: str = "openvino"  # or several, separated by commas: one engine each
    precision: str = ""  # empty: the fastest one that this machine supports natively
    weights: str | None = None  # None: as the card says
    min_batch: int = 1
    opt_batch: int | None = None  # None: as the card says, for GPU engines
    max_batch: int | None = None  # None: as the card says
    hardware: tuple[str, ...] = ()  # compute capabilities; empty: see server.engines.tensorrt
    variant: str = "auto"  # of TensorRT
    or_random: bool = False  # publish an untrained network if the weights are unavailable
    images: Callable[[InputSpec], Pixels] = golden_pixels  # inputs of the golden check
    allow_code: bool = False  # run code that comes with a model: TorchScript programs
    add_engine: bool = False  # add engines to the newest version instead of publishing a new one
    gate: Gate | None = None  # what the engines must reach on labelled images
    calibration: Path | None = None  # images for precision int8
    min_agreement: float = DEFAULT_MIN_AGREEMENT  # of int8 with float32, without a gate

    def __post_init__(self) -> None:
        highest = self.max_batch or MAX_BATCH
        for name, rows, limit in (
            ("--max-batch", self.max_batch, MAX_BATCH),
            ("--opt-batch", self.opt_batch, highest),
            ("--min-batch", self.min_batch, self.opt_batch or highest),
        ):
            if rows is not None and not 1 <= rows <= limit:
                raise ValueError(f"{name} must be 1 to {limit}, not {rows}")
        names = self.backends
        if unknown := [name for name in names if name not in BACKENDS]:
            raise ValueError(
                f"--backend {', '.join(map(repr, unknown))} is unknown; choose one of "
                f"{', '.join(BACKENDS)}"
            )
        if len(names) > 1 and ("null" in names or len(set(names)) < len(names)):
            raise ValueError(
                f"--backend is {self.backend!r}; several backends must differ, "
                "and null must be the only one"
            )
        if self.add_engine and "null" in names:
            raise ValueError("the null backend computes nothing; it cannot be added to a version")
        if self.gate is not None and self.add_engine:
            raise ValueError("--data checks a new version; it has no effect with --add-engine")
        self._check_calibration()

    def _check_calibration(self) -> None:
        if self.precision == "int8" and self.calibration is None:
            raise ValueError(
                "--precision int8 needs --calibration DIR, a folder with images like those of your "
                "callers; 8-bit numbers get their ranges from them"
            )
        if self.precision != "int8" and self.calibration is not None:
            raise ValueError("--calibration is for --precision int8")
        if not 0 <= self.min_agreement <= 1:
            raise ValueError(
                f"--min-agreement must be a fraction from 0 to 1, not {self.min_agreement:g}"
            )

    @property
    def backends(self) -> list[str]:
        return self.backend.split(",")


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildResult:
    """A published model."""

    manifest: Manifest
    seconds: float
    peak_bytes: int  # largest memory use of the process during the build; 0 if unknown


def build(
    card: str | CardSource,
    options: BuildOptions,
    progress: BuildProgress = BuildProgress(),  # noqa: B008 (stateless)
) -> BuildResult:
    """Builds and publishes one model; `card` is for cards.load.

    Raises BuildError; then nothing was published.
    """
    started_s = time.perf_counter()
    _reset_peak_memory()
    run = _add_engines if options.add_engine else _build_version
    try:
        manifest = run(card, options, progress)
    except (
        CardError,
        DataError,
        EngineFailure,
        ExportError,
        CalibrationError,
        GateClosed,
        InvalidVersion,
        NotAccurate,
        WeightsError,
    ) as error:
        raise BuildError(str(error)) from error
    except GoldenMismatch as error:
        raise BuildError(
            f"the engine is wrong, so it was not published: {error}. "
            "Try --precision fp32, and report this as a bug"
        ) from error
    except OSError as error:
        raise BuildError(f"{error.strerror or error}: {error.filename or options.repo}") from error
    return BuildResult(
        manifest=manifest,
        seconds=time.perf_counter() - started_s,
        peak_bytes=_peak_memory_bytes(),
    )


def _build_version(
    source: str | CardSource, options: BuildOptions, progress: BuildProgress
) -> Manifest:
    progress.stage("card")
    card = cards.load(source)
    for note in card.notes:
        progress.warn(note)
    for label, indices in repeated_names(card.labels).items():
        progress.warn(f"classes {', '.join(map(str, indices))} have the same name, {label!r}")
    if options.gate is not None:
        read_gate_data(options.gate, card)  # before the work that it would make vain
    images = None
    if options.calibration is not None:
        images = _calibration(options.calibration, card, progress)
    # The folder comes before the weights: if it cannot be created, nothing is downloaded in vain.
    with writer.staging(options.repo, card.name) as staged:
        return _build_staged(card, options, images, progress, staged)


def _calibration(folder: Path, card: Card, progress: BuildProgress) -> CalibrationImages:
    """Raises CalibrationError."""
    images = read_calibration(folder, card.input)
    if images.unreadable:
        progress.warn(
            f"{len(images.unreadable)} images of {folder} can't be read: {images.unreadable[0]}"
        )
    if len(images.calibration) < MIN_CALIBRATION:
        progress.warn(
            f"{folder} has only {len(images.calibration)} images for the calibration; about "
            f"{MAX_CALIBRATION} are recommended"
        )
    return images


def _build_staged(
    card: Card,
    options: BuildOptions,
    images: CalibrationImages | None,
    progress: BuildProgress,
    staged: Path,
) -> Manifest:
    precisions = {each: _precisions_to_try(each, options) for each in options.backends}
    pixels = options.images(card.input)

    progress.stage("weights")
    loaded = _load_weights(card, options, pixels, progress)
    if loaded.note:
        progress.tell(loaded.note)
    served = served_network(loaded.network, card)

    progress.stage("reference")
    with torch.inference_mode():
        probabilities = served(torch.from_numpy(pixels))[2].numpy()
    golden = Golden(pixels, probabilities, card.activation)

    progress.stage("export")
    onnx = staged / ONNX_FILE
    export(served, onnx, shape=card.input.shape, max_batch=MAX_BATCH)

    records = []
    for backend_name in options.backends:
        compile_options = _limited(_compile_options(backend_name, options, card), loaded.max_batch)
        # The trace is limited to this engine's largest batch: at 1,024 rows a layer of VGG-16 has
        # more values than a 32-bit index can count.
        program = partial(trace, served, card.input.shape, compile_options.max_batch)
        job = CompileJob(
            backend=backend_name,
            options=compile_options._replace(program=program),
            onnx=onnx,
            staged=staged,
            shape=card.input.shape,
            progress=progress,
        )
        if images is not None:
            agreement = options.min_agreement if options.gate is None else None
            quantise = Int8Options(images=images, trained=loaded.trained, min_agreement=agreement)
            record = compile_int8(job, golden, quantise)
        else:
            record, golden = compile_engine(job, precisions[backend_name], golden)
        records.append(record)

    if options.gate is not None:
        progress.stage("evaluate")
        check_accuracy(options.gate, options.repo, card, served, staged, records, progress)

    progress.stage("publish")
    writer.write_golden(staged / GOLDEN_FILE, golden)
    labels = "".join(f"{label}\n" for label in card.labels)
    (staged / LABELS_FILE).write_text(labels, "utf-8")
    manifest = _manifest(card, loaded, staged, tuple(records))
    return writer.publish(options.repo, staged, manifest)


def _add_engines(
    source: str | CardSource, options: BuildOptions, progress: BuildProgress
) -> Manifest:
    """Adds engines to the newest valid version. Uses the version's own graph and golden outputs."""
    progress.stage("card")
    card = cards.load(source)
    name = card.name
    precisions = {each: _precisions_to_try(each, options) for each in options.backends}
    found = list_versions(options.repo) if options.repo.is_dir() else []
    versions = [version for version in found if version.model == name]
    valid = [version for version in versions if version.manifest is not None]
    if not valid:
        raise BuildError(
            f"{options.repo} has no valid version of {name} to add an engine to; "
            "build one first, without --add-engine"
        )
    folder, manifest = valid[0].folder, valid[0].manifest
    assert manifest is not None
    reader.verify_files(folder, manifest)
    golden = reader.open_version(folder, manifest).golden
    for backend_name in options.backends:
        with writer.staging(options.repo, name) as staged:
            job = CompileJob(
                backend=backend_name,
                options=_compile_options(backend_name, options, card),
                onnx=folder / manifest.onnx.name,
                staged=staged,
                shape=manifest.input.spec().shape,
                progress=progress,
            )
            if options.calibration is not None:
                images = _calibration(options.calibration, card, progress)
                quantise = Int8Options(
                    images=images,
                    trained=manifest.weights.trained,
                    min_agreement=options.min_agreement,
                )
                record = compile_int8(job, golden, quantise)
            else:
                record, _ = compile_engine(job, precisions[backend_name], golden)
            progress.stage("publish")
            manifest = writer.add_engine(options.repo, staged, manifest, record)
    return manifest


def _precisions_to_try(name: str, options: BuildOptions) -> Sequence[str]:
    """The precision given in the options; without one the fastest, then fp32."""
    compiler = backend(name)
    supported = compiler.precisions()
    if not options.precision:
        return tuple(dict.fromkeys((compiler.best_precision(), "fp32")))
    if options.precision not in supported:
        raise BuildError(
            f"{name} does not support {options.precision} on this machine; it supports "
            f"{', '.join(supported)} (--precision auto takes the best)"
        )
    return (options.precision,)


def _compile_options(name: str, options: BuildOptions, card: Card) -> CompileOptions:
    """The options of the compilation, except the precision."""
    if name not in GPU_BACKENDS and not backend(name).hardware().startswith("cuda"):
        return CompileOptions("", options.max_batch or card.max_batch)
    max_batch = options.max_batch or card.gpu_max_batch
    return CompileOptions(
        "",
        max_batch,
        opt_batch=min(options.opt_batch or card.gpu_opt_batch, max_batch),
        min_batch=options.min_batch,
        hardware=options.hardware,
        variant=options.variant,
        cache=weights.cache_folder(),
    )


def _limited(options: CompileOptions, max_batch: int | None) -> CompileOptions:
    """The options for a network that can't compute larger batches."""
    if max_batch is None:
        return options
    limits = {
        name: min(getattr(options, name), max_batch)
        for name in ("max_batch", "opt_batch", "min_batch")
    }
    return options._replace(**limits)


def _load_weights(
    card: Card, options: BuildOptions, pixels: Pixels, progress: BuildProgress
) -> Weights:
    # These images set the batch norms of an untrained network.
    calibration = normalised(card, pixels)

    def load(source: str) -> Weights:
        return weights.load(
            card,
            source,
            calibration=calibration,
            allow_code=options.allow_code,
            retries=SHORT_WAIT if options.or_random else DownloadRetries(),
            progress=progress.advance,
        )

    if options.backend == "null":
        loaded = load(options.weights or UNTRAINED)
        return replace(loaded, trained=False, note="the null backend computes nothing")
    try:
        return load(options.weights or card.weights)
    except WrongHash as error:
        advice = "; --or-random does not help, because the weights exist but are the wrong ones"
        raise BuildError(f"{error}{advice if options.or_random else ''}") from error
    except WeightsUnavailable as error:
        if not options.or_random:
            raise
        progress.warn(f"UNTRAINED, the predictions mean nothing: {error.reason}")
        note = f"random parameters, because the weights are unavailable: {error.reason}"
        return replace(load(UNTRAINED), note=note[:1000])


def _manifest(
    card: Card, loaded: Weights, staged: Path, engines: tuple[EngineRecord, ...]
) -> Manifest:
    return Manifest(
        format=MANIFEST_FORMAT,
        model=card.name,
        version=1,  # `publish` sets the real number
        created=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        architecture=loaded.architecture or card.architecture,
        parameters=loaded.parameter_count
        or sum(parameter.numel() for parameter in loaded.network.parameters()),
        weights=WeightsRecord(
            source=weights.published_source(loaded.source),
            sha256=loaded.sha256,
            trained=loaded.trained,
            note=loaded.note,
        ),
        card_sha256=card.sha256,
        input=InputRecord.of(card.input, card.channel_order, card.mean, card.std),
        classes=card.classes,
        top_k=card.top_k,
        activation=card.activation,
        objective_ms=card.objective_ms,
        share=card.share,
        onnx=writer.file_record(staged / ONNX_FILE),
        golden=writer.file_record(staged / GOLDEN_FILE),
        labels=writer.file_record(staged / LABELS_FILE),
        engines=engines,
    )


def _reset_peak_memory() -> None:
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM to the present size


def _peak_memory_bytes() -> int:
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) << 10
    return 0
