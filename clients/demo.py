"""Command: shows the whole path at work, from engines on disk to answers and metrics.

    python clients/demo.py --repo .demo/engines --digits .demo/digits

Starts `python -m server` on free ports, sends it every digit of a folder of PNG files named
<anything>-<label>.png, then a photograph, reads its metrics and stops it. Exit status: 0; 1 when
anything fails, when too few digits are told right, or when the server does not stop cleanly.
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
from convserve_client.loadgen.load import (
    OK,
    Sample,
    Summary,
    summarise,
)

IN_FLIGHT = 16
# Generous: the machine may be busy with other things.
START_S = 120.0  # until the server listens
LOAD_S = 300.0  # until a model has proved itself
STOP_S = 45.0  # longer than the server's own grace
LOG_LINES = 50
LABELS = ("model", "version", "method", "code", "reason", "backend", "precision", "weights")


class DemoFailed(Exception):
    """The demonstration can't go on, or has not shown what it should; the message says why."""


@dataclass(slots=True)
class ServerProcess:
    """A server that runs beside us, and the end of its log."""

    process: asyncio.subprocess.Process
    port: int = 0
    http_port: int = 0
    log: deque[str] = field(default_factory=lambda: deque(maxlen=LOG_LINES))

    def told(self) -> str:
        return "\n".join(self.log) or "(its log is empty)"


@dataclass(frozen=True, slots=True)
class Digits:
    """What became of the digits."""

    right: int
    summary: Summary

    @property
    def accuracy(self) -> float:
        return self.right / self.summary.total


@asynccontextmanager
async def serving(repo: Path, console: Console) -> AsyncIterator[ServerProcess]:
    """Runs a server on free ports of this machine; at the end stops it as an orchestrator would.

    Raises DemoFailed where it does not start, or does not stop with status 0.
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
        await asyncio.wait({waiting, reading}, timeout=START_S, return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        if not listening.is_set():
            raise DemoFailed(f"the server did not start:\n{server.told()}")
        yield server
        process.terminate()
        try:
            status = await asyncio.wait_for(process.wait(), STOP_S)
        except TimeoutError:
            raise DemoFailed(f"the server still ran {STOP_S:g} s after SIGTERM") from None
        if status:
            raise DemoFailed(f"the server stopped with status {status}:\n{server.told()}")
        console.print("server stopped, exit status 0")
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
        await reading


async def _read_log(server: ServerProcess, listening: asyncio.Event, console: Console) -> None:
    """Reads the server's log to its end, so that it never blocks, and tells what matters of it."""
    assert server.process.stderr is not None
    async for line in server.process.stderr:
        text = line.decode(errors="replace").rstrip()
        server.log.append(text)
        try:
            entry = json.loads(text)
        except ValueError:
            continue  # a library's own
        match entry:
            case {"event": "listening", "port": int(port), "http_port": int(http_port)}:
                server.port, server.http_port = port, http_port
                console.print(f"server listens: gRPC on port {port}, HTTP on {http_port}")
                listening.set()
            case {"event": "model_ready", "model": model, "version": version, "engine": engine}:
                console.print(f"ready: {model} version {version}, {engine}", highlight=False)
            case {"event": "version_failed", "model": model, "reason": reason}:
                console.print(f"FAILED: {model}: {reason}", style="bold red", markup=False)


async def classify_digits(
    client: AsyncClient, files: Sequence[Path], answered: Callable[[], object]
) -> Digits:
    """Sends each file once, IN_FLIGHT at a time. Raises ClassifierError with the first failure."""
    zero = time.perf_counter()
    samples: list[Sample] = []
    right = 0
    left = iter(files)  # shared by all callers: each file is one's only

    async def caller(paths: Iterator[Path]) -> None:
        nonlocal right
        for path in paths:
            due_s = time.perf_counter() - zero
            answer = await client.classify(path, model="lenet5", top_k=1)
            samples.append(Sample(due_s, due_s, time.perf_counter() - zero, OK, 1))
            right += answer.results[0][0].label == label_of(path)
            answered()

    async with asyncio.TaskGroup() as callers:
        for _ in range(IN_FLIGHT):
            callers.create_task(caller(left))
    elapsed_s = time.perf_counter() - zero
    return Digits(right, summarise(samples, 0.0, elapsed_s))


def label_of(path: Path) -> str:
    """The label in the name of a digit's file: "7" of 012-7.png."""
    return path.stem.rpartition("-")[2]


def read_metrics(http_port: int) -> dict[str, list[Any]]:
    """Samples of the server's metrics by their name."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with direct.open(f"http://127.0.0.1:{http_port}/metrics", timeout=10) as response:
        text = response.read().decode()
    found: dict[str, list[Any]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, []).append(sample)
    return found


async def demonstrate(
    repo: Path, digits: Path, photo: Path, at_least: float, console: Console
) -> None:
    """Raises DemoFailed, ClassifierError or OSError."""
    files = sorted(digits.glob("*.png"))
    if not files:
        raise DemoFailed(f"there are no digits in {digits}")
    here = asyncio.current_task()
    assert here is not None
    # Whoever ends the demonstration ends its server too.
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, here.cancel)
    async with serving(repo, console) as server:
        async with AsyncClient(f"127.0.0.1:{server.port}", timeout_s=30) as client:
            for model in ("lenet5", "resnet18"):
                await client.wait_ready(LOAD_S, model=model)
            with Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                console=console,
            ) as progress:
                task = progress.add_task("digits classified", total=len(files))
                found = await classify_digits(client, files, lambda: progress.advance(task))
            _print_digits(found, console)
            info = await client.get_model("resnet18")
            _print_photo(
                photo, await client.classify(photo, model="resnet18"), info.weights, console
            )
        _print_metrics(await asyncio.to_thread(read_metrics, server.http_port), console)
    if found.accuracy < at_least:
        raise DemoFailed(
            f"{found.accuracy:.2%} of the digits were told right; at least {at_least:.2%} should be"
        )


def _print_digits(found: Digits, console: Console) -> None:
    latency = found.summary.latency
    assert latency is not None, "no digit failed, and there is at least one"
    table = Table(
        title="lenet5: every held-out digit, a PNG file a call",
        title_justify="left",
        min_width=50,
        show_header=False,
    )
    table.add_column()
    table.add_column(justify="right")
    total = found.summary.total
    table.add_row("told right", f"{found.right} of {total}")
    table.add_row("accuracy", f"{found.accuracy:.2%}")
    table.add_row("images", f"{found.summary.images_hz:,.0f} /s")
    table.add_row("calls in flight", f"{IN_FLIGHT}")
    table.add_row("latency p50", f"{latency.p50_s * 1000:.2f} ms")
    table.add_row("latency p99", f"{latency.p99_s * 1000:.2f} ms")
    console.print(table)


def _print_photo(photo: Path, answer: Answer, weights: str, console: Console) -> None:
    table = Table(
        title=f"{answer.model}: the photograph {escape(photo.name)}",
        title_justify="left",
        min_width=50,
    )
    table.add_column("class")
    table.add_column("probability", justify="right")
    for prediction in answer.results[0]:
        table.add_row(escape(prediction.label), f"{prediction.probability:.2%}")
    console.print(table)
    if not answer.trained:
        console.print(
            f"{answer.model} IS UNTRAINED ({weights}): its parameters are random numbers and these"
            " classes mean nothing.",
            "Its public weights could not be fetched when it was built. Where they can,"
            f' "make clean demo" builds it from them; or, from a file you have: python -m'
            f" model_repo.build {answer.model} --weights file:PATH",
            style="bold red",
            sep="\n",
            markup=False,
            highlight=False,
        )


def _print_metrics(found: dict[str, list[Any]], console: Console) -> None:
    """Of each kind of instrument an example; the demonstration fails where one is missing."""
    table = Table(title="from /metrics", title_justify="left", min_width=50)
    table.add_column("metric")
    table.add_column("of")
    table.add_column("value", justify="right")

    def row(name: str, scale: float = 1.0, form: str = ",.0f") -> None:
        if name not in found:
            raise DemoFailed(f"the server's metrics have no {name}")
        for sample in found[name]:
            of = " ".join(sample.labels[label] for label in LABELS if sample.labels.get(label))
            table.add_row(name, escape(of), format(sample.value * scale, form))

    row("convserve_requests_total")
    row("convserve_images_total")
    row("convserve_batch_rows_count")
    row("convserve_compute_seconds_total", form=".3f")
    row("convserve_refused_total")
    row("convserve_engine_info")
    table.add_section()
    sums, counts = (
        {sample.labels["model"]: sample.value for sample in found.get(name, ())}
        for name in ("convserve_batch_rows_sum", "convserve_batch_rows_count")
    )
    for model, batches in counts.items():
        if batches:
            table.add_row("rows a batch, mean", escape(model), f"{sums[model] / batches:.2f}")
    memory = found.get("process_resident_memory_bytes")
    if memory:
        table.add_row("server's memory", "", f"{memory[0].value / 2**20:,.0f} MiB")
    console.print(table)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--repo", type=Path, required=True, help="model repository with lenet5 and resnet18")
    add("--digits", type=Path, required=True, help="folder of PNG files, <anything>-<label>.png")
    add("--photo", type=Path, help="a photograph (a cat that comes with scikit-image)")
    add(
        "--at-least",
        type=float,
        default=0.985,
        help="share of the digits that must be told right (%(default)s)",
    )
    args = parser.parse_args(argv)
    console = Console(width=None if sys.stdout.isatty() else 100)
    photo = args.photo or _cat()
    failures: list[str] = []
    try:
        asyncio.run(demonstrate(args.repo, args.digits, photo, args.at_least, console))
    except* (DemoFailed, ClassifierError, OSError) as group:
        failures += sorted({str(error) for error in _leaves(group)})
    except* asyncio.CancelledError:
        failures.append("it was told to stop")
    for failure in failures:
        console.print(f"demo failed: {failure}", style="bold red", markup=False, soft_wrap=True)
    if not failures:
        console.print("demo: all is well", style="bold green")
    return 1 if failures else 0


def _leaves(group: BaseExceptionGroup[Any]) -> Iterator[BaseException]:
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from _leaves(error)
        else:
            yield error


def _cat() -> Path:
    from skimage import data  # only the default needs it

    return Path(data.__file__).parent / "chelsea.png"


if __name__ == "__main__":
    sys.exit(main())
