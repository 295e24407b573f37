"""Runs the command of model_repo.build: reads its options, builds, and prints the results."""

from __future__ import annotations

import argparse
import gc
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from model_repo import cards, weights
from model_repo.card_files.new_card import NewCardError, write_card
from model_repo.card_files.sources import CardSource
from model_repo.evaluation.gate import DEFAULT_MAX_DROP, Gate
from model_repo.interruption import Interruption
from model_repo.pipeline import BuildError, BuildOptions, BuildResult, build
from model_repo.progress import ConsoleProgress
from model_repo.quantization.engine import DEFAULT_MIN_AGREEMENT
from server.engines.base import BACKENDS, backend
from server.engines.golden_check import MAX_DEVIATION
from server.engines.tensorrt import libraries as tensorrt_libraries
from server.repository import writer

PRECISIONS = {
    "fp32": "fp32",
    "f32": "fp32",
    "bf16": "bf16",
    "fp16": "fp16",
    "f16": "fp16",
    "int8": "int8",
}


def run(arguments: Sequence[str] | None, interruption: Interruption) -> int:
    """Returns the exit status."""
    known = cards.names()
    parser = _parser(known)
    given = parser.parse_args(arguments)
    if given.new_card:
        return _write_card(parser, given)
    models, options = _what_to_build(parser, given, known)
    interruption.before_exit(writer.discard_unfinished)
    terminal = sys.stdout.isatty()
    console = Console(markup=False, highlight=False, emoji=False, width=None if terminal else 132)
    results: dict[str, BuildResult] = {}
    failures: dict[str, str] = {}
    with ConsoleProgress(console, len(models), live=terminal) as progress:
        for name, card in models.items():
            progress.start_model(name)
            try:
                results[name] = build(card, options, progress)
            except BuildError as error:
                failures[name] = str(error)
            except Exception as error:  # our own bug; the other models are still built
                progress.print_traceback()
                failures[name] = f"{type(error).__name__}: {error}"
            progress.finish_model(failed=name in failures)
            gc.collect()
    if results:
        console.print(_table(results, options.repo))
        if not options.add_engine:
            print(f"Serve it: convserve serve --repo {_typed(options.repo)}")
    for name, reason in failures.items():
        print(f"{name} was not built: {reason}", file=sys.stderr)
    if failures and results:
        print(f"{len(failures)} of {len(models)} models were not built", file=sys.stderr)
    return 1 if failures else 0


def _write_card(parser: argparse.ArgumentParser, given: argparse.Namespace) -> int:
    """Writes the card of --new-card. Returns the exit status."""
    if given.names or given.all or given.name:
        parser.error("--new-card only writes a card; build it after you have read it")
    if not given.checkpoint:
        parser.error("--new-card needs --from CHECKPOINT")
    try:
        card = write_card(Path(given.new_card), Path(given.checkpoint), force=given.force)
    except NewCardError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{card.path}: {card.architecture} with {card.classes} classes")
    if not card.labels_exist:
        print(f"Write {card.labels}: {card.classes} names, one per line, in the training's order.")
    print(f"Check how images were prepared, then run: convserve build {_typed(card.path)}")
    return 0


def _typed(path: Path) -> str:
    """The path as it must be typed: quoted if it needs it."""
    return shlex.quote(str(path))


def _what_to_build(
    parser: argparse.ArgumentParser, given: argparse.Namespace, known: Sequence[str]
) -> tuple[dict[str, str | CardSource], BuildOptions]:
    """The cards by the names to show, and the options. Exits with status 2 for wrong usage."""
    for option in ("checkpoint", "force"):
        if getattr(given, option):
            name = {"checkpoint": "from"}.get(option, option)
            parser.error(f"--{name} belongs to --new-card CARD.toml")
    models = _models(parser, given, known)
    if given.weights and len(models) > 1:
        parser.error(f"--weights is for one model, not for {len(models)}; build them one by one")
    if given.weights and given.add_engine:
        parser.error(
            "--weights and --add-engine exclude each other: the new engine has the weights of the "
            "published version"
        )
    try:
        options = BuildOptions(
            repo=given.repo,
            backend=given.backend,
            precision=PRECISIONS.get(given.precision, ""),
            weights=None if given.name else given.weights,
            min_batch=given.min_batch,
            opt_batch=given.opt_batch,
            max_batch=given.max_batch,
            hardware=tuple(filter(None, given.compute_capability.split(","))),
            variant=given.tensorrt_variant,
            or_random=given.or_random,
            allow_code=given.allow_code,
            add_engine=given.add_engine,
            gate=_gate(given),
            calibration=given.calibration,
            min_agreement=given.min_agreement,
        )
        for name in options.backends:
            backend(name).version()
    except ValueError as error:
        parser.error(str(error))
    except ImportError as error:
        parser.error(f"the library of backend {name} is not installed: {error}")
    return models, options


def _gate(given: argparse.Namespace) -> Gate | None:
    """Raises ValueError."""
    if given.data is None:
        for name in ("min_top1", "max_drop"):
            if getattr(given, name) is not None:
                raise ValueError(f"--{name.replace('_', '-')} needs labelled images: add --data")
        return None
    max_drop = DEFAULT_MAX_DROP if given.max_drop is None else given.max_drop
    return Gate(data=given.data, min_top1=given.min_top1, max_drop=max_drop)


def _models(
    parser: argparse.ArgumentParser, given: argparse.Namespace, known: Sequence[str]
) -> dict[str, str | CardSource]:
    """What to build, by the name that messages show."""
    if given.name:
        if given.names or given.all:
            parser.error("--name builds one model without a card; remove the names of cards")
        return {given.name: _card_of_options(parser, given)}
    for option in ("base", "labels"):
        if getattr(given, option):
            parser.error(f"--{option} is for a model without a card; add --name NAME")
    if given.all == bool(given.names):
        parser.error(
            "name the models to build, or use --all; give the name of a card "
            f"({', '.join(known)}), or the path of one of your own"
        )
    names = known if given.all else list(dict.fromkeys(given.names))
    if unknown := [name for name in names if not (cards.is_card_path(name) or name in known)]:
        parser.error(
            f"there is no card {', '.join(map(repr, unknown))}; cards: {', '.join(known)}. "
            "For a card of your own give its path, for example ./NAME.toml"
        )
    models: dict[str, str | CardSource] = {}
    for name in names:
        title = Path(name).stem if cards.is_card_path(name) else name
        models[name if title in models else title] = name  # two cards may have the same file name
    return models


def _card_of_options(parser: argparse.ArgumentParser, given: argparse.Namespace) -> CardSource:
    """A card that the options describe. Its paths start in the current folder."""
    table = {key: getattr(given, key) for key in ("name", "base", "weights", "labels")}
    if missing := [f"--{key}" for key in ("base", "weights", "labels") if not table[key]]:
        parser.error(f"--name needs {' and '.join(missing)} too, or a card instead of it")
    # A text in TOML is written as in JSON.
    lines = [f"{key} = {json.dumps(value)}\n" for key, value in table.items()]
    return CardSource("of --name", Path.cwd(), "".join(lines).encode())


def _parser(known: Sequence[str]) -> argparse.ArgumentParser:
    command = sys.argv[0] if sys.argv[0] == "convserve build" else "python -m model_repo.build"
    parser = argparse.ArgumentParser(
        prog=command,
        usage=f"{command} CARD... | --all | --name NAME --base CARD --weights FILE --labels FILE "
        "| --new-card CARD --from FILE [OPTION ...]",
        description="Builds models and publishes each as a new version in a model repository. "
        "A card describes a model: give the name of one of ours, or the path of your own.",
        epilog=f"Cards: {', '.join(known)}.",
    )
    option = parser.add_argument
    option("names", nargs="*", metavar="CARD", help="name or path of a card: resnet50, my/net.toml")
    option("--all", action="store_true", help="build the models of all cards")
    option(
        "--repo",
        type=Path,
        default=Path("model_repo/engines"),
        metavar="DIR",
        help="model repository; it is created if it does not exist (%(default)s)",
    )
    _add_card_options(parser)
    _add_weights_options(parser)
    _add_code_option(parser)
    _add_engine_options(parser)
    _add_gpu_options(parser)
    _add_gate_options(parser)
    return parser


def _add_card_options(parser: argparse.ArgumentParser) -> None:
    option = parser.add_argument_group("a model without a card").add_argument
    option("--name", metavar="NAME", help="name of the model; needs the two options below")
    option("--base", metavar="CARD", help="card that says everything else, for example resnet50")
    option(
        "--labels",
        metavar="FILE",
        help="names of the classes: one per line, or .json or .csv",
    )
    option = parser.add_argument_group("write a card").add_argument
    option(
        "--new-card",
        metavar="CARD",
        help="write a commented card for the checkpoint of --from, and build nothing",
    )
    option("--from", dest="checkpoint", metavar="FILE", help="checkpoint to recognise")
    option("--force", action="store_true", help="overwrite an existing card")


def _add_weights_options(parser: argparse.ArgumentParser) -> None:
    option = parser.add_argument_group("weights").add_argument
    option(
        "--weights",
        metavar="SRC",
        help="use these weights and not those of the card, for one model: a file, or "
        f"{weights.SOURCES}",
    )
    option(
        "--or-random",
        action="store_true",
        help="if the weights cannot be downloaded or found, publish an untrained network; the "
        "server marks it as untrained",
    )


def _add_code_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--allow-code",
        action="store_true",
        help="run code that comes with a model while it is built: TorchScript programs. Use it "
        "only for files that you trust; the server runs no such code",
    )


def _add_engine_options(parser: argparse.ArgumentParser) -> None:
    option = parser.add_argument_group("engine").add_argument
    option(
        "--backend",
        default="openvino",
        metavar="B",
        help=f"{', '.join(BACKENDS)}, or several separated by commas (%(default)s)",
    )
    option(
        "--precision",
        choices=("auto", *PRECISIONS),
        default="auto",
        metavar="P",
        help="fp32, bf16, fp16, int8, or auto: the fastest but int8 that this machine supports "
        "natively (%(default)s)",
    )
    option(
        "--calibration",
        type=Path,
        metavar="DIR",
        help="images like those of your callers, for int8: about 300 set the ranges of the "
        "numbers, others check the result; no labels needed",
    )
    option(
        "--min-agreement",
        type=float,
        default=DEFAULT_MIN_AGREEMENT,
        metavar="X",
        help="least fraction of images to which int8 gives the class of float32, if --data does "
        "not measure the accuracy (%(default)s)",
    )
    option("--max-batch", type=int, metavar="N", help="largest batch (default: see the card)")
    option(
        "--add-engine",
        action="store_true",
        help="publish no new version, but add an engine to the newest one; needs no weights",
    )


def _add_gpu_options(parser: argparse.ArgumentParser) -> None:
    option = parser.add_argument_group("GPU engines").add_argument
    option(
        "--opt-batch",
        type=int,
        metavar="N",
        help="batch size that the engine is tuned for (default: see the card)",
    )
    option(
        "--min-batch",
        type=int,
        default=1,
        metavar="N",
        help="smallest batch; smaller ones are padded (%(default)s)",
    )
    option(
        "--compute-capability",
        default="",
        metavar="C",
        help="GPUs to compile for, for example 8.9 or 89,120 (default: the GPU of this machine; "
        "without one, every GPU from 8.0 on that TensorRT-RTX supports)",
    )
    option(
        "--tensorrt-variant",
        choices=tensorrt_libraries.VARIANTS,
        default="auto",
        help="tensorrt (datacenter GPUs) or rtx; auto takes the first one that is installed",
    )


def _add_gate_options(parser: argparse.ArgumentParser) -> None:
    option = parser.add_argument_group("accuracy that a new version must reach").add_argument
    option(
        "--data",
        type=Path,
        metavar="PATH",
        help="labelled images, as for `convserve evaluate`; a version that fails is not published",
    )
    option("--min-top1", type=float, metavar="X", help="least top-1, for example 0.75")
    option(
        "--max-drop",
        type=float,
        metavar="X",
        help="most that top-1 may be below that of float32 PyTorch, and below that of the version "
        f"that is served ({DEFAULT_MAX_DROP:g})",
    )


def _table(results: dict[str, BuildResult], repo: Path) -> Table:
    table = Table(title=f"published to {repo}", title_justify="left")
    for title in ("model", "version", "weights", "engine"):
        table.add_column(title)
    for title in ("deviation at batch", "allowed", "MB", "peak MB", "seconds"):
        table.add_column(title, justify="right")
    for name, result in results.items():
        manifest = result.manifest
        for engine in manifest.engines:
            table.add_row(
                name,
                str(manifest.version),
                "trained" if manifest.weights.trained else "UNTRAINED",
                f"{engine.name} x{engine.max_batch}",
                "  ".join(f"{size}: {share:.2%}" for size, share in engine.deviation.items())
                or "not checked here",
                f"{MAX_DEVIATION[engine.precision]:.1%}",
                f"{sum(file.bytes for file in engine.files) / 1e6:,.1f}",
                f"{result.peak_bytes / 1e6:,.0f}",
                f"{result.seconds:,.1f}",
            )
    return table
