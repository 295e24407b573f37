"""One dashboard panel as data, and its translation to Grafana's panel types."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from grafana_foundation_sdk.builders import (
    common,
    dashboard,
    heatmap,
    prometheus,
    stat,
    table,
    timeseries,
)
from grafana_foundation_sdk.models import common as common_model
from grafana_foundation_sdk.models import dashboard as dashboard_model
from grafana_foundation_sdk.models import heatmap as heatmap_model
from grafana_foundation_sdk.models import prometheus as prometheus_model

# The variable that build.py adds to each dashboard, so that it works with any Prometheus.
DATA_SOURCE = dashboard_model.DataSourceRef(type_val="prometheus", uid="${datasource}")
GRID_COLUMNS = 24  # width of Grafana's grid

Expressions = Mapping[str, str]  # legend -> PromQL

BUILDERS: dict[str, Any] = {
    "lines": timeseries.Panel,
    "stacked": timeseries.Panel,
    "stat": stat.Panel,
    "heatmap": heatmap.Panel,
    "table": table.Panel,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """Settings of a panel of any kind."""

    title: str
    description: str
    unit: str
    expressions: Expressions
    span: int = GRID_COLUMNS // 3
    height: int = 8
    kind: str = "lines"  # a key of BUILDERS
    axis_min: float | None = 0
    axis_max: float | None = None
    thresholds: Sequence[tuple[float, str]] = ()  # of a stat: from this value on, this colour
    decimals: int | None = None


def build_panel(panel: Panel, number: int) -> Any:
    """The panel as an object of the Grafana SDK."""
    result = BUILDERS[panel.kind]()
    result.id(number).title(panel.title).description(panel.description)
    result.datasource(DATA_SOURCE).unit(panel.unit).span(panel.span).height(panel.height)
    if panel.decimals is not None:
        result.decimals(panel.decimals)
    style = {"lines": _lines, "stacked": _stacked, "stat": _stat, "heatmap": _heatmap}
    if panel.kind in style:
        style[panel.kind](result, panel)
    for letter, (legend, expression) in zip("ABCDEFGH", panel.expressions.items(), strict=False):
        result.with_target(_query(panel, letter, legend, expression))
    return result


def _query(panel: Panel, letter: str, legend: str, expression: str) -> Any:
    query = prometheus.Dataquery().ref_id(letter).expr(expression).legend_format(legend)
    query.datasource(DATA_SOURCE)
    if panel.kind in ("stat", "table"):
        query.instant()
    else:
        query.range()
    if panel.kind == "table":
        query.format(prometheus_model.PromQueryFormat.TABLE)
    if panel.kind == "heatmap":
        query.format(prometheus_model.PromQueryFormat.HEATMAP)
    if "histogram_quantile" in expression or panel.kind == "heatmap":
        query.exemplar(True)
    return query


def _lines(result: Any, panel: Panel) -> None:
    legend = common.VizLegendOptions().show_legend(True)
    legend.placement(common_model.LegendPlacement.BOTTOM)
    legend.display_mode(common_model.LegendDisplayMode.LIST)
    result.legend(legend).fill_opacity(0).line_width(1)
    tooltip = common.VizTooltipOptions().mode(common_model.TooltipDisplayMode.MULTI)
    result.tooltip(tooltip.sort(common_model.SortOrder.DESCENDING))
    result.show_points(common_model.VisibilityMode.NEVER)
    if panel.axis_min is not None:
        result.min(panel.axis_min)
    if panel.axis_max is not None:
        result.max(panel.axis_max)


def _stacked(result: Any, panel: Panel) -> None:
    _lines(result, panel)
    result.fill_opacity(40)
    result.stacking(common.StackingConfig().mode(common_model.StackingMode.NORMAL))


def _stat(result: Any, panel: Panel) -> None:
    steps = [dashboard_model.Threshold(value=None, color="text")]
    steps += [
        dashboard_model.Threshold(value=value, color=name) for value, name in panel.thresholds
    ]
    absolute = dashboard_model.ThresholdsMode.ABSOLUTE
    result.thresholds(dashboard.ThresholdsConfig().mode(absolute).steps(steps))
    result.graph_mode(common_model.BigValueGraphMode.NONE)
    result.reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))


def _heatmap(result: Any, panel: Panel) -> None:
    result.calculate(False)
    result.color(
        heatmap.HeatmapColorOptions()
        .mode(heatmap_model.HeatmapColorMode.SCHEME)
        .scheme("Blues")
        .steps(64)
    )
    result.y_axis(heatmap.YAxisConfig().unit(panel.unit))
