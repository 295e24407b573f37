"""Command that turns model cards into engines and publishes them.

    python -m model_repo.build NAME... | --all [--repo DIR] [--weights SRC] [--or-random] ...
    python -m model_repo.build NAME... --add-engine --backend tensorrt [--repo DIR] ...

For each model: card -> weights -> ONNX -> engines -> comparison with eager PyTorch -> published.
What does not compare well is not published; what can't run on this machine is compared wherever it
is loaded. A model that fails does not keep the others from being built. With --add-engine the
newest published version gets another engine of the network it has.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from model_repo import cards, weights
from model_repo.cards import MAX_BATCH, Card, CardError
from model_repo.download import Patience
from model_repo.export import TOP_K, ExportError, Served, export, traced
from model_repo.golden_images import golden_pixels
from model_repo.weights import Weights, WeightsError, WeightsUnavailable, WrongHash
from server.engines import golden_check as golden
from server.engines.base import BACKENDS, Backend, CompileOptions, Engine, backend, infer
from server.engines.record import engine_record
from server.engines.tensorrt import libraries as tensorrt_libraries
from server.errors import EngineFailure
from server.images.input_spec import InputSpec, Pixels
from server.process.cores import available_cores
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

STAGES = ("card", "weights", "answers", "export", "compile", "check", "publish")
SPELLINGS = {"fp32": "fp32", "f32": "fp32", "bf16": "bf16", "fp16": "fp16", "f16": "fp16"}
ON_GPU = {"tensorrt"}
UNTRAINED = "random:0"
# Where going on without is allowed, a place that does not answer is not waited for as long.
IMPATIENT = Patience(timeout_s=10, attempts=2)


class BuildError(Exception):
    """A model can't be built; the message says why and what to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What is asked for, of every model alike."""

    repo: Path
    backend: str = "openvino"  # or several, separated by commas: an engine each
    precision: str = ""  # empty: the fastest that this machine has natively
    weights: str | None = None  # None: as the card says
    min_batch: int = 1
    opt_batch: int | None = None  # None: as the card says, for engines on a GPU
    max_batch: int | None = None  # None: as the card says
    hardware: tuple[str, ...] = ()  # compute capabilities; empty: see server.engines.tensorrt
    variant: str = "auto"  # of TensorRT
    or_random: bool = False
    images: Callable[[InputSpec], Pixels] = golden_pixels  # what answers are compared on
    add: bool = False  # to the newest published version, instead of publishing a new one

    def __post_init__(self) -> None:
        most = self.max_batch or MAX_BATCH
        for name, rows, limit in (
            ("max_batch", self.max_batch, MAX_BATCH),
            ("opt_batch", self.opt_batch, most),
            ("min_batch", self.min_batch, self.opt_batch or most),
        ):
            if rows is not None and not 1 <= rows <= limit:
                raise ValueError(f"{name} must be 1 to {limit}, not {rows}")
        names = self.backends
        if unknown := [name for name in names if name not in BACKENDS]:
            raise ValueError(
                f"backend {', '.join(map(repr, unknown))} is unknown; there are "
                f"{', '.join(BACKENDS)}"
            )
        if len(names) > 1 and ("null" in names or len(set(names)) < len(names)):
            raise ValueError(
                f"backend is {self.backend!r}; several must differ, and null must be alone"
            )
        if self.add and "null" in names:
            raise ValueError("the null backend computes nothing; it can't be added to what does")

    @property
    def backends(self) -> list[str]:
        return self.backend.split(",")


@dataclass(frozen=True, slots=True, kw_only=True)
class Built:
    """A model that has been published."""

    manifest: Manifest
    seconds: float
    peak_bytes: int  # most memory that the process held meanwhile; 0 where it can't be told


class Watcher:
    """Is told how a build goes; this one keeps it to itself."""

    def stage(self, name: str) -> None:
        """The next of STAGES begins."""

    def progress(self, done: int, of: int | None) -> None:
        """Within the stage, in bytes or rounds."""

    def warn(self, text: str) -> None:
        """Something the user must know."""


def build(name: str, order: Order, watcher: Watcher = Watcher()) -> Built:  # noqa: B008 (stateless)
    """Builds and publishes one model. Raises BuildError; then nothing has been published."""
    began_s = time.perf_counter()
    _forget_peak()
    try:
        manifest = _add(name, order, watcher) if order.add else _build(name, order, watcher)
    except (CardError, WeightsError, ExportError, EngineFailure, InvalidVersion) as error:
        raise BuildError(str(error)) from error
    except golden.GoldenMismatch as error:
        raise BuildError(
            f"the engine is wrong, so it was not published: {error}. "
            "Try --precision fp32, and report it"
        ) from error
    except OSError as error:
        raise BuildError(f"{error.strerror or error}: {error.filename or order.repo}") from error
    return Built(manifest=manifest, seconds=time.perf_counter() - began_s, peak_bytes=_peak_bytes())


def _build(name: str, order: Order, watcher: Watcher) -> Manifest:
    watcher.stage("card")
    card = cards.load(name)
    precisions = {each: _precisions(backend(each), each, order) for each in order.backends}
    pixels = order.images(card.input)

    watcher.stage("weights")
    found = _weights(card, order, pixels, watcher)
    served = Served(found.network, classes=card.classes, mean=card.mean, std=card.std)

    watcher.stage("answers")
    with torch.inference_mode():
        probabilities = served(torch.from_numpy(pixels))[2].numpy()
    truth = Golden(pixels, probabilities)

    with writer.staging(order.repo, name) as staged:
        watcher.stage("export")
        onnx = staged / ONNX_FILE
        export(served, onnx, shape=card.input.shape, max_batch=MAX_BATCH)

        records = []
        for each in order.backends:
            target = _target(order, each, card)
            # Up to the rows that it is compiled for and no more: of VGG-16 with 1,024 a layer has
            # more numbers than 32 bits count.
            program = partial(traced, served, card.input.shape, target.max_batch)
            job = _Job(
                backend=each,
                target=target._replace(program=program),
                onnx=onnx,
                staged=staged,
                shape=card.input.shape,
                watcher=watcher,
            )
            record, truth = _first_sound(job, precisions[each], truth)
            records.append(record)

        watcher.stage("publish")
        writer.write_golden(staged / GOLDEN_FILE, truth)
        labels = "".join(f"{label}\n" for label in card.labels)
        (staged / LABELS_FILE).write_text(labels, "utf-8")
        manifest = Manifest(
            format=MANIFEST_FORMAT,
            model=name,
            version=1,  # until it gets its own
            created=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            architecture=card.architecture,
            parameters=sum(parameter.numel() for parameter in found.network.parameters()),
            weights=WeightsRecord(
                source=found.source, sha256=found.sha256, trained=found.trained, note=found.note
            ),
            card_sha256=card.sha256,
            input=InputRecord.of(card.input),
            classes=card.classes,
            top_k=min(TOP_K, card.classes),
            objective_ms=card.objective_ms,
            share=card.share,
            onnx=writer.file_record(onnx),
            golden=writer.file_record(staged / GOLDEN_FILE),
            labels=writer.file_record(staged / LABELS_FILE),
            engines=tuple(records),
        )
        return writer.publish(order.repo, staged, manifest)


def _add(name: str, order: Order, watcher: Watcher) -> Manifest:
    """Adds engines to the newest sound version, from the graph and the answers it has."""
    watcher.stage("card")
    card = cards.load(name)
    precisions = {each: _precisions(backend(each), each, order) for each in order.backends}
    versions = [version for version in list_versions(order.repo) if version.model == name]
    sound = [version for version in versions if version.manifest is not None]
    if not sound:
        raise BuildError(
            f"{order.repo} has no sound version of {name} to add an engine to; "
            "build one first, without --add-engine"
        )
    folder, manifest = sound[0].folder, sound[0].manifest
    assert manifest is not None
    reader.verify_files(folder, manifest)
    truth = reader.read_golden(folder, manifest)
    for each in order.backends:
        with writer.staging(order.repo, name) as staged:
            job = _Job(
                backend=each,
                target=_target(order, each, card),
                onnx=folder / manifest.onnx.name,
                staged=staged,
                shape=manifest.input.spec().shape,
                watcher=watcher,
            )
            record, _ = _first_sound(job, precisions[each], truth)
            watcher.stage("publish")
            manifest = writer.add_engine(order.repo, staged, manifest, record)
    return manifest


def _precisions(compiler: Backend, name: str, order: Order) -> Sequence[str]:
    """What to try in turn: what was asked for, or else the fastest, and fp32 where that fails."""
    there = compiler.precisions()
    if order.precision and order.precision not in there:
        raise BuildError(
            f"{name} has no {order.precision} on this machine; "
            f"it has {', '.join(there)} (--precision auto takes the best)"
        )
    if order.precision:
        return (order.precision,)
    return tuple(dict.fromkeys((compiler.best_precision(), "fp32")))


def _target(order: Order, name: str, card: Card) -> CompileOptions:
    """What to compile for, all but the precision."""
    if name not in ON_GPU and not backend(name).hardware().startswith("cuda"):
        return CompileOptions("", order.max_batch or card.max_batch)
    max_batch = order.max_batch or card.gpu_max_batch
    return CompileOptions(
        "",
        max_batch,
        opt_batch=min(order.opt_batch or card.gpu_opt_batch, max_batch),
        min_batch=order.min_batch,
        hardware=order.hardware,
        variant=order.variant,
        cache=weights.cache_folder(),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    """A graph that is to be compiled into `staged`, for `target` but for the precision."""

    backend: str
    target: CompileOptions
    onnx: Path
    staged: Path
    shape: tuple[int, int, int]
    watcher: Watcher


def _first_sound(
    job: _Job, precisions: Sequence[str], truth: Golden
) -> tuple[EngineRecord, Golden]:
    """The engine of the first precision that gives `truth`, eager PyTorch's answers.

    Returns what it was held against as well. Raises golden.Deviates where none does.
    """
    *others, last = precisions
    for precision in others:
        try:
            return _sound(job, precision, truth)
        except golden.GoldenMismatch as error:
            job.watcher.warn(f"{precision} is too coarse for this network, so {last}: {error}")
    return _sound(job, last, truth)


def _sound(job: _Job, precision: str, truth: Golden) -> tuple[EngineRecord, Golden]:
    compiler, staged = backend(job.backend), job.staged
    target = job.target._replace(precision=precision)
    job.watcher.stage("compile")
    compiled = compiler.compile(job.onnx, staged, target, job.watcher.progress)
    record = engine_record(staged, job.backend, compiled, target, deviation={})
    job.watcher.stage("check")
    if job.backend in ON_GPU and (reason := compiler.incompatibility(record)):
        job.watcher.warn(
            f"{record.name} was compiled and not run: {reason}. Servers check it first"
        )
        return record, truth
    try:
        with _loaded(compiler, staged, record, job.shape) as engine:
            if job.backend == "null":
                truth = Golden(truth.pixels, _answers(engine, truth.pixels))
            deviation = golden.check(engine, truth, precision)
    except golden.GoldenMismatch:
        for file in compiled.files:
            (staged / file).unlink()
        raise
    return msgspec.structs.replace(record, deviation=deviation), truth


def _weights(card: Card, order: Order, pixels: Pixels, watcher: Watcher) -> Weights:
    # An untrained network is shown the golden photographs, normalised, to set its batch norms by.
    look = (torch.from_numpy(pixels).float() / 255 - torch.tensor(card.mean)) / torch.tensor(
        card.std
    )
    calibration = look.permute(0, 3, 1, 2).contiguous()

    def load(source: str) -> Weights:
        return weights.load(
            card,
            source,
            calibration=calibration,
            patience=IMPATIENT if order.or_random else Patience(),
            progress=watcher.progress,
        )

    if order.backend == "null":
        found = load(order.weights or UNTRAINED)
        return replace(found, trained=False, note="the null backend computes nothing")
    source = order.weights or card.weights
    try:
        return load(source)
    except WrongHash as error:
        advice = "; --or-random does not help: there are weights, and they are the wrong ones"
        raise BuildError(f"{error}{advice if order.or_random else ''}") from error
    except WeightsUnavailable as error:
        reason = str(error).partition(". Download")[0]  # what follows is what we say ourselves
        if not order.or_random:
            raise BuildError(
                f"{reason}. Download the weights by other means and build with --weights "
                f"file:PATH, or publish an untrained {card.name} with --or-random"
            ) from error
        watcher.warn(f"UNTRAINED, its answers will mean nothing: {reason}")
        note = f"drawn at random, as the weights could not be fetched: {reason}"
        return replace(load(UNTRAINED), note=note[:1000])


@contextmanager
def _loaded(
    compiler: Backend, folder: Path, record: EngineRecord, shape: tuple[int, int, int]
) -> Iterator[Engine]:
    engine = compiler.load(folder, record, shape, threads=available_cores())
    try:
        yield engine
    finally:
        engine.close()


def _answers(engine: Engine, pixels: Pixels) -> NDArray[np.float32]:
    rows = [infer(engine.instances[0], pixels[row : row + 1]) for row in range(len(pixels))]
    return np.concatenate([answer.probabilities for answer in rows])


def _forget_peak() -> None:
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM counts from here


def _peak_bytes() -> int:
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) << 10
    return 0


# --- the command -----------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Builds what is asked for. 0: all was published; 1: not all; wrong usage exits with 2."""
    names, order = _parse(arguments)
    terminal = sys.stdout.isatty()
    screen = Console(markup=False, highlight=False, emoji=False, width=None if terminal else 132)
    built: dict[str, Built] = {}
    failed: dict[str, str] = {}
    with Screen(screen, len(names), live=terminal) as watcher:
        for name in names:
            watcher.begin(name)
            try:
                built[name] = build(name, order, watcher)
            except BuildError as error:
                failed[name] = str(error)
            except Exception as error:  # a mistake of ours; the other models shall not suffer
                watcher.traceback()
                failed[name] = f"{type(error).__name__}: {error}"
            watcher.end("failed" if name in failed else "published")
            gc.collect()
    if built:
        screen.print(_table(built))
    for name, reason in failed.items():
        print(f"{name} was not built: {reason}", file=sys.stderr)
    if failed and built:
        print(f"{len(failed)} of {len(names)} models were not built", file=sys.stderr)
    return 1 if failed else 0


def _parse(arguments: Sequence[str] | None) -> tuple[list[str], Order]:
    known = cards.names()
    parser = argparse.ArgumentParser(
        prog="python -m model_repo.build",
        description="Builds engines from model cards and publishes them to a model repository.",
        epilog=f"The cards there are: {', '.join(known)}.",
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="a card's name")
    parser.add_argument("--all", action="store_true", help="build every card")
    parser.add_argument(
        "--repo",
        type=Path,
        default=Path("model_repo/engines"),
        metavar="DIR",
        help="the model repository (%(default)s)",
    )
    parser.add_argument(
        "--weights", metavar="SRC", help=f"{weights.SOURCES}; for one model, instead of its card's"
    )
    parser.add_argument(
        "--backend",
        default="openvino",
        metavar="B",
        help=f"what runs it: {', '.join(BACKENDS)}, or several with commas (%(default)s)",
    )
    parser.add_argument(
        "--add-engine",
        action="store_true",
        help="add to the newest published version, from the graph it has; needs no weights",
    )
    parser.add_argument(
        "--precision",
        choices=("auto", *SPELLINGS),
        default="auto",
        metavar="P",
        help="fp32, bf16, fp16 or auto: the fastest that this machine has natively (%(default)s)",
    )
    parser.add_argument(
        "--max-batch", type=int, metavar="N", help="most rows at once, instead of the card's"
    )
    parser.add_argument(
        "--opt-batch",
        type=int,
        metavar="N",
        help="rows to tune for, on a GPU, instead of the card's",
    )
    parser.add_argument(
        "--min-batch", type=int, default=1, metavar="N", help="fill fewer rows up, on a GPU (1)"
    )
    parser.add_argument(
        "--compute-capability",
        default="",
        metavar="C",
        help="GPUs to compile for, as 8.9 or 89,120; else the one here, or where there is none all "
        "that TensorRT-RTX knows from 8.0 on",
    )
    parser.add_argument(
        "--tensorrt-variant",
        choices=tensorrt_libraries.VARIANTS,
        default="auto",
        help="tensorrt for datacenters or rtx; auto takes what is installed, in that order",
    )
    parser.add_argument(
        "--or-random",
        action="store_true",
        help="where weights can't be had, publish an untrained network, marked as one",
    )
    given = parser.parse_args(arguments)
    there = f"there are {', '.join(known)}"
    if given.all == bool(given.names):
        parser.error(f"name the models to build, or --all; {there}")
    names = known if given.all else list(dict.fromkeys(given.names))
    if unknown := [name for name in names if name not in known]:
        parser.error(f"there is no card {', '.join(map(repr, unknown))}; {there}")
    if given.weights and len(names) > 1:
        parser.error(f"--weights is for one model, not for {len(names)}")
    try:
        order = Order(
            repo=given.repo,
            backend=given.backend,
            precision=SPELLINGS.get(given.precision, ""),
            weights=given.weights,
            min_batch=given.min_batch,
            opt_batch=given.opt_batch,
            max_batch=given.max_batch,
            hardware=tuple(filter(None, given.compute_capability.split(","))),
            variant=given.tensorrt_variant,
            or_random=given.or_random,
            add=given.add_engine,
        )
        for name in order.backends:
            backend(name).version()
    except ValueError as error:
        parser.error(str(error))
    except ImportError as error:
        parser.error(f"the library of {name} is not installed: {error}")
    if order.add and given.weights:
        parser.error("--weights is for a new version; --add-engine takes the network that is there")
    return names, order


class Screen(Watcher):
    """Tells the user how it goes: a line a stage, and on a terminal a bar below them."""

    def __init__(self, console: Console, models: int, *, live: bool) -> None:
        self._console = console
        self._bars = Progress(
            TextColumn("{task.fields[model]:<14}"),
            BarColumn(),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not live,
        )
        self._all: TaskID = self._bars.add_task("models", total=models, model="all")
        self._task = self._all
        self._model = ""
        self._stage = ""
        self._began_s = 0.0

    def __enter__(self) -> Screen:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def begin(self, model: str) -> None:
        """The next model begins."""
        self._model, self._stage = model, ""
        self._task = self._bars.add_task("", total=len(STAGES), model=model)

    def stage(self, name: str) -> None:
        self._finish("")
        self._stage, self._began_s = name, time.perf_counter()
        self._bars.update(self._task, completed=STAGES.index(name), description=name)

    def progress(self, done: int, of: int | None) -> None:
        part = done / of if of else 0
        how_far = f"{part:.0%}" if of else f"{done / 1e6:.0f} MB"
        self._bars.update(
            self._task,
            completed=STAGES.index(self._stage) + part,
            description=f"{self._stage} {how_far}",
        )

    def warn(self, text: str) -> None:
        self._console.print(f"{self._model}: {text}", style="bold yellow", soft_wrap=True)

    def traceback(self) -> None:
        """The exception being handled, in full."""
        self._console.print_exception()

    def end(self, outcome: str) -> None:
        """The model is done with."""
        self._finish("" if outcome == "published" else f"  {outcome}")
        self._bars.remove_task(self._task)
        self._bars.advance(self._all)

    def _finish(self, outcome: str) -> None:
        if self._stage:
            seconds = time.perf_counter() - self._began_s
            line = f"{self._model:<14} {self._stage:<8} {seconds:7.1f} s{outcome}"
            self._console.print(line, soft_wrap=True)


def _table(built: dict[str, Built]) -> Table:
    table = Table(title="published", title_justify="left")
    for title in ("model", "version", "weights", "engine"):
        table.add_column(title)
    for title in ("deviation at batch", "allowed", "MB", "peak MB", "seconds"):
        table.add_column(title, justify="right")
    for name, result in built.items():
        manifest = result.manifest
        for engine in manifest.engines:
            table.add_row(
                name,
                str(manifest.version),
                "trained" if manifest.weights.trained else "UNTRAINED",
                f"{engine.name} x{engine.max_batch}",
                "  ".join(f"{size}: {share:.2%}" for size, share in engine.deviation.items())
                or "not run here",
                f"{golden.MAX_DEVIATION[engine.precision]:.1%}",
                f"{sum(file.bytes for file in engine.files) / 1e6:,.1f}",
                f"{result.peak_bytes / 1e6:,.0f}",
                f"{result.seconds:,.1f}",
            )
    return table


if __name__ == "__main__":
    sys.exit(main())
