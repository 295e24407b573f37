"""The types that a scheduler and its user share: requests, batches, instance groups.

A device has units (processor cores or GPU contexts). An engine has instance groups: the instances
of a group are alike, each runs one batch at a time and occupies some units meanwhile. The instance
of a CPU engine that uses all cores therefore excludes the instances that use one core, and all
models on a device share its units.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from server.scheduling.latency import LatencyProfile
from server.security.principal import LOCAL_CALLER, Principal

PRIORITIES = range(10)  # 0 is the default, 9 the most urgent


@dataclass(frozen=True, slots=True)
class InstanceGroup:
    """The instances of an engine that are alike."""

    units: int  # of the device, for each instance
    count: int  # number of instances
    max_batch: int
    profile: LatencyProfile  # measured at load, with the engine warm and the device idle

    def concurrency(self, device_units: int) -> int:
        """How many instances an idle device can run at the same time."""
        return min(self.count, device_units // self.units)


@dataclass(slots=True, eq=False)
class Request:
    """An inference request, from admission until its last row is in a batch."""

    rows: int
    arrived_s: float
    deadline_s: float = math.inf
    priority: int = 0  # one of PRIORITIES
    principal: Principal = LOCAL_CALLER  # whose share of the device it uses
    # The client set no deadline. `deadline_s` is then the model's latency objective: it orders the
    # request, but the request does not expire.
    best_effort: bool = False
    ready_s: float = 0.0  # when its pixels are expected
    is_ready: bool = False  # its pixels are available, so it can run
    taken_rows: int = 0  # rows that are in batches
    is_cancelled: bool = False
    predicted_s: float = math.inf  # completion time predicted at admission

    def take(self, rows: int) -> BatchPart:
        """Moves the next `rows` rows into a batch."""
        part = BatchPart(self, self.taken_rows, rows)
        self.taken_rows += rows
        return part

    def mark_ready(self) -> None:
        self.is_ready = True

    def mark_cancelled(self) -> None:
        self.is_cancelled = True


class BatchPart(NamedTuple):
    """The rows of a request from `first` to `first + rows`, as part of a batch."""

    request: Request
    first: int
    rows: int


class Batch(NamedTuple):
    """A batch to run on an instance of a group. The parts follow each other in its rows."""

    model: str
    group_index: int  # in the model's sequence of instance groups
    units: int  # of the device
    parts: list[BatchPart]
    rows: int
    expected_s: float  # expected run time
    charged_s: float = 0.0  # device seconds that its principals are charged for
    guest_row_s: float = 0.0  # of these, for each row that is not of the first part's principal


class Scheduler(Protocol):
    """Decides which requests are admitted and which batch runs next.

    All methods are called from one thread. Times are seconds on one monotonic clock.
    """

    def add(
        self, model: str, groups: Sequence[InstanceGroup], *, objective_s: float, weight: float
    ) -> None:
        """Adds a model.

        `objective_s` is the latency objective for requests without a deadline. `weight` is the
        model's share of the device relative to other models.
        """

    def remove(self, model: str) -> list[Request]:
        """Removes a model. Returns its queued requests, which the executor has to fail."""

    def admit(self, model: str, request: Request, now_s: float) -> None:
        """Reserves time for the request's rows. Raises Overloaded or DeadlineUnreachable."""

    def mark_ready(self, model: str, request: Request, now_s: float) -> None:
        """The pixels of an admitted request are available: it may run."""

    def cancel(self, model: str, request: Request) -> None:
        """Removes an admitted request from the queue because its caller left or it failed."""

    def next_batch(self, now_s: float) -> Batch | None:
        """The batch to start now. None if nothing can start. Call it until it returns None."""

    def take_expired(self) -> Iterable[tuple[str, Request]]:
        """Requests that `next_batch` cancelled because their deadline cannot be met any more.

        Each request is returned once.
        """

    def batch_finished(self, batch: Batch, now_s: float, seconds: float) -> None:
        """A batch from `next_batch` has succeeded or failed after `seconds`."""

    def next_wake_s(self, now_s: float) -> float | None:
        """The time to call `next_batch` again if nothing happens before; None if not needed."""

    def queued_rows(self, model: str) -> int:
        """Rows that are admitted and not in a batch yet. 0 for a model that was removed."""
