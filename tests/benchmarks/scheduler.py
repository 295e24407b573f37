"""CPU time of the deadline scheduler per request with 1,000 requests waiting.

Run: `python -m tests.benchmarks.scheduler`. It covers admission, the request's share of a batch,
and the end of that batch. It is processor time, not wall time.
"""

from __future__ import annotations

import statistics
import sys
import time

from server.errors import ServingError
from server.scheduling.base import Request
from server.scheduling.deadline import DeadlineScheduler
from tests.simulator.scenarios import GPU, MODEL

WAITING = 1000
REQUESTS = 20_000
ROUNDS = 5


def cost_s(deadline_s: float) -> float:
    """Processor seconds per request while about WAITING requests wait."""
    scheduler = DeadlineScheduler(GPU.units, 1 << 20)
    scheduler.add(MODEL, GPU.groups, objective_s=deadline_s)
    now_s, sent = 0.0, 0
    for _ in range(WAITING):
        request = Request(1, now_s, now_s + deadline_s)
        scheduler.admit(MODEL, request, now_s)
        scheduler.mark_ready(MODEL, request, now_s)
    start_s = time.process_time()
    while sent < REQUESTS:
        batch = scheduler.next_batch(now_s)
        assert batch is not None, "there is always work"
        now_s += batch.expected_s
        scheduler.batch_finished(batch, now_s, batch.expected_s)
        for _ in range(batch.rows):
            sent += 1
            request = Request(1, now_s, now_s + deadline_s)
            try:
                scheduler.admit(MODEL, request, now_s)
            except ServingError:
                continue
            scheduler.mark_ready(MODEL, request, now_s)
    return (time.process_time() - start_s) / sent


def main() -> int:
    for deadline_s in (1.0, 10.0):
        costs = [cost_s(deadline_s) * 1e6 for _ in range(ROUNDS)]
        print(
            f"deadlines of {deadline_s:g} s, {WAITING} waiting: "
            f"median {statistics.median(costs):.1f} us per request "
            f"(min {min(costs):.1f}, max {max(costs):.1f})"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
