"""Command: how much of a bare engine's speed is left behind gRPC, on this machine, now.

    python -m tests.benchmarks.serving --repo .demo/engines --model resnet50

Throughput: callers that ask and wait, with one raw image a call (16 callers) and with as many as
the engine takes in a batch (by as few callers as have 64 images between them, or 4), against the
bare engine with every instance kept busy at the batch size that gives most. Latency: a caller
alone, with the plain stub of gRPC and no event loop of its own, against one bare instance at
batch 1.

The two sides are measured in turn, each while the other is idle, and only neighbouring turns are
compared: a ratio, or a difference, for each pair, and then the median of those. A machine that
slows down meanwhile slows down both sides of a pair. The callers share the machine with the server,
as `make bench` says; the bare engine has it to itself.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import IO, Any

import grpc
from rich.console import Console
from rich.table import Table

from convserve_client.loadgen.argument_types import at_least, positive
from convserve_client.loadgen.images import synthetic_image
from convserve_client.stubs import classify_pb2_grpc
from server.api.stubs import classify_pb2 as pb
from server.engines.base import instances_by_units
from server.models.loader import EngineLoader
from server.process.cores import available_cores
from server.repository.contents import list_versions
from tests.benchmarks.bare import keep_busy, newest_version

ROOT = Path(__file__).resolve().parent.parent.parent
ROWS = (1, 2, 4, 8, 16, 32, 64)  # batch sizes tried on the bare engine, as far as it takes them
CALLERS = 16
IMAGES_IN_FLIGHT = 64  # of callers with several each: more would wait longer than a turn lasts
SLICES, SLICE_S = 8, 0.25  # turns of a lone caller in a round: short, as less changes meanwhile
START_S = 300.0  # loading a large network on a busy machine
STOP_S = 30.0  # for a server to end once it is told to; then it is killed
SPARE_S = 60.0  # of a load, beyond what it is to last
SURVEY_S = 1.5
WARMUP_S = 1.0
DEADLINE_MS = "60000"  # of calls that are to be answered, however slow the network


@dataclass(frozen=True, slots=True)
class Setup:
    """One way to use the bare engine: batches of `rows` on all instances of one kind."""

    units: int  # cores that an instance of that kind occupies
    instances: int
    rows: int

    def __str__(self) -> str:
        cores = "1 core" if self.units == 1 else f"{self.units} cores"
        return f"{self.instances} x {cores}, batch {self.rows}"


@dataclass(slots=True)
class Pairs:
    """One figure on both sides; the values at one place are of neighbouring turns."""

    bare: list[float] = field(default_factory=list)
    served: list[float] = field(default_factory=list)

    def ratios(self) -> list[float]:
        """Served to bare, of each pair."""
        return [served / bare for bare, served in zip(self.bare, self.served, strict=True)]

    def differences(self) -> list[float]:
        """Served less bare, of each pair."""
        return [served - bare for bare, served in zip(self.bare, self.served, strict=True)]


def middle_half(values: Sequence[float]) -> tuple[float, float]:
    """The first and the third quartile."""
    if len(values) == 1:
        return values[0], values[0]
    first, _, third = quantiles(values, n=4, method="inclusive")
    return first, third


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """A model behind gRPC beside its bare engine."""

    model: str
    engine: str
    trained: bool
    best: Setup
    alone: Setup
    single_hz: Pairs  # images a second, one a call
    single_rows: float  # of a batch, the median
    batched_images: int  # a call
    batched_callers: int
    batched_hz: Pairs  # images a second, so many a call
    batched_rows: float
    lone_ms: Pairs  # one image, nobody else calling


# --- the bare engine, in a process of its own ------------------------------------------------


def bare_process(repo: Path, model: str) -> None:
    """Loads the engine, then answers each line that `BareEngine.measure` writes."""
    version = newest_version(repo, model)
    loaded = EngineLoader(threads=available_cores()).load(version)
    groups = {group[0].units: group for group in instances_by_units(loaded.engine)}
    kinds = [{"units": units, "instances": len(group)} for units, group in groups.items()]
    assert version.manifest is not None
    about = {
        "engine": loaded.record.name,
        "trained": version.manifest.weights.trained,
        "kinds": kinds,
        "max_batch": loaded.engine.max_batch,
    }
    print(json.dumps(about), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        group = groups[asked["units"]][: asked["instances"]]
        rows_hz, batch_s = keep_busy(group, asked["rows"], asked["seconds"])
        print(json.dumps({"rows_hz": rows_hz, "batch_s": batch_s}), flush=True)


class BareEngine:
    """The process of `bare_process`; idle between measurements."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        about = self._answer()
        self.engine: str = about["engine"]
        self.trained: bool = about["trained"]
        self.max_batch: int = about["max_batch"]
        self.setups = [
            Setup(kind["units"], kind["instances"], rows)
            for kind in about["kinds"]
            for rows in ROWS
            if rows <= self.max_batch
        ]
        self.lone_setups = [Setup(kind["units"], 1, 1) for kind in about["kinds"]]

    def measure(self, setup: Setup, seconds: float) -> tuple[float, float]:
        """Images a second, and the median batch's seconds."""
        question = asdict(setup) | {"seconds": seconds}
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        answer = self._answer()
        return answer["rows_hz"], answer["batch_s"]

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"bench: the bare engine ended with status {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer


@contextmanager
def bare_engine(repo: Path, model: str) -> Iterator[BareEngine]:
    command = [
        sys.executable,
        "-m",
        "tests.benchmarks.serving",
        "--repo",
        str(repo),
        "--model",
        model,
    ]
    with subprocess.Popen(
        [*command, "--bare"],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield BareEngine(process)
        finally:
            process.kill()


# --- the same engine, served -----------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ServedEngine:
    """A server on this machine, asked by clients/bench.py."""

    port: int
    model: str
    pid: int

    def measure(self, callers: int, seconds: float, *options: str) -> dict[str, Any]:
        """The report of clients/bench.py. SystemExit when a call failed."""
        closed = ("--concurrency", str(callers), "--deadline-ms", DEADLINE_MS)
        report = self.load(*closed, *options, seconds=seconds)
        if report["counts"].keys() != {"OK"}:
            raise SystemExit(f"bench: calls failed: {report['counts']}")
        return report

    @contextmanager
    def stub(self) -> Iterator[Any]:
        """Classifier's, on a connection of its own."""
        with grpc.insecure_channel(f"127.0.0.1:{self.port}") as channel:
            stub: Any = classify_pb2_grpc.ClassifierStub
            yield stub(channel)

    def request(self) -> pb.ClassifyRequest:
        """An image of raw pixels."""
        with self.stub() as stub:
            model = stub.GetModel(pb.GetModelRequest(model=self.model), timeout=10)
        height, width, channels = model.height, model.width, model.channels
        data = synthetic_image(height, width, channels, 0).tobytes()
        raw = pb.RawImage(height=height, width=width, channels=channels, data=data)
        return pb.ClassifyRequest(model=self.model, images=[pb.Image(raw=raw)])

    @staticmethod
    def alone_ms(stub: Any, request: pb.ClassifyRequest, seconds: float) -> float:
        """Median latency of a lone caller that asks and waits."""
        latencies: list[float] = []
        ends_s = time.perf_counter() + seconds
        while (began_s := time.perf_counter()) < ends_s or not latencies:
            stub.Classify(request, timeout=10)
            latencies.append(time.perf_counter() - began_s)
        return 1e3 * median(latencies[len(latencies) // 5 :])  # the first ones warm up

    def load(self, *options: str, seconds: float) -> dict[str, Any]:
        """The report of clients/bench.py under a load of any kind. SystemExit when it gave none."""
        command = [sys.executable, "clients/bench.py", "--target", f"127.0.0.1:{self.port}"]
        command += ["--model", self.model, "--json", "-", *options]
        command += ["--duration-s", str(seconds), "--warmup-s", str(WARMUP_S)]
        limit_s = WARMUP_S + seconds + SPARE_S
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=limit_s)
        if not done.stdout:
            raise SystemExit(f"bench: the load failed:\n{done.stderr}")
        report: dict[str, Any] = json.loads(done.stdout)
        return report


@contextmanager
def served_engine(
    repo: Path, *models: str, options: Sequence[str] = (), start_s: float = START_S
) -> Iterator[ServedEngine]:
    """A server of these models, ready within `start_s`; the first is the one to measure."""
    command = [sys.executable, "-m", "server", "--repo", str(repo), "--models", ",".join(models)]
    command += ["--host", "127.0.0.1", "--port", "0", "--http-port", "0", *options]
    with subprocess.Popen(
        [*command, "--log-format", "json", "--log-level", "info"],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stderr is not None
            listening = _listening(process.stderr)
            # Nobody asks what it logs from here on, but a pipe that is full would hold it up.
            threading.Thread(target=process.stderr.read, daemon=True).start()
            _await_ready(process, listening["http_port"], start_s)
            yield ServedEngine(listening["port"], models[0], process.pid)
        finally:
            process.terminate()
            try:
                process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()


def _listening(log: IO[str]) -> dict[str, Any]:
    lines = []
    for line in log:
        lines.append(line)
        if line.startswith("{"):
            entry: dict[str, Any] = json.loads(line)
            if entry["event"] == "listening":
                return entry
    raise SystemExit("bench: the server did not start:\n" + "".join(lines))


def _await_ready(process: subprocess.Popen[str], http_port: int, start_s: float) -> None:
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    ends_s = time.monotonic() + start_s
    while time.monotonic() < ends_s and process.poll() is None:
        try:
            with direct.open(f"http://127.0.0.1:{http_port}/readyz", timeout=5):
                return
        except urllib.error.URLError:  # an answer of 503 is one too
            time.sleep(0.2)
    raise SystemExit("bench: the server did not get ready")


# --- both ------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    parser = parser_of(__doc__, rounds=5, seconds=4.0)
    add = parser.add_argument
    add("--json", type=Path, metavar="FILE", help="write the figures there too")
    add("--bare", action="store_true", help=argparse.SUPPRESS)  # how it starts its own helper
    args = parser.parse_args(argv)
    repo = args.repo.resolve()
    if args.bare:
        bare_process(repo, args.model)
        return 0
    console = Console(width=None if sys.stdout.isatty() else 100, highlight=False)
    found = compare(repo, args.model, args.rounds, args.seconds, console)
    console.print(_table(found))
    if args.json:
        args.json.write_text(json.dumps(asdict(found), indent=2) + "\n")
    return 0


def compare(repo: Path, model: str, rounds: int, seconds: float, console: Console) -> Comparison:
    """Builds the model where it is missing, and measures it; a turn takes `seconds`."""
    build_if_missing(repo, model, console)
    console.print(f"loading {model}: the bare engine, then the server")
    with (
        bare_engine(repo, model) as bare,
        served_engine(repo, model) as served,
        served.stub() as stub,
    ):
        best, alone = _survey(bare, console)
        images = bare.max_batch
        callers = max(4, min(CALLERS, IMAGES_IN_FLIGHT // images))
        several = ("--images-per-call", str(images))
        request = served.request()
        single, batched, lone = Pairs(), Pairs(), Pairs()
        single_rows: list[float] = []
        batched_rows: list[float] = []

        def single_turn() -> None:
            report = served.measure(CALLERS, seconds)
            single.served.append(report["images_hz"])
            single_rows.append(report["server_mean_batch_rows"])

        def batched_turn() -> None:
            report = served.measure(callers, seconds, *several)
            batched.served.append(report["images_hz"])
            batched_rows.append(report["server_mean_batch_rows"])

        for number in range(1, rounds + 1):
            # The bare turn stands between, next to both, and who is first takes turns.
            before, after = (single_turn, batched_turn)[:: -1 if number % 2 else 1]
            before()
            bare_hz = bare.measure(best, seconds)[0]
            single.bare.append(bare_hz)
            batched.bare.append(bare_hz)
            after()
            for _ in range(SLICES):
                lone.bare.append(bare.measure(alone, SLICE_S)[1] * 1e3)
                lone.served.append(served.alone_ms(stub, request, SLICE_S))
            console.print(
                f"  {model}, round {number} of {rounds}: bare {bare_hz:,.1f} images/s, served "
                f"{single.served[-1]:,.1f}, by {images} a call {batched.served[-1]:,.1f}; "
                f"alone {median(lone.bare[-SLICES:]):.2f} ms bare, "
                f"{median(lone.differences()[-SLICES:]):+.2f} ms served"
            )
    return Comparison(
        model=model,
        engine=bare.engine,
        trained=bare.trained,
        best=best,
        alone=alone,
        single_hz=single,
        single_rows=median(single_rows),
        batched_images=images,
        batched_callers=callers,
        batched_hz=batched,
        batched_rows=median(batched_rows),
        lone_ms=lone,
    )


def _survey(bare: BareEngine, console: Console) -> tuple[Setup, Setup]:
    """The setup that gives most, and the one that is done soonest with a single image."""
    rates_hz: dict[Setup, list[float]] = {}
    for setup in bare.setups:
        rates_hz[setup] = [bare.measure(setup, SURVEY_S)[0]]
        console.print(f"  bare, {setup}: {rates_hz[setup][0]:,.1f} images/s")
    # A short look may take one for the other: the two best have two more.
    finalists = sorted(rates_hz, key=lambda setup: -rates_hz[setup][0])[:2]
    for setup in finalists * 2:
        rates_hz[setup].append(bare.measure(setup, SURVEY_S)[0])
    alone = min(bare.lone_setups, key=lambda setup: bare.measure(setup, SURVEY_S)[1])
    return max(finalists, key=lambda setup: median(rates_hz[setup])), alone


def _table(found: Comparison) -> Table:
    def row(name: str, values: Sequence[float], form: str, **style: Any) -> None:
        low, high = middle_half(values)
        extremes = f"{min(values):{form}} to {max(values):{form}}"
        table.add_row(
            name, f"{median(values):{form}}", f"{low:{form}} to {high:{form}}", extremes, **style
        )

    title = f"{found.model}, {found.engine}, {available_cores()} cores"
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for heading in ("median", "middle half", "range"):
        table.add_column(heading, justify="right")
    row(f"bare engine ({found.best}), images/s", found.single_hz.bare, ",.1f", end_section=True)
    for pairs, callers, images, rows in (
        (found.single_hz, CALLERS, 1, found.single_rows),
        (found.batched_hz, found.batched_callers, found.batched_images, found.batched_rows),
    ):
        row(
            f"served, {callers} callers, {images} a call ({rows:.1f} rows a batch), images/s",
            pairs.served,
            ",.1f",
        )
        row("  served / bare, of a pair", pairs.ratios(), ".1%", end_section=True)
    row(f"bare engine, one image ({found.alone}), ms", found.lone_ms.bare, ".2f")
    row("served, a caller alone (p50), ms", found.lone_ms.served, ".2f")
    row("  added by serving, of a pair, ms", found.lone_ms.differences(), "+.2f")
    return table


def parser_of(description: str | None, *, rounds: int, seconds: float) -> argparse.ArgumentParser:
    """What every such command is asked: the model, and how often and how long to measure it."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--repo", type=Path, required=True, help="model repository; built into where it lacks it")
    add("--model", default="resnet50", help="what to measure (%(default)s)")
    add("--rounds", type=at_least(1), default=rounds, help="turns of each side (%(default)s)")
    add("--seconds", type=positive, default=seconds, help="length of a turn (%(default)g)")
    return parser


def build_if_missing(repo: Path, model: str, console: Console) -> None:
    if repo.is_dir() and any(
        version.model == model and version.manifest for version in list_versions(repo)
    ):
        return
    console.print(f"building {model}, with random weights where there are no others")
    build = [sys.executable, "-m", "model_repo.build", model, "--repo", str(repo), "--or-random"]
    status = subprocess.run(build, cwd=ROOT).returncode
    if status:
        raise SystemExit(f"bench: the build failed with status {status}")


if __name__ == "__main__":
    sys.exit(main())
