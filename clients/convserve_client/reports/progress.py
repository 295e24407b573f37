"""Progress line of a running measurement."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from convserve_client.loadgen.plan import Plan
from convserve_client.loadgen.run import Progress
from convserve_client.loadgen.worker_pool import ShowProgress

RECENT_S = 2.0  # period that the line covers
MIN_SPAN_S = 0.25  # between two updates


@contextmanager
def progress_line(console: Any) -> Iterator[ProgressLine]:
    """Shows the progress of consecutive runs inside this block."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn()
    # Refreshed only with new data: the refresh thread of rich would disturb the measurement.
    with Progress(
        *columns,
        console=console,
        transient=True,
        auto_refresh=False,
        disable=not console.is_terminal,
    ) as bar:
        yield ProgressLine(bar)


class ProgressLine:
    """One line that shows the current run."""

    def __init__(self, bar: Any) -> None:
        self._bar = bar
        self._task = bar.add_task("connecting", total=1.0)

    def show_for(self, plan: Plan, title: str = "") -> ShowProgress:
        """Function that shows the progress of a run of this plan."""
        recent: deque[tuple[float, Progress]] = deque()

        def show(now_s: float, progress: Progress) -> None:
            recent.append((now_s, progress))
            while now_s - recent[0][0] > RECENT_S:
                recent.popleft()
            phase = "warm-up" if now_s < plan.warmup_s else "measuring"
            if now_s > plan.until_s:
                phase = "waiting for the last answers"
            self._bar.update(
                self._task,
                total=plan.until_s,
                completed=min(now_s, plan.until_s),
                description=f"{title}{phase}: {_latest(recent)}",
                refresh=True,
            )

        return show


def _latest(recent: Sequence[tuple[float, Progress]]) -> str:
    total = Progress()
    for _, progress in recent:
        total.add(progress)
    span_s = max(recent[-1][0] - recent[0][0], MIN_SPAN_S)
    text = f"{total.answered / span_s:,.0f} /s"
    if total.latencies_s:
        p50_s, p99_s = np.percentile(total.latencies_s, [50, 99])
        text += f", p50 {p50_s * 1e3:.1f} ms, p99 {p99_s * 1e3:.1f} ms"
    if total.refused or total.failed:
        text += f", refused {total.refused / span_s:,.0f} /s, failed {total.failed / span_s:,.0f}"
    return f"{text}, {recent[-1][1].in_flight} in flight"
