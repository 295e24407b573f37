"""Results of perf_analyzer are read from its output."""

from tests.benchmarks.perf_analyzer import parse_output


def test_the_output_of_perf_analyzer_is_parsed() -> None:
    text = """Request concurrency: 16
  Client:
    Request count: 37284
    Throughput: 6730.35 infer/sec
    Avg latency: 2368 usec (standard deviation 539 usec)
    p50 latency: 2289 usec
    p90 latency: 2906 usec
    p99 latency: 3816 usec
  Server:
    Inference count: 37286
"""
    assert parse_output(text) == (6730.35, 2.289, 3.816)
    assert parse_output("error: failed to get model metadata") is None
