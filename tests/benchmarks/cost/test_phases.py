"""Phases of a request: every sample, thread and module of the server belongs to one."""

from pathlib import Path

import pytest

from tests.benchmarks.cost.phases import (
    OTHER,
    PHASE_OF,
    PHASES,
    SERIALIZING,
    UNSPLIT,
    phase_of_code,
    phase_samples,
    split_by_phase,
    thread_group,
)
from tests.benchmarks.cost.sampling import parse_samples, time_between
from tests.benchmarks.options import ROOT

SERVER = ROOT / "server"
# Code for start, stop, loading and scrapes, which no request passes through.
OUTSIDE_REQUESTS = (  # files and rooms below server/
    *("__init__", "__main__", "app", "cli", "run", "settings", "process/", "repository/"),
    *("models/", "telemetry/", "api/stubs/"),
)


def line_of(file: Path, text: str) -> int:
    """Number of the first line that contains the text."""
    lines = file.read_text().splitlines()
    return 1 + next(number for number, line in enumerate(lines) if text in line)


def sample(frames: str, count: int, thread: str = "thread (7): MainThread") -> str:
    bottom = f"<module> ({SERVER}/__main__.py:38);Runner.run (/lib/asyncio/runners.py:118)"
    return ";".join(part for part in (thread, bottom, frames) if part) + f" {count}"


def test_a_sample_belongs_to_the_phase_of_the_innermost_function_of_the_server() -> None:
    handlers, in_flight = SERVER / "api/rpc/handlers.py", SERVER / "api/in_flight.py"
    classify = f"Classifier.Classify ({SERVER}/api/classify.py:42)"
    raw = "\n".join(
        [
            sample("", 1),
            sample(f"Connection._flush ({SERVER}/transport/http2.py:644)", 2),
            sample(f"_parse ({handlers}:387)", 3),
            sample(f"_Handler.respond ({handlers}:{line_of(handlers, SERIALIZING)})", 4),
            sample(f"InFlightLimits.begin ({in_flight}:{line_of(in_flight, 'calls += 1')})", 5),
            sample(f"{classify};PixelBatch.pixels ({SERVER}/api/content.py:85)", 6),
            sample(
                f"{classify};DeviceExecutor.admit ({SERVER}/execution/device.py:247);"
                "<lambda> (<string>:1)",
                7,
            ),
            sample(
                f"DeviceExecutor._start ({SERVER}/execution/device.py:379);"
                f"OpenVinoInstance.start ({SERVER}/engines/openvino.py:136);"
                "InferRequest.start_async (/lib/openvino/_ov_api.py:268)",
                8,
            ),
            sample(f"{classify};best_classes ({SERVER}/api/inference.py:150)", 9),
            sample(f"ModelMetrics.answered ({SERVER}/telemetry/metrics.py:316)", 10),
        ]
    )
    assert phase_samples(parse_samples(raw), 7) == {
        "loop": 1,
        "transport": 2,
        "protobuf": 3 + 4,
        "call": 5,
        "decode": 6,
        "queue": 7,
        "engine": 8,
        "encode": 9,
        "metrics": 10,
    }


def test_samples_of_other_threads_are_ignored() -> None:
    raw = "\n".join(
        [
            sample(f"DeviceExecutor.admit ({SERVER}/execution/device.py:247)", 3),
            sample(f"decode ({SERVER}/images/decode.py:50)", 5, "thread (8): decode_0"),
            "thread (9);OpenVinoInstance.finished (/x/openvino.py:1) 2",
        ]
    )
    found = parse_samples(raw)
    assert [(one.thread, one.name, one.samples) for one in found] == [
        (7, "MainThread", 3),
        (8, "decode_0", 5),
        (9, "", 2),
    ]
    assert phase_samples(found, 7) == {"queue": 3}


def test_every_module_on_the_path_of_a_request_has_a_phase() -> None:
    assert {phase for _, _, phase in PHASE_OF} | {"loop"} == set(PHASES)
    for file in SERVER.rglob("*.py"):
        name = str(file.relative_to(SERVER))
        if not name.startswith(OUTSIDE_REQUESTS):
            assert phase_of_code(name) != "loop", name


def test_every_file_and_function_in_the_table_of_phases_exists() -> None:
    for prefix, function, _ in PHASE_OF:
        assert list(SERVER.glob(f"{prefix}*")), prefix
        owner, _, name = function.rpartition(".")
        text = (SERVER / prefix).read_text() if function else ""
        assert not owner or f"class {owner}" in text, function
        assert not name or f"def {name}" in text, function


def test_threads_that_python_did_not_start_belong_to_the_engine() -> None:
    named = {7: "MainThread", 8: "decode_0", 10: "AnyIO worker thread"}
    groups = {thread: thread_group(thread, named.get(thread, ""), 7) for thread in (7, 8, 9, 10)}
    assert groups == {7: "loop", 8: "decode", 9: "engine", 10: OTHER}


def test_the_phases_of_a_request_add_up_to_its_total() -> None:
    groups_s = {"loop": 2.0, "engine": 5.0, "decode": 1.0}
    us = split_by_phase(400.0, groups_s, {"transport": 30, "engine": 10, "loop": 60})
    assert us == pytest.approx({"loop": 60, "transport": 30, "decode": 50, "engine": 260})
    assert list(us) == ["loop", "transport", "decode", "engine"]  # in the order of a request's path


def test_without_samples_the_time_of_the_event_loop_is_not_split() -> None:
    assert split_by_phase(90.0, {"loop": 1.0, UNSPLIT: 2.0}, {}) == pytest.approx(
        {"loop": 30, UNSPLIT: 60}
    )


def test_all_the_time_of_a_new_thread_counts() -> None:
    assert time_between({1: 2.0, 2: 1.0}, {1: 2.5, 3: 0.25}) == {1: 0.5, 3: 0.25}
