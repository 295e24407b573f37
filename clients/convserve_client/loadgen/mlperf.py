"""MLPerf Inference's scenarios, driven by its official LoadGen, with ResNet-50's rules.

LoadGen decides when which sample is due and judges the run; this file sends the calls. Its own
files, mlperf_log_summary.txt and mlperf_log_detail.txt, stay where they are written. The rules
(600 s at least, 15 ms at p99 in Server, 8 samples a query in MultiStream) are those that LoadGen
carries in itself; a run that departs from them is marked as not compliant. No run is an official
result: the pictures are not ImageNet's, and accuracy is not measured here.
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
from convserve_client.loadgen.arguments import Asked
from convserve_client.loadgen.calls import (
    Call,
    Channel,
    ask,
    clock,
)
from convserve_client.loadgen.event_loop import run_loop
from convserve_client.loadgen.load import (
    OK,
    STATUSES,
    Samples,
    summarise,
)
from convserve_client.loadgen.plan import Plan
from convserve_client.loadgen.protocols import Request, Unaskable, protocol
from convserve_client.loadgen.worker import connected

RULES = "resnet50"
WHOLE_RUN_S = 600.0
LEAST_QUERIES = 100  # of a shorter run
CROWD = 16  # calls at a time that find out what a server can do
AMPLE = 1.2
EXPECTED_SHARE = 0.5  # of the latency of a lone call: too low only costs memory
SUMMARY = "mlperf_log_summary.txt"
MOST_PAUSE_S = 1.0
RETRY_S = 0.005  # after a refusal without a hint: a query must be answered however late
GIVE_UP_S = 60.0
RETRIED = ("RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED", "UNAVAILABLE")
Query = Sequence[tuple[int, int]]  # LoadGen's id of each sample, and the sample's index


@dataclass(slots=True)
class Outcome:
    """What became of the calls, beside LoadGen's own account."""

    samples: Samples = field(default_factory=Samples)
    refusals: int = 0
    failures: list[str] = field(default_factory=list)


def run(asked: Asked, console: Any) -> tuple[dict[str, Any], int]:
    """Runs the scenario; gives the result for --json and the exit status: 0 where LoadGen finds the
    run valid, 3 where it does not, 1 where calls failed.

    Raises ImportError without LoadGen, and what `Asked.prepared` does.
    """
    plan = asked.plan
    settings, departures = _settings(asked)
    if len(plan.kinds) != 1:
        raise Unaskable("--scenario takes one model and no mixes")
    folder = asked.mlperf_dir / f"{plan.kinds[0].model}-{asked.scenario}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / SUMMARY).unlink(missing_ok=True)
    console.print(f"{asked.scenario}: LoadGen writes to {folder}", highlight=False)
    outcome = run_loop(_serve(plan, asked.scenario, settings, folder, departures))
    return _result(asked, folder, outcome, departures, console)


def _settings(asked: Asked) -> tuple[Any, list[str]]:
    """LoadGen's settings, and in which ways they depart from the rules."""
    import mlperf_loadgen as lg

    plan, departures = asked.plan, []
    settings = lg.TestSettings()
    settings.scenario = getattr(lg.TestScenario, asked.scenario)
    settings.mode = lg.TestMode.PerformanceOnly
    # 0: the rules that are part of the library; no file is read.
    settings.FromConfig("", RULES, asked.scenario, 0)
    if plan.duration_s < WHOLE_RUN_S:
        settings.min_duration_ms = round(plan.duration_s * 1e3)
        departures.append(f"it is made for {plan.duration_s:g} s, not {WHOLE_RUN_S:g} s")
        if asked.scenario != "Offline":
            departures += _fewer(settings, LEAST_QUERIES)
    if asked.scenario == "Server":
        if plan.rate_hz is None:
            raise Unaskable("--scenario Server needs a --rate: the queries a second to aim at")
        settings.server_target_qps = plan.rate_hz
        if asked.mlperf_target_s:
            settings.server_target_latency_ns = round(asked.mlperf_target_s * 1e9)
            departures.append(f"the limit is {asked.mlperf_target_s * 1e3:g} ms at p99, not 15 ms")
    if asked.scenario == "Offline" and plan.rate_hz is None and not plan.warmup_s:
        raise Unaskable(
            "--scenario Offline needs a --rate, the images a second expected, or a --warmup to "
            "find it out"
        )
    return settings, departures


def _fewer(settings: Any, queries: int) -> list[str]:
    """Has fewer queries asked for than the rules want; gives how that departs from them."""
    least = settings.min_query_count
    if queries >= least:
        return []
    settings.min_query_count = queries
    return [f"at least {queries} samples are asked for, not {least}"]


async def _serve(
    plan: Plan, scenario: str, settings: Any, folder: Path, departures: list[str]
) -> Outcome:
    """LoadGen on a thread of its own, its queries answered here. Adds to `departures`."""
    loop = asyncio.get_running_loop()
    samples = settings.performance_sample_count_override
    async with AsyncExitStack() as stack:
        asked = protocol(plan)
        request = await asked.library(plan, plan.kinds[0], samples)
        answering = _Answering(await connected(plan, asked, stack), request, plan)
        expected_s = await answering.alone(plan.warmup_s)
        if expected_s is not None:  # from it LoadGen knows how many queries to make beforehand
            settings.single_stream_expected_latency_ns = round(EXPECTED_SHARE * expected_s * 1e9)
            settings.multi_stream_expected_latency_ns = round(EXPECTED_SHARE * expected_s * 1e9)
        if scenario == "Offline":
            # One query of so many samples: too few, and the run is too short to be valid.
            rate_hz = plan.rate_hz or AMPLE * await answering.crowd(plan.warmup_s)
            settings.offline_expected_qps = rate_hz
            if plan.duration_s < WHOLE_RUN_S:
                departures += _fewer(settings, max(1, round(rate_hz * plan.duration_s)))
        over = asyncio.Event()

        def issue(queried: Sequence[Any]) -> None:  # on LoadGen's thread; must return at once
            query = [(sample.id, sample.index) for sample in queried]
            loop.call_soon_threadsafe(answering.take, query, clock())

        def test() -> None:
            try:
                _test(issue, samples, settings, folder)
            finally:
                loop.call_soon_threadsafe(over.set)

        loop.add_signal_handler(signal.SIGINT, answering.interrupted)
        thread = threading.Thread(target=test, name="loadgen", daemon=True)
        thread.start()
        try:
            await over.wait()
        finally:
            loop.remove_signal_handler(signal.SIGINT)
        thread.join()
    return answering.outcome


def _test(
    issue: Callable[[Sequence[Any]], None], samples: int, settings: Any, folder: Path
) -> None:
    """A whole run of LoadGen; returns when it has judged it."""
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


class _Answering:
    """Sends calls for the samples that LoadGen asks for. Lives in one event loop."""

    def __init__(self, channels: Sequence[Channel], request: Request, plan: Plan) -> None:
        self.outcome = Outcome()
        self._channels = itertools.cycle(channels)
        self._request = request
        self._images = plan.kinds[0].images
        self._timeout_s = plan.deadlines_s[0]
        self._slots = asyncio.Semaphore(plan.max_in_flight)
        self._crowd = min(CROWD, plan.max_in_flight)
        self._zero_s = clock()
        self._tasks: set[asyncio.Task[None]] = set()

    async def alone(self, seconds: float) -> float | None:
        """The median seconds of a call while one follows the other for so long; None without one.

        Raises ClassifierError where the first one fails.
        """
        latencies: list[float] = []
        ends_s = clock() + seconds
        while (began_s := clock()) < ends_s:
            call = await self._ask([0])
            if call.code and not latencies:
                raise translate(call.failure(), connected=True)
            latencies.append(clock() - began_s)
        return median(latencies) if latencies else None

    async def crowd(self, seconds: float) -> float:
        """Images a second of CROWD callers, or as many as may be in flight, who ask and wait, for
        so long. Raises ClassifierError where a call fails in a way that asking again can't mend, or
        none is answered."""
        ends_s = clock() + seconds
        done = 0

        async def caller() -> None:
            nonlocal done
            while clock() < ends_s:
                call = await self._ask(range(self._images))
                if STATUSES[call.code] == OK:
                    done += self._images
                    continue
                error = translate(call.failure(), connected=True)
                if STATUSES[call.code] not in RETRIED:
                    raise error
                await asyncio.sleep(_pause_s(error))

        began_s = clock()
        callers = [asyncio.ensure_future(caller()) for _ in range(self._crowd)]
        try:
            await asyncio.gather(*callers)
        finally:
            for one in callers:  # where one of them fails, nobody else goes on asking
                one.cancel()
        if not done:
            raise ClassifierError(
                f"none of {self._crowd} callers was answered within {seconds:g} s; say a --rate"
            )
        return done / (clock() - began_s)

    def take(self, query: Query, issued_s: float) -> None:
        for first in range(0, len(query), self._images):
            call = self._call(query[first : first + self._images], issued_s - self._zero_s)
            task = asyncio.get_running_loop().create_task(call)
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _call(self, query: Query, issued_s: float) -> None:
        """One call for some samples, sent until it is answered: LoadGen knows no refusing."""
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
        """The status the call ended with; None where it is worth another try, after a wait."""
        call = await self._ask(indices)
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

    async def _ask(self, indices: Sequence[int]) -> Call:
        return await ask(next(self._channels), self._request(indices), self._timeout_s)

    def interrupted(self) -> None:
        """Says what there is and ends the process: LoadGen can't end a run early."""
        summary = summarise(self.outcome.samples.columns, 0.0, max(self._now_s(), 1e-9))
        p99 = f", p99 {summary.latency.p99_s * 1e3:.2f} ms" if summary.latency else ""
        print(
            f"bench: interrupted after {summary.duration_s:.1f} s: {summary.images_hz:,.1f} "
            f"samples/s{p99}; LoadGen's summary is written by whole runs only",
            file=sys.stderr,
            flush=True,
        )
        os._exit(130)

    def _now_s(self) -> float:
        return clock() - self._zero_s


def _pause_s(refusal: ClassifierError) -> float:
    """How long to wait before asking again."""
    return min(refusal.retry_after_s or RETRY_S, MOST_PAUSE_S)


def _result(
    asked: Asked, folder: Path, outcome: Outcome, departures: Sequence[str], console: Any
) -> tuple[dict[str, Any], int]:
    text = ""
    with suppress(OSError):
        text = (folder / SUMMARY).read_text()
    if not text:
        raise ClassifierError(f"LoadGen wrote no summary to {folder}")
    told = _figures(text)
    valid = told.get("Result is") == "VALID" and not outcome.failures
    console.print(text.partition("\n\n")[0].strip(), highlight=False)
    console.print(f"retried after a refusal: {outcome.refusals:,}", highlight=False)
    for failure in dict.fromkeys(outcome.failures[:3]):
        console.print(f"[bold red]FAILED[/] ({len(outcome.failures):,} calls): {failure}")
    if departures:
        console.print(
            "[bold]NOT COMPLIANT[/] with MLPerf's rules: " + "; ".join(departures), highlight=False
        )
    result = {
        "scenario": asked.scenario,
        "rules": RULES,
        "valid": valid,
        "compliant": not departures,
        "departures": list(departures),
        "refusals_retried": outcome.refusals,
        "failed_calls": len(outcome.failures),
        "summary_file": str(folder / SUMMARY),
        "summary": told,
    }
    return result, 1 if outcome.failures else 0 if valid else 3


def _figures(text: str) -> dict[str, str]:
    """The summary's lines `name : value`."""
    pairs = (line.split(":", 1) for line in text.splitlines() if ":" in line)
    return {name.strip(): value.strip() for name, value in pairs}
