"""Runs one measurement: sends the load, reads the server's counters, and makes the report."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from urllib.parse import urlsplit

from convserve_client.loadgen import server_metrics
from convserve_client.loadgen.event_loop import clock
from convserve_client.loadgen.plan import Plan
from convserve_client.loadgen.protocols.adapter import AnswerTotals
from convserve_client.loadgen.results.report import Report
from convserve_client.loadgen.results.samples import Samples
from convserve_client.loadgen.run import Progress
from convserve_client.loadgen.server_metrics import NoMetrics, ServerMetrics
from convserve_client.loadgen.worker_pool import ShowProgress, run_workers
from convserve_client.security.access import Access
from convserve_client.security.connection_errors import host_of


def _show_nothing(now_s: float, progress: Progress) -> None:
    pass


async def measure(plan: Plan, show_progress: ShowProgress = _show_nothing) -> Report:
    """Runs the plan. Raises ClassifierError if the server cannot describe the model, and what
    `run_workers` raises.

    Ctrl-C ends the run early; the report has what was measured until then.
    """
    stop = asyncio.Event()
    reading: list[asyncio.Task[_Counters]] = []

    def on_start(zero_s: float) -> None:
        reading.append(asyncio.create_task(_read_counters(plan, zero_s, stop)))

    with _stop_on_interrupt(stop):
        try:
            results = await run_workers(
                plan, on_start=on_start, show_progress=show_progress, stop=stop
            )
            interrupted = stop.is_set()
            stop.set()
            counters = await reading[0]
        finally:
            for task in reading:
                task.cancel()
    samples, totals = Samples(), AnswerTotals()
    for result in results:
        samples.extend(result.packed_samples)
        totals.add(result.totals)
    return Report(
        plan=plan,
        samples=samples.columns,
        ended_s=max(result.ended_s for result in results),
        server=totals,
        worker_cpu_s=tuple(result.cpu_s for result in results),
        connections=sum(result.connections for result in results),
        request_bytes=sum(result.request_bytes for result in results) / len(results),
        interrupted=interrupted,
        metrics=counters.metrics,
        metrics_missing=counters.missing,
        server_cpu_s=counters.cpu_s,
    )


@dataclass(slots=True)
class _Counters:
    """Increase of the server's counters during the measurement."""

    metrics: ServerMetrics | None = None
    missing: str = ""  # why they could not be read
    cpu_s: float | None = None


def metrics_access(plan: Plan) -> Access:
    """TLS for the server's metrics, and the token if they are on the host that is measured."""
    if urlsplit(plan.metrics_url).hostname == host_of(plan.target):
        return plan.access
    return replace(plan.access, token="")


async def _read_counters(plan: Plan, zero_s: float, stop: asyncio.Event) -> _Counters:
    """Reads the server's counters at the end of the warm-up and at the end of the measurement."""
    texts: list[str] = []
    found, cpu_s = _Counters(), []
    for when_s in (plan.warmup_s, plan.until_s):
        delay_s = max(0.0, zero_s + when_s - clock())
        with suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), delay_s)
        if plan.server_pids:
            try:
                cpu_s.append(server_metrics.cpu_s(plan.server_pids))
            except ProcessLookupError as error:
                found.missing = str(error)
        if plan.metrics_url and not found.missing:
            try:
                # In a thread, and parsed after the run, so that it does not delay sending.
                texts.append(
                    await asyncio.to_thread(
                        server_metrics.fetch, plan.metrics_url, metrics_access(plan)
                    )
                )
            except NoMetrics as error:
                found.missing = str(error)
    if len(cpu_s) == 2:
        found.cpu_s = cpu_s[1] - cpu_s[0]
    if len(texts) == 2:
        try:
            before, after = map(server_metrics.parse, texts)
            found.metrics = server_metrics.difference(before, after, plan.models)
        except NoMetrics as error:
            found.missing = str(error)
    return found


@contextmanager
def _stop_on_interrupt(stop: asyncio.Event) -> Iterator[None]:
    """SIGINT sets `stop` inside this block."""
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGINT, stop.set)
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGINT)
