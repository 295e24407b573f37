"""The work of tests/gpu/lane.py, in a process that finds the right TensorRT: see there."""

from __future__ import annotations

import argparse
import gc
import json
import platform
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from statistics import median, quantiles
from typing import Any

import numpy as np
import torch
from torch import nn

from model_repo import cards, weights
from model_repo.architectures.registry import create, find
from model_repo.cards import MAX_BATCH
from model_repo.export import ServedNetwork, export, trace
from model_repo.pipeline import BuildOptions, build
from server.engines import golden_check as golden
from server.engines.base import CompileOptions, Engine, Outputs, backend, infer
from server.engines.tensorrt.cuda import Cuda, CudaError, GpuUnavailable
from server.errors import EngineFailure
from server.images.input_spec import InputSpec, Pixels
from server.models import loader as loading
from server.process.cores import available_cores
from server.repository import reader
from server.repository.contents import VersionEntry
from server.repository.manifest import EngineRecord
from tests.benchmarks.bare import keep_busy, newest_version, processor
from tests.gpu import lane as gpu_lane
from tests.support.multiplications import multiplications

FIRST = ("resnet50", "vgg16", "googlenet", "resnet152", "alexnet", "lenet5")
BATCHES = (1, 8, 32, 128, 256)
FIRST_MODELS = 2  # measured in every precision before anything else is
COMPILED = ("resnet50", "vgg16")  # beside torch.compile too, which takes its time:
COMPILED_FIRST = (1, 256)  # so these batches first
IMAGES_A_CALL = (1, 8, 64)
BAD_LOADS = 200
BAD_S = 40.0  # begin no further load after so long
FROM_GRAPHS = ("tensorrt", "openvino")  # to whose engines another precision's can be added
COPY_BYTES = 256 << 20

Results = dict[str, Any]


class Lane:
    """What is found, and the time that is left to find more."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.out: Path = given.out
        self.scratch: Path = given.scratch
        self.repo: Path = self.scratch / "engines"
        self.seconds: float = given.seconds
        self.peak_flops: float = given.peak_tflops * 1e12
        self.backend: str = given.backend
        self._ends_s = time.monotonic() + 60 * given.minutes
        self.results: Results = {
            "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "command": given.command,
            "machine": machine(),
            "tried": json.loads(given.tried),
            "backend": given.backend,
            "first": "",
            "models": {},
            "skipped": [],
            "failed": [],
        }
        before = self._before() if given.resume else {}
        if before.get("backend") != self.backend:
            shutil.rmtree(self.repo, ignore_errors=True)  # other engines
        if before:
            self.results |= before | {"backend": self.backend}
            if (running := self.results.pop("running", None)) is not None:
                why = "the process ended in it"
                self.results["failed"].append({"step": running, "why": why})

    def _before(self) -> Results:
        """What a process before this one found, which ended too early."""
        try:
            found: Results = json.loads((self.out / "results.json").read_text())
        except (OSError, ValueError):
            return {}
        return found

    def step(self, name: str, work: Callable[[], Any]) -> Any:
        """What `work` gives, or None where time is up or it failed; either is written down."""
        if self.crashed(name) or self.late(name):
            self.save()
            return None
        self.results["running"] = name  # for whoever goes on where it crashes
        self.save()  # what the last one found, too
        found = None
        began_s = time.monotonic()
        print(f"{name}: ", end="", flush=True)  # before, for whoever wonders where it crashed
        try:
            gc.collect()
            torch.cuda.empty_cache()  # of what the last one left; TensorRT asks the driver
            found = work()
        except (Exception, SystemExit) as error:  # the rest shall be measured all the same
            traceback.print_exc()
            self.results["failed"].append({"step": name, "why": f"{type(error).__name__}: {error}"})
        print(f"{time.monotonic() - began_s:.1f} s", flush=True)
        del self.results["running"]
        return found

    def crashed(self, name: str) -> bool:
        """Whether a process before this one ended in that step."""
        return any(one["step"] == name for one in self.results["failed"])

    def late(self, name: str) -> bool:
        """Whether time is up, so that what `name` says is left out."""
        if time.monotonic() <= self._ends_s:
            return False
        self.results["skipped"].append(name)
        return True

    def save(self) -> None:
        (self.out / "results.json").write_text(json.dumps(self.results, indent=2) + "\n")
        (self.out / "results.md").write_text(table(self.results))


# --- the machine -------------------------------------------------------------------------------


def machine() -> Results:
    found: Results = {
        "system": platform.platform(),
        "processor": processor(),
        "cores": available_cores(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "gpu": None,
    }
    try:
        gpu = Cuda().gpu()
    except (GpuUnavailable, CudaError) as error:
        found["why_no_gpu"] = str(error)
    else:
        found |= {
            "gpu": gpu.name,
            "capability": gpu.capability,
            "driver_cuda": gpu.driver_cuda,
            "free_bytes": gpu.free_bytes,
        }
    try:
        found["tensorrt"] = backend("tensorrt").version()
    except ImportError as error:
        found["tensorrt"] = str(error)
    return found


# --- what is measured --------------------------------------------------------------------------


def pictures(spec: InputSpec) -> Pixels:
    """Real images where the packages that hold them are installed, else smooth made-up ones."""
    try:
        from model_repo.golden_images import golden_pixels

        return golden_pixels(spec)
    except (ImportError, OSError):  # scikit-image's differ by version
        draw = np.random.default_rng(0)
        made = []
        for number in range(6):
            coarse = draw.integers(0, 256, (4 + number, 4 + number, spec.channels), np.uint8)
            planes = torch.from_numpy(coarse).permute(2, 0, 1)[None].float()
            size = (spec.height, spec.width)
            fine = nn.functional.interpolate(planes, size, mode="bicubic").clamp(0, 255)
            made.append(fine[0].permute(1, 2, 0).byte().numpy())
        return np.stack(made)


def built(lane: Lane, name: str, precision: str) -> Results:
    """Builds and publishes, or adds to what has been; the golden check is part of it."""
    options = BuildOptions(
        repo=lane.repo,
        backend=lane.backend,
        precision=precision,
        weights="random:0",
        images=pictures,
        add_engine=lane.backend in FROM_GRAPHS and (lane.repo / name).is_dir(),
    )
    made = build(name, options)
    record = made.manifest.engines[-1]
    return {
        "engine": record.name,
        "seconds": made.seconds,
        "plan_bytes": sum(file.bytes for file in record.files),
        "deviation": record.deviation,
    }


def built_last(engines: Sequence[EngineRecord]) -> EngineRecord:
    return engines[-1]


def served_first(engines: Sequence[EngineRecord]) -> EngineRecord:
    """The one that a server takes."""
    return min(engines, key=loading._preference)


@contextmanager
def newest(
    lane: Lane,
    name: str,
    choose: Callable[[Sequence[EngineRecord]], EngineRecord] = built_last,
) -> Iterator[tuple[Engine, VersionEntry]]:
    """An engine of the version that was built last."""
    version = newest_version(lane.repo, name)
    assert version.manifest is not None
    record = choose(version.manifest.engines)
    shape = version.manifest.input.spec().shape
    engine = backend(record.backend).load(version.folder, record, shape, threads=available_cores())
    try:
        yield engine, version
    finally:
        engine.close()
        gc.collect()


def parity(engine: Engine, version: VersionEntry) -> dict[str, float]:
    """The largest deviation from eager float32, by every size that the engine computes, and that
    the same image gets the same answer in every row. Raises golden.Deviates."""
    assert version.manifest is not None
    truth = reader.read_golden(version.folder, version.manifest)
    sizes = sorted({engine.computed_rows(rows) for rows in range(1, engine.max_batch + 1)})
    precision = version.manifest.engines[-1].precision
    return golden.check(engine, truth, precision, sizes)


def contract(engine: Engine, version: VersionEntry) -> None:
    """What server.engines promises of every engine: forms, answers to keep, instances side by side.

    Raises AssertionError.
    """
    assert version.manifest is not None
    pixels = reader.read_golden(version.folder, version.manifest).pixels
    first = engine.instances[0]
    for rows in range(1, min(len(pixels), engine.max_batch) + 1):
        answer = infer(first, pixels[:rows])
        forms = [(array.shape[0], array.dtype.name) for array in answer]
        assert forms == [(rows, "int32"), (rows, "float32"), (rows, "float32")], forms
    kept = [array.copy() for array in answer]
    infer(first, pixels[::-1][:1])
    assert all(map(np.array_equal, answer, kept)), "a later batch changed an answer"
    alone = [infer(first, pixels[n : n + 1]).classes[0, 0] for n in range(len(pixels))]
    for _ in range(20):
        finished: list[SimpleQueue[Outputs | Exception]] = []
        for n, instance in enumerate(engine.instances):
            instance.pixels[:1] = pixels[n : n + 1]
            finished.append(SimpleQueue())
            instance.start(1, finished[-1].put)
        for n, queue in enumerate(finished):
            outcome = queue.get()
            assert isinstance(outcome, Outputs), outcome
            assert outcome.classes[0, 0] == alone[n], "instances disturb each other"
            assert queue.empty(), "a start was answered twice"


def speed(lane: Lane, engine: Engine, name: str, rows: list[Results]) -> None:
    """Adds latency of one instance and throughput of all, by batch size; pixels come from where
    the engine takes them, on the host."""
    flop = 2 * multiplications_of(name)
    instance = engine.instances[0]
    finished: SimpleQueue[Outputs | Exception] = SimpleQueue()
    for batch in (batch for batch in BATCHES if batch <= engine.max_batch):

        def run(batch: int = batch) -> None:
            instance.start(batch, finished.put)
            if isinstance(outcome := finished.get(), Exception):
                raise outcome

        latencies = timed(lane.seconds, run)
        images_hz, _ = keep_busy(engine.instances, batch, lane.seconds)
        rows.append({"batch": batch, **percentiles(latencies), "images_hz": images_hz})
        if lane.results["machine"]["gpu"]:
            rows[-1]["roofline"] = images_hz * flop / lane.peak_flops


def pytorch(
    lane: Lane,
    name: str,
    precision: str,
    rows: list[Results],
    batches: Sequence[int],
    *,
    compiled: bool,
) -> None:
    """Adds the same by PyTorch on the GPU, eager or by torch.compile with CUDA graphs; pixels come
    from page-locked memory and answers go there."""
    card = cards.load(name)
    network = create(card.architecture, card.classes).eval()
    served = ServedNetwork(network, classes=card.classes, mean=card.mean, std=card.std)
    module: Any = trace(served, card.input.shape, MAX_BATCH, precision, "cuda").module()
    if compiled:
        module = torch.compile(module, mode="reduce-overhead", dynamic=False)
    for batch in batches:
        if lane.late(f"{name} {'torch.compile' if compiled else 'eager'} at batch {batch}"):
            break
        pixels = torch.zeros((batch, *card.input.shape), dtype=torch.uint8).pin_memory()
        answers: list[torch.Tensor] = []

        def run(pixels: torch.Tensor = pixels, answers: list[torch.Tensor] = answers) -> None:
            outputs = module(pixels.to("cuda", non_blocking=True))
            if not answers:
                answers += [torch.empty_like(each, device="cpu").pin_memory() for each in outputs]
            for answer, output in zip(answers, outputs, strict=True):
                answer.copy_(output, non_blocking=True)
            torch.cuda.synchronize()

        with torch.inference_mode():
            latencies = timed(lane.seconds, run)
        rows.append(
            {"batch": batch, **percentiles(latencies), "images_hz": batch / median(latencies)}
        )
        rows.sort(key=lambda row: row["batch"])


def timed(seconds: float, run: Callable[[], Any]) -> list[float]:
    """Seconds of each run, for so long and at least ten times."""
    for _ in range(3):
        run()
    found: list[float] = []
    ends_s = time.perf_counter() + seconds
    while (began_s := time.perf_counter()) < ends_s or len(found) < 10:
        run()
        found.append(time.perf_counter() - began_s)
    return found


def percentiles(latencies: Sequence[float]) -> Results:
    return {"p50_ms": 1e3 * median(latencies), "p99_ms": 1e3 * quantiles(latencies, n=100)[98]}


def multiplications_of(name: str) -> int:
    """Those of a model for one image."""
    card = cards.load(name)
    with torch.device("meta"):
        network = create(card.architecture, card.classes).eval()
        image = torch.empty(1, *find(card.architecture).input_shape)
        return multiplications(network, image)


def copies() -> Results:
    """Bytes a second over the bus, page-locked memory."""
    cuda = Cuda()
    address, _ = cuda.allocate_pinned(COPY_BYTES)
    device, stream = cuda.allocate(COPY_BYTES), cuda.create_stream()
    found = {}
    for name, copy, to, source in (
        ("to_device", cuda.copy_to_device, device, address),
        ("to_host", cuda.copy_to_host, address, device),
    ):

        def run(copy: Any = copy, to: int = to, source: int = source) -> None:
            copy(to, source, COPY_BYTES, stream)
            cuda.synchronize(stream)

        found[name] = COPY_BYTES / median(timed(0.3, run))
    cuda.destroy_stream(stream)
    cuda.free(device)
    cuda.free_pinned(address)
    return found


def bad_plans(lane: Lane, name: str) -> Results:
    """Loads damaged plans many times, in a process of its own, as such a load may crash."""
    command = [sys.executable, "-m", "tests.gpu.measure", "--bad-plans", name]
    command += ["--out", str(lane.out), "--scratch", str(lane.scratch)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3 * BAD_S)
    if done.returncode:
        raise EngineFailure(f"it ended with {done.returncode}: {done.stderr[-1000:]}")
    found: Results = json.loads(done.stdout.splitlines()[-1])
    return found


def damaged(plan: bytes) -> dict[str, bytes]:
    """A plan's content, spoilt in ways that the first look at it does not find."""
    third = len(plan) // 3
    return {
        "its end is missing": plan[: 2 * third],
        "a hole in the middle": plan[:third] + bytes(third) + plan[2 * third :],
    }


def load_damaged(folder: Path, version: VersionEntry) -> Results:
    """How many loads there were, how many were refused, and what the device's memory lost.

    A plan carries no sum of its own, so one with a hole may be taken: servers compare the hash.
    """
    assert version.manifest is not None
    record = version.manifest.engines[-1]
    shape = version.manifest.input.spec().shape
    file = record.files[0].name
    for number, content in enumerate(damaged((version.folder / file).read_bytes()).values()):
        (folder / str(number)).mkdir(parents=True, exist_ok=True)
        (folder / str(number) / file).write_bytes(content)
    folders = sorted(folder.iterdir())
    cuda = Cuda()
    before = loads = refused = 0
    ends_s = time.monotonic() + BAD_S
    while loads < BAD_LOADS and time.monotonic() < ends_s:
        try:
            each = folders[loads % len(folders)]
            backend(record.backend).load(each, record, shape, threads=1).close()
        except EngineFailure:
            refused += 1
        loads += 1
        gc.collect()
        if loads == 2 * len(folders):  # whatever is made once for a process has been made
            before = cuda.gpu().free_bytes
    return {"loads": loads, "refused": refused, "lost_bytes": before - cuda.gpu().free_bytes}


def behind_grpc(lane: Lane, name: str) -> list[Results]:
    """The server with callers in several processes, raw pixels, beside the bare engine's best."""
    from tests.benchmarks.serving import (
        served_engine,  # needs gRPC and more; what is above does not
    )

    with newest(lane, name, served_first) as (engine, version):
        assert version.manifest is not None
        record = served_first(version.manifest.engines)
        bare = [
            keep_busy(engine.instances, batch, lane.seconds)[0]
            for batch in BATCHES
            if batch <= engine.max_batch
        ]
    processes = max(1, min(8, available_cores() // 2))
    rows = []
    with served_engine(lane.repo, name, start_s=60.0) as server:
        for images in IMAGES_A_CALL:
            options = [
                "--concurrency",
                str(max(16, 512 // images)),
                "--images-per-call",
                str(images),
            ]
            options += ["--deadline-ms", "10000", "--processes", str(processes)]
            report = server.load(*options, seconds=3 * lane.seconds)
            images_hz = report["images_hz"]
            rows.append(
                {
                    "engine": record.name,
                    "images_a_call": images,
                    "images_hz": images_hz,
                    "bare_hz": max(bare),
                    "ratio": images_hz / max(bare),
                    "p50_ms": report["latency_ms"]["p50"],
                    "p99_ms": report["latency_ms"]["p99"],
                }
            )
    return rows


def compiled_only(lane: Lane, names: Sequence[str]) -> None:
    """Without a GPU: every network becomes a plan."""
    plans = lane.results["plans"] = {}
    for name in names:

        def work(name: str = name) -> None:
            card = cards.load(name)
            found = weights.load(card, "random:0")
            served = ServedNetwork(
                found.network, classes=card.classes, mean=card.mean, std=card.std
            )
            folder = lane.scratch / "plans" / name
            folder.mkdir(parents=True, exist_ok=True)
            export(served, folder / "model.onnx", shape=card.input.shape, max_batch=MAX_BATCH)
            began_s = time.monotonic()
            target = CompileOptions("fp16", card.gpu_max_batch, opt_batch=card.gpu_opt_batch)
            made = backend("tensorrt").compile(folder / "model.onnx", folder, target)
            plans[name] = {
                "engine": made.name,
                "seconds": time.monotonic() - began_s,
                "plan_bytes": (folder / made.files[0]).stat().st_size,
            }

        lane.step(f"{name} fp16 compiled", work)


# --- the whole ---------------------------------------------------------------------------------


def run(lane: Lane, names: Sequence[str], precisions: Sequence[str]) -> None:
    """What matters most comes first: the first models' engines, then the server, then PyTorch."""
    on_gpu = lane.results["machine"]["gpu"] is not None
    lane.results["first"] = names[0]
    if on_gpu:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        whole(lane, "copies", "copies", copies)
    first, others = names[:FIRST_MODELS], names[FIRST_MODELS:]
    compiled = [name for name in first if name in COMPILED]
    for name in first:
        for precision in precisions:
            measured(lane, name, precision)
    whole(lane, "served", "served", partial(behind_grpc, lane, names[0]))
    if on_gpu:
        for name in first:
            beside(lane, name, precisions[-1], BATCHES, compiled=False)
        for name in compiled:
            beside(lane, name, precisions[-1], COMPILED_FIRST, compiled=True)
        if lane.backend == "tensorrt":
            whole(lane, "bad_plans", "bad plans", partial(bad_plans, lane, names[0]))
    for name in others:
        measured(lane, name, precisions[0])
        if on_gpu:
            beside(lane, name, precisions[0], BATCHES, compiled=False)
    if on_gpu:
        left = [batch for batch in BATCHES if batch not in COMPILED_FIRST]
        for name in compiled:
            beside(lane, name, precisions[-1], left, compiled=True)
    for name in others:
        for precision in precisions[1:]:
            measured(lane, name, precision)


def whole(lane: Lane, key: str, name: str, work: Callable[[], Any]) -> None:
    """A step whose outcome is one of the results, unless it is there already."""
    if not lane.results.get(key):
        lane.results[key] = lane.step(name, work)


def measured(lane: Lane, name: str, precision: str) -> None:
    """Builds, checks and times one engine, unless that was done."""
    found = lane.results["models"].setdefault(f"{name} {precision}", {})
    if found.get("speed"):
        return
    found["build"] = lane.step(f"{name} {precision} built", partial(built, lane, name, precision))
    if found["build"] is None:
        return

    def checked() -> None:
        with newest(lane, name) as (engine, version):
            found["parity"] = parity(engine, version)
            contract(engine, version)
            found["captured"] = getattr(engine.instances[0], "captured", None)
            speed(lane, engine, name, found.setdefault("speed", []))

    lane.step(f"{name} {precision} checked and timed", checked)


def beside(
    lane: Lane, name: str, precision: str, batches: Sequence[int], *, compiled: bool
) -> None:
    """Times PyTorch at those batch sizes that were not."""
    how = "torch.compile" if compiled else "eager"
    rows = lane.results["models"].setdefault(f"{name} {precision}", {}).setdefault(how, [])
    left = [batch for batch in batches if batch not in {row["batch"] for row in rows}]
    if left:
        step = f"{name} {how} {' '.join(map(str, left))}"
        lane.step(step, partial(pytorch, lane, name, precision, rows, left, compiled=compiled))


def table(results: Results) -> str:
    """The results for people, in Markdown."""
    about = results["machine"]
    lines = [
        f"{results['date']}, `{results['command']}`",
        "",
        f"GPU: {about['gpu'] or 'none, ' + about.get('why_no_gpu', '')}; TensorRT: "
        f"{about['tensorrt']}; torch {about['torch']}; Python {about['python']}; "
        f"{about['processor']}, {about['cores']} cores",
        "",
    ]
    for tried in results["tried"]:
        lines.append(f"- TensorRT {tried['tensorrt']}: {tried['why'] or 'runs'}")
    if found := results.get("copies"):
        lines.append(
            f"- copies: {found['to_device'] / 1e9:.1f} GB/s to the device, "
            f"{found['to_host'] / 1e9:.1f} GB/s to the host"
        )
    if found := results.get("bad_plans"):
        lines.append(
            f"- damaged plans loaded {found['loads']} times, {found['refused']} refused: "
            f"{found['lost_bytes'] / 1e6:,.1f} MB of the device's memory lost"
        )
    lines += _grid(
        ("model", "by", "batch", "p50 ms", "p99 ms", "images/s", "of the roofline"),
        [
            (
                name,
                how,
                f"{row['batch']}",
                f"{row['p50_ms']:.3f}",
                f"{row['p99_ms']:.3f}",
                f"{row['images_hz']:,.0f}",
                f"{row['roofline']:.1%}" if "roofline" in row else "",
            )
            for name, found in results["models"].items()
            for how, key in (
                ("the engine", "speed"),
                ("eager", "eager"),
                ("compile", "torch.compile"),
            )
            for row in found.get(key) or ()
        ],
    )
    lines += _grid(
        (
            "engine",
            "images a call",
            "served images/s",
            "bare images/s",
            "ratio",
            "p50 ms",
            "p99 ms",
        ),
        [
            (
                row["engine"],
                f"{row['images_a_call']}",
                f"{row['images_hz']:,.0f}",
                f"{row['bare_hz']:,.0f}",
                f"{row['ratio']:.1%}",
                f"{row['p50_ms']:.2f}",
                f"{row['p99_ms']:.2f}",
            )
            for row in results.get("served") or ()
        ],
    )
    lines += _grid(
        ("model", "largest deviation", "at sizes"),
        [
            (name, f"{max(found['parity'].values()):.2%}", " ".join(found["parity"]))
            for name, found in results["models"].items()
            if found.get("parity")
        ],
    )
    lines += _grid(
        ("model", "plan", "seconds", "MB"),
        [
            (name, plan["engine"], f"{plan['seconds']:.1f}", f"{plan['plan_bytes'] / 1e6:,.1f}")
            for name, plan in results.get("plans", {}).items()
        ],
    )
    lines += [f"- failed: {failed['step']}: {failed['why']}" for failed in results["failed"]]
    if results["skipped"]:
        lines.append(f"- no time was left for: {', '.join(results['skipped'])}")
    return "\n".join(lines).rstrip("\n") + "\n"


def _grid(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    if not rows:
        return []
    return ["", *(f"| {' | '.join(row)} |" for row in (titles, ["---"] * len(titles), *rows)), ""]


def probe(repo: Path) -> None:
    """Compiles ResNet-18 by TensorRT and holds it against eager PyTorch. Raises what goes wrong."""
    Cuda()
    options = BuildOptions(
        repo=repo,
        backend="tensorrt",
        precision="fp16",
        weights="random:0",
        images=pictures,
    )
    manifest = build("resnet18", options).manifest
    if not manifest.engines[0].deviation:
        raise EngineFailure(
            backend("tensorrt").incompatibility(manifest.engines[0]) or "it was not run"
        )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = gpu_lane.parser_of("tests.gpu.measure", __doc__)
    parser.add_argument("--probe", action="store_true", help="run ResNet-18 by TensorRT, no more")
    parser.add_argument("--bad-plans", metavar="MODEL", help="load damaged ones, no more")
    parser.add_argument("--command", default="python -m tests.gpu.measure", help="what was asked")
    parser.add_argument("--resume", action="store_true", help="go on where one before crashed")
    parser.add_argument("--tried", default="[]", help="what was found out of TensorRT, as JSON")
    given = parser.parse_args(arguments)
    given.scratch = given.scratch or given.out / "scratch"
    if given.probe:
        try:
            probe(given.scratch / "probe")
        except Exception as error:
            print(f"{type(error).__name__}: {error}".replace("\n", " "))
            return 1
        return 0
    if given.bad_plans:
        version = newest_version(given.scratch / "engines", given.bad_plans)
        print(json.dumps(load_damaged(given.scratch / "damaged", version)))
        return 0
    lane = Lane(given)
    known = [*FIRST, *(name for name in cards.names() if name not in FIRST)]
    names = given.models.split(",") if given.models else known
    if unknown := [name for name in names if name not in known]:
        parser.error(f"there is no model {', '.join(unknown)}; there are {', '.join(known)}")
    gpu = lane.results["machine"]["gpu"]
    if lane.backend in ("auto", "tensorrt"):
        lane.backend = (
            "tensorrt" if any(tried["runs"] for tried in lane.results["tried"]) else "none"
        )
    if lane.backend == "none" and gpu is not None:
        lane.backend = "inductor"
    if lane.backend == "none":
        without = f"no GPU: {lane.results['machine']['why_no_gpu']}"
        try:
            backend("tensorrt").version()
        except ImportError as error:
            print(f"{without}; and nothing to compile with: {error}", flush=True)
        else:
            print(f"{without}; compiling, and no more", flush=True)
            compiled_only(lane, names)
    else:
        usual = "bf16" if lane.backend == "inductor" else "fp16,bf16"
        precisions = (given.precisions or usual).split(",")
        run(lane, names, precisions)
    lane.save()
    print(table(lane.results))
    return 1 if lane.results["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
