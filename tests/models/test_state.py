"""A version goes through its states in their order, and says why it stands where it does."""

from __future__ import annotations

from itertools import pairwise

import pytest

from server.api.stubs import classify_pb2 as pb
from server.models.state import NEXT, State, VersionState


def life_in(state: State) -> VersionState:
    """A life that has come to that state by the shortest way."""
    ways = {State.UNAVAILABLE: [State.UNAVAILABLE]}
    while state not in ways:
        for way in list(ways.values()):
            for following in NEXT[way[-1]]:
                ways.setdefault(following, [*way, following])
    life = VersionState()
    for old, new in pairwise(ways[state]):
        assert life.state is old
        life.to(new, "broken" if new is State.FAILED else "")
    return life


def test_a_version_is_loaded_checked_served_drained_and_loaded_again() -> None:
    told: list[tuple[str, str, str]] = []
    life = VersionState(
        "not looked at yet",
        lambda life, old: told.append((old.name, life.state.name, life.reason)),
    )
    assert (life.state, life.reason) == (State.UNAVAILABLE, "not looked at yet")
    for state in (State.LOADING, State.CHECKING, State.READY):
        life.to(state)
    life.to(State.DRAINING, "version 2 is served")
    life.to(State.READY, "version 2 was given up")
    life.to(State.DRAINING)
    life.to(State.UNLOADED)
    life.to(State.LOADING)
    life.to(State.FAILED, "labels.txt is missing")
    assert told == [
        ("UNAVAILABLE", "LOADING", ""),
        ("LOADING", "CHECKING", ""),
        ("CHECKING", "READY", ""),
        ("READY", "DRAINING", "version 2 is served"),
        ("DRAINING", "READY", "version 2 was given up"),
        ("READY", "DRAINING", ""),
        ("DRAINING", "UNLOADED", ""),
        ("UNLOADED", "LOADING", ""),
        ("LOADING", "FAILED", "labels.txt is missing"),
    ]


@pytest.mark.parametrize("state", State)
def test_there_is_no_other_way_from_a_state_than_those_named(state: State) -> None:
    for other in State:
        life = life_in(state)
        if other is state or other in NEXT[state]:
            life.to(other, "why")
            assert (life.state, life.reason) == (other, "why")
        else:
            with pytest.raises(RuntimeError, match=f"is {state.name} can't become {other.name}"):
                life.to(other, "why")
            assert life.state is state


@pytest.mark.parametrize("state", State)
def test_every_state_can_be_reached_and_left(state: State) -> None:
    assert NEXT[state] - {state}
    assert life_in(state).state is state


def test_a_reason_may_change_where_the_state_does_not_and_nobody_is_told_of_a_change() -> None:
    told: list[VersionState] = []
    life = VersionState(told=lambda life, old: told.append(life))
    life.to(State.UNAVAILABLE, "version 2 is served")
    assert (life.reason, told) == ("version 2 is served", [])


def test_nothing_fails_without_a_reason() -> None:
    with pytest.raises(ValueError, match="for a reason"):
        VersionState().to(State.FAILED)


def test_callers_see_the_same_states() -> None:
    sent = {name for name in pb.Model.State.keys() if name != "STATE_UNSPECIFIED"}  # noqa: SIM118
    assert sent == {state.name for state in State}
