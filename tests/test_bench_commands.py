"""The commands that measure put every figure where it belongs."""

from pathlib import Path

import pytest

from tests.bench_cost import (
    OTHER,
    PHASE_OF,
    PHASES,
    SERIALIZING,
    UNSPLIT,
    group_of,
    phase_of_code,
    phase_samples,
    spent,
    split,
    stacks,
)
from tests.bench_serving import ROOT, Pairs, middle_half

SERVER = ROOT / "server"
# Run where a server starts, stops, loads or is scraped; not in the way of a call.
NOT_OF_CALLS = {
    "__init__", "__main__", "app", "containers", "cuda", "golden", "gpu", "guard", "lifecycle",
    "loading", "logs", "memory", "precision", "priority", "probation", "rollout", "settings",
    "shared_memory",
}  # fmt: skip


def line_of(file: Path, text: str) -> int:
    """Of its first line that holds the text."""
    lines = file.read_text().splitlines()
    return 1 + next(number for number, line in enumerate(lines) if text in line)


def sample(frames: str, count: int, thread: str = "thread (7): MainThread") -> str:
    bottom = f"<module> ({SERVER}/__main__.py:38);Runner.run (/lib/asyncio/runners.py:118)"
    return ";".join(part for part in (thread, bottom, frames) if part) + f" {count}"


def test_a_sample_belongs_to_the_innermost_of_the_servers_functions() -> None:
    rpc = SERVER / "service" / "rpc.py"
    classify = f"Classifier.Classify ({SERVER}/service/classify.py:42)"
    raw = "\n".join(
        [
            sample("", 1),
            sample(f"Connection._flush ({SERVER}/transport/http2.py:644)", 2),
            sample(f"_request ({rpc}:387)", 3),
            sample(f"_Answering.response ({rpc}:{line_of(rpc, SERIALIZING)})", 4),
            sample(f"Intake.take ({rpc}:{line_of(rpc, 'self.calls += 1')})", 5),
            sample(f"{classify};Classifier._pixels ({SERVER}/service/classify.py:85)", 6),
            sample(f"{classify};Host.admit ({SERVER}/host.py:247);<lambda> (<string>:1)", 7),
            sample(
                f"Host._start ({SERVER}/host.py:379);"
                f"OpenVinoInstance.start ({SERVER}/engines/openvino.py:136);"
                "InferRequest.start_async (/lib/openvino/_ov_api.py:268)",
                8,
            ),
            sample(f"{classify};best_classes ({SERVER}/service/inference.py:150)", 9),
            sample(f"ModelMetrics.answered ({SERVER}/metrics.py:316)", 10),
        ]
    )
    assert phase_samples(stacks(raw), 7) == {
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


def test_samples_of_other_threads_are_not_the_loops() -> None:
    raw = "\n".join(
        [
            sample(f"Host.admit ({SERVER}/host.py:247)", 3),
            sample(f"decode ({SERVER}/images.py:50)", 5, "thread (8): decode_0"),
            "thread (9);OpenVinoInstance.finished (/x/openvino.py:1) 2",
        ]
    )
    found = stacks(raw)
    assert [(one.thread, one.name, one.samples) for one in found] == [
        (7, "MainThread", 3),
        (8, "decode_0", 5),
        (9, "", 2),
    ]
    assert phase_samples(found, 7) == {"queue": 3}


def test_every_module_that_calls_pass_through_has_a_phase() -> None:
    assert {phase for _, _, phase in PHASE_OF} | {"loop"} == set(PHASES)
    for file in SERVER.rglob("*.py"):
        name = str(file.relative_to(SERVER))
        if "repository/" not in name and file.stem not in NOT_OF_CALLS:
            assert phase_of_code(name) != "loop", name


def test_every_function_that_has_a_phase_of_its_own_exists() -> None:
    for beginning, function, _ in PHASE_OF:
        assert list(SERVER.glob(f"{beginning}*")), beginning
        owner, _, name = function.rpartition(".")
        text = (SERVER / beginning).read_text() if function else ""
        assert not owner or f"class {owner}" in text, function
        assert not name or f"def {name}" in text, function


def test_threads_that_python_did_not_start_are_the_engines() -> None:
    named = {7: "MainThread", 8: "decode_0", 10: "AnyIO worker thread"}
    groups = {thread: group_of(thread, named.get(thread, ""), 7) for thread in (7, 8, 9, 10)}
    assert groups == {7: "loop", 8: "decode", 9: "engine", 10: OTHER}


def test_the_phases_of_a_call_add_up_to_its_total() -> None:
    groups_s = {"loop": 2.0, "engine": 5.0, "decode": 1.0}
    us = split(400.0, groups_s, {"transport": 30, "engine": 10, "loop": 60})
    assert us == pytest.approx({"loop": 60, "transport": 30, "decode": 50, "engine": 260})
    assert list(us) == ["loop", "transport", "decode", "engine"]  # in the order of a call's way


def test_without_samples_the_loop_stays_whole() -> None:
    assert split(90.0, {"loop": 1.0, UNSPLIT: 2.0}, {}) == pytest.approx({"loop": 30, UNSPLIT: 60})


def test_a_thread_that_began_meanwhile_has_spent_all_it_has() -> None:
    assert spent({1: 2.0, 2: 1.0}, {1: 2.5, 3: 0.25}) == {1: 0.5, 3: 0.25}


def test_sides_are_compared_by_neighbouring_turns() -> None:
    pairs = Pairs(bare=[10.0, 20.0, 40.0], served=[9.0, 16.0, 20.0])
    assert pairs.ratios() == [0.9, 0.8, 0.5]
    assert pairs.differences() == [-1.0, -4.0, -20.0]


@pytest.mark.parametrize(
    ("values", "expected"), [([3.0], (3.0, 3.0)), ([4.0, 1.0, 2.0, 3.0, 5.0], (2.0, 4.0))]
)
def test_the_middle_half_leaves_out_a_quarter_at_each_end(
    values: list[float], expected: tuple[float, float]
) -> None:
    assert middle_half(values) == expected
