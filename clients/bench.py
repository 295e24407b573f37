"""Command: measures a server from outside: what it answers, how fast, and what it refuses.

    python clients/bench.py --model resnet50 --concurrency 16   callers who ask, wait, ask again
    python clients/bench.py --model resnet50 --rate 200         Poisson arrivals, waiting for nobody

Nothing is retried: every request counts once, under the status it ended with. Latency runs from
the moment a request was due to the moment its answer was there; only successes have one. Exit
status: 0, 1 when nothing succeeded, 2 for wrong usage.
"""

import argparse
import asyncio
import io
import itertools
import json
import math
import resource
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import grpc
import numpy as np

if not __package__:  # run as a script: Python looks for imports in clients/, not in its parent
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from clients.client import MAX_MESSAGE_BYTES, AsyncClient, ClassifierError, channel_options
from clients.load import OK, Sample, Summary, poisson, summarise
from proto import classify_pb2 as pb

CLASSIFY = "/convserve.v1.Classifier/Classify"
NOT_SENT = "NOT_SENT"  # due while --max-in-flight requests were unanswered; never left the client
UNREACHABLE_PAUSE_S = 0.01  # asking a server that isn't there any faster tells nothing

Rpc = Callable[..., Awaitable[pb.ClassifyResponse]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """One measurement, as the command line asks for it."""

    target: str
    model: str
    version: int
    concurrency: int | None  # closed loop with that many callers; None: open loop at rate_hz
    rate_hz: float | None
    seed: int
    duration_s: float
    warmup_s: float
    images_per_call: int
    input: str
    deadline_ms: float
    channels: int
    max_in_flight: int


@dataclass(slots=True)
class ServerSide:
    """What the answers say of the server, added up."""

    answers: int = 0
    decode_ms: float = 0.0
    queue_ms: float = 0.0
    compute_ms: float = 0.0
    total_ms: float = 0.0
    batches: int = 0
    batch_rows: int = 0
    answered_by: set[tuple[str, int, bool]] = field(default_factory=set)  # model, version, trained

    def add(self, response: pb.ClassifyResponse) -> None:
        timing = response.timing
        self.answers += 1
        self.decode_ms += timing.decode_ms
        self.queue_ms += timing.queue_ms
        self.compute_ms += timing.compute_ms
        self.total_ms += timing.total_ms
        self.batches += len(timing.batch_rows)
        self.batch_rows += sum(timing.batch_rows)
        self.answered_by.add((response.model, response.version, response.trained))


class Run:
    """Sends prepared requests and keeps what became of each. Lives in one event loop.

    Requests are bytes that were serialised once: the sender shares the machine with what it
    measures, so a call must cost it as little as can be.
    """

    def __init__(
        self,
        rpcs: Sequence[Rpc],
        requests: Sequence[bytes],
        *,
        images: int,
        timeout_s: float,
        warmup_s: float = 0.0,
    ) -> None:
        """`images` are in each request. Those due before `warmup_s` count in `samples` only."""
        self._rpcs = itertools.cycle(rpcs)
        self._requests = itertools.cycle(requests)
        self._images = images
        self._timeout_s = timeout_s
        self._warmup_s = warmup_s
        self._zero = time.perf_counter()
        self._cpu_from_s: float | None = None  # CPU seconds used when the warm-up was over
        self.in_flight = 0
        self.samples: list[Sample] = []
        self.server = ServerSide()

    def now_s(self) -> float:
        return time.perf_counter() - self._zero

    def cpu_s(self) -> float:
        """CPU seconds this process has used since the warm-up."""
        return 0.0 if self._cpu_from_s is None else _cpu_s() - self._cpu_from_s

    async def closed_loop(self, concurrency: int, until_s: float) -> None:
        """`concurrency` callers, each sending its next request when the last one ended."""

        async def caller() -> None:
            while (due_s := self.now_s()) < until_s:
                if await self._ask(due_s) == "UNAVAILABLE":
                    await asyncio.sleep(UNREACHABLE_PAUSE_S)

        async with asyncio.TaskGroup() as callers:
            for _ in range(concurrency):
                callers.create_task(caller())

    async def open_loop(
        self, arrivals: Iterator[float], until_s: float, *, max_in_flight: int
    ) -> None:
        """Sends at the due times, whatever became of earlier requests."""
        async with asyncio.TaskGroup() as asking:
            for due_s in itertools.takewhile(lambda due_s: due_s < until_s, arrivals):
                while (early_s := due_s - self.now_s()) > 0:
                    # The loop's timers tick in milliseconds; a shorter sleep would spin until due.
                    await asyncio.sleep(max(early_s, 0.001))
                if self.in_flight < max_in_flight:
                    self.in_flight += 1
                    asking.create_task(self._ask_and_leave(due_s))
                else:
                    now_s = self.now_s()
                    self.samples.append(Sample(due_s, now_s, now_s, NOT_SENT, self._images))

    async def _ask_and_leave(self, due_s: float) -> None:
        try:
            await self._ask(due_s)
        finally:
            self.in_flight -= 1

    async def _ask(self, due_s: float) -> str:
        """One call, sampled however it ends; returns its status."""
        counts = due_s >= self._warmup_s
        if counts and self._cpu_from_s is None:
            self._cpu_from_s = _cpu_s()
        sent_s = self.now_s()
        status = "CANCELLED"
        try:
            response = await next(self._rpcs)(next(self._requests), timeout=self._timeout_s)
            # grpcio gives None now and then where the deadline passed as the answer came (1.78).
            status = OK if response is not None else "DEADLINE_EXCEEDED"
        except grpc.aio.AioRpcError as failure:
            status = failure.code().name
        finally:
            self.samples.append(Sample(due_s, sent_s, self.now_s(), status, self._images))
        if counts and status == OK:
            self.server.add(response)
        return status


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What one measurement found."""

    plan: Plan
    request_bytes: int
    summary: Summary
    server: ServerSide
    client_cpu_s: float
    interrupted: bool

    @property
    def client_cpu_s_per_call(self) -> float | None:
        sent = self.summary.total - self.summary.counts.get(NOT_SENT, 0)
        return self.client_cpu_s / sent if sent else None

    def as_json(self) -> dict[str, Any]:
        """The report with units in its names; null where there was nothing to measure."""
        summary, server = self.summary, self.server
        latency = asdict(summary.latency) if summary.latency else {}
        answers = max(server.answers, 1)
        return {
            **asdict(self.plan),
            "loop": "closed" if self.plan.concurrency else "open",
            "request_bytes": self.request_bytes,
            "interrupted": self.interrupted,
            "measured_s": summary.duration_s,
            "counts": dict(summary.counts),
            "in_time": summary.in_time,
            "late": summary.late,
            "goodput_hz": summary.goodput_hz,
            "calls_hz": summary.calls_hz,
            "images_hz": summary.images_hz,
            "latency_ms": {name.removesuffix("_s"): s * 1000 for name, s in latency.items()},
            "lag_p99_ms": None if summary.lag_p99_s is None else summary.lag_p99_s * 1000,
            "client_cpu_s": self.client_cpu_s,
            "client_cpu_s_per_call": self.client_cpu_s_per_call,
            "answered_by": [
                {"model": model, "version": version, "trained": trained}
                for model, version, trained in sorted(server.answered_by)
            ],
            "server_mean_ms": {
                "decode": server.decode_ms / answers,
                "queue": server.queue_ms / answers,
                "compute": server.compute_ms / answers,
                "total": server.total_ms / answers,
            }
            if server.answers
            else None,
            "server_mean_batch_rows": server.batch_rows / server.batches
            if server.batches
            else None,
        }


async def measure(
    plan: Plan, progress: Callable[[Run], Coroutine[Any, Any, None]] | None = None
) -> Report:
    """Runs the plan. Raises ClassifierError when the server can't be asked about the model.

    An interrupt from the keyboard ends the run early; what was measured until then is reported.
    """
    async with AsyncExitStack() as stack:
        client = await stack.enter_async_context(AsyncClient(plan.target))
        info = await client.get_model(plan.model, plan.version)
        requests = prepared_requests(plan, info.input_shape)
        channels = [
            await stack.enter_async_context(
                grpc.aio.insecure_channel(
                    plan.target,
                    options=[
                        *channel_options(MAX_MESSAGE_BYTES),
                        # else channels to one target share one connection
                        ("grpc.use_local_subchannel_pool", 1),
                    ],
                )
            )
            for _ in range(plan.channels)
        ]
        async with asyncio.timeout(10):
            await asyncio.gather(*(channel.channel_ready() for channel in channels))
        rpcs: list[Any] = [
            channel.unary_unary(CLASSIFY, None, pb.ClassifyResponse.FromString)
            for channel in channels
        ]
        run = Run(
            rpcs,
            requests,
            images=plan.images_per_call,
            timeout_s=plan.deadline_ms / 1000,
            warmup_s=plan.warmup_s,
        )
        until_s = plan.warmup_s + plan.duration_s
        if plan.concurrency is not None:
            load = run.closed_loop(plan.concurrency, until_s)
        else:
            assert plan.rate_hz is not None
            arrivals = poisson(plan.rate_hz, plan.seed)
            load = run.open_loop(arrivals, until_s, max_in_flight=plan.max_in_flight)
        interrupted = await _interruptible(load, run, progress)
        cpu_s = run.cpu_s()
        ended_s = min(run.now_s(), until_s)
        return Report(
            plan=plan,
            request_bytes=round(sum(map(len, requests)) / len(requests)),
            # an interrupt during the warm-up leaves nothing to sum up
            summary=summarise(
                run.samples,
                plan.warmup_s,
                max(ended_s, plan.warmup_s + 1e-9),
                deadline_s=plan.deadline_ms / 1000,
            ),
            server=run.server,
            client_cpu_s=cpu_s,
            interrupted=interrupted,
        )


async def _interruptible(
    load: Coroutine[Any, Any, None],
    run: Run,
    progress: Callable[[Run], Coroutine[Any, Any, None]] | None,
) -> bool:
    """Awaits the load, its progress shown beside it; True when the keyboard ended it."""
    loop = asyncio.get_running_loop()
    sending = asyncio.create_task(load)
    interrupts: list[bool] = []

    def interrupt() -> None:
        interrupts.append(True)
        sending.cancel()

    loop.add_signal_handler(signal.SIGINT, interrupt)
    showing = asyncio.create_task(progress(run)) if progress else None
    try:
        await sending
    except asyncio.CancelledError:
        if not interrupts:
            raise
    finally:
        loop.remove_signal_handler(signal.SIGINT)
        if showing:
            showing.cancel()
            with suppress(asyncio.CancelledError):
                await showing
    return bool(interrupts)


def prepared_requests(plan: Plan, shape: tuple[int, int, int]) -> list[bytes]:
    """The requests to send in turn, serialised. Raises OSError when a file can't be read."""
    height, width, channels = shape
    request = pb.ClassifyRequest(model=plan.model, version=plan.version)
    count = plan.images_per_call
    if plan.input == "raw":
        pixels = np.stack([picture(height, width, channels, seed) for seed in range(count)])
        request.pixels.CopyFrom(
            pb.RawImages(
                count=count, height=height, width=width, channels=channels, data=pixels.tobytes()
            )
        )
        return [request.SerializeToString()]
    if plan.input == "jpeg":
        files = [_jpeg(seed) for seed in range(count)]
    else:
        path = Path(plan.input)
        paths = sorted(p for p in path.iterdir() if p.is_file()) if path.is_dir() else [path]
        files = [path.read_bytes() for path in paths]
        if not files:
            raise FileNotFoundError(f"there is no file in {path}")
    prepared = []
    for first in range(0, len(files), count):
        del request.images[:]
        for n in range(first, first + count):
            request.images.add(encoded=files[n % len(files)])
        prepared.append(request.SerializeToString())
    return prepared


def picture(height: int, width: int, channels: int, seed: int) -> np.ndarray[Any, Any]:
    """[H, W, C] uint8 that compresses about as a photograph does: waves, with a little noise."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    waves = np.zeros((height, width, channels))
    for octave in range(6):
        fy, fx, phase = rng.normal(size=(3, channels)) * 2.0**octave
        waves += np.sin(
            2 * np.pi * (y[..., None] / height * fy + x[..., None] / width * fx) + phase
        ) / 2.0 ** (octave / 2)
    waves = 128 + 40 * waves + rng.normal(scale=4, size=waves.shape)
    return waves.clip(0, 255).astype(np.uint8)


def _jpeg(seed: int) -> bytes:
    """A picture of the size that photographs in ImageNet have on average."""
    from PIL import Image  # only this input needs it

    file = io.BytesIO()
    Image.fromarray(picture(375, 500, 3, seed)).save(file, "JPEG", quality=90)
    return file.getvalue()


def _cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def main(argv: Sequence[str] | None = None) -> int:
    plan, json_to = _parsed(argv)
    try:
        # The bar is imported here though it is drawn later: an import holds up the event loop.
        from rich import progress  # noqa: F401
        from rich.console import Console
    except ImportError:
        return _fail("the tables need rich: pip install 'convserve[client]'")
    try:
        # uvloop costs the sender less; where there is none, asyncio measures as well.
        import uvloop

        run_loop: Any = uvloop.run
    except ImportError:
        run_loop = asyncio.run
    console = Console(stderr=True)
    try:
        report = run_loop(measure(plan, lambda run: _show_progress(plan, run, console)))
    except ClassifierError as error:
        return _fail(str(error))
    except (OSError, ImportError) as error:
        return _fail(f"--input {plan.input}: {error}")
    except KeyboardInterrupt:
        return _fail("interrupted before anything was measured")
    except TimeoutError:
        return _fail(f"{plan.target} took no further connections within 10 s")
    text = json.dumps(report.as_json(), indent=2) + "\n"
    if json_to == "-":
        sys.stdout.write(text)
    elif json_to is not None:
        Path(json_to).write_text(text)
    _print_table(report, console if json_to == "-" else Console())
    return 0 if report.summary.succeeded else 1


def _fail(message: str) -> int:
    print(f"bench: {message}", file=sys.stderr)
    return 1


async def _show_progress(plan: Plan, run: Run, console: Any) -> None:
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    total_s = plan.warmup_s + plan.duration_s
    columns = TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn()
    # Drawn by hand, four times a second: the bar's own thread would take from what is measured.
    with Progress(*columns, console=console, transient=True, auto_refresh=False) as bar:
        task = bar.add_task("", total=total_s)
        while True:
            now_s = run.now_s()
            phase = "warm-up" if now_s < plan.warmup_s else "measuring"
            if now_s > total_s:
                phase = "waiting for the last answers"
            bar.update(task, completed=min(now_s, total_s), description=phase, refresh=True)
            await asyncio.sleep(0.25)


def _print_table(report: Report, console: Any) -> None:
    from rich.table import Table

    plan, summary, server = report.plan, report.summary, report.server
    load = (
        f"closed loop, {plan.concurrency} callers"
        if plan.concurrency
        else f"open loop, Poisson {plan.rate_hz:g}/s, seed {plan.seed}"
    )
    table = Table(title=f"{plan.model} at {plan.target}: {load}", title_justify="left")
    table.add_column()
    table.add_column(justify="right")
    for model, version, trained in sorted(server.answered_by):
        untrained = "" if trained else ", UNTRAINED"
        table.add_row("answered by", f"{model} version {version}{untrained}")
    table.add_row("measured", f"{summary.duration_s:.1f} s" + ", cut short" * report.interrupted)
    table.add_row("images a call", str(plan.images_per_call))
    table.add_row("bytes a call", f"{report.request_bytes:,}")
    table.add_row("deadline", f"{plan.deadline_ms:g} ms")
    table.add_section()
    for status, count in sorted(summary.counts.items(), key=lambda item: -item[1]):
        note = f" (over {plan.max_in_flight} in flight)" if status == NOT_SENT else ""
        table.add_row(status + note, f"{count:,}  {count / summary.total:7.2%}")
    if summary.total:
        table.add_row("in time", f"{summary.in_time:,}  {summary.in_time / summary.total:7.2%}")
    table.add_section()
    table.add_row("goodput", f"{summary.goodput_hz:,.1f} /s")
    table.add_row("calls", f"{summary.calls_hz:,.1f} /s")
    table.add_row("images", f"{summary.images_hz:,.1f} /s")
    if summary.latency:
        names = ("p50", "p90", "p95", "p99", "p99.9", "max")
        for name, seconds in zip(names, asdict(summary.latency).values(), strict=True):
            table.add_row(f"latency {name}", f"{seconds * 1000:,.2f} ms")
    if summary.lag_p99_s is not None and not plan.concurrency:
        table.add_row("sent late by, p99", f"{summary.lag_p99_s * 1000:,.2f} ms")
    table.add_section()
    if server.answers:
        for phase in ("decode", "queue", "compute", "total"):
            mean_ms = getattr(server, f"{phase}_ms") / server.answers
            table.add_row(f"server: {phase}, mean", f"{mean_ms:,.2f} ms")
    if server.batches:
        table.add_row("server: rows a batch, mean", f"{server.batch_rows / server.batches:.2f}")
    if report.client_cpu_s_per_call is not None:
        table.add_row("client: CPU a call", f"{report.client_cpu_s_per_call * 1e6:,.0f} us")
    console.print(table)


def _parsed(argv: Sequence[str] | None) -> tuple[Plan, str | None]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--target", default="127.0.0.1:8001", help="the server, as HOST:PORT (%(default)s)")
    add("--model", required=True, help="the model to ask")
    add("--version", type=at_least(0), default=0, help="its version; 0 is the newest (0)")
    load = parser.add_mutually_exclusive_group()
    load.add_argument(
        "--concurrency", type=at_least(1), help="closed loop with that many callers (16)"
    )
    load.add_argument(
        "--rate", type=positive, help="open loop: Poisson arrivals, that many calls a second"
    )
    add("--seed", type=int, default=1, help="of the arrivals (%(default)s)")
    add("--duration", type=positive, default=10.0, help="seconds to measure (%(default)g)")
    add("--warmup", type=_not_negative, default=2.0, help="seconds before that (%(default)g)")
    add("--images-per-call", type=at_least(1), default=1, help="images a call (%(default)s)")
    add(
        "--input",
        default="raw",
        metavar="raw|jpeg|PATH",
        help="raw: pixels of the model's own size; jpeg: made-up pictures of 500x375;"
        " or an image file, or a folder of them, sent in turn (%(default)s)",
    )
    add("--deadline-ms", type=positive, default=1000.0, help="of each call (%(default)g)")
    add("--channels", type=at_least(1), default=1, help="connections (%(default)s)")
    add(
        "--max-in-flight",
        type=at_least(1),
        default=1024,
        help=f"open loop: most unanswered calls; those due beyond count as {NOT_SENT}"
        " (%(default)s)",
    )
    add("--json", metavar="FILE|-", help="write the result there; - is the standard output")
    args = parser.parse_args(argv)
    plan = Plan(
        target=args.target,
        model=args.model,
        version=args.version,
        concurrency=None if args.rate else args.concurrency or 16,
        rate_hz=args.rate,
        seed=args.seed,
        duration_s=args.duration,
        warmup_s=args.warmup,
        images_per_call=args.images_per_call,
        input=args.input,
        deadline_ms=args.deadline_ms,
        channels=args.channels,
        max_in_flight=args.max_in_flight,
    )
    return plan, args.json


def at_least(least: int) -> Callable[[str], int]:
    """For argparse: a whole number, no smaller than that."""

    def number(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"{value} given; it must be at least {least}")
        return value

    return number


def positive(text: str) -> float:
    """For argparse: a number above 0, and finite."""
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{value} given; it must be positive and finite")
    return value


def _not_negative(text: str) -> float:
    return 0.0 if float(text) == 0 else positive(text)


if __name__ == "__main__":
    sys.exit(main())
