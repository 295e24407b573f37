"""Objectives count all due requests, and the search finds the highest rate that meets them."""

from collections.abc import Callable, Generator

import pytest

from convserve_client.loadgen.results.objective import all_met, highest_rate, parse_objective
from convserve_client.loadgen.results.samples import OK, Sample
from convserve_client.loadgen.results.summary import Summary, summarise


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
def test_an_objective_compares_its_figure_with_its_limit(text: str, met: bool) -> None:
    assert parse_objective(text).is_met(summary()) is met


def test_refusing_more_than_one_percent_misses_a_p99_objective() -> None:
    assert parse_objective("p99<15ms").is_met(summary(refused=1))
    assert not parse_objective("p99<15ms").is_met(summary(refused=2))
    objective = parse_objective("p99<15ms")
    assert objective.format(objective.value(summary(refused=2))) == "no answer"


def test_a_run_without_requests_meets_no_objective() -> None:
    empty = summarise([], 0, 1)
    for text in ("p99<1s", "refused<1%", "in_time>1%"):
        assert not parse_objective(text).is_met(empty)
    assert all_met([], empty)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("p98<15ms", "p98<15ms.* is not an objective; .* Figures: p50, p90"),
        ("p99=15ms", "is not an objective"),
        ("p99<15", "needs one of the units us, ms, s"),
        ("p99<15%", "needs one of the units us, ms, s"),
        ("goodput>5ms", "takes no unit"),
        ("refused<5ms", "needs one of the units %"),
        ("p99<1.2.3ms", "1.2.3 is not a number"),
    ],
)
def test_an_invalid_objective_is_rejected_with_what_is_allowed(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        parse_objective(text)


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
def test_the_search_is_as_precise_as_its_tolerance(start_hz: float) -> None:
    tried: list[float] = []

    def met(rate_hz: float) -> bool:
        tried.append(rate_hz)
        return rate_hz <= 123.4

    found = searched(highest_rate(start_hz, tolerance=0.02), met)
    assert found is not None
    assert 123.4 / 1.02 <= found <= 123.4
    assert len(tried) <= 16


def test_the_search_ends_if_no_rate_is_met() -> None:
    assert searched(highest_rate(100.0), lambda rate_hz: False) is None
