"""A short form of `make fuzz`, and all inputs that were faults once."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fuzz.catalogue import TARGETS
from tests.fuzz.runner import fed, made_input, run

SEED = 1
INPUTS = 1_000
SECONDS = 2.0
CRASHES = sorted(path for path in Path(__file__).parent.glob("crashes/*/*") if path.is_file())


@pytest.mark.parametrize("name", TARGETS)
def test_random_inputs_are_accepted_or_refused(name: str, tmp_path: Path) -> None:
    result = run(TARGETS[name], SEED, INPUTS, tmp_path, SECONDS)
    assert not result.faults
    assert 0 < result.accepted < result.inputs, "the inputs are all valid, or none is"


@pytest.mark.parametrize("path", CRASHES, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_an_input_that_was_a_fault_is_none_any_more(path: Path) -> None:
    with TARGETS[path.parent.name].feed() as feed:
        fed(feed, path.read_bytes())


def test_the_same_seed_makes_the_same_inputs() -> None:
    for target in TARGETS.values():
        assert made_input(target, 1, 2) == made_input(target, 1, 2)
        inputs = {made_input(target, SEED, number) for number in range(20)}
        assert len(inputs) > 5, target.name
