"""The queue of one principal for one model."""

from __future__ import annotations

import heapq

from server.scheduling.base import PRIORITIES, BatchPart, Request
from server.scheduling.principal_share import PrincipalAccount
from server.scheduling.waiting_rows import WaitingRows
from server.security.principal import Principal


class PrincipalQueue:
    """The waiting requests of a principal for a model, by priority and then by deadline.

    A request counts as waiting from its admission. It can run once it is ready.
    """

    __slots__ = ("_ready", "_sequence", "account", "principal", "priorities", "ready_rows", "rows")

    def __init__(self, principal: Principal, step_s: float, account: PrincipalAccount) -> None:
        self.principal = principal
        self.account = account
        self.priorities = [WaitingRows(step_s) for _ in PRIORITIES]
        self.rows = 0  # admitted, not in a batch
        self.ready_rows = 0  # of these, the rows that can run
        self._ready: list[tuple[int, float, int, Request]] = []  # a heap
        self._sequence = 0

    def accept(self, request: Request) -> None:
        """Adds an admitted request."""
        self.priorities[request.priority].add(request)
        self.rows += request.rows

    def mark_ready(self, request: Request) -> None:
        """Lets an admitted request run."""
        self._sequence += 1
        key = (-request.priority, request.deadline_s, self._sequence, request)
        heapq.heappush(self._ready, key)
        self.ready_rows += request.rows
        request.mark_ready()

    def first(self) -> Request | None:
        """The next request to run."""
        ready = self._ready
        while ready:
            request = ready[0][3]
            if not request.is_cancelled:
                return request
            heapq.heappop(ready)
        return None

    def take_from_first(self, request: Request, rows: int) -> BatchPart:
        """Moves rows of the request that is first into a batch."""
        part = request.take(rows)
        if request.taken_rows == request.rows:
            heapq.heappop(self._ready)
        self.remove(request, rows)
        return part

    def remove(self, request: Request, rows: int) -> None:
        """Forgets rows of a request: they are in a batch, or the request is cancelled."""
        self.priorities[request.priority].remove(request, rows)
        self.rows -= rows
        if request.is_ready:
            self.ready_rows -= rows
            if not self.ready_rows:
                self._ready.clear()  # only cancelled requests are left

    def ready_requests(self) -> list[Request]:
        """The requests that can run, in no order."""
        return [entry[3] for entry in self._ready if not entry[3].is_cancelled]
