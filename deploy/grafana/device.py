"""Devices dashboard: how models share a device, the server process, and the GPUs."""

from deploy.grafana.panel import Panel
from deploy.grafana.queries import DEVICE_BUSY, INFERENCE, INSTANCE, PROCESS, gpu, rate, ratio

_PROCESS = (
    Panel(
        title="CPU cores in use",
        description="Processor cores that the server process uses, engines included.",
        unit="short",
        expressions={"{{instance}}": rate("process_cpu_seconds_total", "instance", PROCESS)},
    ),
    Panel(
        title="Memory",
        description="Resident memory of the server process. It should level off; steady growth is"
        " a leak.",
        unit="bytes",
        expressions={
            "{{instance}}": f"sum by (instance) (process_resident_memory_bytes{{{PROCESS}}})"
        },
    ),
    Panel(
        title="Open file descriptors",
        description="Open connections and files, and the limit of the process.",
        unit="short",
        expressions={
            "open {{instance}}": f"sum by (instance) (process_open_fds{{{PROCESS}}})",
            "limit {{instance}}": f"min by (instance) (process_max_fds{{{PROCESS}}})",
        },
    ),
    Panel(
        title="CPU time per request",
        description="CPU seconds of the whole server process for each successful request.",
        unit="s",
        expressions={
            "{{instance}}": ratio(
                rate("process_cpu_seconds_total", "instance", PROCESS),
                rate("convserve_requests_total", "instance", f'{INSTANCE}, {INFERENCE}, code="OK"'),
            )
        },
    ),
    Panel(
        title="Up",
        description="1 if Prometheus can read /metrics of the server, else 0.",
        unit="short",
        axis_max=1,
        expressions={"{{instance}}": f"max by (instance) (up{{{PROCESS}}})"},
    ),
    Panel(
        title="Uptime",
        description="Time since the process started. A drop to 0 is a restart.",
        unit="s",
        expressions={
            "{{instance}}": f"time() - max by (instance) (process_start_time_seconds{{{PROCESS}}})"
        },
    ),
)

_GPUS = (
    Panel(
        title="GPU utilisation",
        description="Fraction of time in which at least one kernel ran, as NVML reports it.",
        unit="percentunit",
        axis_max=1,
        expressions={"{{gpu}} {{instance}}": gpu("busy_ratio")},
    ),
    Panel(
        title="GPU memory",
        description="Memory in use by all processes, and total memory.",
        unit="bytes",
        expressions={
            "used {{gpu}} {{instance}}": gpu("memory_used_bytes"),
            "total {{gpu}} {{instance}}": gpu("memory_total_bytes"),
        },
    ),
    Panel(
        title="GPU power",
        description="Power draw of the whole card. Far below its limit while busy: the kernels are"
        " small.",
        unit="watt",
        expressions={"{{gpu}} {{instance}}": gpu("power_watts")},
    ),
    Panel(
        title="GPU temperature",
        description="Temperature of the GPU chip. A hot chip lowers its clock rate.",
        unit="celsius",
        expressions={"{{gpu}} {{instance}}": gpu("temperature_celsius")},
    ),
)

DEVICE = (
    Panel(
        title="Device utilisation",
        description="Fraction of each device in use over the last seconds.",
        unit="percentunit",
        axis_max=1,
        span=12,
        expressions={"{{device}} {{instance}}": DEVICE_BUSY},
    ),
    Panel(
        title="Engine time by model",
        description="Seconds of engine time per second: how the models share the devices.",
        unit="short",
        kind="stacked",
        span=12,
        expressions={"{{model}}": rate("convserve_compute_seconds_total", "model", INSTANCE)},
    ),
    *_PROCESS,
    Panel(
        title="Padding",
        description="Fraction of computed rows that only pad a batch to a supported batch size.",
        unit="percentunit",
        axis_max=1,
        expressions={
            "{{model}}": ratio(
                rate("convserve_padded_rows_total", "model", INSTANCE),
                f"{rate('convserve_batch_rows_sum', 'model', INSTANCE)} + "
                f"{rate('convserve_padded_rows_total', 'model', INSTANCE)}",
            )
        },
    ),
    Panel(
        title="Fallback engines",
        description="1 if the version has a better engine that is incompatible with this machine."
        " The log and ListModels say why.",
        unit="short",
        axis_max=1,
        expressions={
            "{{model}} on {{backend}}": "max by (model, backend) "
            f"(convserve_engine_fallback{{{INSTANCE}}})"
        },
    ),
    *_GPUS,
)
