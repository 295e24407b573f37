"""Command: writes Grafana's dashboards into dashboards/.

    python -m deploy.grafana.build

Every panel has a unit and a description of what to look for.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from grafana_foundation_sdk.builders import dashboard
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import dashboard as dashboard_model

from deploy.grafana.device import DEVICE
from deploy.grafana.model import MODEL
from deploy.grafana.overview import OVERVIEW
from deploy.grafana.panel import DATA_SOURCE, Panel, build_panel

FOLDER = Path(__file__).resolve().parent / "dashboards"


def variable(name: str, query: str) -> Any:
    """A dashboard variable with the values of a label; all values are selected at first."""
    result = dashboard.QueryVariable(name).label(name.capitalize()).datasource(DATA_SOURCE)
    everything = dashboard_model.VariableOption(selected=True, text="All", value="$__all")
    result.query(query).multi(True).include_all(True).all_value(".*").current(everything)
    return result.refresh(dashboard_model.VariableRefresh.ON_TIME_RANGE_CHANGED)


def board(uid: str, title: str, panels: Sequence[Panel], *, by_model: bool = True) -> Any:
    result = dashboard.Dashboard(title).uid(uid).tags(["convserve"]).editable()
    result.time("now-30m", "now").refresh("10s").timezone("browser")
    result.tooltip(dashboard_model.DashboardCursorSync.CROSSHAIR)
    if by_model:
        result.with_variable(variable("model", "label_values(convserve_model_ready, model)"))
    result.with_variable(variable("instance", 'label_values(up{job="convserve"}, instance)'))
    link = dashboard.DashboardLink("convserve").type(dashboard_model.DashboardLinkType.DASHBOARDS)
    result.link(link.tags(["convserve"]).keep_time(True).include_vars(True))
    for number, panel in enumerate(panels, 1):
        result.with_panel(build_panel(panel, number))
    return result.build()


def dashboards() -> dict[str, str]:
    """The dashboards as JSON, by file name."""
    boards = {
        "overview": board("convserve-overview", "convserve: overview", OVERVIEW),
        "model": board("convserve-model", "convserve: model", MODEL),
        "device": board("convserve-device", "convserve: devices", DEVICE, by_model=False),
    }
    return {
        f"{name}.json": JSONEncoder(sort_keys=True, indent=1).encode(built) + "\n"
        for name, built in boards.items()
    }


def main() -> int:
    for name, text in dashboards().items():
        (FOLDER / name).write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
