"""Command: writes Grafana's dashboards into dashboards/.

    python -m deploy.grafana.build

Every panel has a unit and a description of what to look for. The files have the form of Grafana's
"Export for sharing": any Grafana can import them, and grafana.com accepts them.
"""

from __future__ import annotations

import json
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
GRAFANA_VERSION = "11.0.0"  # the oldest that shows everything
PANEL_NAMES = {
    "heatmap": "Heatmap",
    "stat": "Stat",
    "table": "Table",
    "timeseries": "Time series",
}


def variable(name: str, query: str, *, all_value: str | None = ".*") -> Any:
    """A dashboard variable with the values of a label; all values are selected at first.

    Without `all_value`, Grafana inserts the values themselves for "All".
    """
    result = dashboard.QueryVariable(name).label(name.capitalize()).datasource(DATA_SOURCE)
    everything = dashboard_model.VariableOption(selected=True, text="All", value="$__all")
    result.query(query).multi(True).include_all(True).current(everything)
    if all_value is not None:
        result.all_value(all_value)
    return result.refresh(dashboard_model.VariableRefresh.ON_TIME_RANGE_CHANGED)


def board(uid: str, title: str, panels: Sequence[Panel], *, by_model: bool = True) -> Any:
    result = dashboard.Dashboard(title).uid(uid).tags(["convserve"]).editable()
    result.time("now-30m", "now").refresh("10s").timezone("browser")
    result.tooltip(dashboard_model.DashboardCursorSync.CROSSHAIR)
    source = dashboard.DatasourceVariable("datasource").label("Data source").type("prometheus")
    result.with_variable(source)
    if by_model:
        result.with_variable(variable("model", "label_values(convserve_model_ready, model)"))
    else:
        # Other services have process metrics too, so "All" must mean the jobs of convserve only.
        query = "label_values(convserve_model_ready, job)"
        result.with_variable(variable("job", query, all_value=None))
    result.with_variable(variable("instance", "label_values(convserve_model_ready, instance)"))
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
    return {f"{name}.json": exported(built) for name, built in boards.items()}


def exported(built: Any) -> str:
    """A dashboard as JSON, in the form of Grafana's export.

    It needs no input: the data source is a variable.
    """
    encoded: dict[str, Any] = json.loads(JSONEncoder().encode(built))
    kinds = sorted({panel["type"] for panel in encoded["panels"]})
    required = [
        {"type": "grafana", "id": "grafana", "name": "Grafana", "version": GRAFANA_VERSION},
        {"type": "datasource", "id": "prometheus", "name": "Prometheus", "version": "1.0.0"},
        *(
            {"type": "panel", "id": kind, "name": PANEL_NAMES[kind], "version": ""}
            for kind in kinds
        ),
    ]
    encoded |= {"__inputs": [], "__elements": {}, "__requires": required, "id": None}
    return json.dumps(encoded, sort_keys=True, indent=1) + "\n"


def main() -> int:
    for name, text in dashboards().items():
        (FOLDER / name).write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
