"""Runs the command of model_repo.evaluate: reads its options, measures, and prints the results."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from errno import EROFS
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from model_repo.evaluation.dataset import DataError, DataSet, Sample, read_data
from model_repo.evaluation.eager import eager_network
from model_repo.evaluation.evaluation import Evaluated, Predict, encoded, evaluate
from model_repo.evaluation.local import opened_engine, predict_eagerly, predict_with_engine
from model_repo.evaluation.predictions import Predictions
from model_repo.evaluation.report import html_of
from model_repo.evaluation.tables import MAX_FILES, print_tables
from server.engines.base import Engine
from server.errors import EngineFailure
from server.repository import reader
from server.repository.contents import VersionEntry, list_versions
from server.repository.evaluation import write_evaluation
from server.repository.manifest import InvalidVersion, Manifest

EAGER = "eager"


def run(arguments: Sequence[str] | None) -> int:
    """Returns the exit status."""
    given = _parse(arguments)
    console = Console(
        markup=False, highlight=False, emoji=False, width=None if sys.stdout.isatty() else 110
    )
    errors = Console(stderr=True, markup=False, highlight=False, emoji=False, soft_wrap=True)
    try:
        measure = _measure_server if given.server else _measure
        with _progress(errors) as progress:
            measured = measure(given, progress)
        _write(given, measured)
    except (DataError, InvalidVersion, EngineFailure) as error:
        print(f"{given.model} was not evaluated: {error}", file=sys.stderr)
        return 1
    _warn(errors, measured)
    if given.json:
        sys.stdout.write(encoded(measured.document).decode())
    else:
        print_tables(console, measured.document)
    return 0


NewBar = Callable[[str, int], Callable[[int], None]]


@contextmanager
def _progress(console: Console) -> Iterator[NewBar]:
    """Makes progress bars; they are shown on a terminal only."""
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not sys.stderr.isatty(),
    ) as bars:

        def new_bar(title: str, total: int) -> Callable[[int], None]:
            task = bars.add_task(title, total=total)
            return lambda done: bars.update(task, completed=done)

        yield new_bar


def _measure(given: argparse.Namespace, new_bar: NewBar) -> Evaluated:
    """Measures an engine of the repository. Raises DataError, InvalidVersion, EngineFailure."""
    entry, manifest = _version(given.repo, given.model, given.version)
    labels = reader.open_version(entry.folder, manifest).labels
    data = read_data(given.data, labels)
    references: list[Predict] = []
    for against in given.against:
        if against == EAGER:
            served = eager_network(manifest, given.card, given.weights, allow_code=given.allow_code)
            references.append(
                lambda samples, served=served: predict_eagerly(  # type: ignore[misc]
                    served, manifest.input.spec(), samples, new_bar("eager PyTorch", len(samples))
                )
            )
        else:
            other, others_manifest = _version(given.repo, given.model, int(against))
            _check_labels(other, others_manifest, labels)
            references.append(partial(_with_best_engine, other, others_manifest, new_bar))
    with opened_engine(entry.folder, manifest, given.engine) as (engine, name):
        return evaluate(
            data,
            labels,
            partial(_classify, entry, manifest, engine, name, new_bar),
            references,
            model=given.model,
            version=entry.version,
            engine=name,
        )


def _with_best_engine(
    entry: VersionEntry, manifest: Manifest, new_bar: NewBar, samples: Sequence[Sample]
) -> Predictions:
    with opened_engine(entry.folder, manifest) as (engine, name):
        return _classify(entry, manifest, engine, name, new_bar, samples)


def _classify(
    entry: VersionEntry,
    manifest: Manifest,
    engine: Engine,
    name: str,
    new_bar: NewBar,
    samples: Sequence[Sample],
) -> Predictions:
    source = f"{entry.model} version {entry.version}, {name}"
    bar = new_bar(source, len(samples))
    return predict_with_engine(engine, manifest.input.spec(), samples, source, bar)


def _version(repo: Path, model: str, number: int) -> tuple[VersionEntry, Manifest]:
    """A valid version: that number, or the newest. Raises DataError."""
    try:
        versions = [entry for entry in list_versions(repo) if entry.model == model]
    except OSError as error:
        raise DataError(f"--repo {repo} can't be read: {error.strerror}") from None
    if not versions:
        raise DataError(f"--repo {repo} has no model {model!r}")
    for entry in versions:
        if number in (0, entry.version) and entry.manifest is not None:
            if entry.manifest.activation != "softmax":
                raise DataError(
                    f"{model} gives each class a probability of its own (sigmoid); only models "
                    "with one class per image (softmax) can be evaluated"
                )
            return entry, entry.manifest
    known = ", ".join(str(entry.version) for entry in versions if entry.manifest is not None)
    raise DataError(
        f"--repo {repo} has no valid version {number or ''} of {model}; it has {known or 'none'}"
    )


def _check_labels(other: VersionEntry, manifest: Manifest, labels: Sequence[str]) -> None:
    if reader.open_version(other.folder, manifest).labels != tuple(labels):
        raise DataError(
            f"--against {other.version}: that version has other classes, so the two can't be "
            "compared"
        )


def _measure_server(given: argparse.Namespace, new_bar: NewBar) -> Evaluated:
    """Measures a model of a running server. Raises DataError."""
    try:
        from model_repo.evaluation.remote import model_of, predict_with_server
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "convserve_client":
            raise
        raise DataError(
            "--server needs the Python client: pip install convserve-client, or pip install "
            "./clients/convserve_client in a checkout"
        ) from None
    model = model_of(given.server, given.model, given.version)
    if model.activation not in ("", "softmax"):
        raise DataError(
            f"{given.model} gives each class a probability of its own (sigmoid); only models with "
            "one class per image (softmax) can be evaluated"
        )
    data: DataSet = read_data(given.data, model.labels)

    def predict(number: int, samples: Sequence[Sample]) -> Predictions:
        chosen = model if number == model.version else model_of(given.server, given.model, number)
        if chosen.labels != model.labels:
            raise DataError(
                f"--against {number}: that version has other classes, so the two can't be compared"
            )
        bar = new_bar(f"{chosen.name} version {chosen.version}", len(samples))
        return predict_with_server(given.server, chosen, samples, bar)

    return evaluate(
        data,
        model.labels,
        partial(predict, model.version),
        [partial(predict, int(number)) for number in given.against],
        model=model.name,
        version=model.version,
        engine=f"{model.backend}-{model.precision}",
    )


def _write(given: argparse.Namespace, measured: Evaluated) -> None:
    """Writes the files that the options ask for. Raises DataError."""
    if given.report is not None:
        try:
            given.report.write_text(html_of(measured), "utf-8")
        except OSError as error:
            raise DataError(f"--report {given.report} can't be written: {error.strerror}") from None
    if given.record:
        document = measured.document
        folder = given.repo / document.model / str(document.version)
        try:
            write_evaluation(folder, encoded(document))
        except OSError as error:
            read_only = " (the repository is read-only)" if error.errno == EROFS else ""
            raise DataError(
                f"--record can't write evaluation.json into {folder}: {error.strerror}{read_only}. "
                "Run without --record, or with a repository that this user may write"
            ) from None


def _warn(console: Console, measured: Evaluated) -> None:
    document = measured.document
    if bad := document.unreadable_files:
        console.print(f"warning: {len(bad)} images can't be read and are in no figure:")
        for line in bad[:MAX_FILES]:
            console.print(f"  {line}")
    if ignored := measured.data.ignored:
        names = ", ".join(path.name for path in ignored[:MAX_FILES])
        more = ", ..." if len(ignored) > MAX_FILES else ""
        console.print(
            f"warning: {len(ignored)} files are not images and were ignored: {names}{more}"
        )
    present = {sample.label for sample in measured.data.samples}
    if missing := len(measured.labels) - len(present):
        console.print(f"note: {missing} of {len(measured.labels)} classes have no images")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Exits with status 2 for wrong usage."""
    command = (
        sys.argv[0] if sys.argv[0] == "convserve evaluate" else "python -m model_repo.evaluate"
    )
    parser = argparse.ArgumentParser(
        prog=command,
        description="Measures how well a published model classifies labelled images.",
        allow_abbrev=False,
    )
    _add_options(parser)
    given = parser.parse_args(arguments)
    for against in given.against:
        if against != EAGER and not (against.isascii() and against.isdecimal() and int(against)):
            parser.error(f"--against is {against!r}; give {EAGER} or the number of a version")
        if against == EAGER and given.server:
            parser.error("--against eager needs a repository, not --server")
    if given.version < 0:
        parser.error(f"--version is {given.version}; give the number of a version")
    if given.server and (given.record or given.engine):
        name = "--record" if given.record else "--engine"
        parser.error(f"{name} needs a repository, not --server")
    return given


def _add_options(parser: argparse.ArgumentParser) -> None:
    option = parser.add_argument
    option("model", metavar="MODEL", help="name of the model")
    option(
        "--data",
        type=Path,
        required=True,
        metavar="PATH",
        help="labelled images: a folder with one subfolder per class, named by label or index; or "
        "a CSV file with the columns file and label",
    )
    option(
        "--repo",
        type=Path,
        default=Path("model_repo/engines"),
        metavar="DIR",
        help="model repository (%(default)s)",
    )
    option("--version", type=int, default=0, metavar="N", help="version (default: the newest)")
    option("--engine", default="", metavar="NAME", help="engine (default: the best one here)")
    option("--server", metavar="HOST:PORT", help="measure a running server through gRPC instead")
    option(
        "--against",
        action="append",
        default=[],
        metavar="REF",
        help="compare with eager (float32 PyTorch), or with the version of this number; repeat it "
        "for several",
    )
    option("--card", default="", metavar="CARD", help="card of the model, for --against eager")
    option("--weights", default="", metavar="SRC", help="weights, for --against eager")
    option(
        "--allow-code",
        action="store_true",
        help="run code that comes with the model, for --against eager",
    )
    option("--json", action="store_true", help="print all results as JSON")
    option("--report", type=Path, metavar="FILE", help="write a page with plots (HTML)")
    option(
        "--record",
        action="store_true",
        help="write evaluation.json beside the manifest; the server then shows the result",
    )
