"""Arrivals are what they say they are, and a summary counts what it says it counts."""

import math
from itertools import groupby, islice, pairwise

import grpc
import pytest

from convserve_client.loadgen.load import (
    NOT_SENT,
    OK,
    STATUSES,
    Sample,
    Samples,
    bursts,
    constant,
    estimate,
    poisson,
    summarise,
    trace,
    windows,
)


def succeeded(due_s: float, latency_s: float, images: int = 1) -> Sample:
    return Sample(due_s, due_s, due_s + latency_s, OK, images)


def test_the_same_seed_gives_the_same_arrivals() -> None:
    first = list(islice(poisson(100, seed=7), 1000))
    assert first == list(islice(poisson(100, seed=7), 1000))
    assert first != list(islice(poisson(100, seed=8), 1000))


def test_poisson_gaps_have_the_mean_and_the_spread_of_their_rate() -> None:
    times = [0.0, *islice(poisson(50, seed=1), 20_000)]
    gaps = [after - before for before, after in pairwise(times)]
    mean = sum(gaps) / len(gaps)
    deviation = math.sqrt(sum((gap - mean) ** 2 for gap in gaps) / len(gaps))
    assert mean == pytest.approx(1 / 50, rel=0.03)
    assert deviation == pytest.approx(1 / 50, rel=0.03)  # of an exponential: equal to the mean
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


def test_a_trace_begins_at_its_first_time() -> None:
    assert trace(["# seconds", "5.5", "", "6.0  # two at once", "6.0"]) == [0.0, 0.5, 0.5]


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["1", "soon"], "line 2: 'soon' is no number of seconds"),
        (["2", "1"], "line 2: 1 does not follow"),
        (["nan"], "line 1"),
        (["# nothing"], "no time"),
    ],
)
def test_a_trace_that_is_none_says_in_which_line(lines: list[str], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        trace(lines)


@pytest.mark.parametrize("rate_hz", [0, -1, math.inf, math.nan])
def test_a_rate_that_is_none_is_refused_before_the_first_arrival(rate_hz: float) -> None:
    with pytest.raises(ValueError, match="rate_hz"):
        poisson(rate_hz, seed=1)
    with pytest.raises(ValueError, match="rate_hz"):
        constant(rate_hz)


def test_latency_includes_the_time_the_sender_was_late() -> None:
    assert Sample(due_s=1.0, sent_s=1.5, finished_s=1.75, status=OK, images=1).latency_s == 0.75


def test_percentiles_are_latencies_that_occurred() -> None:
    samples = [succeeded(due_s=0.0, latency_s=n / 1000) for n in range(1000, 0, -1)]
    latency = summarise(samples, 0, 10).latency
    assert latency is not None
    assert latency.p50_s == 0.5
    assert latency.p90_s == 0.9
    assert latency.p95_s == 0.95
    assert latency.p99_s == 0.99
    assert latency.p999_s == 0.999
    assert latency.max_s == 1.0


def test_one_success_is_every_percentile() -> None:
    latency = summarise([succeeded(0.0, 0.25)], 0, 1).latency
    assert latency is not None
    assert {latency.p50_s, latency.p90_s, latency.p999_s, latency.max_s} == {0.25}


def test_refusals_and_failures_are_counted_and_never_averaged_in() -> None:
    samples = [
        succeeded(0.1, 0.5),
        Sample(0.2, 0.2, 0.201, "RESOURCE_EXHAUSTED", 1),  # fast, and no service at all
        Sample(0.3, 0.3, 9.0, "DEADLINE_EXCEEDED", 1),
        Sample(0.4, 0.4, 0.4, "RESOURCE_EXHAUSTED", 1),
    ]
    summary = summarise(samples, 0, 1)
    assert summary.counts == {OK: 1, "RESOURCE_EXHAUSTED": 2, "DEADLINE_EXCEEDED": 1}
    assert (summary.succeeded, summary.total) == (1, 4)
    assert summary.latency is not None
    assert summary.latency.p50_s == summary.latency.max_s == pytest.approx(0.5)
    assert summary.calls_hz == 1


def test_goodput_is_answers_within_their_deadline_and_nothing_else() -> None:
    samples = [
        succeeded(1.0, 0.09),
        succeeded(1.5, 0.11),  # too late, though it is an answer
        succeeded(2.95, 0.06),  # in time, though it came when the next stretch had begun
        succeeded(3.5, 0.01),  # of that stretch
        Sample(2.0, 2.05, 2.06, "RESOURCE_EXHAUSTED", 1),
    ]
    summary = summarise(samples, 1, 3, deadline_s=0.1)
    assert (summary.in_time, summary.late, summary.total) == (2, 1, 4)
    assert summary.goodput_hz == 1.0
    assert summarise(samples, 1, 3).in_time == 3, "without a deadline nothing is late"


def test_a_stretch_counts_what_was_due_in_it_and_the_answers_that_came_in_it() -> None:
    samples = [
        succeeded(due_s=0.5, latency_s=1.0, images=4),  # warm-up, answered in the stretch
        succeeded(due_s=1.5, latency_s=0.5, images=4),
        succeeded(due_s=2.5, latency_s=1.0, images=4),  # answered after it
        succeeded(due_s=3.5, latency_s=0.1, images=4),
    ]
    summary = summarise(samples, 1, 3)
    assert summary.counts == {OK: 2}
    assert summary.calls_hz == 1.0
    assert summary.images_hz == 4.0
    assert summary.latency is not None
    assert (summary.latency.p50_s, summary.latency.max_s) == (0.5, 1.0)


def test_lag_is_how_late_requests_were_sent() -> None:
    samples = [Sample(n / 100, n / 100 + n / 1000, 5.0, OK, 1) for n in range(100)]
    assert summarise(samples, 0, 10).lag_p99_s == pytest.approx(0.098)


def test_nothing_due_has_no_latency_and_no_lag() -> None:
    summary = summarise([], 0, 2)
    assert (summary.total, summary.calls_hz, summary.latency, summary.lag_p99_s) == (
        0,
        0,
        None,
        None,
    )


def test_statuses_have_the_numbers_of_grpc() -> None:
    assert [STATUSES[code.value[0]] for code in grpc.StatusCode] == [
        code.name for code in grpc.StatusCode
    ]


def test_samples_come_out_of_their_bytes_as_they_went_in() -> None:
    there = [
        Sample(1.25, 1.5, 2.75, OK, 64, kind=7, tries=3, hint_s=0.5, rows=2.5),
        Sample(2.0, 2.0, 2.0, NOT_SENT, 1),
    ]
    samples = Samples(there)
    both = Samples(packed=samples.packed)
    both.extend(samples.packed)
    assert list(both) == there + there
    assert (len(both), both.columns["images"].tolist()) == (4, [64, 1, 64, 1])


def test_what_got_no_answer_is_later_than_any_limit() -> None:
    samples = [succeeded(0.1, 0.01) for _ in range(98)]
    samples += [Sample(0.1, 0.1, 0.1, status, 1) for status in ("RESOURCE_EXHAUSTED", NOT_SENT)]
    summary = summarise(samples, 0, 1)
    assert summary.latency is not None
    assert summary.latency_of_all is not None
    assert summary.latency.p99_s == pytest.approx(0.01)
    assert summary.latency_of_all.p95_s == pytest.approx(0.01)
    assert summary.latency_of_all.p99_s == math.inf
    assert (summary.refused, summary.not_sent, summary.failed) == (1, 1, 0)


def test_each_kind_has_its_own_deadline() -> None:
    samples = [Sample(0.0, 0.0, 0.5, OK, 1, kind=kind) for kind in (0, 1, 1)]
    assert summarise(samples, 0, 1, deadline_s=[0.4, 0.6]).in_time == 2


def test_hints_are_counted_as_given_obeyed_and_worth_it() -> None:
    samples = [
        Sample(0.0, 0.0, 0.1, "RESOURCE_EXHAUSTED", 1),  # without a hint
        Sample(0.0, 0.0, 0.1, "RESOURCE_EXHAUSTED", 1, hint_s=0.2),  # not obeyed
        Sample(0.0, 0.0, 0.3, OK, 1, tries=3, hint_s=0.1),  # refused twice before
        Sample(0.0, 0.0, 0.9, OK, 1, tries=2, hint_s=0.1),  # too late
    ]
    hints = summarise(samples, 0, 1, deadline_s=0.5).hints
    assert (hints.refusals, hints.given, hints.obeyed, hints.answered) == (5, 3, 2, 1)


def test_a_batch_counts_once_however_many_calls_it_carried() -> None:
    of_three = [Sample(0.0, 0.0, 0.1, OK, 1, rows=3.0) for _ in range(3)]
    alone = Sample(0.0, 0.0, 0.1, OK, 1, rows=1.0)
    unknown = Sample(0.0, 0.0, 0.1, OK, 1)
    assert summarise([*of_three, alone, unknown], 0, 1).mean_rows == pytest.approx(2.0)
    assert summarise([unknown], 0, 1).mean_rows is None


def test_windows_split_the_stretch_and_lose_nothing() -> None:
    samples = Samples(succeeded(n / 10, 0.01) for n in range(40)).columns
    parts = windows(samples, 1.0, 3.0, 4)
    assert [part.total for part in parts] == [5, 5, 5, 5]
    assert all(part.duration_s == pytest.approx(0.5) for part in parts)


def test_the_margin_is_students() -> None:
    found = estimate([10.0, 12.0, 14.0])  # mean 12, deviation 2, 2 degrees of freedom
    assert found is not None
    assert (found.mean, found.windows) == (12.0, 3)
    assert found.margin == pytest.approx(4.303 * 2 / math.sqrt(3))
    assert estimate([10.0]) is None
    assert estimate([10.0, math.inf]) is None


def test_poisson_calls_to_a_steady_server_wait_as_pollaczek_and_khinchine_say() -> None:
    service_s, rate_hz = 0.01, 70.0  # M/D/1 at 70 %
    samples, free_s = Samples(), 0.0
    for due_s in islice(poisson(rate_hz, seed=5), 200_000):
        free_s = max(free_s, due_s) + service_s
        samples.add(due_s, due_s, free_s, OK, 1)
    columns = samples.columns
    waits = columns["finished_s"] - columns["due_s"] - service_s
    load = rate_hz * service_s
    assert float(waits.mean()) == pytest.approx(load * service_s / (2 * (1 - load)), rel=0.03)
    assert float((waits < 1e-9).mean()) == pytest.approx(1 - load, rel=0.03)  # who waits not at all


def test_a_stretch_without_length_is_refused() -> None:
    with pytest.raises(ValueError, match="must be after"):
        summarise([], 1, 1)
