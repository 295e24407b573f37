"""States of a model version and the transitions between them.

    UNAVAILABLE -> LOADING -> CHECKING -> READY -> DRAINING -> UNLOADED -> LOADING ...
                                            ^---------'
    Every state can go to FAILED. A failed version that is tried again goes to UNAVAILABLE.

Pure: no clock, no I/O.
"""

from __future__ import annotations

import enum


class State(enum.Enum):
    """State of a version. The names are those of convserve.v1.Model.State."""

    UNAVAILABLE = enum.auto()  # known but not loaded
    LOADING = enum.auto()  # checksums are compared and the engine is created
    CHECKING = enum.auto()  # the engine runs the golden inputs, is profiled and warmed up
    READY = enum.auto()  # accepts requests
    DRAINING = enum.auto()  # accepts no new requests and finishes those it has
    UNLOADED = enum.auto()  # was ready before; its engine is closed
    FAILED = enum.auto()  # can't be used; the reason says why


TRANSITIONS: dict[State, frozenset[State]] = {
    State.UNAVAILABLE: frozenset({State.LOADING, State.FAILED}),
    State.LOADING: frozenset({State.CHECKING, State.READY, State.FAILED}),
    State.CHECKING: frozenset({State.READY, State.FAILED}),
    State.READY: frozenset({State.DRAINING, State.FAILED}),
    State.DRAINING: frozenset({State.READY, State.UNLOADED, State.FAILED}),
    State.UNLOADED: frozenset({State.LOADING, State.FAILED}),
    State.FAILED: frozenset({State.UNAVAILABLE}),
}


class VersionState:
    """Current state of a version and the reason for it. Rejects impossible transitions."""

    __slots__ = ("reason", "state")

    def __init__(self, reason: str = "") -> None:
        self.state = State.UNAVAILABLE
        self.reason = reason  # plain words; empty if the state needs no explanation

    def move_to(self, state: State, reason: str = "") -> bool:
        """Sets state and reason. Returns whether the state changed; the reason alone may change.

        Raises RuntimeError if the transition is not allowed, ValueError for FAILED without a
        reason.
        """
        old = self.state
        if state is not old and state not in TRANSITIONS[old]:
            raise RuntimeError(f"a version can't go from {old.name} to {state.name}")
        if state is State.FAILED and not reason:
            raise ValueError("FAILED needs a reason")
        self.state, self.reason = state, reason
        return state is not old
