"""Options make the plan that they describe."""

from __future__ import annotations

from pathlib import Path

import pytest

from convserve_client.loadgen.arguments import parse_options
from convserve_client.loadgen.plan import combine


def test_a_mix_is_every_combination_with_its_weight() -> None:
    classes = combine([("a", 3.0), ("b", 1.0)], [(1, 1.0), (8, 0.5)], [(0, 1.0)], [(50.0, 1.0)])
    assert [(one.model, one.images, one.weight) for one in classes] == [
        ("a", 1, 3.0),
        ("a", 8, 1.5),
        ("b", 1, 1.0),
        ("b", 8, 0.5),
    ]


def test_options_make_the_plan() -> None:
    options = parse_options(
        "",
        [
            *("--target=oip://host:9", "--model=a=3,b", "--images-per-call=1,8=0.5"),
            *("--priority=0=9,2", "--deadline-ms=50", "--rate-hz=10,20", "--arrivals=bursts"),
            *("--shape=x:1,2", "--outputs=y,z", "--objective=p99<15ms"),
        ],
    )
    assert (options.plan.protocol, options.plan.target) == ("oip", "host:9")
    assert len(options.plan.classes) == 8
    assert options.rates_hz == (10, 20)
    assert options.plan.concurrency is None
    assert options.plan.shapes == (("x", (1, 2)),)
    assert options.plan.outputs == ("y", "z")
    assert options.plan.metrics_url == ""  # no default for port 9
    assert parse_options("", ["--model=a"]).plan.metrics_url == "http://127.0.0.1:8000/metrics"
    assert parse_options("", ["--model=a", "--metrics-url=none"]).plan.metrics_url == ""


def test_a_trace_is_repeated_and_stretched_to_a_rate(tmp_path: Path) -> None:
    (tmp_path / "trace").write_text("0\n1\n2\n")
    for arguments, times in (([], [0, 1, 2, 3, 4]), (["--rate-hz=2"], [0, 0.5, 1, 1.5, 2])):
        options = parse_options("", ["--model=a", f"--trace={tmp_path}/trace", *arguments])
        due = options.plan.due()
        assert [next(due)[0] for _ in range(5)] == pytest.approx(times)
