"""The policy: who is admitted, who runs next, how large a batch.

Pure and synchronous: no I/O, no clock of its own (every call is told the time), no threads. The
mechanism that moves pixels and answers callers is host.py; it may be given any `Policy`.

A device has units (processor cores, GPU contexts). An engine offers lanes: a lane runs one batch at
a time on each of its instances and occupies some units while it does. So the wide lane of a CPU
engine excludes its narrow ones by needing all units, and models on one device share its units.

`Deadline` is the policy to serve with: it plans from the measured profile of each engine and each
caller's own deadline, refuses at arrival what can't be in time, and computes nothing that nobody
waits for. `Fixed` is what other servers do, to compare with: a size and a delay that somebody set.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_left, bisect_right, insort
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Protocol

from server.errors import DeadlineUnreachable, Overloaded

PRIORITIES = range(10)  # 0 is the usual, 9 the most urgent

# What a batch may begin later than the lanes' order says, in its own time: else it would be cut
# where one before it was slow, and be dearer a row. (In tests/simulator up to 1 % of the calls in
# bursts are given up at 0.05, none at 0.15; more leaves lanes idle at a burst's end.)
LATER = 0.15


class LatencyProfile:
    """How long a lane takes by batch size, in seconds: measured at some sizes, straight between."""

    def __init__(self, seconds: Mapping[int, float]) -> None:
        if 1 not in seconds or min(seconds.values()) <= 0:
            raise ValueError(f"a profile needs batch size 1 and times above 0, not {dict(seconds)}")
        sizes = sorted(seconds)
        running = 0.0
        known = []
        for size in sizes:  # a larger batch is never taken to be faster: that is noise
            running = max(running, seconds[size])
            known.append(running)
        self._by_rows = [0.0]  # its index is the number of rows
        for rows in range(1, sizes[-1] + 1):
            index = bisect_left(sizes, rows)
            value = known[index]
            if sizes[index] != rows:
                low, low_s = sizes[index - 1], known[index - 1]
                value = low_s + (value - low_s) * (rows - low) / (sizes[index] - low)
            self._by_rows.append(value)

    def __call__(self, rows: int) -> float:
        """Seconds for a batch of `rows`; beyond the largest measured size in proportion."""
        largest = len(self._by_rows) - 1
        if rows <= largest:
            return self._by_rows[rows]
        return self._by_rows[-1] * rows / largest

    def largest(self, seconds: float) -> int:
        """The most rows that take no longer; 0 where a single one does."""
        return bisect_right(self._by_rows, seconds) - 1


@dataclass(frozen=True, slots=True)
class InstanceGroup:
    """One kind of instance of an engine."""

    units: int
    count: int  # how many instances of this kind there are
    max_batch: int
    profile: LatencyProfile  # at load, when the engine was warm and alone


@dataclass(slots=True, eq=False)
class Request:
    """One caller's images, from admission until every row has been given to a batch."""

    rows: int
    arrived_s: float
    deadline_s: float = math.inf
    priority: int = 0  # one of PRIORITIES
    best_effort: bool = (
        False  # the deadline is an aim of ours, not the caller's: late is better than never
    )
    runnable: bool = False  # its rows are there
    taken: int = 0  # rows given to batches so far
    cancelled: bool = False  # nobody waits for it any more: no further row is taken
    predicted_s: float = math.inf  # when its answer was expected, at admission


class BatchPart(NamedTuple):
    """The rows `first` to `first + rows` of a call, travelling in one batch."""

    call: Request
    first: int
    rows: int


class Batch(NamedTuple):
    """What to run: these portions, one after the other, on an instance of that lane."""

    model: str
    lane: int  # index among the model's lanes
    units: int
    portions: list[BatchPart]
    rows: int
    expected_s: float  # how long it should take


class Scheduler(Protocol):
    """What host.py asks. Called from one thread; times are seconds on one forward-moving clock."""

    def add(
        self, model: str, lanes: Sequence[InstanceGroup], *, objective_s: float, weight: float
    ) -> None:
        """A model that may now be asked: the latency aimed at where a caller sets no deadline,
        and its share of the device beside other models'."""

    def remove(self, model: str) -> list[Request]:
        """Forgets a model; returns the calls that were still waiting, for the host to answer."""

    def admit(self, model: str, call: Request, now_s: float) -> None:
        """Promises the call its rows' time, or raises Overloaded or DeadlineUnreachable."""

    def ready(self, model: str, call: Request, now_s: float) -> None:
        """The rows of an admitted call are there: it may run."""

    def cancel(self, model: str, call: Request) -> None:
        """The caller of an admitted call has left, or it has failed: it must cost nothing more."""

    def next(self, now_s: float) -> Batch | None:
        """The batch to start now; None when there is nothing to do or no room. Ask until None."""

    def take_expired(self) -> Iterable[tuple[str, Request]]:
        """Calls given up by `next` since the last time this was asked, withdrawn already."""

    def finished(self, batch: Batch, now_s: float, seconds: float) -> None:
        """That batch has left its lane after so many seconds, answered or failed."""

    def wake_s(self, now_s: float) -> float | None:
        """When `next` should be asked again though nothing has happened; None for never."""

    def waiting(self, model: str) -> int:
        """Rows admitted and not yet given to a batch; none of a model that was removed."""


class LatencyEstimate:
    """A lane's profile as it is now: the one from load, slowed down as the last batches were.

    One factor for all sizes, so that sizes not run lately are not judged by how fast they once
    were. The window is short enough to follow a change within twenty batches either way; of its
    slowest runs one is left out, so that a single hiccup frightens nobody. Never faster than at
    load.

    The second slowest of twenty is a 93rd percentile. A 99th lies twice as far from the median,
    where the chance of a slow run falls as an exponential does. (So it does with ResNet-50 on two
    shared cores: median 1.06, 93rd 1.18, 99th 1.42 times the profile. With the second slowest
    itself 0.4 to 0.6 % of calls were answered late, with this 0.2 to 0.3.)

    What a lane that has not run since `STALE_S` was like says nothing of now: it is judged by the
    profile again until it has run. Otherwise one that was slow while the machine was crowded would
    be shunned for ever after.
    """

    WINDOW = 20
    STALE_S = 0.5  # twenty batches of ResNet-50

    def __init__(self, profile: LatencyProfile) -> None:
        self.profile = profile
        self.usual = 1.0  # median factor
        self.careful = 1.0  # 99th percentile, to promise by
        self._recent: deque[float] = deque()
        self._sorted: list[float] = []
        self._learned_s = 0.0

    def refresh(self, now_s: float) -> None:
        """Forgets what is stale."""
        if self._recent and now_s - self._learned_s > self.STALE_S:
            self._recent.clear()
            self._sorted.clear()
            self.usual = self.careful = 1.0

    def learn(self, rows: int, seconds: float, now_s: float) -> None:
        self.refresh(now_s - seconds)
        self._learned_s = now_s
        factor = seconds / self.profile(rows)
        if len(self._recent) == self.WINDOW:
            oldest = self._recent.popleft()
            del self._sorted[bisect_left(self._sorted, oldest)]
        self._recent.append(factor)
        insort(self._sorted, factor)
        count = len(self._sorted)
        self.usual = max(1.0, self._sorted[count // 2])
        slow = self._sorted[-2] if count > 1 else self._sorted[0]
        self.careful = max(self.usual, 2 * slow - self.usual)

    def p50(self, rows: int) -> float:
        return self.profile(rows) * self.usual

    def p99(self, rows: int) -> float:
        return self.profile(rows) * self.careful


class _Rows:
    """Rows waiting at one priority, by deadline in steps: how many come before a deadline?"""

    def __init__(self, step_s: float) -> None:
        self.step_s = step_s
        self.total = 0
        self.keys: list[int] = []  # ascending, those with rows
        self.by_key: dict[int, int] = {}
        self.promised: dict[int, int] = {}  # of these, rows whose deadline is their caller's

    def key(self, deadline_s: float) -> int:
        return int(deadline_s / self.step_s) if deadline_s < 1e9 * self.step_s else 1 << 60

    def add(self, call: Request) -> None:
        key, rows = self.key(call.deadline_s), call.rows
        self.total += rows
        if key not in self.by_key:
            self.by_key[key] = self.promised[key] = 0
            insort(self.keys, key)
        self.by_key[key] += rows
        self.promised[key] += 0 if call.best_effort else rows

    def take(self, call: Request, rows: int) -> None:
        key = self.key(call.deadline_s)
        self.total -= rows
        self.by_key[key] -= rows
        self.promised[key] -= 0 if call.best_effort else rows
        if not self.by_key[key]:
            del self.by_key[key], self.promised[key]
            del self.keys[bisect_left(self.keys, key)]

    def up_to(self, key: int) -> int:
        if not self.keys or key >= self.keys[-1]:
            return self.total
        return sum(self.by_key[k] for k in self.keys[: bisect_right(self.keys, key)])


class _Plan(NamedTuple):
    """A way to run a backlog: lanes of one kind, side by side, at one batch size."""

    latency: LatencyEstimate
    rows: int
    row_s: float  # device seconds a row, by the profile at load


class _Begin(NamedTuple):
    """When the device gets to what waits."""

    mean_s: float  # as if its lanes were one
    lanes_s: Sequence[float]  # when each is free, ascending; empty where their order is not known


class _Share(NamedTuple):
    """What a model can count on of its device."""

    part: float  # of its time
    credit_s: float  # device seconds before that, at once


@dataclass(slots=True, eq=False)
class _Queue:
    """One model: its lanes and what waits for them."""

    model: str
    lanes: Sequence[InstanceGroup]
    latencies: list[LatencyEstimate]
    plans: list[_Plan]  # the largest batch first
    objective_s: float
    weight: float
    levels: list[_Rows]  # by priority
    heap: list[tuple[int, float, int, Request]] = field(
        default_factory=list
    )  # those that are ready
    rows: int = 0  # admitted, not yet in a batch
    ready_rows: int = 0  # of these, those that may run
    busy: list[int] = field(default_factory=list)  # running batches by lane
    virtual_s: float = 0.0  # device seconds had, over its weight
    batch_penalty: float = 1.0  # what a row costs lately, over what it would in the batches planned
    used_s: float = 0.0  # decayed device seconds, over USAGE_S
    used_at_s: float = 0.0


@dataclass(slots=True, eq=False)
class _Running:
    units: int
    ends_s: float  # expected

    def left_s(self, now_s: float) -> float:
        """Seconds until it is done; one overdue is taken to be half way."""
        return abs(self.ends_s - now_s)


class DeadlineScheduler:
    """Earliest deadline first within a priority, planned from measured latencies.

    A call is admitted if, with all that is before it, its answer is expected in time, and nobody
    of its priority behind it is made late. Lower priorities get what is left: theirs may be made
    hopeless, and then they are given up before they cost anything. Models share the device by the
    seconds they use it, weighted; what one leaves idle is lent.
    """

    BUSY_S = 0.3  # over which the device's idle time is averaged
    # Idle for more than this share of it, the device has capacity to spare. (At 0.05 ResNet-50 at
    # 0.8 of capacity was taken for overloaded now and then, which cost 0.4 % of its answers.)
    SPARE = 0.02
    # Device seconds that a model has at once after it wanted less than its share: calls come in
    # bunches, and one that asks for its share on average is to get it.
    CREDIT_S = 0.1
    USAGE_S = 0.5  # over which a model's use of the device is averaged
    STEPS = 48  # of deadlines within an objective

    # A caller without a deadline has the model's objective for its place in the line. It is refused
    # where it would wait for so many times that: it asked for an answer, not for one in time.
    PATIENCE = 10
    PATIENCE_S = 10.0  # and never for less than this: 64 callers of a slow network wait for 3 s

    def __init__(self, units: int, capacity: int, total_capacity: int | None = None) -> None:
        """`capacity` is the rows that may wait for one model, `total_capacity` for all together."""
        self._units = units
        self._free = units
        self._capacity = capacity
        self._total_capacity = total_capacity or 4 * capacity
        self._queues: dict[str, _Queue] = {}
        self._rows = 0
        self._sequence = 0
        self._running: dict[int, _Running] = {}  # by the batch's identity
        self._idle = True  # nothing to run for what is free
        self._spare = 1.0  # share of the device that was idle lately
        self._spare_at_s = -math.inf
        self._virtual_s = 0.0  # of the model served last
        self._given_up: list[tuple[str, Request]] = []

    def add(
        self, model: str, lanes: Sequence[InstanceGroup], *, objective_s: float, weight: float = 1.0
    ) -> None:
        lanes = [replace(lane, max_batch=_worthwhile(lane)) for lane in lanes]
        latencies = [LatencyEstimate(lane.profile) for lane in lanes]
        self._queues[model] = _Queue(
            model,
            lanes,
            latencies,
            self._plans(lanes, latencies),
            objective_s,
            weight,
            levels=[_Rows(objective_s / self.STEPS) for _ in PRIORITIES],
            busy=[0] * len(lanes),
            virtual_s=self._virtual_s,
        )

    def remove(self, model: str) -> list[Request]:
        queue = self._queues.pop(model)
        self._rows -= queue.rows
        return [call for _, _, _, call in queue.heap if not call.cancelled]

    # --- admission ---

    def admit(self, model: str, call: Request, now_s: float) -> None:
        queue = self._queues[model]
        if call.deadline_s == math.inf:
            call.best_effort = True
            call.deadline_s = now_s + queue.objective_s
        limit_s = self._limit_s(queue, call, now_s)
        if queue.rows + call.rows > self._capacity:
            self._refuse(queue, call, now_s, f"the queue holds {self._capacity} images")
        if self._rows + call.rows > self._total_capacity:
            self._refuse(queue, call, now_s, f"all queues hold {self._total_capacity} images")
        if not queue.rows and not self._running:
            # Nothing is known of now: the last batches may have been slow, but to refuse by them
            # would keep them the last for ever.
            self._probe(queue, call, now_s, limit_s)
            return
        level = queue.levels[call.priority]
        key = level.key(call.deadline_s)
        ahead = level.up_to(key)
        if level.total != queue.rows:  # not all that waits is of its priority
            ahead += sum(higher.total for higher in queue.levels[call.priority + 1 :])
        self._note_idle(now_s)
        begin = self._begin(queue, now_s)
        share = self._share(queue, now_s, queue.batch_penalty)
        plan = None
        for candidate in self._plans_for(queue, share, limit_s - now_s):
            finish_s = _finish_s(candidate, begin, ahead + call.rows, share)
            call.predicted_s = min(call.predicted_s, finish_s)
            if finish_s <= limit_s:
                plan = candidate
                call.predicted_s = finish_s
                break
        if plan is None:
            self._refuse(queue, call, now_s, self._too_late(queue, call))
        elif not self._spares(level, key, ahead + call.rows, plan, begin, share):
            self._refuse(queue, call, now_s, "it would make others late that are already promised")
        self._accept(queue, call)

    def ready(self, model: str, call: Request, now_s: float) -> None:
        queue = self._queues.get(model)
        if queue is None or call.cancelled:
            return
        if not queue.ready_rows:  # back from idleness: little credit for time it did not want
            queue.virtual_s = max(queue.virtual_s, self._virtual_s - self.CREDIT_S / queue.weight)
        self._sequence += 1
        heapq.heappush(queue.heap, (-call.priority, call.deadline_s, self._sequence, call))
        queue.ready_rows += call.rows
        call.runnable = True

    def cancel(self, model: str, call: Request) -> None:
        if call.cancelled:
            return
        call.cancelled = True
        queue = self._queues.get(model)
        left = call.rows - call.taken
        if queue is not None and left:
            self._forget(queue, call, left)

    def _probe(self, queue: _Queue, call: Request, now_s: float, limit_s: float) -> None:
        """Admits a call to an idle device where the profile from load allows it."""
        for plan in queue.plans:
            seconds = _alone_s(plan, call.rows, plan.latency.profile)
            call.predicted_s = min(call.predicted_s, now_s + seconds)
        if call.predicted_s > limit_s:
            self._refuse(queue, call, now_s, self._too_late(queue, call))
        self._accept(queue, call)

    def _patience_s(self, queue: _Queue) -> float:
        """How long a call without a deadline waits for others, at most."""
        return max(self.PATIENCE * queue.objective_s, self.PATIENCE_S)

    def _limit_s(self, queue: _Queue, call: Request, now_s: float) -> float:
        """When a call must be answered. Of one without a deadline, what its own rows take does not
        count: it would be refused for ever where they take longer than its patience."""
        if not call.best_effort:
            return call.deadline_s
        own_s = min(_alone_s(plan, call.rows, plan.latency.p50) for plan in queue.plans)
        return now_s + self._patience_s(queue) + own_s

    def _too_late(self, queue: _Queue, call: Request) -> str:
        if not call.best_effort:
            return "no answer in time is possible"
        return f"a call without a deadline waits {self._patience_s(queue):g} s at most"

    def _accept(self, queue: _Queue, call: Request) -> None:
        queue.levels[call.priority].add(call)
        queue.rows += call.rows
        self._rows += call.rows

    def _plans_for(self, queue: _Queue, share: _Share, budget_s: float) -> Sequence[_Plan]:
        """The plans that may be counted on for a call with so many seconds left, to try in turn.

        Any, as long as the device has capacity to spare, or the model has had less of it than it
        may: a burst ends. Under lasting overload only the cheapest one of whose batches there is
        time for one and a half: what is left of one that runs, on average, and the call's own.
        (Nexus, SOSP 2019, has time for two.) To count on smaller batches would admit calls later
        and later, until there is time for small ones only, and those are dearer a row.
        """
        if self._spare > self.SPARE or share.credit_s > self.CREDIT_S / 4:
            return queue.plans
        for number, plan in enumerate(queue.plans):
            if 1.5 * plan.latency.p50(plan.rows) <= budget_s:
                return queue.plans[number : number + 1]
        return queue.plans[-1:]

    def _spares(
        self, level: _Rows, key: int, ahead: int, plan: _Plan, begin: _Begin, share: _Share
    ) -> bool:
        """Whether those behind stay in time with `ahead` rows before them."""
        everything_s = _finish_s(plan, begin, ahead + level.total, share)
        for later in level.keys[bisect_right(level.keys, key) :]:
            limit_s = later * level.step_s
            if limit_s >= everything_s:
                break  # from here on even the last of all is in time
            ahead += level.by_key[later]
            if level.promised[later] and _finish_s(plan, begin, ahead, share) > limit_s:
                return False
        return True

    def _refuse(self, queue: _Queue, call: Request, now_s: float, why: str) -> None:
        fastest_s = min(plan.latency.profile(call.rows) for plan in queue.plans)
        if not call.best_effort and now_s + fastest_s > call.deadline_s:
            raise DeadlineUnreachable(
                f"{queue.model} needs {fastest_s * 1e3:.1f} ms for {call.rows} images when idle, "
                f"and {max(0.0, call.deadline_s - now_s) * 1e3:.1f} ms are left"
            )
        behind_s = self._drain_s(queue, queue.rows, now_s)
        # When the same call would be in time, if nobody else came; a batch more, as the one that
        # runs then may just have begun.
        left_s = self._limit_s(queue, call, now_s) - now_s
        wait_s = self._drain_s(queue, queue.rows + call.rows, now_s) - left_s
        wait_s = max(wait_s, 0.0) + min(plan.latency.p99(plan.rows) for plan in queue.plans)
        raise Overloaded(
            f"{why}: {queue.rows} images wait for {queue.model}, {behind_s * 1e3:.0f} ms of work",
            retry_after_s=wait_s,
        )

    def _drain_s(self, queue: _Queue, rows: int, now_s: float) -> float:
        """Seconds until so many rows are done, after what runs now."""
        share = self._share(queue, now_s)
        begin = _Begin(self._residual_s(now_s), ())
        return min(_finish_s(plan, begin, max(1, rows), share) for plan in queue.plans)

    def _begin(self, queue: _Queue, now_s: float) -> _Begin:
        """When what waits begins: with several lanes, all of one kind, and nothing else on the
        device it is known of each, as what waits goes to them in turn.

        Under lasting overload the mean is taken, which is later by a quarter of a batch: those few
        who are let in more would be just in time, and any batch that is slower would be cut.
        """
        mean_s = now_s + self._residual_s(now_s)
        at_once = self._at_once(queue.lanes[0])
        alike = len(queue.lanes) == 1 and at_once > 1
        alone = len(self._queues) == 1 and len(self._running) == sum(queue.busy)
        if not alike or not alone or self._spare <= self.SPARE:
            return _Begin(mean_s, ())
        lanes_s = sorted(now_s + run.left_s(now_s) for run in self._running.values())
        idle = at_once - len(lanes_s)
        return _Begin(mean_s, [now_s] * idle + lanes_s)

    def _residual_s(self, now_s: float) -> float:
        """Device seconds until what runs now is done."""
        return sum(run.left_s(now_s) * run.units for run in self._running.values()) / self._units

    def _share(self, queue: _Queue, now_s: float, dearer: float = 1.0) -> _Share:
        """What this model can count on: its credit, then its own part and what others leave.

        `dearer` is what a row costs over what the plan says.
        """
        if len(self._queues) == 1:
            return _Share(1.0 / dearer, 0.0)
        others_s = active_weight = 0.0
        for other in self._queues.values():
            if other is not queue:
                used = _used(other, now_s, self.USAGE_S)
                if used > 0.01 or other.rows:
                    others_s += used
                    active_weight += other.weight
        own = queue.weight / (queue.weight + active_weight)
        credit_s = queue.weight * (self._virtual_s - queue.virtual_s)
        part = max(own, min(1.0, 1.0 - others_s))
        return _Share(part / dearer, min(max(credit_s, 0.0), self.CREDIT_S))

    # --- dispatch ---

    def next(self, now_s: float) -> Batch | None:
        while self._free:
            queue = self._choose_queue()
            if queue is None:
                self._note_idle(now_s)
                self._idle = True
                return None
            index = self._choose_lane(queue, now_s)
            if index is None:
                return None  # none of its lanes fits into what is free
            batch = self._form(queue, index, now_s)
            if batch is not None:
                return batch
        return None

    def take_expired(self) -> Iterable[tuple[str, Request]]:
        given_up, self._given_up = self._given_up, []
        return given_up

    def finished(self, batch: Batch, now_s: float, seconds: float) -> None:
        self._note_idle(now_s)
        self._free += batch.units
        del self._running[id(batch.portions)]
        queue = self._queues.get(batch.model)
        if queue is None:
            return
        queue.busy[batch.lane] -= 1
        queue.latencies[batch.lane].learn(batch.rows, seconds, now_s)
        device_s = seconds * batch.units / self._units
        queue.virtual_s += (device_s - batch.expected_s * batch.units / self._units) / queue.weight
        queue.used_s = _used(queue, now_s, self.USAGE_S) + device_s / self.USAGE_S
        queue.used_at_s = now_s

    def wake_s(self, now_s: float) -> float | None:
        return None  # an idle engine never waits, so there is nothing to wait for

    def waiting(self, model: str) -> int:
        queue = self._queues.get(model)
        return queue.rows if queue is not None else 0

    def _note_idle(self, now_s: float) -> None:
        """Brings the share of idle time up to date; asked before what is free changes."""
        kept = math.exp((self._spare_at_s - now_s) / self.BUSY_S)
        idle = self._free / self._units if self._idle else 0.0
        self._spare = self._spare * kept + idle * (1 - kept)
        self._spare_at_s = now_s

    def _choose_queue(self) -> _Queue | None:
        """Of the models with something to run, the one that has had the least for its weight."""
        chosen = None
        for queue in self._queues.values():
            heap = queue.heap
            while heap and (heap[0][3].cancelled or heap[0][3].taken == heap[0][3].rows):
                heapq.heappop(heap)
            if heap and (chosen is None or queue.virtual_s < chosen.virtual_s):
                chosen = queue
        return chosen

    def _form(self, queue: _Queue, index: int, now_s: float) -> Batch | None:
        """The largest worthwhile batch that keeps the tightest deadline in it; None where the call
        that was first in line had to be given up."""
        heap = queue.heap
        head = heap[0][3]
        lane, latency = queue.lanes[index], queue.latencies[index]
        least_s = latency.p50(1) if self._running else latency.profile(1)  # idle: see `admit`
        if not head.best_effort and now_s + least_s > head.deadline_s:
            self._give_up(queue, head)
            return None
        places = self._places(queue, index)
        room = min(lane.max_batch, math.ceil(queue.ready_rows / places))
        limit_s = (math.inf if head.best_effort else head.deadline_s) - now_s
        fits = max(1, latency.profile.largest(limit_s / latency.careful))
        if fits < room and self._starves(queue, latency, fits, room, places):
            self._give_up(queue, head)
            return None
        self._update_batch_penalty(queue, latency, min(fits, room), room)
        room = min(room, fits)
        portions: list[BatchPart] = []
        rows = 0
        while heap and rows < room:
            call = heap[0][3]
            if call.cancelled:
                heapq.heappop(heap)
                continue
            if portions and not call.best_effort and call.deadline_s < head.deadline_s:
                # Of a lower priority, but tighter: it must not be made late by coming along.
                fits = latency.profile.largest((call.deadline_s - now_s) / latency.careful)
                if fits <= rows:
                    break
                room = min(room, fits)
            count = min(room - rows, call.rows - call.taken)
            portions.append(BatchPart(call, call.taken, count))
            call.taken += count
            rows += count
            if call.taken == call.rows:
                heapq.heappop(heap)
        for call, _, count in portions:
            self._forget(queue, call, count)
        return self._start(queue, index, portions, rows, now_s)

    def _start(
        self, queue: _Queue, index: int, portions: list[BatchPart], rows: int, now_s: float
    ) -> Batch:
        lane = queue.lanes[index]
        expected_s = queue.latencies[index].p50(rows)
        queue.busy[index] += 1
        self._note_idle(now_s)
        self._idle = False
        self._free -= lane.units
        self._virtual_s = max(self._virtual_s, queue.virtual_s)
        queue.virtual_s += expected_s * lane.units / self._units / queue.weight
        self._running[id(portions)] = _Running(lane.units, now_s + expected_s)
        return Batch(queue.model, index, lane.units, portions, rows, expected_s)

    def _choose_lane(self, queue: _Queue, now_s: float) -> int | None:
        """Of the free lanes the one with which what waits is done soonest, the first in line in
        time if any lane can."""
        head = queue.heap[0][3]
        limit_s = math.inf if head.best_effort else head.deadline_s - now_s
        best, best_s = None, (True, math.inf)
        for index, lane in enumerate(queue.lanes):
            places = self._places(queue, index)
            if places <= 0:
                continue
            latency = queue.latencies[index]
            latency.refresh(now_s)
            rounds = max(1.0, queue.ready_rows / (places * lane.max_batch))
            each = min(lane.max_batch, math.ceil(queue.ready_rows / places))
            seconds = (latency.p99(1) > limit_s, latency.p50(each) * rounds)
            if seconds < best_s or best is None:
                best, best_s = index, seconds
        return best

    def _places(self, queue: _Queue, index: int) -> int:
        lane = queue.lanes[index]
        return min(lane.count - queue.busy[index], self._free // lane.units)

    def _starves(
        self, queue: _Queue, latency: LatencyEstimate, fits: int, room: int, places: int
    ) -> bool:
        """Whether keeping the head's deadline, by a batch of `fits` where `room` could go, would
        cost others theirs: at the pace of such batches the last one waiting is late.

        Then the head is given up, as Nexus does (SOSP 2019, early drop): else after a stall every
        head is tight, every batch small, and nobody is ever in time again.
        """
        if latency.p50(fits) / fits <= 1.2 * latency.p50(room) / room:
            return False
        pace_s = latency.p50(fits) / fits / places
        return queue.ready_rows * pace_s > queue.objective_s

    def _update_batch_penalty(
        self, queue: _Queue, latency: LatencyEstimate, fits: int, room: int
    ) -> None:
        """Learns how much dearer rows are when tight deadlines keep batches small, so that
        admission promises less until batches are whole again."""
        now = (latency.profile(fits) / fits) / (latency.profile(room) / room)
        queue.batch_penalty += 0.2 * (now - queue.batch_penalty)

    def _give_up(self, queue: _Queue, call: Request) -> None:
        self.cancel(queue.model, call)
        self._given_up.append((queue.model, call))

    def _forget(self, queue: _Queue, call: Request, rows: int) -> None:
        """Takes rows of a call out of the counts of what waits."""
        level = queue.levels[call.priority]
        level.take(call, rows)
        queue.rows -= rows
        self._rows -= rows
        if call.runnable:
            queue.ready_rows -= rows

    def _at_once(self, lane: InstanceGroup) -> int:
        """How many batches of that kind the idle device has instances and room for."""
        return min(lane.count, self._units // lane.units)

    def _plans(
        self, lanes: Sequence[InstanceGroup], latencies: Sequence[LatencyEstimate]
    ) -> list[_Plan]:
        plans = []
        for lane, latency in zip(lanes, latencies, strict=True):
            at_once = self._at_once(lane)
            for rows in planned_sizes(lane.max_batch):
                plans.append(_Plan(latency, rows, lane.profile(rows) / rows / at_once))
        # The cheapest a row first; a plan that is dearer and slower than another is none.
        plans.sort(key=lambda plan: plan.row_s)
        kept: list[_Plan] = []
        for plan in plans:
            seconds = plan.latency.profile(plan.rows)
            if not kept or seconds < kept[-1].latency.profile(kept[-1].rows):
                kept.append(plan)
        return kept


def planned_sizes(max_batch: int) -> Sequence[int]:
    """The batch sizes to measure and to plan with, ascending."""
    return sorted({1 << power for power in range(max_batch.bit_length())} | {max_batch})


def _worthwhile(lane: InstanceGroup) -> int:
    """The rows beyond which a batch is no cheaper a row, by a hundredth: more would keep the lane
    for longer from those that are due next, and nobody would gain.

    (ResNet-50 on one core: 8 rows take 60.4 ms, 4 take 30.0. In tests/simulator it makes up to
    1 % more answers in time.)
    """
    sizes = planned_sizes(lane.max_batch)
    least_s = min(lane.profile(rows) / rows for rows in sizes)
    return next(rows for rows in sizes if lane.profile(rows) / rows <= 1.01 * least_s)


def _alone_s(plan: _Plan, rows: int, batch_s: Callable[[int], float]) -> float:
    """What so many rows take by themselves, where their last batch takes what `batch_s` says."""
    last = min(plan.rows, rows)
    return (rows - last) * plan.row_s + batch_s(last)


def _finish_s(plan: _Plan, begin: _Begin, rows: int, share: _Share) -> float:
    """When the last of `rows` is done: whole batches before it at the plan's pace, then its own.

    By the usual latencies, and half of what a careful one has on top: for so many batches in a row
    its square root times as much, as some are slow and others fast. Half, as a batch is cut at its
    start where it would be too slow: whom admission took for too late could not be answered at all.
    """
    batches = (rows - 1) // plan.rows
    before = batches * plan.rows
    own = plan.rows if before else rows  # where a batch went before, others come along with this
    latency = plan.latency
    work_s = before * plan.row_s
    own_s, batch_s = latency.profile(own), latency.profile(plan.rows)
    # In each of work_s / batch_s rounds a batch: its spread squared, so many times.
    spread_s = 0.5 * (latency.careful - latency.usual) * math.sqrt(own_s**2 + work_s * batch_s)
    in_turn = begin.lanes_s and begin.lanes_s[-1] - begin.lanes_s[0] <= batch_s * latency.usual
    if in_turn:  # else the first of them is free again before the last one is at all
        rounds, lane = divmod(batches, len(begin.lanes_s))
        begins_s = begin.lanes_s[lane] + LATER * batch_s
        before_s = rounds * batch_s / share.part
    else:
        begins_s = begin.mean_s
        at_once_s = min(work_s, share.credit_s)
        before_s = at_once_s + (work_s - at_once_s) / share.part
    return begins_s + (before_s + own_s) * latency.usual + spread_s


def _used(queue: _Queue, now_s: float, over_s: float) -> float:
    """The share of the device that a model has used lately, 0 to 1."""
    return queue.used_s * math.exp(-(now_s - queue.used_at_s) / over_s)


class FixedScheduler:
    """A size and a delay, set by hand: what Triton and TensorFlow Serving do; to compare with.

    A batch starts when `size` rows wait or the oldest has waited `delay_s`. Knows no deadlines and
    no profile; a queue has room for `capacity` rows, the next call is refused.
    """

    def __init__(self, units: int, capacity: int, *, size: int = 8, delay_s: float = 0.0) -> None:
        self._units = units
        self._free = units
        self._capacity = capacity
        self._size = size
        self._delay_s = delay_s
        self._lanes: dict[str, Sequence[InstanceGroup]] = {}
        self._busy: dict[str, list[int]] = {}
        self._calls: dict[str, deque[Request]] = {}
        self._rows: dict[str, int] = {}  # admitted, not yet in a batch
        self._runnable: dict[str, int] = {}  # of these, those that are there

    def add(
        self, model: str, lanes: Sequence[InstanceGroup], *, objective_s: float, weight: float = 1.0
    ) -> None:
        self._lanes[model] = lanes
        self._busy[model] = [0] * len(lanes)
        self._calls[model] = deque()
        self._rows[model] = self._runnable[model] = 0

    def remove(self, model: str) -> list[Request]:
        del self._lanes[model], self._busy[model], self._rows[model], self._runnable[model]
        return [call for call in self._calls.pop(model) if not call.cancelled]

    def admit(self, model: str, call: Request, now_s: float) -> None:
        if self._rows[model] + call.rows > self._capacity:
            best = min(self._lanes[model], key=lambda lane: lane.profile(lane.max_batch))
            raise Overloaded(
                f"{self._rows[model]} images wait for {model}; the queue holds {self._capacity}",
                retry_after_s=best.profile(best.max_batch) * self._rows[model] / best.max_batch,
            )
        self._rows[model] += call.rows

    def ready(self, model: str, call: Request, now_s: float) -> None:
        if model in self._calls and not call.cancelled:
            call.runnable = True
            self._runnable[model] += call.rows
            self._calls[model].append(call)

    def cancel(self, model: str, call: Request) -> None:
        if not call.cancelled:
            call.cancelled = True
            if model in self._rows:
                self._rows[model] -= call.rows - call.taken
                self._runnable[model] -= (call.rows - call.taken) if call.runnable else 0

    def next(self, now_s: float) -> Batch | None:
        for model in sorted(self._calls, key=self._oldest_s):
            waiting = self._runnable[model]
            if not waiting or (
                waiting < self._size and now_s < self._oldest_s(model) + self._delay_s
            ):
                continue
            for index, lane in sorted(enumerate(self._lanes[model]), key=lambda e: e[1].units):
                if lane.units <= self._free and self._busy[model][index] < lane.count:
                    return self._take(model, index, min(lane.max_batch, self._size, waiting))
        return None

    def take_expired(self) -> Iterable[tuple[str, Request]]:
        return ()

    def finished(self, batch: Batch, now_s: float, seconds: float) -> None:
        self._free += batch.units
        if batch.model in self._busy:
            self._busy[batch.model][batch.lane] -= 1

    def wake_s(self, now_s: float) -> float | None:
        """When the oldest call has waited long enough."""
        due = [self._oldest_s(model) + self._delay_s for model in self._calls]
        soonest_s = min(due, default=math.inf)
        return soonest_s if now_s < soonest_s < math.inf else None

    def waiting(self, model: str) -> int:
        return self._rows.get(model, 0)

    def _oldest_s(self, model: str) -> float:
        calls = self._calls[model]
        while calls and calls[0].cancelled:
            calls.popleft()
        return calls[0].arrived_s if calls else math.inf

    def _take(self, model: str, index: int, room: int) -> Batch:
        calls, lane = self._calls[model], self._lanes[model][index]
        portions: list[BatchPart] = []
        rows = 0
        while rows < room:
            call = calls[0]
            if not call.cancelled:
                count = min(room - rows, call.rows - call.taken)
                portions.append(BatchPart(call, call.taken, count))
                call.taken += count
                rows += count
            if call.cancelled or call.taken == call.rows:
                calls.popleft()
        self._rows[model] -= rows
        self._runnable[model] -= rows
        self._busy[model][index] += 1
        self._free -= lane.units
        return Batch(model, index, lane.units, portions, rows, lane.profile(rows))
