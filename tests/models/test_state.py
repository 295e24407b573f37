"""A version goes through its states in the allowed order and has a reason for its state."""

from __future__ import annotations

from itertools import pairwise

import pytest

from server.api.stubs import classify_pb2 as pb
from server.models.state import TRANSITIONS, State, VersionState


def in_state(state: State) -> VersionState:
    """A version that has reached the state on the shortest path."""
    paths = {State.UNAVAILABLE: [State.UNAVAILABLE]}
    while state not in paths:
        for path in list(paths.values()):
            for following in TRANSITIONS[path[-1]]:
                paths.setdefault(following, [*path, following])
    version = VersionState()
    for old, new in pairwise(paths[state]):
        assert version.state is old
        version.move_to(new, "broken" if new is State.FAILED else "")
    return version


def test_a_version_is_loaded_checked_served_drained_and_loaded_again() -> None:
    version = VersionState("not looked at yet")
    assert (version.state, version.reason) == (State.UNAVAILABLE, "not looked at yet")
    changes: list[tuple[str, str, str]] = []
    for state, reason in [
        (State.LOADING, ""),
        (State.CHECKING, ""),
        (State.READY, ""),
        (State.DRAINING, "version 2 is served"),
        (State.READY, "version 2 was rolled back"),
        (State.DRAINING, ""),
        (State.UNLOADED, ""),
        (State.LOADING, ""),
        (State.FAILED, "labels.txt is missing"),
    ]:
        old = version.state
        if version.move_to(state, reason):
            changes.append((old.name, version.state.name, version.reason))
    assert changes == [
        ("UNAVAILABLE", "LOADING", ""),
        ("LOADING", "CHECKING", ""),
        ("CHECKING", "READY", ""),
        ("READY", "DRAINING", "version 2 is served"),
        ("DRAINING", "READY", "version 2 was rolled back"),
        ("READY", "DRAINING", ""),
        ("DRAINING", "UNLOADED", ""),
        ("UNLOADED", "LOADING", ""),
        ("LOADING", "FAILED", "labels.txt is missing"),
    ]


@pytest.mark.parametrize("state", State)
def test_every_other_transition_is_rejected(state: State) -> None:
    for other in State:
        version = in_state(state)
        if other is state or other in TRANSITIONS[state]:
            version.move_to(other, "why")
            assert (version.state, version.reason) == (other, "why")
        else:
            with pytest.raises(RuntimeError, match=f"can't go from {state.name} to {other.name}"):
                version.move_to(other, "why")
            assert version.state is state


@pytest.mark.parametrize("state", State)
def test_every_state_can_be_reached_and_left(state: State) -> None:
    assert TRANSITIONS[state] - {state}
    assert in_state(state).state is state


def test_a_new_reason_alone_is_no_change_of_state() -> None:
    version = VersionState()
    assert not version.move_to(State.UNAVAILABLE, "version 2 is served")
    assert version.reason == "version 2 is served"


def test_a_failure_needs_a_reason() -> None:
    with pytest.raises(ValueError, match="needs a reason"):
        VersionState().move_to(State.FAILED)


def test_the_contract_has_the_same_states() -> None:
    sent = {name for name in pb.Model.State.keys() if name != "STATE_UNSPECIFIED"}  # noqa: SIM118
    assert sent == {state.name for state in State}
