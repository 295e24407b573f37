"""Command: how much of a bare engine's speed is left behind gRPC, on this machine, now.

    python -m tests.bench_serving --repo .demo/engines --model resnet50

Throughput: 16 callers, one raw image a call, against the bare engine with every instance kept busy
at the batch size that gives most. Latency: a caller alone, with the plain stub of gRPC and no
event loop of its own, against the bare engine at batch 1. The two sides are measured in turn,
several times, each while the other is idle, and compared by their medians: a machine that slows
down meanwhile slows down both. The callers share the machine with the server, as `make bench` says;
the bare engine has it to itself.
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
from statistics import median
from typing import IO, Any

import grpc
from rich.console import Console
from rich.table import Table

from clients.arguments import at_least, positive
from clients.pictures import picture
from proto import classify_pb2 as pb
from proto import classify_pb2_grpc
from server import loading, repository
from server.engines import cores, instances_by_units
from tests.bare import keep_busy, newest_version

ROOT = Path(__file__).resolve().parent.parent
ROWS = (1, 2, 4, 8)  # batch sizes tried on the bare engine
CALLERS = 16
SLICES = 4  # turns of a lone caller in a round
START_S = 300.0  # loading a large network on a busy machine
SURVEY_S = 1.5
WARMUP_S = 1.0


@dataclass(frozen=True, slots=True)
class Setup:
    """One way to use the bare engine: batches of `rows` on all instances of one kind."""

    units: int  # cores that an instance of that kind occupies
    instances: int
    rows: int

    def __str__(self) -> str:
        return f"{self.instances} x {self.units} core(s), batch {self.rows}"


@dataclass(slots=True)
class Measured:
    """One figure on both sides, a value a round."""

    bare: list[float] = field(default_factory=list)
    served: list[float] = field(default_factory=list)


# --- the bare engine, in a process of its own ------------------------------------------------


def bare_process(repo: Path, model: str) -> None:
    """Loads the engine, then answers each line {"units", "rows", "seconds"} with a measurement."""
    version = newest_version(repo, model)
    loaded = loading.load(version, only="", threads=cores(), stopping=threading.Event())
    groups = {group[0].units: group for group in instances_by_units(loaded.engine)}
    kinds = [{"units": units, "instances": len(group)} for units, group in groups.items()]
    print(
        json.dumps(
            {"engine": loaded.record.name, "kinds": kinds, "max_batch": loaded.engine.max_batch}
        ),
        flush=True,
    )
    for line in sys.stdin:
        asked = json.loads(line)
        rows_hz, batch_s = keep_busy(groups[asked["units"]], asked["rows"], asked["seconds"])
        print(json.dumps({"rows_hz": rows_hz, "batch_s": batch_s}), flush=True)


class BareEngine:
    """The process of `bare_process`; idle between measurements."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        about = self._answer()
        self.engine: str = about["engine"]
        self.setups = [
            Setup(kind["units"], kind["instances"], rows)
            for kind in about["kinds"]
            for rows in ROWS
            if rows <= about["max_batch"]
        ]

    def measure(self, setup: Setup, seconds: float) -> tuple[float, float]:
        """Images a second, and the median batch's seconds."""
        question = {"units": setup.units, "rows": setup.rows, "seconds": seconds}
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
    command = [sys.executable, "-m", "tests.bench_serving", "--repo", str(repo), "--model", model]
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

    def measure(self, callers: int, seconds: float) -> dict[str, Any]:
        """The report of clients/bench.py. SystemExit when a call failed."""
        report = self.load("--concurrency", str(callers), "--deadline-ms", "10000", seconds=seconds)
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
        data = picture(height, width, channels, 0).tobytes()
        raw = pb.RawImage(height=height, width=width, channels=channels, data=data)
        return pb.ClassifyRequest(model=self.model, images=[pb.Image(raw=raw)])

    def alone_ms(self, request: pb.ClassifyRequest, seconds: float) -> float:
        """Median latency of a lone caller that asks and waits."""
        with self.stub() as stub:
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
        command += ["--duration", str(seconds), "--warmup", str(WARMUP_S)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if not done.stdout:
            raise SystemExit(f"bench: the load failed:\n{done.stderr}")
        report: dict[str, Any] = json.loads(done.stdout)
        return report


@contextmanager
def served_engine(repo: Path, *models: str, options: Sequence[str] = ()) -> Iterator[ServedEngine]:
    """A server of these models, ready; the first is the one to measure."""
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
            _await_ready(process, listening["http_port"])
            yield ServedEngine(listening["port"], models[0])
        finally:
            process.terminate()


def _listening(log: IO[str]) -> dict[str, Any]:
    lines = []
    for line in log:
        lines.append(line)
        if line.startswith("{"):
            entry: dict[str, Any] = json.loads(line)
            if entry["event"] == "listening":
                return entry
    raise SystemExit("bench: the server did not start:\n" + "".join(lines))


def _await_ready(process: subprocess.Popen[str], http_port: int) -> None:
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    ends_s = time.monotonic() + START_S
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
    build_if_missing(repo, args.model, console)
    console.print(f"loading {args.model}: the bare engine, then the server")
    with bare_engine(repo, args.model) as bare, served_engine(repo, args.model) as served:
        survey = {}
        for setup in bare.setups:
            survey[setup] = bare.measure(setup, SURVEY_S)
            console.print(f"  bare, {setup}: {survey[setup][0]:,.1f} images/s")
        # The two best are measured on: a short look may take one for the other.
        finalists = sorted(survey, key=lambda setup: -survey[setup][0])[:2]
        alone = min((s for s in survey if s.rows == 1), key=lambda setup: survey[setup][1])
        bare_hz: dict[Setup, list[float]] = {setup: [] for setup in finalists}
        request, latencies = served.request(), Measured()
        served_hz, batch_rows = [], []
        for number in range(1, args.rounds + 1):
            for setup in finalists:
                bare_hz[setup].append(bare.measure(setup, args.seconds / 2)[0])
            report = served.measure(CALLERS, args.seconds)
            served_hz.append(report["images_hz"])
            batch_rows.append(report["server_mean_batch_rows"])
            slices = Measured()  # short turns, as less changes from one to the next
            for _ in range(SLICES):
                slices.bare.append(bare.measure(alone, args.seconds / 2 / SLICES)[1] * 1e3)
                slices.served.append(served.alone_ms(request, args.seconds / 2 / SLICES))
            latencies.bare.append(median(slices.bare))
            latencies.served.append(median(slices.served))
            console.print(
                f"  round {number} of {args.rounds}: "
                f"bare {max(rates[-1] for rates in bare_hz.values()):,.1f} images/s, "
                f"served {served_hz[-1]:,.1f}; "
                f"alone {latencies.bare[-1]:.2f} ms bare, {latencies.served[-1]:.2f} ms served"
            )
    best = max(finalists, key=lambda setup: median(bare_hz[setup]))
    throughput = Measured(bare_hz[best], served_hz)
    _print(args.model, bare.engine, best, alone, throughput, latencies, batch_rows, console)
    if args.json:
        figures = {
            "model": args.model,
            "engine": bare.engine,
            "callers": CALLERS,
            "best_setup": asdict(best),
            "images_hz": asdict(throughput),
            "images_ratio": median(throughput.served) / median(throughput.bare),
            "lone_caller_ms": asdict(latencies),
            "added_ms": median(latencies.served) - median(latencies.bare),
        }
        args.json.write_text(json.dumps(figures, indent=2) + "\n")
    return 0


def _print(
    model: str,
    engine: str,
    best: Setup,
    alone: Setup,
    throughput: Measured,
    latencies: Measured,
    batch_rows: Sequence[float],
    console: Console,
) -> None:
    def spread(values: Sequence[float], form: str) -> str:
        return f"{min(values):{form}} to {max(values):{form}}"

    bare_hz, served_hz = median(throughput.bare), median(throughput.served)
    bare_ms, served_ms = median(latencies.bare), median(latencies.served)
    table = Table(title=f"{model}, {engine}, {cores()} cores", title_justify="left")
    table.add_column("median of the rounds")
    table.add_column("", justify="right")
    table.add_column("rounds", justify="right")
    table.add_row(
        f"bare engine ({best})", f"{bare_hz:,.1f} images/s", spread(throughput.bare, ",.1f")
    )
    table.add_row(
        f"served, {CALLERS} callers ({median(batch_rows):.1f} rows a batch)",
        f"{served_hz:,.1f} images/s",
        spread(throughput.served, ",.1f"),
    )
    table.add_row("served / bare", f"{served_hz / bare_hz:.1%}", end_section=True)
    table.add_row(
        f"bare engine, a batch of 1 ({alone.units} core(s))",
        f"{bare_ms:.2f} ms",
        spread(latencies.bare, ".2f"),
    )
    table.add_row(
        "served, a caller alone (p50)", f"{served_ms:.2f} ms", spread(latencies.served, ".2f")
    )
    table.add_row("added by serving", f"{served_ms - bare_ms:.2f} ms")
    console.print(table)


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
        version.model == model and version.manifest for version in repository.scan(repo)
    ):
        return
    console.print(f"building {model}, with random weights where there are no others")
    build = [sys.executable, "-m", "model_repo.build", model, "--repo", str(repo), "--or-random"]
    status = subprocess.run(build, cwd=ROOT).returncode
    if status:
        raise SystemExit(f"bench: the build failed with status {status}")


if __name__ == "__main__":
    sys.exit(main())
