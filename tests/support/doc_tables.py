"""Command: writes the tables in docs/ that are generated from code.

    python -m tests.support.doc_tables

A table is between the comments `<!-- table: NAME -->` and `<!-- end -->`.
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
from tests.telemetry.fake_nvml import FakeNvml

ROOT = Path(__file__).resolve().parent.parent.parent
TABLE = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", flags=re.DOTALL)


def settings() -> str:
    """All options of the server."""
    rows = []
    for option in fields(Settings):
        flag = f"`--{option.name.replace('_', '-')}`"
        variable = f"`{PREFIX}{option.name.upper()}`"
        default = "" if option.default == "" else f"`{option.default}`"
        rows.append((flag, variable, default, _help(option.metadata)))
    return _table(("flag", "variable", "default", "meaning"), rows)


def _help(metadata: Any) -> str:
    help, choices = str(metadata["help"]), metadata["choices"]
    if all(choice in help.lower() for choice in choices):
        return help
    return f"{help}: {', '.join(choices)}"


def metrics() -> str:
    """All metrics of the server, with the names that Prometheus stores."""
    rows = [
        (f"`{name}`", kind, ", ".join(labels), help) for name, kind, labels, help in instruments()
    ]
    return _table(("metric", "type", "labels", "meaning"), rows)


def instruments() -> list[tuple[str, str, tuple[str, ...], str]]:
    """Name, type, labels and help of each metric."""
    metrics = Metrics()
    metrics.read_queue_rows(lambda: {"any": 1})
    metrics.read_connections(lambda: {"any": 1})
    metrics.read_busy(lambda: {"any": 1.0})
    metrics.read_tls(lambda: 1.0, lambda: False)
    metrics.read_gpus(GpuMonitor(FakeNvml()))
    labels = {
        value._name: tuple(value._labelnames)  # there is no public way without samples
        for value in (*vars(metrics).values(), *vars(metrics.principals).values())
        if not isinstance(value, CollectorRegistry) and hasattr(value, "_labelnames")
    }
    found = []
    for family in metrics.registry.collect():
        if family.name.startswith("convserve_"):
            suffix = "_total" if family.type == "counter" else ""
            names = labels.get(family.name) or tuple(family.samples[0].labels)
            found.append((family.name + suffix, family.type, names, family.documentation))
    return found


def networks() -> str:
    """All architectures, with their number of parameters in serving and in training."""
    rows = []
    for name in architecture_names():
        architecture = find(name)
        with torch.device("meta"):
            serving, training = f"{_parameters(create(name)):,}", ""
            if architecture.training:
                training = f"{_parameters(create(name, auxiliary=True)):,}"
        channels, height, width = architecture.input_shape
        rows.append((f"`{name}`", f"{height}x{width}x{channels}", serving, training))
    return _table(("name", "input", "parameters", "with auxiliary classifiers"), rows)


def _parameters(network: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [titles, ["---"] * len(titles), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


TABLES: dict[str, tuple[str, Callable[[], str]]] = {  # name: (page, content)
    "settings": ("docs/configuration.md", settings),
    "metrics": ("docs/metrics.md", metrics),
    "networks": ("docs/models.md", networks),
}


def updated(text: str) -> str:
    """The text of a page with current tables."""
    return TABLE.sub(lambda table: table[1] + TABLES[table[2]][1]() + table[3], text)


def main() -> None:
    for page, _ in TABLES.values():
        path = ROOT / page
        path.write_text(updated(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
