"""Summaries count every request once and compute latency only from successes."""

import math

import grpc
import pytest

from convserve_client.loadgen.results.samples import NOT_SENT, OK, STATUSES, Sample, Samples
from convserve_client.loadgen.results.summary import estimate, split_windows, summarise


def succeeded(due_s: float, latency_s: float, images: int = 1) -> Sample:
    return Sample(due_s, due_s, due_s + latency_s, OK, images)


def test_latency_includes_the_delay_before_sending() -> None:
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


def test_refusals_and_failures_are_counted_but_have_no_latency() -> None:
    samples = [
        succeeded(0.1, 0.5),
        Sample(0.2, 0.2, 0.201, "RESOURCE_EXHAUSTED", 1),  # fast, but not an answer
        Sample(0.3, 0.3, 9.0, "DEADLINE_EXCEEDED", 1),
        Sample(0.4, 0.4, 0.4, "RESOURCE_EXHAUSTED", 1),
    ]
    summary = summarise(samples, 0, 1)
    assert summary.counts == {OK: 1, "RESOURCE_EXHAUSTED": 2, "DEADLINE_EXCEEDED": 1}
    assert (summary.succeeded, summary.total) == (1, 4)
    assert summary.latency is not None
    assert summary.latency.p50_s == summary.latency.max_s == pytest.approx(0.5)
    assert summary.calls_hz == 1


def test_goodput_counts_only_answers_within_their_deadline() -> None:
    samples = [
        succeeded(1.0, 0.09),
        succeeded(1.5, 0.11),  # an answer, but too late
        succeeded(2.95, 0.06),  # in time, but it arrived in the next period
        succeeded(3.5, 0.01),  # in the next period
        Sample(2.0, 2.05, 2.06, "RESOURCE_EXHAUSTED", 1),
    ]
    summary = summarise(samples, 1, 3, deadline_s=0.1)
    assert (summary.in_time, summary.late, summary.total) == (2, 1, 4)
    assert summary.goodput_hz == 1.0
    assert summarise(samples, 1, 3).in_time == 3, "without a deadline nothing is late"


def test_a_period_counts_requests_by_due_time_and_throughput_by_arrival() -> None:
    samples = [
        succeeded(due_s=0.5, latency_s=1.0, images=4),  # due in the warm-up, answered in the period
        succeeded(due_s=1.5, latency_s=0.5, images=4),
        succeeded(due_s=2.5, latency_s=1.0, images=4),  # answered after the period
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


def test_a_period_without_requests_has_no_latency_and_no_lag() -> None:
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


def test_samples_survive_packing() -> None:
    there = [
        Sample(1.25, 1.5, 2.75, OK, 64, request_class=7, tries=3, retry_after_s=0.5, rows=2.5),
        Sample(2.0, 2.0, 2.0, NOT_SENT, 1),
    ]
    samples = Samples(there)
    both = Samples(packed=samples.packed)
    both.extend(samples.packed)
    assert list(both) == there + there
    assert (len(both), both.columns["images"].tolist()) == (4, [64, 1, 64, 1])


def test_a_request_without_an_answer_is_infinitely_late() -> None:
    samples = [succeeded(0.1, 0.01) for _ in range(98)]
    samples += [Sample(0.1, 0.1, 0.1, status, 1) for status in ("RESOURCE_EXHAUSTED", NOT_SENT)]
    summary = summarise(samples, 0, 1)
    assert summary.latency is not None
    assert summary.latency_of_all is not None
    assert summary.latency.p99_s == pytest.approx(0.01)
    assert summary.latency_of_all.p95_s == pytest.approx(0.01)
    assert summary.latency_of_all.p99_s == math.inf
    assert (summary.refused, summary.not_sent, summary.failed) == (1, 1, 0)


def test_each_request_class_has_its_own_deadline() -> None:
    samples = [Sample(0.0, 0.0, 0.5, OK, 1, request_class=index) for index in (0, 1, 1)]
    assert summarise(samples, 0, 1, deadline_s=[0.4, 0.6]).in_time == 2


def test_requested_waits_are_counted_as_given_obeyed_and_successful() -> None:
    samples = [
        Sample(0.0, 0.0, 0.1, "RESOURCE_EXHAUSTED", 1),  # no requested wait
        Sample(0.0, 0.0, 0.1, "RESOURCE_EXHAUSTED", 1, retry_after_s=0.2),  # not obeyed
        Sample(
            0.0, 0.0, 0.3, OK, 1, tries=3, retry_after_s=0.1
        ),  # refused twice before it succeeded
        Sample(0.0, 0.0, 0.9, OK, 1, tries=2, retry_after_s=0.1),  # too late
    ]
    retry_after = summarise(samples, 0, 1, deadline_s=0.5).retry_after
    assert (
        retry_after.refusals,
        retry_after.given,
        retry_after.obeyed,
        retry_after.answered,
    ) == (5, 3, 2, 1)


def test_a_batch_counts_once_however_many_calls_it_had() -> None:
    of_three = [Sample(0.0, 0.0, 0.1, OK, 1, rows=3.0) for _ in range(3)]
    alone = Sample(0.0, 0.0, 0.1, OK, 1, rows=1.0)
    unknown = Sample(0.0, 0.0, 0.1, OK, 1)
    assert summarise([*of_three, alone, unknown], 0, 1).mean_rows == pytest.approx(2.0)
    assert summarise([unknown], 0, 1).mean_rows is None


def test_windows_split_the_period_without_losing_requests() -> None:
    samples = Samples(succeeded(n / 10, 0.01) for n in range(40)).columns
    parts = split_windows(samples, 1.0, 3.0, 4)
    assert [part.total for part in parts] == [5, 5, 5, 5]
    assert all(part.duration_s == pytest.approx(0.5) for part in parts)


def test_the_margin_is_that_of_students_t() -> None:
    found = estimate([10.0, 12.0, 14.0])  # mean 12, deviation 2, 2 degrees of freedom
    assert found is not None
    assert (found.mean, found.windows) == (12.0, 3)
    assert found.margin == pytest.approx(4.303 * 2 / math.sqrt(3))
    assert estimate([10.0]) is None
    assert estimate([10.0, math.inf]) is None


def test_an_empty_period_is_rejected() -> None:
    with pytest.raises(ValueError, match="must be after"):
        summarise([], 1, 1)
