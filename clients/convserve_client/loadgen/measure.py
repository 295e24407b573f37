"""One measurement: the load sent, the server watched in the same window, all of it summed up."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from convserve_client.loadgen import server_metrics as scrape
from convserve_client.loadgen.calls import clock
from convserve_client.loadgen.load import (
    NOT_SENT,
    Array,
    Estimate,
    Samples,
    Summary,
    estimate,
    summarise,
    windows,
)
from convserve_client.loadgen.plan import Plan
from convserve_client.loadgen.protocols import PHASES, ServerSide
from convserve_client.loadgen.server_metrics import NoMetrics, ServerMetrics
from convserve_client.loadgen.worker import Progress
from convserve_client.loadgen.worker_pool import send

# A generator that sends later (p99) adds to what it measures: than a share of the p99 it reports,
# within these bounds.
LAG_SHARE = 0.1
LAG_LEAST_S, LAG_MOST_S = 0.001, 0.01
BOUND_SHARE = 0.92  # of a core: a closed loop's callers wait for their own process then

Figures = Mapping[str, Estimate | None]


@dataclass(frozen=True, kw_only=True)
class Report:
    """What one measurement found."""

    plan: Plan
    samples: Array  # the columns of convserve_client.loadgen.load.Samples
    ended_s: float
    server: ServerSide
    sender_cpu_s: tuple[float, ...]  # of each process
    request_bytes: float
    interrupted: bool = False
    metrics: ServerMetrics | None = None
    metrics_missing: str = ""  # why there are none, where they were asked for
    server_cpu_s: float | None = None  # by the kernel, where processes were named

    @cached_property
    def summary(self) -> Summary:
        return self._of(self.samples)

    @cached_property
    def by_kind(self) -> list[Summary]:
        return [
            self._of(self.samples[self.samples["kind"] == index])
            for index in range(len(self.plan.kinds))
        ]

    @cached_property
    def windows(self) -> list[Summary]:
        return windows(
            self.samples,
            self.plan.warmup_s,
            self._measured_to_s,
            self.plan.windows,
            deadline_s=self.plan.deadlines_s,
        )

    @property
    def confidence(self) -> Figures:
        """The main figures' means over the windows, with the margin of 95 %."""

        def of(figure: Callable[[Summary], float | None]) -> Estimate | None:
            values = [figure(window) for window in self.windows]
            return estimate([value for value in values if value is not None])

        return {
            "calls_hz": of(lambda window: window.calls_hz),
            "goodput_hz": of(lambda window: window.goodput_hz),
            "p50_ms": of(lambda window: window.latency.p50_s * 1e3 if window.latency else None),
            "p99_ms": of(lambda window: window.latency.p99_s * 1e3 if window.latency else None),
        }

    @property
    def faults(self) -> list[str]:
        """Why the run is not what the plan says; empty where it is valid."""
        summary, found = self.summary, []
        if self.plan.concurrency is None and summary.lag_p99_s is not None:
            p99_s = summary.latency.p99_s if summary.latency else 0.0
            if summary.lag_p99_s > min(max(LAG_LEAST_S, LAG_SHARE * p99_s), LAG_MOST_S):
                found.append(
                    f"requests were sent {summary.lag_p99_s * 1e3:.2f} ms late (p99): the "
                    "generator could not keep up; try more --processes"
                )
        if summary.not_sent:
            found.append(
                f"{summary.not_sent:,} requests were not sent, as {self.plan.max_in_flight} were "
                "unanswered (--max-in-flight)"
            )
        if self.plan.concurrency is not None and self.sender_share > BOUND_SHARE:
            found.append(
                f"a sending process used {self.sender_share:.0%} of a core: this is the "
                "generator's speed, not the server's; try more --processes"
            )
        return found

    @property
    def valid(self) -> bool:
        return not self.faults

    @property
    def sender_share(self) -> float:
        """Of a core, by the busiest sending process."""
        return max(self.sender_cpu_s, default=0.0) / self.summary.duration_s

    @property
    def client_cpu_s(self) -> float:
        return sum(self.sender_cpu_s)

    @property
    def sent(self) -> int:
        return self.summary.total - self.summary.counts.get(NOT_SENT, 0)

    @property
    def client_cpu_s_per_call(self) -> float | None:
        return self.client_cpu_s / self.sent if self.sent else None

    @property
    def server_cpu_s_per_call(self) -> float | None:
        """Of a call that came in, by the kernel's count or else by the server's own."""
        spent_s = self.server_cpu_s
        if spent_s is None and self.metrics is not None:
            spent_s = self.metrics.cpu_s
        return None if spent_s is None or not self.sent else spent_s / self.sent

    @property
    def loop(self) -> str:
        return "open" if self.plan.concurrency is None else "closed"

    @property
    def _measured_to_s(self) -> float:
        # An interrupt during the warm-up leaves nothing to sum up.
        return max(self.ended_s, self.plan.warmup_s + 1e-9)

    def _of(self, samples: Array) -> Summary:
        return summarise(
            samples, self.plan.warmup_s, self._measured_to_s, deadline_s=self.plan.deadlines_s
        )

    def as_json(self) -> dict[str, Any]:
        """The report with units in its names; null where there was nothing to measure."""
        plan, summary, server = self.plan, self.summary, self.server
        asked = asdict(plan)
        del asked["trace"]
        answers = max(server.answers, 1)
        return {
            **asked,
            "loop": self.loop,
            "request_bytes": round(self.request_bytes),
            "interrupted": self.interrupted,
            "valid": self.valid,
            "faults": self.faults,
            **figures(summary),
            "confidence_95": {
                name: None if found is None else asdict(found)
                for name, found in self.confidence.items()
            },
            "by_kind": [
                {**asdict(kind), **figures(part)}
                for kind, part in zip(plan.kinds, self.by_kind, strict=True)
            ],
            "client_cpu_s": self.client_cpu_s,
            "client_cpu_s_per_call": self.client_cpu_s_per_call,
            "client_busiest_process": self.sender_share,
            "server_cpu_s": self.server_cpu_s,
            "server_cpu_s_per_call": self.server_cpu_s_per_call,
            "answered_by": [
                {"model": model, "version": version, "trained": trained}
                for model, version, trained in sorted(server.answered_by, key=str)
            ],
            "server_mean_ms": {
                phase: spent_ms / answers
                for phase, spent_ms in zip(PHASES, server.phases_ms, strict=True)
            }
            if server.answers
            else None,
            "server_mean_batch_rows": summary.mean_rows,
            "server_metrics": None if self.metrics is None else self.metrics.as_json(),
            "server_metrics_missing": self.metrics_missing or None,
        }


def figures(summary: Summary) -> dict[str, Any]:
    """A summary with units in its names."""
    latency = asdict(summary.latency) if summary.latency else {}
    return {
        "measured_s": summary.duration_s,
        "counts": dict(summary.counts),
        "in_time": summary.in_time,
        "late": summary.late,
        "refused": summary.refused,
        "failed": summary.failed,
        "goodput_hz": summary.goodput_hz,
        "calls_hz": summary.calls_hz,
        "images_hz": summary.images_hz,
        "latency_ms": {name.removesuffix("_s"): s * 1000 for name, s in latency.items()},
        "lag_p99_ms": None if summary.lag_p99_s is None else summary.lag_p99_s * 1000,
        "lag_max_ms": None if summary.lag_max_s is None else summary.lag_max_s * 1000,
        "hints": asdict(summary.hints),
    }


Show = Callable[[float, Progress], None]  # told the run's time and what is new since the last


def _unseen(now_s: float, progress: Progress) -> None:
    pass


async def measure(plan: Plan, show: Show = _unseen) -> Report:
    """Runs the plan. Raises ClassifierError when the server can't be asked about the model, and
    what else `senders.send` does.

    An interrupt from the keyboard ends the run early; what was measured until then is reported.
    """
    stop = asyncio.Event()
    watch: list[asyncio.Task[_Watched]] = []

    def started(zero_s: float) -> None:
        watch.append(asyncio.create_task(_watched(plan, zero_s, stop)))

    with _interrupts(stop):
        try:
            parts = await send(plan, started=started, show=show, stop=stop)
            interrupted = stop.is_set()
            stop.set()
            watched = await watch[0]
        finally:
            for task in watch:
                task.cancel()
    samples, server = Samples(), ServerSide()
    for part in parts:
        samples.extend(part.packed)
        server.add(part.server)
    return Report(
        plan=plan,
        samples=samples.columns,
        ended_s=max(part.ended_s for part in parts),
        server=server,
        sender_cpu_s=tuple(part.cpu_s for part in parts),
        request_bytes=sum(part.request_bytes for part in parts) / len(parts),
        interrupted=interrupted,
        metrics=watched.metrics,
        metrics_missing=watched.missing,
        server_cpu_s=watched.cpu_s,
    )


@dataclass(slots=True)
class _Watched:
    metrics: ServerMetrics | None = None
    missing: str = ""
    cpu_s: float | None = None


async def _watched(plan: Plan, zero_s: float, stop: asyncio.Event) -> _Watched:
    """Reads the server's counters when the warm-up ends and when the measurement does."""
    texts: list[str] = []
    found, spent_s = _Watched(), []
    for when_s in (plan.warmup_s, plan.until_s):
        rest_s = max(0.0, zero_s + when_s - clock())
        with suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), rest_s)
        if plan.server_pids:
            try:
                spent_s.append(scrape.cpu_s(plan.server_pids))
            except ProcessLookupError as error:
                found.missing = str(error)
        if plan.metrics_url and not found.missing:
            try:
                # On a thread, and parsed when all is over: the sender must not wait for it.
                texts.append(await asyncio.to_thread(scrape.fetch, plan.metrics_url))
            except NoMetrics as error:
                found.missing = str(error)
    if len(spent_s) == 2:
        found.cpu_s = spent_s[1] - spent_s[0]
    if len(texts) == 2:
        try:
            models = {kind.model for kind in plan.kinds}
            found.metrics = scrape.between(scrape.read(texts[0]), scrape.read(texts[1]), models)
        except NoMetrics as error:
            found.missing = str(error)
    return found


@contextmanager
def _interrupts(stop: asyncio.Event) -> Iterator[None]:
    """SIGINT sets `stop` meanwhile."""
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGINT, stop.set)
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGINT)
