"""The commands that measure put every figure where it belongs."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.benchmarks import beside as bench_beside
from tests.benchmarks import overload as bench_overload
from tests.benchmarks import page as bench_page
from tests.benchmarks.cost import (
    MEANING,
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
from tests.benchmarks.serving import ROOT, Pairs, middle_half

SERVER = ROOT / "server"
# Run where a server starts, stops, loads or is scraped; not in the way of a call.
NOT_OF_CALLS = (  # files and rooms below server/
    *("__init__", "__main__", "app", "cli", "settings", "process/", "repository/", "models/"),
    *("telemetry/", "api/stubs/"),
)


def line_of(file: Path, text: str) -> int:
    """Of its first line that holds the text."""
    lines = file.read_text().splitlines()
    return 1 + next(number for number, line in enumerate(lines) if text in line)


def sample(frames: str, count: int, thread: str = "thread (7): MainThread") -> str:
    bottom = f"<module> ({SERVER}/__main__.py:38);Runner.run (/lib/asyncio/runners.py:118)"
    return ";".join(part for part in (thread, bottom, frames) if part) + f" {count}"


def test_a_sample_belongs_to_the_innermost_of_the_servers_functions() -> None:
    handlers, in_flight = SERVER / "api/handlers.py", SERVER / "api/in_flight.py"
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
            sample(f"DeviceExecutor.admit ({SERVER}/execution/device.py:247)", 3),
            sample(f"decode ({SERVER}/images/decode.py:50)", 5, "thread (8): decode_0"),
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
        if not name.startswith(NOT_OF_CALLS):
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


# --- the page ---------------------------------------------------------------------------------

MEASURED = {"date": "2026-01-02", "commit": "abc1234", "rounds": 3, "seconds": 4.0}
HERE = {"processor": "A processor, 2 cores", "system": "A system", "versions": "openvino 1"}


def served(**changes: Any) -> dict[str, Any]:
    return {
        "model": "small",
        "engine": "openvino-fp32",
        "trained": True,
        "best": {"units": 1, "instances": 2, "rows": 4},
        "alone": {"units": 2, "instances": 1, "rows": 1},
        "single_hz": {"bare": [100.0, 200.0, 50.0], "served": [50.0, 180.0, 20.0]},
        "single_rows": 4.0,
        "batched_images": 8,
        "batched_callers": 8,
        "batched_hz": {"bare": [100.0, 200.0, 50.0], "served": [90.0, 190.0, 50.0]},
        "batched_rows": 8.0,
        "lone_ms": {"bare": [1.0, 2.0, 3.0], "served": [1.5, 2.25, 4.0]},
        **MEASURED,
        **changes,
    }


def cost(**changes: Any) -> dict[str, Any]:
    return {
        "model": "small",
        "engine_input": "raw",
        "calls_hz": [10.0, 20.0, 30.0],
        "total_us": [90.0, 100.0, 130.0],
        "rows": 2.0,
        "phases_us": {"loop": 20.0, "transport": 30.0, "engine": 50.0},
        "samples": 400,
        "unsplit": "",
        **MEASURED,
        **changes,
    }


OVERLOAD = {
    "model": "small",
    "deadline_ms": 50.0,
    "capacity_hz": 80.0,
    **HERE,
    **MEASURED,
    "figures": [
        {
            "policy": policy,
            "load": load,
            "offered_hz": 80.0 * load,
            "goodput_hz": good_hz,
            "of_capacity": good_hz / 80,
            "in_time": 0.5,
            "late": 0.25,
            "refused": 0.25,
            "p99_ms": None if good_hz == 0 else 40.0,
            "rows": 2.0,
            "lag_ms": 1.0,
        }
        for load, policy, good_hz in (
            (1.0, "deadline", 76.0),
            (1.0, "fixed", 20.0),
            (2.0, "deadline", 72.0),
            (2.0, "fixed", 0.0),
        )
    ],
}


def page(folder: Path, overload: Any = None, **parts: Any) -> str:
    found = {"machine": HERE, "served": {}, "cost": {}, **parts}
    bench_page.write(folder / "cpu.md", found, overload or {})
    return (folder / "cpu.md").read_text()


def cells(text: str, first: str) -> list[str]:
    """Of the table's row that begins so."""
    line = next(line for line in text.splitlines() if line.startswith(f"| {first} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_page_has_the_median_of_the_pairs_and_not_the_ratio_of_medians(tmp_path: Path) -> None:
    text = page(tmp_path, served={"small": served()})
    assert cells(text, "small") == [
        "small",
        "100.0",
        "2 x 1 core, batch 4",
        "50.0",
        "50.0% (40.0% to 90.0%)",
        "8",
        "90.0",
        "95.0% (90.0% to 100.0%)",
        "2026-01-02, abc1234",
    ]
    assert "| small | 2.00 | 2.25 | +0.50 | +0.38 to +0.75 | 3 |" in text


def test_the_page_says_whose_parameters_are_random(tmp_path: Path) -> None:
    assert "drawn at random" not in page(tmp_path, served={"small": served()})
    text = page(tmp_path, served={"small": served(), "other": served(trained=False)})
    assert "Of other the parameters are drawn at random" in text


def test_the_page_has_a_column_for_each_way_to_ask(tmp_path: Path) -> None:
    other = cost(phases_us={"engine": 100.0})
    text = page(tmp_path, cost={"small, raw": cost(), "small, jpeg": other})
    assert cells(text, "transport")[2:] == ["30.0 (30.0%)", ""]
    assert cells(text, "engine")[2:] == ["50.0 (50.0%)", "100.0 (100.0%)"]
    assert cells(text, "**all**")[2:] == ["100 (90 to 130)"] * 2
    assert "was not measured" not in text


def test_the_page_says_where_the_split_was_not_measured(tmp_path: Path) -> None:
    whole = cost(phases_us={"loop": 40.0, UNSPLIT: 60.0}, samples=0, unsplit="py-spy is not there")
    text = page(tmp_path, cost={"small, raw": whole})
    assert "The split of small, raw was not measured: py-spy is not there." in text
    assert cells(text, UNSPLIT)[2:] == ["60.0 (60.0%)"]


def test_the_page_has_the_curve_of_overload_and_its_figures(tmp_path: Path) -> None:
    text = page(tmp_path, overload={"overload-small-cpu": OVERLOAD})
    assert "(overload-small-cpu.svg)" in text
    assert "| 2.0 x | fixed | 160 | 0.0 | 0.0% | 50.0% | 25.00% | 25.0% | none |" in text


def test_the_same_figures_give_the_same_small_plots(tmp_path: Path) -> None:
    folders = tmp_path / "one", tmp_path / "other"
    for folder in folders:
        folder.mkdir()
        page(folder, served={"small": served()}, cost={"small, raw": cost()})
        bench_overload.write(folder / "overload-small-cpu", OVERLOAD)
    names = sorted(file.name for file in folders[0].iterdir() if file.suffix == ".svg")
    assert names == ["cpu-cost.svg", "cpu-served.svg", "overload-small-cpu.svg"]
    for name in names:
        texts = [(folder / name).read_bytes() for folder in folders]
        assert texts[0] == texts[1], name
        assert len(texts[0]) < 60_000, name
        assert b"<text" in texts[0], name


def test_the_curve_of_overload_stays_within_its_plot_above_capacity_too() -> None:
    axes = bench_overload._drawn({**OVERLOAD, "capacity_hz": 10.0}).axes[0]
    assert axes.get_ylim()[1] > 76.0


def test_figures_of_another_machine_are_not_kept() -> None:
    stored = {"machine": HERE, "served": {"small": served()}, "cost": {}}
    assert bench_page.known(stored, HERE) == stored
    there = HERE | {"processor": "Another"}
    assert bench_page.known(stored, there) == {"machine": there, "served": {}, "cost": {}}


def test_the_curves_are_those_that_lie_beside_the_page(tmp_path: Path) -> None:
    (tmp_path / "overload-small-cpu.json").write_text(json.dumps(OVERLOAD))
    (tmp_path / "cpu.json").write_text("{}")
    assert bench_page.overloads(tmp_path) == {"overload-small-cpu": OVERLOAD}


def test_every_phase_has_a_colour_and_a_meaning() -> None:
    phases = {*PHASES, OTHER, UNSPLIT}
    assert bench_page.COLOURS.keys() == phases
    assert MEANING.keys() == phases


def test_of_perf_analyzer_its_clients_figures_are_read() -> None:
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
    assert bench_beside.told(text) == (6730.35, 2.289, 3.816)
    assert bench_beside.told("error: failed to get model metadata") is None
