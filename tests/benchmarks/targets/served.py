"""A server process on this machine, loaded by clients/bench.py."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import IO, Any

import grpc

from convserve_client.loadgen.images import synthetic_image
from convserve_client.stubs import classify_pb2_grpc
from server.api.stubs import classify_pb2 as pb

ROOT = Path(__file__).resolve().parent.parent.parent.parent
CALLERS = 16
START_TIMEOUT_S = 300.0  # enough to load a large network on a busy machine
STOP_TIMEOUT_S = 30.0  # after SIGTERM; then the server is killed
EXTRA_LOAD_S = 60.0  # a run of the load generator may take this much longer than planned
WARMUP_S = 1.0
DEADLINE_MS = "60000"  # for requests that must succeed, however slow the network is


@dataclass(frozen=True, slots=True)
class ServedEngine:
    """A ready server and the model to measure."""

    port: int
    model: str
    pid: int

    def measure(self, callers: int, seconds: float, *options: str) -> dict[str, Any]:
        """The report of clients/bench.py in a closed loop. SystemExit if a request failed."""
        closed_loop = ("--concurrency", str(callers), "--deadline-ms", DEADLINE_MS)
        report = self.load(*closed_loop, *options, seconds=seconds)
        if report["counts"].keys() != {"OK"}:
            raise SystemExit(f"bench: requests failed: {report['counts']}")
        return report

    def load(self, *options: str, seconds: float) -> dict[str, Any]:
        """The report of clients/bench.py for any load. SystemExit if it wrote none."""
        command = [sys.executable, "clients/bench.py", "--target", f"127.0.0.1:{self.port}"]
        command += ["--model", self.model, "--json", "-", *options]
        command += ["--duration-s", str(seconds), "--warmup-s", str(WARMUP_S)]
        timeout_s = WARMUP_S + seconds + EXTRA_LOAD_S
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout_s)
        if not done.stdout:
            raise SystemExit(f"bench: the load generator failed:\n{done.stderr}")
        report: dict[str, Any] = json.loads(done.stdout)
        return report

    @contextmanager
    def stub(self) -> Iterator[Any]:
        """A stub of the Classifier service on a new connection."""
        with grpc.insecure_channel(f"127.0.0.1:{self.port}") as channel:
            stub: Any = classify_pb2_grpc.ClassifierStub
            yield stub(channel)

    def request(self) -> pb.ClassifyRequest:
        """A request with one image of raw pixels."""
        with self.stub() as stub:
            model = stub.GetModel(pb.GetModelRequest(model=self.model), timeout=10)
        height, width, channels = model.height, model.width, model.channels
        data = synthetic_image(height, width, channels, 0).tobytes()
        raw = pb.RawImage(height=height, width=width, channels=channels, data=data)
        return pb.ClassifyRequest(model=self.model, images=[pb.Image(raw=raw)])

    @staticmethod
    def single_caller_ms(stub: Any, request: pb.ClassifyRequest, seconds: float) -> float:
        """Median latency of one caller that sends one request at a time."""
        latencies: list[float] = []
        ends_s = time.perf_counter() + seconds
        while (began_s := time.perf_counter()) < ends_s or not latencies:
            stub.Classify(request, timeout=10)
            latencies.append(time.perf_counter() - began_s)
        return 1e3 * median(latencies[len(latencies) // 5 :])  # the first ones warm up


@contextmanager
def served_engine(
    repo: Path, *models: str, options: Sequence[str] = (), start_s: float = START_TIMEOUT_S
) -> Iterator[ServedEngine]:
    """A server of these models that is ready within `start_s`. The first one is measured."""
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
            listening = _listening_event(process.stderr)
            # Nobody needs the rest of the log, but a full pipe would block the server.
            threading.Thread(target=process.stderr.read, daemon=True).start()
            _wait_until_ready(process, listening["http_port"], start_s)
            yield ServedEngine(listening["port"], models[0], process.pid)
        finally:
            process.terminate()
            try:
                process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()


def _listening_event(log: IO[str]) -> dict[str, Any]:
    lines = []
    for line in log:
        lines.append(line)
        if line.startswith("{"):
            entry: dict[str, Any] = json.loads(line)
            if entry["event"] == "listening":
                return entry
    raise SystemExit("bench: the server did not start:\n" + "".join(lines))


def _wait_until_ready(process: subprocess.Popen[str], http_port: int, start_s: float) -> None:
    no_proxy = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    ends_s = time.monotonic() + start_s
    while time.monotonic() < ends_s and process.poll() is None:
        try:
            with no_proxy.open(f"http://127.0.0.1:{http_port}/readyz", timeout=5):
                return
        except urllib.error.URLError:  # includes responses with status 503
            time.sleep(0.2)
    raise SystemExit("bench: the server did not become ready")
