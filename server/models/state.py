"""The life of a version: where it stands, why, and where it may go from there.

    UNAVAILABLE -> LOADING -> CHECKING -> READY -> DRAINING -> UNLOADED -> LOADING ...
                                            ^---------'
    From anywhere it may go to FAILED, and from there it may be looked at anew.

Pure: it is told what happened and refuses what can't have.
"""

from __future__ import annotations

import enum
from collections.abc import Callable


class State(enum.Enum):
    """Where a version stands; the names are those of convserve.v1.Model.State."""

    UNAVAILABLE = enum.auto()  # known, and not loaded
    LOADING = enum.auto()  # its files are compared and its engine is made
    CHECKING = enum.auto()  # the engine answers golden inputs, is timed and warmed up
    READY = enum.auto()  # it answers calls
    DRAINING = enum.auto()  # it takes no new calls; those it has are finished
    UNLOADED = enum.auto()  # it answered once; its engine is closed
    FAILED = enum.auto()  # it can't be used, and the reason says why


NEXT: dict[State, frozenset[State]] = {
    State.UNAVAILABLE: frozenset({State.LOADING, State.FAILED}),
    State.LOADING: frozenset({State.CHECKING, State.READY, State.FAILED}),
    State.CHECKING: frozenset({State.READY, State.FAILED}),
    State.READY: frozenset({State.DRAINING, State.FAILED}),
    State.DRAINING: frozenset({State.READY, State.UNLOADED, State.FAILED}),
    State.UNLOADED: frozenset({State.LOADING, State.FAILED}),
    State.FAILED: frozenset({State.UNAVAILABLE}),
}


class VersionState:
    """One version's state. `told` hears of every change, after it: the life, and the old state."""

    __slots__ = ("_told", "reason", "state")

    def __init__(
        self, reason: str = "", told: Callable[[VersionState, State], None] = lambda life, old: None
    ) -> None:
        self.state = State.UNAVAILABLE
        self.reason = reason  # in plain words; empty where the state says it all
        self._told = told

    def to(self, state: State, reason: str = "") -> None:
        """Goes on to `state`. Staying there with another reason is allowed, and no change.

        Raises RuntimeError where there is no such way, ValueError for FAILED without a reason.
        """
        old = self.state
        if state is not old and state not in NEXT[old]:
            raise RuntimeError(f"a version that is {old.name} can't become {state.name}")
        if state is State.FAILED and not reason:
            raise ValueError("a version fails for a reason")
        self.state, self.reason = state, reason
        if state is not old:
            self._told(self, old)
