"""Overview dashboard: are all models ready, what is answered, refused and late, and how fast."""

from deploy.grafana.panel import Panel
from deploy.grafana.queries import (
    DEVICE_BUSY,
    INFERENCE,
    INSTANCE,
    QUEUE_ROWS,
    RANGE,
    READY,
    REQUEST_DURATION,
    REQUESTS,
    SELECTED,
    SUCCEEDED,
    quantile,
    rate,
    ratio,
)

_STATS = (
    Panel(
        title="Ready models",
        description="Models with at least one ready version. If one is missing, /readyz says why.",
        unit="short",
        kind="stat",
        span=4,
        height=4,
        thresholds=[(0, "red"), (1, "green")],
        expressions={"ready": f"count(max by (model) ({READY}) == 1) or vector(0)"},
    ),
    Panel(
        title="Goodput",
        description="Successful requests per second. Late responses do not count.",
        unit="reqps",
        kind="stat",
        span=4,
        height=4,
        expressions={"successful": f"sum({SUCCEEDED})"},
    ),
    Panel(
        title="Latency p99",
        description="99 % of successful requests, over all models, took at most this long in the"
        " server.",
        unit="s",
        kind="stat",
        span=4,
        height=4,
        expressions={"p99": quantile(0.99, REQUEST_DURATION, "", f"{SELECTED}, {INFERENCE}")},
    ),
    Panel(
        title="Refused",
        description="Fraction of requests refused because they could not meet their deadline or"
        " exceeded a limit.",
        unit="percentunit",
        kind="stat",
        span=4,
        height=4,
        decimals=2,
        thresholds=[(0.01, "orange"), (0.05, "red")],
        expressions={
            "refused": ratio(
                f"sum(rate(convserve_refused_total{{{SELECTED}}}{RANGE}))", f"sum({REQUESTS})"
            )
        },
    ),
    Panel(
        title="Deadlines missed",
        description="Fraction of requests that were admitted and then missed their deadline.",
        unit="percentunit",
        kind="stat",
        span=4,
        height=4,
        decimals=2,
        thresholds=[(0.001, "orange"), (0.01, "red")],
        expressions={
            "missed": ratio(
                f"sum(rate(convserve_deadline_missed_total{{{SELECTED}}}{RANGE}))",
                f"sum({REQUESTS})",
            )
        },
    ),
    Panel(
        title="Busiest device",
        description="Utilisation of the busiest device. Near 100 % there is no capacity left.",
        unit="percentunit",
        kind="stat",
        span=4,
        height=4,
        thresholds=[(0.7, "orange"), (0.9, "red")],
        expressions={"busy": f"max(convserve_device_busy_ratio{{{INSTANCE}}})"},
    ),
)

_LATENCIES = tuple(
    Panel(
        title=f"Latency {name}",
        description=f"{share} of successful requests took at most this long, from arrival to"
        " response in the server. Read from histogram buckets: the error is at most one third.",
        unit="s",
        expressions={
            "{{model}}": quantile(fraction, REQUEST_DURATION, "model", f"{SELECTED}, {INFERENCE}")
        },
    )
    for name, fraction, share in (
        ("p50", 0.5, "50 %"),
        ("p99", 0.99, "99 %"),
        ("p99.9", 0.999, "99.9 %"),
    )
)

# Empty without --auth.
_PRINCIPALS = (
    Panel(
        title="Device time by principal",
        description="Fraction of a device that each principal uses. In overload, principals get"
        " time by their weights. Needs --auth.",
        unit="percentunit",
        kind="stacked",
        expressions={
            "{{principal}}": rate("convserve_principal_device_seconds_total", "principal", INSTANCE)
        },
    ),
    Panel(
        title="Images by principal",
        description="Images classified per second for each principal. Needs --auth.",
        unit="short",
        kind="stacked",
        expressions={
            "{{principal}}": rate("convserve_principal_images_total", "principal", INSTANCE)
        },
    ),
    Panel(
        title="Refused by principal",
        description="Refused requests of each principal. quota: it sends more than its quota"
        " allows. overloaded: in overload, it sends more than its share. Needs --auth.",
        unit="reqps",
        expressions={
            "{{principal}}: {{reason}}": rate(
                "convserve_principal_refused_total", "principal, reason", INSTANCE
            )
        },
    ),
)

OVERVIEW = (
    *_STATS,
    Panel(
        title="Goodput by model",
        description="Successful requests per second, for each model.",
        unit="reqps",
        kind="stacked",
        span=12,
        expressions={"{{model}}": SUCCEEDED},
    ),
    Panel(
        title="Requests by status",
        description="Requests per second by gRPC status. RESOURCE_EXHAUSTED: refused, the response"
        " says when to retry. DEADLINE_EXCEEDED: too late. INTERNAL: a server error, see the log.",
        unit="reqps",
        kind="stacked",
        span=12,
        expressions={
            "{{code}}": rate("convserve_requests_total", "code", f"{SELECTED}, {INFERENCE}")
        },
    ),
    *_LATENCIES,
    Panel(
        title="Device utilisation",
        description="Fraction of each device in use over the last seconds. Use it for autoscaling.",
        unit="percentunit",
        axis_max=1,
        expressions={"{{device}} {{instance}}": DEVICE_BUSY},
    ),
    Panel(
        title="Queued images",
        description="Images that wait for an engine. Grows under overload until requests are"
        " refused.",
        unit="short",
        expressions={"{{model}}": f"sum by (model) ({QUEUE_ROWS})"},
    ),
    Panel(
        title="Refused and late",
        description="Refused requests by reason, and missed deadlines by the stage that the"
        " request had reached.",
        unit="reqps",
        expressions={
            "refused: {{reason}}": rate("convserve_refused_total", "reason"),
            "late in {{stage}}": rate("convserve_deadline_missed_total", "stage"),
        },
    ),
    *_PRINCIPALS,
)
