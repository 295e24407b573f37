"""Command: writes Grafana's dashboards into dashboards/, from this file.

    python deploy/grafana/build.py

Quantiles come from histograms, never from averages; what has several instances is summed before it
is divided. Every panel has a unit, and says in its description what to see in it.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
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
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import common as common_model
from grafana_foundation_sdk.models import dashboard as dashboard_model
from grafana_foundation_sdk.models import heatmap as heatmap_model
from grafana_foundation_sdk.models import prometheus as prometheus_model

FOLDER = Path(__file__).resolve().parent / "dashboards"
SOURCE = dashboard_model.DataSourceRef(type_val="prometheus", uid="prometheus")
WHOLE = 24  # columns of Grafana's grid

# What classifies; the other methods only tell.
CALLS = 'method=~"Classify|Model(Stream)?Infer"'
HERE = 'model=~"$model", instance=~"$instance"'
INSTANCE = 'instance=~"$instance"'
PROCESS = f'job="convserve", {INSTANCE}'
RATE = "[$__rate_interval]"
READY = f"convserve_model_ready{{{HERE}}}"
WAITING = f"convserve_queue_rows{{{HERE}}}"
BUSY = f"max by (device, instance) (convserve_device_busy_ratio{{{INSTANCE}}})"

Expressions = Mapping[str, str]  # by legend


def rate(name: str, by: str, labels: str = HERE) -> str:
    """The rate of a counter a second, summed over all but the labels `by`."""
    return f"sum by ({by}) (rate({name}{{{labels}}}{RATE}))"


def quantile(share: float, name: str, by: str, labels: str = HERE) -> str:
    return (
        f"histogram_quantile({share}, {rate(f'{name}_bucket', f'le, {by}'.rstrip(', '), labels)})"
    )


def gpu(name: str) -> str:
    """What NVML tells; a server without a GPU has none of it."""
    return f"max by (gpu, instance) (convserve_gpu_{name}{{{INSTANCE}}})"


def ratio(part: str, whole: str) -> str:
    """0 where there is nothing to divide by: nobody calls, nothing goes wrong."""
    return f"({part}) / ({whole} > 0) or 0 * ({whole})"


ANSWERED = rate("convserve_requests_total", "model", f'{HERE}, {CALLS}, code="OK"')
ALL_CALLS = rate("convserve_requests_total", "model", f"{HERE}, {CALLS}")
DURATION = "convserve_request_duration_seconds"
PHASE = "convserve_phase_duration_seconds"


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """What all kinds of panels are told."""

    title: str
    description: str
    unit: str
    expressions: Expressions
    span: int = 8
    height: int = 8
    kind: str = "lines"  # lines, stacked, stat, heatmap, table
    least: float | None = 0  # of the axis
    most: float | None = None
    limits: Sequence[tuple[float, str]] = ()  # from which value on which colour, of a stat
    decimals: int | None = None


def built(panel: Panel, number: int) -> Any:
    """The panel, by the builder of its kind."""
    kinds: dict[str, Any] = {
        "lines": timeseries.Panel,
        "stacked": timeseries.Panel,
        "stat": stat.Panel,
        "heatmap": heatmap.Panel,
        "table": table.Panel,
    }
    made = kinds[panel.kind]()
    made.id(number).title(panel.title).description(panel.description)
    made.datasource(SOURCE).unit(panel.unit).span(panel.span).height(panel.height)
    if panel.decimals is not None:
        made.decimals(panel.decimals)
    {"lines": _lines, "stacked": _stacked, "stat": _stat}.get(panel.kind, _plain)(made, panel)
    for letter, (legend, expression) in zip("ABCDEFGH", panel.expressions.items(), strict=False):
        made.with_target(_query(panel, letter, legend, expression))
    return made


def _query(panel: Panel, letter: str, legend: str, expression: str) -> Any:
    query = prometheus.Dataquery().ref_id(letter).expr(expression).legend_format(legend)
    query.datasource(SOURCE)
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


def _lines(made: Any, panel: Panel) -> None:
    legend = common.VizLegendOptions().show_legend(True)
    legend.placement(common_model.LegendPlacement.BOTTOM)
    legend.display_mode(common_model.LegendDisplayMode.LIST)
    made.legend(legend).fill_opacity(0).line_width(1)
    tooltip = common.VizTooltipOptions().mode(common_model.TooltipDisplayMode.MULTI)
    made.tooltip(tooltip.sort(common_model.SortOrder.DESCENDING))
    made.show_points(common_model.VisibilityMode.NEVER)
    if panel.least is not None:
        made.min(panel.least)
    if panel.most is not None:
        made.max(panel.most)


def _stacked(made: Any, panel: Panel) -> None:
    _lines(made, panel)
    made.fill_opacity(40)
    made.stacking(common.StackingConfig().mode(common_model.StackingMode.NORMAL))


def _stat(made: Any, panel: Panel) -> None:
    steps = [dashboard_model.Threshold(value=None, color="text")]
    steps += [dashboard_model.Threshold(value=from_, color=name) for from_, name in panel.limits]
    absolute = dashboard_model.ThresholdsMode.ABSOLUTE
    made.thresholds(dashboard.ThresholdsConfig().mode(absolute).steps(steps))
    made.graph_mode(common_model.BigValueGraphMode.NONE)
    made.reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))


def _plain(made: Any, panel: Panel) -> None:
    if panel.kind == "heatmap":
        made.calculate(False)
        made.color(
            heatmap.HeatmapColorOptions()
            .mode(heatmap_model.HeatmapColorMode.SCHEME)
            .scheme("Blues")
            .steps(64)
        )
        made.y_axis(heatmap.YAxisConfig().unit(panel.unit))


OVERVIEW = (
    Panel(
        title="Models ready",
        description="Models of which a version answers calls. Fewer than usual: /readyz says why.",
        unit="short",
        kind="stat",
        span=4,
        height=4,
        limits=[(0, "red"), (1, "green")],
        expressions={"ready": f"count(max by (model) ({READY}) == 1) or vector(0)"},
    ),
    Panel(
        title="Goodput",
        description="Calls answered a second. What came after its deadline is not among them.",
        unit="reqps",
        kind="stat",
        span=4,
        height=4,
        expressions={"answered": f"sum({ANSWERED})"},
    ),
    Panel(
        title="p99",
        description="99 of 100 answers took at most so long in the server, over all models.",
        unit="s",
        kind="stat",
        span=4,
        height=4,
        expressions={"p99": quantile(0.99, DURATION, "", f"{HERE}, {CALLS}")},
    ),
    Panel(
        title="Refused",
        description="Share of calls refused because they could not have been in time.",
        unit="percentunit",
        kind="stat",
        span=4,
        height=4,
        decimals=2,
        limits=[(0.01, "orange"), (0.05, "red")],
        expressions={
            "refused": ratio(
                f"sum(rate(convserve_refused_total{{{HERE}}}{RATE}))", f"sum({ALL_CALLS})"
            )
        },
    ),
    Panel(
        title="Deadlines missed",
        description="Share of calls whose deadline passed after they had been taken in.",
        unit="percentunit",
        kind="stat",
        span=4,
        height=4,
        decimals=2,
        limits=[(0.001, "orange"), (0.01, "red")],
        expressions={
            "missed": ratio(
                f"sum(rate(convserve_deadline_missed_total{{{HERE}}}{RATE}))", f"sum({ALL_CALLS})"
            )
        },
    ),
    Panel(
        title="Busiest device",
        description="Share of the busiest device's units at work. Near 1 there is nothing left.",
        unit="percentunit",
        kind="stat",
        span=4,
        height=4,
        limits=[(0.7, "orange"), (0.9, "red")],
        expressions={"busy": f"max(convserve_device_busy_ratio{{{INSTANCE}}})"},
    ),
    Panel(
        title="Goodput by model",
        description="Calls answered a second.",
        unit="reqps",
        kind="stacked",
        span=12,
        expressions={"{{model}}": ANSWERED},
    ),
    Panel(
        title="Outcomes",
        description="Calls by the status they ended with. RESOURCE_EXHAUSTED: refused, with a hint"
        " when to come again; DEADLINE_EXCEEDED: too late; INTERNAL: ours to mend, see the log.",
        unit="reqps",
        kind="stacked",
        span=12,
        expressions={"{{code}}": rate("convserve_requests_total", "code", f"{HERE}, {CALLS}")},
    ),
    *(
        Panel(
            title=f"Latency, {name}",
            description=f"{text} answers took at most so long, from arrival to answer in the"
            " server; read off buckets, so within a third of the truth.",
            unit="s",
            expressions={"{{model}}": quantile(share, DURATION, "model", f"{HERE}, {CALLS}")},
        )
        for name, share, text in (
            ("p50", 0.5, "Half of the"),
            ("p99", 0.99, "99 of 100"),
            ("p99.9", 0.999, "999 of 1,000"),
        )
    ),
    Panel(
        title="Devices at work",
        description="Share of each device's units at work over the last seconds: what to scale by.",
        unit="percentunit",
        most=1,
        expressions={"{{device}} {{instance}}": BUSY},
    ),
    Panel(
        title="Waiting images",
        description="Images that wait for an engine. Grows under overload until calls are refused.",
        unit="short",
        expressions={"{{model}}": f"sum by (model) ({WAITING})"},
    ),
    Panel(
        title="Refused and late",
        description="Calls refused, by reason; deadlines that passed, by where calls were then.",
        unit="reqps",
        expressions={
            "refused: {{reason}}": rate("convserve_refused_total", "reason"),
            "late in {{stage}}": rate("convserve_deadline_missed_total", "stage"),
        },
    ),
)

MODEL = (
    Panel(
        title="Where the time goes",
        description="Mean time of a call by phase, stacked: decoding, waiting for an engine, in the"
        " engine, writing the answer. Queue large: more load than the engine is good for.",
        unit="s",
        kind="stacked",
        span=12,
        expressions={
            "{{phase}}": f"{rate(f'{PHASE}_sum', 'phase')} / {rate(f'{PHASE}_count', 'phase')}"
        },
    ),
    Panel(
        title="Phases, p99",
        description="99 of 100 calls spent at most so long in each phase. They do not add up.",
        unit="s",
        span=12,
        expressions={"{{phase}}": quantile(0.99, PHASE, "phase")},
    ),
    Panel(
        title="Latency",
        description="Calls by how long they took; dots are single calls, with the trace of each.",
        unit="s",
        kind="heatmap",
        span=12,
        expressions={"{{le}}": rate(f"{DURATION}_bucket", "le", f"{HERE}, {CALLS}")},
    ),
    Panel(
        title="Rows a batch",
        description="Batches by their size. Small under load: deadlines leave no time to wait.",
        unit="short",
        kind="heatmap",
        span=12,
        expressions={"{{le}}": rate("convserve_batch_rows_bucket", "le")},
    ),
    Panel(
        title="Waiting images",
        description="Images that wait for an engine.",
        unit="short",
        expressions={"{{model}} {{instance}}": f"sum by (model, instance) ({WAITING})"},
    ),
    Panel(
        title="Profile against reality",
        description="When an answer was expected at admission, less when its engine was done."
        " Around 0 the profile is right; below it answers come later than promised.",
        unit="s",
        least=None,
        expressions={
            f"p{share * 100:g}": quantile(share, "convserve_prediction_error_seconds", "model")
            for share in (0.1, 0.5, 0.9)
        },
    ),
    Panel(
        title="Calls by version",
        description="Calls answered by each version: a new one takes over when it is ready.",
        unit="reqps",
        kind="stacked",
        expressions={
            "{{model}} {{version}}": rate(
                "convserve_requests_total", "model, version", f'{HERE}, {CALLS}, code="OK"'
            )
        },
    ),
    Panel(
        title="Images",
        description="Images classified a second.",
        unit="ops",
        expressions={"{{model}}": rate("convserve_images_total", "model")},
    ),
    Panel(
        title="Work for nobody",
        description="Share of the engines' time spent on answers that nobody waited for any more.",
        unit="percentunit",
        expressions={
            "{{model}}": ratio(
                rate("convserve_wasted_compute_seconds_total", "model"),
                rate("convserve_compute_seconds_total", "model"),
            )
        },
    ),
    Panel(
        title="Loading took",
        description="Seconds from the version's folder to its first answer: hashes, golden check,"
        " warm-up.",
        unit="s",
        expressions={"{{model}}": f"max by (model) (convserve_engine_load_seconds{{{HERE}}})"},
    ),
    Panel(
        title="Versions",
        description="Every version that is known; value 1 answers calls, 0 does not.",
        unit="short",
        kind="table",
        span=12,
        expressions={
            "versions": f"max by (model, version, instance) (convserve_model_ready{{{HERE}}})"
        },
    ),
    Panel(
        title="Engines in use",
        description="What runs each model. Weights that are untrained give meaningless classes.",
        unit="short",
        kind="table",
        span=12,
        expressions={
            "engines": "max by (model, version, backend, precision, weights, instance)"
            f" (convserve_engine_info{{{HERE}}} == 1)"
        },
    ),
)

DEVICE = (
    Panel(
        title="Devices at work",
        description="Share of each device's units at work over the last seconds.",
        unit="percentunit",
        most=1,
        span=12,
        expressions={"{{device}} {{instance}}": BUSY},
    ),
    Panel(
        title="Engine time by model",
        description="Seconds of engines at work, a second: how the models share the devices.",
        unit="short",
        kind="stacked",
        span=12,
        expressions={"{{model}}": rate("convserve_compute_seconds_total", "model", INSTANCE)},
    ),
    Panel(
        title="Processor",
        description="Cores the server's process uses, engines included.",
        unit="short",
        expressions={"{{instance}}": rate("process_cpu_seconds_total", "instance", PROCESS)},
    ),
    Panel(
        title="Memory",
        description="What the process has in memory. It levels off; steady growth is a leak.",
        unit="bytes",
        expressions={
            "{{instance}}": f"sum by (instance) (process_resident_memory_bytes{{{PROCESS}}})"
        },
    ),
    Panel(
        title="Open files",
        description="Connections and files that are open, and how many may be.",
        unit="short",
        expressions={
            "open {{instance}}": f"sum by (instance) (process_open_fds{{{PROCESS}}})",
            "limit {{instance}}": f"min by (instance) (process_max_fds{{{PROCESS}}})",
        },
    ),
    Panel(
        title="Server CPU a call",
        description="Processor seconds of the whole process for each call answered.",
        unit="s",
        expressions={
            "{{instance}}": ratio(
                rate("process_cpu_seconds_total", "instance", PROCESS),
                rate("convserve_requests_total", "instance", f'{INSTANCE}, {CALLS}, code="OK"'),
            )
        },
    ),
    Panel(
        title="Up",
        description="Whether Prometheus reaches the server's /metrics: 1 does.",
        unit="short",
        most=1,
        expressions={"{{instance}}": f"max by (instance) (up{{{PROCESS}}})"},
    ),
    Panel(
        title="Running for",
        description="Time since the process started. A drop to 0 is a restart.",
        unit="s",
        expressions={
            "{{instance}}": f"time() - max by (instance) (process_start_time_seconds{{{PROCESS}}})"
        },
    ),
    Panel(
        title="Filling up",
        description="Share of the rows computed that only fill a batch up to one of its sizes.",
        unit="percentunit",
        most=1,
        expressions={
            "{{model}}": ratio(
                rate("convserve_padded_rows_total", "model", INSTANCE),
                f"{rate('convserve_batch_rows_sum', 'model', INSTANCE)} + "
                f"{rate('convserve_padded_rows_total', 'model', INSTANCE)}",
            )
        },
    ),
    Panel(
        title="Engines that are not the best",
        description="1 where a better engine of the version does not serve; the server's log and "
        "ListModels say why.",
        unit="short",
        most=1,
        expressions={
            "{{model}} by {{backend}}": "max by (model, backend) "
            f"(convserve_engine_fallback{{{INSTANCE}}})"
        },
    ),
    Panel(
        title="GPU at work",
        description="Share of the last moment in which some kernel ran, as NVML tells it.",
        unit="percentunit",
        most=1,
        expressions={"{{gpu}} {{instance}}": gpu("busy_ratio")},
    ),
    Panel(
        title="GPU memory",
        description="In use by whomever, and what there is.",
        unit="bytes",
        expressions={
            "used {{gpu}} {{instance}}": gpu("memory_used_bytes"),
            "of {{gpu}} {{instance}}": gpu("memory_total_bytes"),
        },
    ),
    Panel(
        title="GPU power",
        description="Drawn by the whole card. Far below its limit while busy: kernels are small.",
        unit="watt",
        expressions={"{{gpu}} {{instance}}": gpu("power_watts")},
    ),
    Panel(
        title="GPU temperature",
        description="Of the chip. Hot ones lower their clocks.",
        unit="celsius",
        expressions={"{{gpu}} {{instance}}": gpu("temperature_celsius")},
    ),
)


def variable(name: str, query: str) -> Any:
    """Any of the label's values, all of them at first."""
    made = dashboard.QueryVariable(name).label(name.capitalize()).datasource(SOURCE)
    everything = dashboard_model.VariableOption(selected=True, text="All", value="$__all")
    made.query(query).multi(True).include_all(True).all_value(".*").current(everything)
    return made.refresh(dashboard_model.VariableRefresh.ON_TIME_RANGE_CHANGED)


def board(uid: str, title: str, panels: Sequence[Panel], *, by_model: bool = True) -> Any:
    made = dashboard.Dashboard(title).uid(uid).tags(["convserve"]).editable()
    made.time("now-30m", "now").refresh("10s").timezone("browser")
    made.tooltip(dashboard_model.DashboardCursorSync.CROSSHAIR)
    if by_model:
        made.with_variable(variable("model", "label_values(convserve_model_ready, model)"))
    made.with_variable(variable("instance", 'label_values(up{job="convserve"}, instance)'))
    link = dashboard.DashboardLink("convserve").type(dashboard_model.DashboardLinkType.DASHBOARDS)
    made.link(link.tags(["convserve"]).keep_time(True).include_vars(True))
    for number, panel in enumerate(panels, 1):
        made.with_panel(built(panel, number))
    return made.build()


BOARDS: Mapping[str, Any] = {
    "overview": lambda: board("convserve-overview", "convserve: overview", OVERVIEW),
    "model": lambda: board("convserve-model", "convserve: one model", MODEL),
    "device": lambda: board("convserve-device", "convserve: devices", DEVICE, by_model=False),
}


def texts() -> dict[str, str]:
    """The dashboards as JSON, by the name of their file."""
    return {
        f"{name}.json": JSONEncoder(sort_keys=True, indent=1).encode(make()) + "\n"
        for name, make in BOARDS.items()
    }


def main() -> int:
    for name, text in texts().items():
        (FOLDER / name).write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
