"""The pages show every figure in the right place."""

import json
from pathlib import Path
from typing import Any

from tests.benchmarks.cost.phases import MEANING, OTHER, PHASES, UNSPLIT
from tests.benchmarks.page import overload_results, reusable, write
from tests.benchmarks.reports import overload as overload_report
from tests.benchmarks.reports.cost import COLOURS

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
            "scheduler": scheduler,
            "load": load,
            "offered_hz": 80.0 * load,
            "goodput_hz": goodput_hz,
            "of_capacity": goodput_hz / 80,
            "in_time": 0.5,
            "late": 0.25,
            "refused": 0.25,
            "p99_ms": None if goodput_hz == 0 else 40.0,
            "rows": 2.0,
            "lag_ms": 1.0,
        }
        for load, scheduler, goodput_hz in (
            (1.0, "deadline", 76.0),
            (1.0, "fixed", 20.0),
            (2.0, "deadline", 72.0),
            (2.0, "fixed", 0.0),
        )
    ],
}


def page(folder: Path, overload: Any = None, **parts: Any) -> str:
    figures = {"machine": HERE, "served": {}, "cost": {}, **parts}
    write(folder / "cpu.md", figures, overload or {})
    return (folder / "cpu.md").read_text()


def cells(text: str, first: str) -> list[str]:
    """The cells of the table row with this first cell."""
    line = next(line for line in text.splitlines() if line.startswith(f"| {first} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_page_shows_the_median_ratio_of_pairs_and_not_the_ratio_of_medians(
    tmp_path: Path,
) -> None:
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


def test_the_page_names_the_models_with_random_weights(tmp_path: Path) -> None:
    assert "random" not in page(tmp_path, served={"small": served()})
    text = page(tmp_path, served={"small": served(), "other": served(trained=False)})
    assert "The weights of other are random" in text


def test_the_page_has_a_column_for_each_model_and_input(tmp_path: Path) -> None:
    other = cost(phases_us={"engine": 100.0})
    text = page(tmp_path, cost={"small, raw": cost(), "small, jpeg": other})
    assert cells(text, "transport")[2:] == ["30.0 (30.0%)", ""]
    assert cells(text, "engine")[2:] == ["50.0 (50.0%)", "100.0 (100.0%)"]
    assert cells(text, "**all**")[2:] == ["100 (90 to 130)"] * 2
    assert "not measured" not in text


def test_the_page_says_why_phases_were_not_measured(tmp_path: Path) -> None:
    whole = cost(
        phases_us={"loop": 40.0, UNSPLIT: 60.0}, samples=0, unsplit="py-spy is not installed"
    )
    text = page(tmp_path, cost={"small, raw": whole})
    assert "The phases of small, raw were not measured: py-spy is not installed." in text
    assert cells(text, UNSPLIT)[2:] == ["60.0 (60.0%)"]


def test_the_page_has_the_plot_and_the_figures_of_overload(tmp_path: Path) -> None:
    text = page(tmp_path, overload={"overload-small-cpu": OVERLOAD})
    assert "(overload-small-cpu.svg)" in text
    assert "| 2.0 x | fixed | 160 | 0.0 | 0.0% | 50.0% | 25.00% | 25.0% | none |" in text


def test_the_same_figures_give_identical_small_plots(tmp_path: Path) -> None:
    folders = tmp_path / "one", tmp_path / "other"
    for folder in folders:
        folder.mkdir()
        page(folder, served={"small": served()}, cost={"small, raw": cost()})
        overload_report.write_page(folder / "overload-small-cpu", OVERLOAD)
    names = sorted(file.name for file in folders[0].iterdir() if file.suffix == ".svg")
    assert names == ["cpu-cost.svg", "cpu-served.svg", "overload-small-cpu.svg"]
    for name in names:
        files = [(folder / name).read_bytes() for folder in folders]
        assert files[0] == files[1], name
        assert len(files[0]) < 60_000, name
        assert b"<text" in files[0], name


def test_goodput_above_the_capacity_stays_inside_the_plot() -> None:
    axes = overload_report.draw({**OVERLOAD, "capacity_hz": 10.0}).axes[0]
    assert axes.get_ylim()[1] > 76.0


def test_figures_of_another_machine_are_not_reused() -> None:
    stored = {"machine": HERE, "served": {"small": served()}, "cost": {}}
    assert reusable(stored, HERE) == stored
    elsewhere = HERE | {"processor": "Another"}
    assert reusable(stored, elsewhere) == {"machine": elsewhere, "served": {}, "cost": {}}


def test_the_page_includes_the_overload_results_in_its_folder(tmp_path: Path) -> None:
    (tmp_path / "overload-small-cpu.json").write_text(json.dumps(OVERLOAD))
    (tmp_path / "cpu.json").write_text("{}")
    assert overload_results(tmp_path) == {"overload-small-cpu": OVERLOAD}


def test_every_phase_has_a_colour_and_a_meaning() -> None:
    phases = {*PHASES, OTHER, UNSPLIT}
    assert COLOURS.keys() == phases
    assert MEANING.keys() == phases
