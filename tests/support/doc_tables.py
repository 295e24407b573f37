"""Command: writes the tables of README.md that are known better by the code.

    python -m tests.support.doc_tables

A table stands between two comments, `<!-- table: NAME -->` and `<!-- end -->`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from prometheus_client import CollectorRegistry

from model_repo.architectures.registry import architecture_names, create, find
from server.settings import PREFIX, Settings
from server.telemetry.metrics import Metrics
from server.telemetry.nvml import GpuMonitor
from tests.support.fake_nvml import FakeNvml

README = Path(__file__).resolve().parent.parent.parent / "README.md"
PLACE = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", flags=re.DOTALL)


def settings() -> str:
    """Every option of the server."""
    rows = []
    for option in fields(Settings):
        default = option.default
        shown = "" if default == "" else f"`{default}`"
        flag = "--" + option.name.replace("_", "-")
        rows.append(
            (f"`{flag}`", f"`{PREFIX}{option.name.upper()}`", shown, _help(option.metadata))
        )
    return _table(("flag", "variable", "default", ""), rows)


def _help(metadata: Any) -> str:
    help, choices = str(metadata["help"]), metadata["choices"]
    if all(choice in help.lower() for choice in choices):
        return help
    return f"{help}: {', '.join(choices)}"


def metrics() -> str:
    """Every instrument of ours, under the name that Prometheus stores."""
    rows = []
    for name, kind, labels, help in instruments():
        rows.append((f"`{name}`", kind, ", ".join(labels), help))
    return _table(("metric", "kind", "labels", ""), rows)


def instruments() -> list[tuple[str, str, tuple[str, ...], str]]:
    """Name, kind, labels and help of each."""
    ours = Metrics()
    ours.read_queue_rows(lambda: {"any": 1})
    ours.read_busy(lambda: {"any": 1.0})
    ours.read_gpus(GpuMonitor(FakeNvml()))
    labels = {
        value._name: tuple(value._labelnames)  # nothing public tells those of an unused instrument
        for value in vars(ours).values()
        if not isinstance(value, CollectorRegistry) and hasattr(value, "_labelnames")
    }
    found = []
    for family in ours.registry.collect():
        if family.name.startswith("convserve_"):
            suffix = "_total" if family.type == "counter" else ""
            of = labels.get(family.name) or tuple(family.samples[0].labels)
            found.append((family.name + suffix, family.type, of, family.documentation))
    return found


def networks() -> str:
    """Every architecture, with the parameters it has where it is served and where it is trained."""
    rows = []
    for name in architecture_names():
        found = find(name)
        with torch.device("meta"):
            served = _parameters(create(name))
            trained = f"{_parameters(create(name, auxiliary=True)):,}" if found.training else ""
        channels, height, width = found.input_shape
        rows.append((f"`{name}`", f"{height}x{width}x{channels}", f"{served:,}", trained))
    return _table(("name", "input", "parameters", "with auxiliary classifiers"), rows)


def _parameters(network: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [titles, ["---"] * len(titles), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


TABLES: dict[str, Callable[[], str]] = {
    "settings": settings,
    "metrics": metrics,
    "networks": networks,
}


def renewed(text: str) -> str:
    """The text with each of its tables as the code has it."""
    return PLACE.sub(lambda place: place[1] + TABLES[place[2]]() + place[3], text)


if __name__ == "__main__":
    README.write_text(renewed(README.read_text(encoding="utf-8")), encoding="utf-8")
