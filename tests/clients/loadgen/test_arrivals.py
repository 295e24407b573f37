"""Arrivals follow the process and the rate that their names say."""

import math
from itertools import groupby, islice, pairwise

import pytest

from convserve_client.loadgen.arrivals import bursts, constant, poisson, read_trace
from convserve_client.loadgen.results.samples import OK, Samples


def test_the_same_seed_gives_the_same_arrivals() -> None:
    first = list(islice(poisson(100, seed=7), 1000))
    assert first == list(islice(poisson(100, seed=7), 1000))
    assert first != list(islice(poisson(100, seed=8), 1000))


def test_poisson_gaps_have_the_mean_and_deviation_of_their_rate() -> None:
    times = [0.0, *islice(poisson(50, seed=1), 20_000)]
    gaps = [after - before for before, after in pairwise(times)]
    mean = sum(gaps) / len(gaps)
    deviation = math.sqrt(sum((gap - mean) ** 2 for gap in gaps) / len(gaps))
    assert mean == pytest.approx(1 / 50, rel=0.03)
    assert deviation == pytest.approx(
        1 / 50, rel=0.03
    )  # an exponential distribution has the mean as deviation
    assert min(gaps) > 0


def test_constant_arrivals_are_evenly_spaced_and_do_not_drift() -> None:
    assert list(islice(constant(4), 5)) == [0, 0.25, 0.5, 0.75, 1]
    assert next(islice(constant(3), 3_000_000, None)) == 1_000_000


def test_bursts_come_together_and_keep_the_rate() -> None:
    times = list(islice(bursts(100, 5, seed=3), 10_000))
    assert {len(list(together)) for _, together in groupby(times)} == {5}
    assert len(times) / times[-1] == pytest.approx(100, rel=0.06)
    with pytest.raises(ValueError, match="burst of 0"):
        bursts(100, 0, seed=3)


def test_a_trace_starts_at_its_first_time() -> None:
    assert read_trace(["# seconds", "5.5", "", "6.0  # two at once", "6.0"]) == [0.0, 0.5, 0.5]


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["1", "soon"], "line 2: 'soon' is not a number of seconds"),
        (["2", "1"], "line 2: 1 is not finite or is before the previous time"),
        (["nan"], "line 1"),
        (["# nothing"], "no times"),
    ],
)
def test_an_invalid_trace_is_rejected_with_its_line(lines: list[str], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        read_trace(lines)


@pytest.mark.parametrize("rate_hz", [0, -1, math.inf, math.nan])
def test_an_invalid_rate_is_rejected_before_the_first_arrival(rate_hz: float) -> None:
    with pytest.raises(ValueError, match="rate_hz"):
        poisson(rate_hz, seed=1)
    with pytest.raises(ValueError, match="rate_hz"):
        constant(rate_hz)


def test_poisson_arrivals_at_a_steady_server_wait_as_queueing_theory_says() -> None:
    service_s, rate_hz = 0.01, 70.0  # M/D/1 at 70 %
    samples, free_s = Samples(), 0.0
    for due_s in islice(poisson(rate_hz, seed=5), 200_000):
        free_s = max(free_s, due_s) + service_s
        samples.add(due_s, due_s, free_s, OK, 1)
    columns = samples.columns
    waits = columns["finished_s"] - columns["due_s"] - service_s
    load = rate_hz * service_s
    assert float(waits.mean()) == pytest.approx(load * service_s / (2 * (1 - load)), rel=0.03)
    assert float((waits < 1e-9).mean()) == pytest.approx(
        1 - load, rel=0.03
    )  # requests that do not wait
