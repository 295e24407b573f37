"""Latency and throughput of engines, of PyTorch, and of the server."""

from __future__ import annotations

from collections.abc import Sequence
from queue import SimpleQueue
from statistics import median
from typing import Any

import torch

from model_repo import cards
from model_repo.architectures.registry import find
from model_repo.cards import MAX_BATCH
from model_repo.export import ServedNetwork, trace
from server.engines.base import Engine, Outputs
from server.process.cores import available_cores
from tests.benchmarks.targets.bare import keep_busy
from tests.gpu.measuring.engines import new_network, newest_engine, preferred_by_server
from tests.gpu.measuring.measurement_run import MeasurementRun
from tests.gpu.measuring.report import Results
from tests.gpu.measuring.timing import percentiles, time_runs
from tests.support.multiplications import multiplications

BATCHES = (1, 8, 32, 128, 256)
IMAGES_PER_CALL = (1, 8, 64)


def measure_engine(run: MeasurementRun, engine: Engine, name: str, rows: list[Results]) -> None:
    """Adds a row for each batch size: latency of one instance and throughput of all.

    The pixels start in the instance's input memory on the host.
    """
    operations = 2 * multiplications_of(name)
    instance = engine.instances[0]
    finished: SimpleQueue[Outputs | Exception] = SimpleQueue()
    for batch in (batch for batch in BATCHES if batch <= engine.max_batch):

        def run_batch(batch: int = batch) -> None:
            instance.start(batch, finished.put)
            if isinstance(outcome := finished.get(), Exception):
                raise outcome

        latencies_s = time_runs(run.seconds, run_batch)
        images_hz, _ = keep_busy(engine.instances, batch, run.seconds)
        rows.append({"batch": batch, **percentiles(latencies_s), "images_hz": images_hz})
        if run.results["machine"]["gpu"]:
            rows[-1]["roofline"] = images_hz * operations / run.peak_flops


def measure_pytorch(
    run: MeasurementRun,
    name: str,
    precision: str,
    rows: list[Results],
    batches: Sequence[int],
    *,
    compiled: bool,
) -> None:
    """Adds the same rows for PyTorch on the GPU, eager or by torch.compile with CUDA graphs.

    Pixels and outputs are in page-locked memory on the host.
    """
    card = cards.load(name)
    served = ServedNetwork(new_network(name), top_k=card.top_k, mean=card.mean, std=card.std)
    module: Any = trace(served, card.input.shape, MAX_BATCH, precision, "cuda").module()
    if compiled:
        module = torch.compile(module, mode="reduce-overhead", dynamic=False)
    for batch in batches:
        if run.skip_if_late(f"{name} {'torch.compile' if compiled else 'eager'} at batch {batch}"):
            break
        pixels = torch.zeros((batch, *card.input.shape), dtype=torch.uint8).pin_memory()
        answers: list[torch.Tensor] = []

        def run_batch(pixels: torch.Tensor = pixels, answers: list[torch.Tensor] = answers) -> None:
            outputs = module(pixels.to("cuda", non_blocking=True))
            if not answers:
                answers += [torch.empty_like(each, device="cpu").pin_memory() for each in outputs]
            for answer, output in zip(answers, outputs, strict=True):
                answer.copy_(output, non_blocking=True)
            torch.cuda.synchronize()

        with torch.inference_mode():
            latencies_s = time_runs(run.seconds, run_batch)
        images_hz = batch / median(latencies_s)
        rows.append({"batch": batch, **percentiles(latencies_s), "images_hz": images_hz})
        rows.sort(key=lambda row: row["batch"])


def measure_server(run: MeasurementRun, name: str) -> list[Results]:
    """The server's throughput of raw pixels, beside the best of the bare engine.

    Clients run in several processes.
    """
    from tests.benchmarks.targets.served import (
        served_engine,  # needs gRPC, unlike the rest of this module
    )

    with newest_engine(run.repo, name, preferred_by_server) as (engine, version):
        assert version.manifest is not None
        record = preferred_by_server(version.manifest.engines)
        bare_hz = max(
            keep_busy(engine.instances, batch, run.seconds)[0]
            for batch in BATCHES
            if batch <= engine.max_batch
        )
    processes = max(1, min(8, available_cores() // 2))
    rows = []
    with served_engine(run.repo, name, start_s=60.0) as server:
        for images in IMAGES_PER_CALL:
            options = ["--concurrency", str(max(16, 512 // images))]
            options += ["--images-per-call", str(images)]
            options += ["--deadline-ms", "10000", "--processes", str(processes)]
            report = server.load(*options, seconds=3 * run.seconds)
            images_hz = report["images_hz"]
            rows.append(
                {
                    "engine": record.name,
                    "images_per_call": images,
                    "images_hz": images_hz,
                    "bare_hz": bare_hz,
                    "ratio": images_hz / bare_hz,
                    "p50_ms": report["latency_ms"]["p50"],
                    "p99_ms": report["latency_ms"]["p99"],
                }
            )
    return rows


def multiplications_of(name: str) -> int:
    """The multiplications of a model for one image."""
    card = cards.load(name)
    with torch.device("meta"):
        network = new_network(name)
        image = torch.empty(1, *find(card.architecture).input_shape)
        return multiplications(network, image)
