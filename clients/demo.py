"""Command: shows the whole path at work, from engines on disk to predictions and metrics.

    python clients/demo.py --repo .demo/engines --digits .demo/digits

Starts `python -m server` on free ports, sends every digit of a folder of PNG files named
<anything>-<label>.png and one photograph, reads the server's metrics, and stops the server. Exit
status: 0; 1 if anything fails, if the accuracy is too low, or if the server does not stop cleanly.
"""

import argparse
import asyncio
import json
import os
import signal
import sys
import time
import urllib.request
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from convserve_client import Answer, AsyncClient, ClassifierError
from convserve_client.loadgen.results.samples import OK, Sample
from convserve_client.loadgen.results.summary import Summary, summarise

MODELS = ("lenet5", "resnet18")
CALLERS = 16
# Long timeouts, because the machine may be busy.
START_TIMEOUT_S = 120.0  # until the server listens
LOAD_TIMEOUT_S = 300.0  # until a model is ready
STOP_TIMEOUT_S = 45.0  # longer than the server's own drain timeout
MAX_LOG_LINES = 50
LABELS = ("model", "code", "reason")
METRICS = {  # name: unit and format of the values that the demo prints
    "convserve_requests_total": ("requests", ",.0f"),
    "convserve_images_total": ("images", ",.0f"),
    "convserve_batch_rows_count": ("batches", ",.0f"),
    "convserve_compute_seconds_total": ("s", ".3f"),
    "convserve_refused_total": ("refused", ",.0f"),
}


class DemoFailed(Exception):
    """The demo cannot continue, or a result is wrong. The message says why."""


@dataclass(slots=True)
class ServerProcess:
    """A running server and the end of its log."""

    process: asyncio.subprocess.Process
    port: int = 0
    http_port: int = 0
    log: deque[str] = field(default_factory=lambda: deque(maxlen=MAX_LOG_LINES))

    def log_text(self) -> str:
        return "\n".join(self.log) or "(its log is empty)"


@dataclass(frozen=True, slots=True)
class DigitsResult:
    """Predictions for the digits."""

    correct: int
    summary: Summary

    @property
    def accuracy(self) -> float:
        return self.correct / self.summary.total


@asynccontextmanager
async def running_server(repo: Path, console: Console) -> AsyncIterator[ServerProcess]:
    """Runs a server on free ports and stops it with SIGTERM, as an orchestrator does.

    Raises DemoFailed if the server does not start, or does not stop with status 0.
    """
    command = [sys.executable, "-m", "server", "--repo", str(repo), "--host", "127.0.0.1"]
    command += ["--port", "0", "--http-port", "0", "--log-format", "json", "--log-level", "info"]
    process = await asyncio.create_subprocess_exec(
        *command,
        stderr=asyncio.subprocess.PIPE,
        env={name: value for name, value in os.environ.items() if "CONVSERVE_" not in name},
    )
    server = ServerProcess(process)
    listening = asyncio.Event()
    reading = asyncio.create_task(_read_log(server, listening, console))
    try:
        waiting = asyncio.create_task(listening.wait())
        await asyncio.wait(
            {waiting, reading}, timeout=START_TIMEOUT_S, return_when=asyncio.FIRST_COMPLETED
        )
        waiting.cancel()
        if not listening.is_set():
            raise DemoFailed(f"the server did not start:\n{server.log_text()}")
        yield server
        process.terminate()
        try:
            status = await asyncio.wait_for(process.wait(), STOP_TIMEOUT_S)
        except TimeoutError:
            raise DemoFailed(
                f"the server was still running {STOP_TIMEOUT_S:g} s after SIGTERM"
            ) from None
        if status:
            raise DemoFailed(f"the server stopped with status {status}:\n{server.log_text()}")
        console.print("server stopped, exit status 0")
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
        await reading


async def _read_log(server: ServerProcess, listening: asyncio.Event, console: Console) -> None:
    """Reads the server's log to its end, so that the pipe never blocks the server."""
    assert server.process.stderr is not None
    async for line in server.process.stderr:
        text = line.decode(errors="replace").rstrip()
        server.log.append(text)
        try:
            entry = json.loads(text)
        except ValueError:
            continue  # a line from a library
        match entry:
            case {"event": "listening", "port": int(port), "http_port": int(http_port)}:
                server.port, server.http_port = port, http_port
                console.print(f"server: gRPC on port {port}, HTTP on port {http_port}")
                listening.set()
            case {"event": "version_failed", "model": model, "reason": reason}:
                console.print(f"FAILED: {model}: {reason}", style="bold red", markup=False)


async def classify_digits(
    client: AsyncClient, files: Sequence[Path], on_answer: Callable[[], object]
) -> DigitsResult:
    """Sends each file once, from CALLERS callers. Raises the first ClassifierError."""
    zero = time.perf_counter()
    samples: list[Sample] = []
    correct = 0
    remaining = iter(files)  # shared by all callers, so that each file is sent once

    async def caller() -> None:
        nonlocal correct
        for path in remaining:
            due_s = time.perf_counter() - zero
            answer = await client.classify(path, model="lenet5", top_k=1)
            samples.append(Sample(due_s, due_s, time.perf_counter() - zero, OK, 1))
            correct += answer.results[0][0].label == label_of(path)
            on_answer()

    async with asyncio.TaskGroup() as callers:
        for _ in range(CALLERS):
            callers.create_task(caller())
    elapsed_s = time.perf_counter() - zero
    return DigitsResult(correct, summarise(samples, 0.0, elapsed_s))


def label_of(path: Path) -> str:
    """Label in the name of a digit's file: "7" in 012-7.png."""
    return path.stem.rpartition("-")[2]


def read_metrics(http_port: int) -> dict[str, list[Any]]:
    """Samples of the server's metrics by name."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with direct.open(f"http://127.0.0.1:{http_port}/metrics", timeout=10) as response:
        text = response.read().decode()
    found: dict[str, list[Any]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, []).append(sample)
    return found


async def demonstrate(
    repo: Path, digits: Path, photo: Path, min_accuracy: float, console: Console
) -> None:
    """Raises DemoFailed, ClassifierError or OSError."""
    files = sorted(digits.glob("*.png"))
    if not files:
        raise DemoFailed(f"the folder {digits} contains no PNG files")
    this_task = asyncio.current_task()
    assert this_task is not None
    # SIGTERM must also stop the server.
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, this_task.cancel)
    async with running_server(repo, console) as server:
        async with AsyncClient(f"127.0.0.1:{server.port}", timeout_s=30) as client:
            weights: dict[str, str] = {}
            for name in MODELS:
                await client.wait_ready(LOAD_TIMEOUT_S, model=name)
                info = await client.get_model(name)
                weights[name] = info.weights
                console.print(
                    f"ready: {name} version {info.version}, {info.backend} {info.precision}",
                    highlight=False,
                )
            with Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                console=console,
                transient=True,
            ) as progress:
                task = progress.add_task("classifying digits", total=len(files))
                found = await classify_digits(client, files, lambda: progress.advance(task))
            _print_digits(found, console)
            answer = await client.classify(photo, model="resnet18")
            _print_photo(photo, answer, weights["resnet18"], console)
        _print_metrics(await asyncio.to_thread(read_metrics, server.http_port), console)
    if found.accuracy < min_accuracy:
        raise DemoFailed(f"accuracy {found.accuracy:.2%} is below {min_accuracy:.2%}")


def _table(title: str, console: Console) -> Table:
    console.print()
    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        show_header=False,
        box=None,
        padding=(0, 2, 0, 2),
    )
    table.add_column(min_width=24)
    table.add_column(justify="right")
    return table


def _print_digits(found: DigitsResult, console: Console) -> None:
    summary, latency = found.summary, found.summary.latency
    assert latency is not None, "no digit failed, and there is at least one"
    table = _table("lenet5: every held-out digit, one PNG file per call", console)
    table.add_row("accuracy", f"{found.accuracy:.2%}", f"{found.correct} of {summary.total}")
    table.add_row("throughput", f"{summary.images_hz:,.0f}", f"images/s, {CALLERS} callers")
    table.add_row("latency p50", f"{latency.p50_s * 1000:.2f}", "ms")
    table.add_row("latency p99", f"{latency.p99_s * 1000:.2f}", "ms")
    console.print(table, highlight=False)


def _print_photo(photo: Path, answer: Answer, weights: str, console: Console) -> None:
    table = _table(f"{answer.model}: photograph {escape(photo.name)}", console)
    for prediction in answer.results[0]:
        table.add_row(escape(prediction.label), f"{prediction.probability:.2%}")
    console.print(table, highlight=False)
    if not answer.trained:
        console.print(
            f"{answer.model} IS UNTRAINED ({weights}): its parameters are random numbers, so these"
            " classes mean nothing.",
            "Its public weights could not be downloaded. To use them, run `make clean demo` with"
            f" network access, or `python -m model_repo.build {answer.model} --weights file:PATH`.",
            style="bold red",
            sep="\n",
            markup=False,
            highlight=False,
        )


def _print_metrics(found: dict[str, list[Any]], console: Console) -> None:
    """Prints the values above 0. Raises DemoFailed if a metric is missing."""
    table = _table("metrics of the server, from /metrics", console)
    for name, (unit, form) in METRICS.items():
        if name not in found:
            raise DemoFailed(f"/metrics does not contain {name}")
        for sample in found[name]:
            labels = sample.labels
            if sample.value and labels.get("method", "Classify") == "Classify":
                shown = " ".join(labels[label] for label in LABELS if label in labels)
                table.add_row(f"{name}  {escape(shown)}", format(sample.value, form), unit)
    memory = found.get("process_resident_memory_bytes")
    if memory:
        table.add_row("process_resident_memory_bytes", f"{memory[0].value / 2**20:,.0f}", "MiB")
    console.print(table, highlight=False)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--repo", type=Path, required=True, help="model repository with lenet5 and resnet18")
    add("--digits", type=Path, required=True, help="folder of PNG files, <anything>-<label>.png")
    add("--photo", type=Path, help="photograph (default: a cat from scikit-image)")
    add(
        "--min-accuracy",
        type=float,
        default=0.985,
        help="lowest accepted accuracy for the digits, 0 to 1 (%(default)s)",
    )
    args = parser.parse_args(argv)
    console = Console(width=None if sys.stdout.isatty() else 100)
    failures: list[str] = []
    try:
        photo = args.photo or _cat()
        asyncio.run(demonstrate(args.repo, args.digits, photo, args.min_accuracy, console))
    except* (DemoFailed, ClassifierError, OSError) as group:
        failures += sorted({str(error) for error in _leaves(group)})
    except* asyncio.CancelledError:
        failures.append("interrupted by a signal")
    for failure in failures:
        console.print(f"demo failed: {failure}", style="bold red", markup=False, soft_wrap=True)
    if not failures:
        console.print("demo passed", style="bold green")
    return 1 if failures else 0


def _leaves(group: BaseExceptionGroup[Any]) -> Iterator[BaseException]:
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from _leaves(error)
        else:
            yield error


def _cat() -> Path:
    from skimage import data  # imported only if no photograph is given

    return Path(data.__file__).parent / "chelsea.png"


if __name__ == "__main__":
    sys.exit(main())
