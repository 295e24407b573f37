"""What the policy costs a request with a thousand waiting: `python -m tests.benchmarks.scheduler`.

Processor seconds, not wall time: admission, readiness, its share of a batch, and the batch's end.
"""

from __future__ import annotations

import statistics
import sys
import time

from server.errors import ServingError
from server.scheduling.base import Request
from server.scheduling.deadline import DeadlineScheduler
from tests.simulator.simulation import GPU, MODEL

WAITING = 1000
CALLS = 20_000
ROUNDS = 5


def cost_s(deadline_s: float) -> float:
    """Processor seconds a call while about WAITING others wait."""
    policy = DeadlineScheduler(GPU.units, 1 << 20)
    policy.add(MODEL, GPU.lanes, objective_s=deadline_s)
    now_s, asked = 0.0, 0
    for _ in range(WAITING):
        call = Request(1, now_s, now_s + deadline_s)
        policy.admit(MODEL, call, now_s)
        policy.mark_ready(MODEL, call, now_s)
    began_s = time.process_time()
    while asked < CALLS:
        batch = policy.next_batch(now_s)
        assert batch is not None, "there is always work"
        now_s += batch.expected_s
        policy.batch_finished(batch, now_s, batch.expected_s)
        for _ in range(batch.rows):
            asked += 1
            call = Request(1, now_s, now_s + deadline_s)
            try:
                policy.admit(MODEL, call, now_s)
            except ServingError:
                continue
            policy.mark_ready(MODEL, call, now_s)
    return (time.process_time() - began_s) / asked


def main() -> int:
    for deadline_s in (1.0, 10.0):
        costs = [cost_s(deadline_s) * 1e6 for _ in range(ROUNDS)]
        print(
            f"deadlines of {deadline_s:g} s, {WAITING} waiting: "
            f"median {statistics.median(costs):.1f} us a call "
            f"(least {min(costs):.1f}, most {max(costs):.1f})"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
