"""An objective judges what it names, by the share of all that were due; a search finds the edge."""

from collections.abc import Callable, Generator

import pytest

from convserve_client.loadgen.load import (
    OK,
    Sample,
    Summary,
    summarise,
)
from convserve_client.loadgen.objective import all_met, highest_rate, objective


def summary(latency_s: float = 0.01, refused: int = 0) -> Summary:
    samples = [Sample(0.0, 0.0, latency_s, OK, 1) for _ in range(100 - refused)]
    samples += [Sample(0.0, 0.0, 0.001, "RESOURCE_EXHAUSTED", 1) for _ in range(refused)]
    return summarise(samples, 0, 1, deadline_s=0.1)


@pytest.mark.parametrize(
    ("text", "met"),
    [
        ("p99<15ms", True),
        ("p99.9 < 10.1ms", True),
        ("max<=5ms", False),
        ("p50<0.02s", True),
        ("p50<9000us", False),
        ("goodput>=100", True),
        ("calls>100", False),
        ("in_time>99%", True),
        ("refused<=0", True),
        ("failed<0.01", True),
    ],
)
def test_an_objective_is_met_or_not(text: str, met: bool) -> None:
    assert objective(text).met(summary()) is met


def test_who_refuses_a_hundredth_misses_a_p99_however_fast_the_rest() -> None:
    assert objective("p99<15ms").met(summary(refused=1))
    assert not objective("p99<15ms").met(summary(refused=2))
    assert objective("p99<15ms").shown(objective("p99<15ms").value(summary(refused=2))) == (
        "no answer"
    )


def test_nothing_due_meets_no_share_and_no_latency() -> None:
    empty = summarise([], 0, 1)
    for text in ("p99<1s", "refused<1%", "in_time>1%"):
        assert not objective(text).met(empty)
    assert all_met([], empty)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("p98<15ms", "p98<15ms.* is no objective; .* one of p50, p90"),
        ("p99=15ms", "is no objective"),
        ("p99<15", "needs one of the units us, ms, s"),
        ("p99<15%", "needs one of the units us, ms, s"),
        ("goodput>5ms", "takes no unit"),
        ("refused<5ms", "needs one of the units %"),
        ("p99<1.2.3ms", "1.2.3 is no number"),
    ],
)
def test_what_is_none_says_what_is_allowed(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        objective(text)


def searched(
    tries: Generator[float, bool, float | None], met: Callable[[float], bool]
) -> float | None:
    rate_hz = next(tries)
    while True:
        try:
            rate_hz = tries.send(met(rate_hz))
        except StopIteration as end:
            found: float | None = end.value
            return found


@pytest.mark.parametrize("start_hz", [1.0, 90.0, 100.0, 5000.0])
def test_the_search_comes_as_near_as_it_says(start_hz: float) -> None:
    tried: list[float] = []

    def met(rate_hz: float) -> bool:
        tried.append(rate_hz)
        return rate_hz <= 123.4

    found = searched(highest_rate(start_hz, tolerance=0.02), met)
    assert found is not None
    assert 123.4 / 1.02 <= found <= 123.4
    assert len(tried) <= 16


def test_a_search_gives_up_where_nothing_is_met() -> None:
    assert searched(highest_rate(100.0), lambda rate_hz: False) is None
