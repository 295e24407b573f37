"""The queues of all principals for one model, and which principal's request runs next."""

from __future__ import annotations

import math
from collections.abc import Sequence

from server.scheduling.base import Batch, BatchPart, Request
from server.scheduling.principal_queue import PrincipalQueue
from server.scheduling.principal_share import PrincipalShares
from server.security.fair_limit import may_hold
from server.security.principal import ANONYMOUS, Principal

# Rounds to compute how long a principal shares the device: each makes the estimate shorter.
ROUNDS = 4


class PrincipalQueues:
    """The waiting requests of a model by principal, and the shares of the principals.

    A batch may have rows of several principals. Each is charged for its rows. With a single
    principal all of this has no effect.
    """

    def __init__(self, step_s: float) -> None:
        """`step_s` is the resolution of deadlines, see `WaitingRows`."""
        self._step_s = step_s
        self._shares = PrincipalShares()
        self._queues: dict[str, PrincipalQueue] = {}  # of principals that were active lately
        self.is_shared = False  # nobody shares a server without identities

    def of(self, principal: Principal) -> PrincipalQueue:
        """The queue of a principal."""
        queue = self._queues.get(principal.name)
        if queue is None:
            account = self._shares.open_account(principal.weight)
            queue = self._queues[principal.name] = PrincipalQueue(principal, self._step_s, account)
            self.is_shared |= principal.name != ANONYMOUS
        elif queue.account.weight != principal.weight:  # the auth file has changed
            self._shares.set_weight(queue.account, principal.weight)
        return queue

    def may_add(self, own: PrincipalQueue, rows: int, free: int) -> bool:
        """Whether a principal may add rows to a queue that has room for `free` more."""
        if not self.is_shared:
            return rows <= free
        waiting = (queue for queue in self._queues.values() if queue.rows and queue is not own)
        others_weight = sum(queue.account.weight for queue in waiting)
        return may_hold(own.rows + rows, rows, free, own.account.weight, others_weight)

    def mark_ready(self, request: Request) -> None:
        """Lets an admitted request run."""
        queue = self._queues[request.principal.name]
        if self.is_shared and not queue.ready_rows:
            self._shares.resume(queue.account)
        queue.mark_ready(request)

    def next(self) -> PrincipalQueue:
        """The principal that has used the least of its share, among those that can run.

        There must be one.
        """
        queues = self._queues.values()
        if len(queues) == 1:
            return next(iter(queues))
        return min((queue for queue in queues if queue.ready_rows), key=_virtual_s)

    def remove(self, request: Request, rows: int) -> None:
        """Forgets rows of a waiting request."""
        self._queues[request.principal.name].remove(request, rows)

    def charge(self, queue: PrincipalQueue, device_s: float) -> None:
        """Charges a principal for rows that are in the next batch."""
        self._shares.charge(queue.account, device_s)

    def refused(self) -> None:
        """A request was refused for lack of time."""
        self._shares.refused()

    def batch_starts(self, *, has_more: bool, now_s: float) -> bool:
        """A batch starts; with `has_more` other requests have to wait for another batch.

        Returns whether the principals compete for the device.
        """
        return self._shares.batch_starts(has_more=has_more, now_s=now_s)

    def settle(self, batch: Batch, device_s: float, expected_s: float, now_s: float) -> None:
        """A batch that was expected to use `expected_s` has used `device_s`."""
        factor = device_s / expected_s
        rows_by_principal = _rows_by_principal(batch.parts)
        host = batch.parts[0].request.principal.name
        guest_rows = batch.rows - rows_by_principal[host][1]
        for name, (principal, rows) in rows_by_principal.items():
            charged_s = rows * batch.guest_row_s
            if name == host:
                charged_s = batch.charged_s - guest_rows * batch.guest_row_s
            account = self.of(principal).account
            self._shares.charge(account, charged_s * (factor - 1.0))
            self._shares.record_use(account, charged_s * factor, now_s)
        self._forget_idle(now_s)

    def credit_s(self, own: PrincipalQueue) -> float:
        """Device seconds by which a principal is below its share. Alone it has no share."""
        return self._shares.credit_s(own.account) if len(self._queues) > 1 else 0.0

    def rows_ahead(
        self, own: PrincipalQueue, rows: int, row_s: float, ratio: float, now_s: float
    ) -> int:
        """How many rows run before the next `rows` rows of a principal are done, these included.

        A row takes `row_s` device seconds. `ratio` is the model's part of the device. Each other
        principal runs what waits and what it keeps sending, but not more than its weight allows
        while the principal has work.
        """
        if len(self._queues) == 1:
            return rows
        shares, work_s = self._shares, rows * row_s
        end_virtual_s = shares.resumed_virtual_s(own.account) + work_s / own.account.weight
        others: list[tuple[float, float, float]] = []
        for other in self._queues.values():
            account = other.account
            limit_s = account.weight * (end_virtual_s - shares.resumed_virtual_s(account))
            if other is not own and limit_s > 0:
                others.append((other.rows * row_s, account.used_ratio(now_s) / ratio, limit_s))
        ends_s = work_s + sum(limit_s for _, _, limit_s in others)
        for _ in range(ROUNDS):
            ends_s = work_s + sum(
                min(waiting_s + used_ratio * ends_s, limit_s)
                for waiting_s, used_ratio, limit_s in others
            )
        return math.ceil(ends_s / row_s - 1e-6)

    def ready_requests(self) -> list[Request]:
        """The requests that can run, in no order."""
        return [request for queue in self._queues.values() for request in queue.ready_requests()]

    def rows(self) -> list[tuple[Principal, int]]:
        """How many rows wait, by principal."""
        return [(queue.principal, queue.rows) for queue in self._queues.values()]

    def _forget_idle(self, now_s: float) -> None:
        """Forgets principals that neither wait nor have used the device lately."""
        idle = [
            name
            for name, queue in self._queues.items()
            if not queue.rows and queue.account.is_idle(now_s)
        ]
        for name in idle:
            del self._queues[name]
        self._shares.set_active(queue.account for queue in self._queues.values())


def _virtual_s(queue: PrincipalQueue) -> float:
    return queue.account.virtual_s


def _rows_by_principal(parts: Sequence[BatchPart]) -> dict[str, tuple[Principal, int]]:
    found: dict[str, tuple[Principal, int]] = {}
    for part in parts:
        principal = part.request.principal
        _, rows = found.get(principal.name, (principal, 0))
        found[principal.name] = principal, rows + part.rows
    return found
