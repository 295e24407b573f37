"""Counts the waiting rows of one priority by deadline."""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort

from server.scheduling.base import Request

NO_DEADLINE_STEP = 1 << 60  # for deadlines that are too far away to be divided


class WaitingRows:
    """Histogram of the waiting rows over their deadlines, in steps of `step_s`.

    It tells how many rows are due before a deadline without a walk over all requests.
    """

    def __init__(self, step_s: float) -> None:
        self.step_s = step_s
        self.total = 0
        self.steps: list[int] = []  # ascending, without empty steps
        self.by_step: dict[int, int] = {}
        self.with_deadline: dict[int, int] = {}  # rows whose client set the deadline

    def step_of(self, deadline_s: float) -> int:
        return int(deadline_s / self.step_s) if deadline_s < 1e9 * self.step_s else NO_DEADLINE_STEP

    def add(self, request: Request) -> None:
        step, rows = self.step_of(request.deadline_s), request.rows
        self.total += rows
        if step not in self.by_step:
            self.by_step[step] = self.with_deadline[step] = 0
            insort(self.steps, step)
        self.by_step[step] += rows
        self.with_deadline[step] += 0 if request.best_effort else rows

    def remove(self, request: Request, rows: int) -> None:
        step = self.step_of(request.deadline_s)
        self.total -= rows
        self.by_step[step] -= rows
        self.with_deadline[step] -= 0 if request.best_effort else rows
        if not self.by_step[step]:
            del self.by_step[step], self.with_deadline[step]
            del self.steps[bisect_left(self.steps, step)]

    def up_to(self, step: int) -> int:
        """Rows that are due in this step or before."""
        if not self.steps or step >= self.steps[-1]:
            return self.total
        return sum(self.by_step[other] for other in self.steps[: bisect_right(self.steps, step)])

    def steps_after(self, step: int) -> list[int]:
        return self.steps[bisect_right(self.steps, step) :]
