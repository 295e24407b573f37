"""MLPerf Inference scenarios, driven by MLPerf's own LoadGen with the rules for ResNet-50.

LoadGen decides when each sample is due and judges the run; this module sends the calls. LoadGen's
files, mlperf_log_summary.txt and mlperf_log_detail.txt, are kept. LoadGen contains the rules: at
least 600 s, 15 ms at p99 in Server, 8 samples per query in MultiStream. A run that departs from
them is reported as not compliant. No run is an official result: the images are not ImageNet's, and
accuracy is not measured.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from convserve_client.error_translation import translate
from convserve_client.errors import ClassifierError
from convserve_client.loadgen.event_loop import clock, run_loop
from convserve_client.loadgen.options import Options
from convserve_client.loadgen.plan import Plan
from convserve_client.loadgen.protocols.adapter import RequestBuilder, UnsupportedModel
from convserve_client.loadgen.protocols.selection import adapter_for
from convserve_client.loadgen.results.samples import OK, STATUSES, Samples
from convserve_client.loadgen.results.summary import summarise
from convserve_client.loadgen.wire.call import UnaryCall
from convserve_client.loadgen.wire.channel import Channel, call_and_wait
from convserve_client.loadgen.worker import connect

RULES = "resnet50"
COMPLIANT_DURATION_S = 600.0
MIN_QUERIES = 100  # of a shorter run
PROBE_CALLERS = 16  # that measure what the server can do
RATE_MARGIN = 1.2  # expect more than was measured, so that the run is long enough
LATENCY_MARGIN = 0.5  # of the measured latency; too low an expectation only costs memory
SUMMARY = "mlperf_log_summary.txt"
MAX_PAUSE_S = 1.0
DEFAULT_PAUSE_S = 0.005  # after a refusal without a requested wait
GIVE_UP_S = 60.0
RETRIED = ("RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED", "UNAVAILABLE")
Query = Sequence[tuple[int, int]]  # LoadGen's ID and the index of each sample


@dataclass(slots=True)
class Outcome:
    """Results of the calls, in addition to LoadGen's own results."""

    samples: Samples = field(default_factory=Samples)
    refusals: int = 0
    failures: list[str] = field(default_factory=list)


def run(options: Options, console: Any) -> tuple[dict[str, Any], int]:
    """Runs the scenario. Returns the result for --json and the exit status.

    The status is 0 if LoadGen finds the run valid, 3 if it does not, 1 if calls failed. Raises
    ImportError without LoadGen, and what `ProtocolAdapter.sample_library` raises.
    """
    plan = options.plan
    settings, departures = _settings(options)
    if len(plan.classes) != 1:
        raise UnsupportedModel("--scenario takes one model and no mixes")
    folder = options.mlperf_dir / f"{plan.classes[0].model}-{options.scenario}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / SUMMARY).unlink(missing_ok=True)
    console.print(f"{options.scenario}: LoadGen writes to {folder}", highlight=False)
    outcome = run_loop(_run_loadgen(plan, options.scenario, settings, folder, departures))
    return _result(options, folder, outcome, departures, console)


def _settings(options: Options) -> tuple[Any, list[str]]:
    """LoadGen's settings, and how they depart from the rules."""
    import mlperf_loadgen as lg

    plan, departures = options.plan, []
    settings = lg.TestSettings()
    settings.scenario = getattr(lg.TestScenario, options.scenario)
    settings.mode = lg.TestMode.PerformanceOnly
    # 0: use the rules inside the library, read no file
    settings.FromConfig("", RULES, options.scenario, 0)
    if plan.duration_s < COMPLIANT_DURATION_S:
        settings.min_duration_ms = round(plan.duration_s * 1e3)
        departures.append(f"the run takes {plan.duration_s:g} s, not {COMPLIANT_DURATION_S:g} s")
        if options.scenario != "Offline":
            departures += _lower_queries(settings, MIN_QUERIES)
    if options.scenario == "Server":
        if plan.rate_hz is None:
            raise UnsupportedModel(
                "--scenario Server needs a --rate-hz: the target queries per second"
            )
        settings.server_target_qps = plan.rate_hz
        if options.mlperf_latency_s:
            settings.server_target_latency_ns = round(options.mlperf_latency_s * 1e9)
            departures.append(
                f"the limit is {options.mlperf_latency_s * 1e3:g} ms at p99, not 15 ms"
            )
    if options.scenario == "Offline" and plan.rate_hz is None and not plan.warmup_s:
        raise UnsupportedModel(
            "--scenario Offline needs a --rate-hz, the expected images per second, or a --warmup-s"
            " to measure it"
        )
    return settings, departures


def _lower_queries(settings: Any, queries: int) -> list[str]:
    """Lowers the minimum number of queries. Returns how that departs from the rules."""
    minimum = settings.min_query_count
    if queries >= minimum:
        return []
    settings.min_query_count = queries
    return [f"the run has at least {queries} samples, not {minimum}"]


async def _run_loadgen(
    plan: Plan, scenario: str, settings: Any, folder: Path, departures: list[str]
) -> Outcome:
    """Runs LoadGen in a thread and answers its queries here. Adds to `departures`."""
    samples = settings.performance_sample_count_override
    async with AsyncExitStack() as stack:
        adapter = adapter_for(plan)
        build = await adapter.sample_library(plan, plan.classes[0], samples)
        sut = _SystemUnderTest(await connect(plan, adapter, stack), build, plan)
        latency_s = await sut.measure_latency(plan.warmup_s)
        if latency_s is not None:  # LoadGen prepares that many queries in advance
            expected_ns = round(LATENCY_MARGIN * latency_s * 1e9)
            settings.single_stream_expected_latency_ns = expected_ns
            settings.multi_stream_expected_latency_ns = expected_ns
        if scenario == "Offline":
            # LoadGen sends one query of rate * duration samples. Too few make the run too short.
            rate_hz = plan.rate_hz or RATE_MARGIN * await sut.measure_rate(plan.warmup_s)
            settings.offline_expected_qps = rate_hz
            if plan.duration_s < COMPLIANT_DURATION_S:
                departures += _lower_queries(settings, max(1, round(rate_hz * plan.duration_s)))
        await _run_test(sut, samples, settings, folder)
    return sut.outcome


async def _run_test(sut: _SystemUnderTest, samples: int, settings: Any, folder: Path) -> None:
    """Runs LoadGen's test in a thread until LoadGen has judged it."""
    loop = asyncio.get_running_loop()
    done = asyncio.Event()

    def issue(queried: Sequence[Any]) -> None:  # in LoadGen's thread; must return at once
        query = [(sample.id, sample.index) for sample in queried]
        loop.call_soon_threadsafe(sut.answer, query, clock())

    def test() -> None:
        try:
            _test(issue, samples, settings, folder)
        finally:
            loop.call_soon_threadsafe(done.set)

    loop.add_signal_handler(signal.SIGINT, sut.exit_on_interrupt)
    thread = threading.Thread(target=test, name="loadgen", daemon=True)
    thread.start()
    try:
        await done.wait()
    finally:
        loop.remove_signal_handler(signal.SIGINT)
    thread.join()


def _test(
    issue: Callable[[Sequence[Any]], None], samples: int, settings: Any, folder: Path
) -> None:
    """Calls LoadGen. Returns when LoadGen has judged the run."""
    import mlperf_loadgen as lg

    sut = lg.ConstructSUT(issue, lambda: None)
    qsl = lg.ConstructQSL(samples, samples, lambda indices: None, lambda indices: None)
    log = lg.LogSettings()
    output = lg.LogOutputSettings()
    output.outdir = str(folder)
    log.log_output = output
    try:
        lg.StartTestWithLogSettings(sut, qsl, settings, log)
    finally:
        lg.DestroyQSL(qsl)
        lg.DestroySUT(sut)


class _SystemUnderTest:
    """Sends calls for the samples that LoadGen issues. Belongs to one event loop."""

    def __init__(
        self, channels: Sequence[Channel], build_request: RequestBuilder, plan: Plan
    ) -> None:
        self.outcome = Outcome()
        self._channels = itertools.cycle(channels)
        self._build_request = build_request
        self._images = plan.classes[0].images
        self._timeout_s = plan.deadlines_s[0]
        self._slots = asyncio.Semaphore(plan.max_in_flight)
        self._callers = min(PROBE_CALLERS, plan.max_in_flight)
        self._zero_s = clock()
        self._tasks: set[asyncio.Task[None]] = set()

    async def measure_latency(self, duration_s: float) -> float | None:
        """Median latency of one call after the other; None if `duration_s` is 0.

        Raises ClassifierError if the first call fails.
        """
        latencies: list[float] = []
        ends_s = clock() + duration_s
        while (began_s := clock()) < ends_s:
            call = await self._send([0])
            if call.code and not latencies:
                raise translate(call.failure(), connected=True)
            latencies.append(clock() - began_s)
        return median(latencies) if latencies else None

    async def measure_rate(self, duration_s: float) -> float:
        """Images per second of several callers in a closed loop.

        Raises ClassifierError if a call fails in a way that a retry cannot help, or if no call
        succeeds.
        """
        ends_s = clock() + duration_s
        done = 0

        async def call_in_loop() -> None:
            nonlocal done
            while clock() < ends_s:
                call = await self._send(range(self._images))
                if STATUSES[call.code] == OK:
                    done += self._images
                    continue
                error = translate(call.failure(), connected=True)
                if STATUSES[call.code] not in RETRIED:
                    raise error
                await asyncio.sleep(_pause_s(error))

        began_s = clock()
        callers = [asyncio.ensure_future(call_in_loop()) for _ in range(self._callers)]
        try:
            await asyncio.gather(*callers)
        finally:
            for caller in callers:  # if one of them fails, the others stop too
                caller.cancel()
        if not done:
            raise ClassifierError(
                f"no call of {self._callers} callers succeeded within {duration_s:g} s; set"
                " --rate-hz"
            )
        return done / (clock() - began_s)

    def answer(self, query: Query, issued_s: float) -> None:
        """Sends the calls for a query of LoadGen."""
        for first in range(0, len(query), self._images):
            call = self._call(query[first : first + self._images], issued_s - self._zero_s)
            task = asyncio.get_running_loop().create_task(call)
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _call(self, query: Query, issued_s: float) -> None:
        """Sends one call until it succeeds, because LoadGen does not allow refusals."""
        import mlperf_loadgen as lg

        async with self._slots:
            sent_s = self._now_s()
            indices = [index for _, index in query]
            tries = 1
            while (status := await self._try(indices, issued_s)) is None:
                tries += 1
        finished_s = self._now_s()
        self.outcome.samples.add(issued_s, sent_s, finished_s, status, len(query), 0, tries)
        lg.QuerySamplesComplete([lg.QuerySampleResponse(sample, 0, 0) for sample, _ in query])

    async def _try(self, indices: Sequence[int], issued_s: float) -> str | None:
        """Status of the call; None, after a pause, if it should be sent again."""
        call = await self._send(indices)
        status = STATUSES[call.code]
        if status == OK:
            return OK
        error = translate(call.failure(), connected=True)
        if status not in RETRIED or self._now_s() - issued_s > GIVE_UP_S:
            self.outcome.failures.append(f"{status}: {error}")
            return status
        self.outcome.refusals += 1
        await asyncio.sleep(_pause_s(error))
        return None

    async def _send(self, indices: Sequence[int]) -> UnaryCall:
        request = self._build_request(indices)
        return await call_and_wait(next(self._channels), request, self._timeout_s)

    def exit_on_interrupt(self) -> None:
        """Prints the results so far and ends the process: LoadGen cannot end a run early."""
        summary = summarise(self.outcome.samples.columns, 0.0, max(self._now_s(), 1e-9))
        p99 = f", p99 {summary.latency.p99_s * 1e3:.2f} ms" if summary.latency else ""
        print(
            f"bench: interrupted after {summary.duration_s:.1f} s: {summary.images_hz:,.1f} "
            f"samples/s{p99}; LoadGen writes a summary only for complete runs",
            file=sys.stderr,
            flush=True,
        )
        os._exit(130)

    def _now_s(self) -> float:
        return clock() - self._zero_s


def _pause_s(refusal: ClassifierError) -> float:
    """Seconds to wait before the next try."""
    return min(refusal.retry_after_s or DEFAULT_PAUSE_S, MAX_PAUSE_S)


def _result(
    options: Options, folder: Path, outcome: Outcome, departures: Sequence[str], console: Any
) -> tuple[dict[str, Any], int]:
    text = ""
    with suppress(OSError):
        text = (folder / SUMMARY).read_text()
    if not text:
        raise ClassifierError(f"LoadGen wrote no summary to {folder}")
    figures = _figures(text)
    valid = figures.get("Result is") == "VALID" and not outcome.failures
    console.print(text.partition("\n\n")[0].strip(), highlight=False)
    console.print(f"calls sent again after a refusal: {outcome.refusals:,}", highlight=False)
    for failure in dict.fromkeys(outcome.failures[:3]):
        console.print(f"[bold red]FAILED[/] ({len(outcome.failures):,} calls): {failure}")
    if departures:
        console.print(
            "[bold]NOT COMPLIANT[/] with MLPerf's rules: " + "; ".join(departures), highlight=False
        )
    result = {
        "scenario": options.scenario,
        "rules": RULES,
        "valid": valid,
        "compliant": not departures,
        "departures": list(departures),
        "refusals_retried": outcome.refusals,
        "failed_calls": len(outcome.failures),
        "summary_file": str(folder / SUMMARY),
        "summary": figures,
    }
    return result, 1 if outcome.failures else 0 if valid else 3


def _figures(text: str) -> dict[str, str]:
    """Lines of the summary of the form `name : value`."""
    pairs = (line.split(":", 1) for line in text.splitlines() if ":" in line)
    return {name.strip(): value.strip() for name, value in pairs}
