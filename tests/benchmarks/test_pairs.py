"""Statistics of pairs of turns."""

import pytest

from tests.benchmarks.pairs import Pairs, middle_half


def test_ratios_and_differences_compare_adjacent_turns() -> None:
    pairs = Pairs(bare=[10.0, 20.0, 40.0], served=[9.0, 16.0, 20.0])
    assert pairs.ratios() == [0.9, 0.8, 0.5]
    assert pairs.differences() == [-1.0, -4.0, -20.0]


@pytest.mark.parametrize(
    ("values", "expected"), [([3.0], (3.0, 3.0)), ([4.0, 1.0, 2.0, 3.0, 5.0], (2.0, 4.0))]
)
def test_the_middle_half_excludes_a_quarter_at_each_end(
    values: list[float], expected: tuple[float, float]
) -> None:
    assert middle_half(values) == expected
