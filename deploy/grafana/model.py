"""Model dashboard: time by phase, batch sizes, prediction error, versions and engines."""

from deploy.grafana.panel import Panel
from deploy.grafana.queries import (
    INFERENCE,
    PHASE_DURATION,
    QUEUE_ROWS,
    REQUEST_DURATION,
    SELECTED,
    quantile,
    rate,
    ratio,
)

MODEL = (
    Panel(
        title="Mean time by phase",
        description="Mean time of a request in each phase: decode, queue, compute, respond. A large"
        " queue phase means that the load is near or above the capacity.",
        unit="s",
        kind="stacked",
        span=12,
        expressions={
            "{{phase}}": f"{rate(f'{PHASE_DURATION}_sum', 'phase')}"
            f" / {rate(f'{PHASE_DURATION}_count', 'phase')}"
        },
    ),
    Panel(
        title="Phases, p99",
        description="99 % of requests spent at most this long in each phase. The values of the"
        " phases do not add up to the p99 of the whole request.",
        unit="s",
        span=12,
        expressions={"{{phase}}": quantile(0.99, PHASE_DURATION, "phase")},
    ),
    Panel(
        title="Latency distribution",
        description="Requests by duration. Dots are single requests with a link to their trace.",
        unit="s",
        kind="heatmap",
        span=12,
        expressions={
            "{{le}}": rate(f"{REQUEST_DURATION}_bucket", "le", f"{SELECTED}, {INFERENCE}")
        },
    ),
    Panel(
        title="Batch size distribution",
        description="Batches by number of rows. Small batches under load mean that deadlines leave"
        " no time to wait for more rows.",
        unit="short",
        kind="heatmap",
        span=12,
        expressions={"{{le}}": rate("convserve_batch_rows_bucket", "le")},
    ),
    Panel(
        title="Queued images",
        description="Images that wait for an engine, for each model and server.",
        unit="short",
        expressions={"{{model}} {{instance}}": f"sum by (model, instance) ({QUEUE_ROWS})"},
    ),
    Panel(
        title="Prediction error",
        description="Completion time predicted at admission minus actual completion time. Near 0"
        " the latency profile is right. Negative: responses come later than predicted.",
        unit="s",
        axis_min=None,
        expressions={
            f"p{fraction * 100:g}": quantile(
                fraction, "convserve_prediction_error_seconds", "model"
            )
            for fraction in (0.1, 0.5, 0.9)
        },
    ),
    Panel(
        title="Requests by version",
        description="Successful requests per second for each version. A new version takes over"
        " when it is ready.",
        unit="reqps",
        kind="stacked",
        expressions={
            "{{model}} {{version}}": rate(
                "convserve_requests_total",
                "model, version",
                f'{SELECTED}, {INFERENCE}, code="OK"',
            )
        },
    ),
    Panel(
        title="Latency p99 by version",
        description="99 % of the requests of each version took at most this long in the server."
        " Compare a canary with the stable version here.",
        unit="s",
        expressions={
            "{{model}} {{version}}": quantile(
                0.99, REQUEST_DURATION, "model, version", f'{SELECTED}, version!=""'
            )
        },
    ),
    Panel(
        title="Latency p50 by version",
        description="Half of the requests of each version took at most this long in the server.",
        unit="s",
        expressions={
            "{{model}} {{version}}": quantile(
                0.5, REQUEST_DURATION, "model, version", f'{SELECTED}, version!=""'
            )
        },
    ),
    Panel(
        title="Failures by version",
        description="Requests per second that end with a server error, for each version.",
        unit="reqps",
        expressions={
            "{{model}} {{version}}": rate(
                "convserve_requests_total",
                "model, version",
                f'{SELECTED}, {INFERENCE}, version!="", code=~"INTERNAL|UNKNOWN"',
            )
        },
    ),
    Panel(
        title="Images",
        description="Classified images per second.",
        unit="ops",
        expressions={"{{model}}": rate("convserve_images_total", "model")},
    ),
    Panel(
        title="Wasted engine time",
        description="Fraction of engine time spent on results that no caller received.",
        unit="percentunit",
        expressions={
            "{{model}}": ratio(
                rate("convserve_wasted_compute_seconds_total", "model"),
                rate("convserve_compute_seconds_total", "model"),
            )
        },
    ),
    Panel(
        title="Load time",
        description="Seconds to load the version: checksums, engine, golden check, warm-up.",
        unit="s",
        expressions={"{{model}}": f"max by (model) (convserve_engine_load_seconds{{{SELECTED}}})"},
    ),
    Panel(
        title="Versions",
        description="All known versions. Value 1: ready. Value 0: not ready.",
        unit="short",
        kind="table",
        span=12,
        expressions={
            "versions": f"max by (model, version, instance) (convserve_model_ready{{{SELECTED}}})"
        },
    ),
    Panel(
        title="Engines in use",
        description="Engine of each loaded version. With untrained weights the classes mean"
        " nothing.",
        unit="short",
        kind="table",
        span=12,
        expressions={
            "engines": "max by (model, version, backend, precision, weights, instance)"
            f" (convserve_engine_info{{{SELECTED}}} == 1)"
        },
    ),
)
