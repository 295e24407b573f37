"""PromQL expressions that several dashboards use.

Values of several instances are summed before they are divided. Quantiles come from histogram
buckets, never from averages.
"""

INFERENCE = 'method=~"Classify|Model(Stream)?Infer"'
SELECTED = 'model=~"$model", instance=~"$instance"'
INSTANCE = 'instance=~"$instance"'
PROCESS = f'job=~"$job", {INSTANCE}'
RANGE = "[$__rate_interval]"

REQUEST_DURATION = "convserve_request_duration_seconds"
PHASE_DURATION = "convserve_phase_duration_seconds"


def rate(name: str, by: str, labels: str = SELECTED) -> str:
    """Per-second rate of a counter, summed over all labels except `by`."""
    return f"sum by ({by}) (rate({name}{{{labels}}}{RANGE}))"


def quantile(fraction: float, name: str, by: str, labels: str = SELECTED) -> str:
    """Quantile of a histogram, for each combination of the labels `by`."""
    buckets = rate(f"{name}_bucket", f"le, {by}".rstrip(", "), labels)
    return f"histogram_quantile({fraction}, {buckets})"


def ratio(part: str, whole: str) -> str:
    """`part` divided by `whole`; 0 without traffic."""
    return f"({part}) / ({whole} > 0) or 0 * ({whole})"


def gpu(name: str) -> str:
    """A GPU metric. Servers without a GPU do not export it."""
    return f"max by (gpu, instance) (convserve_gpu_{name}{{{INSTANCE}}})"


READY = f"convserve_model_ready{{{SELECTED}}}"
QUEUE_ROWS = f"convserve_queue_rows{{{SELECTED}}}"
DEVICE_BUSY = f"max by (device, instance) (convserve_device_busy_ratio{{{INSTANCE}}})"
SUCCEEDED = rate("convserve_requests_total", "model", f'{SELECTED}, {INFERENCE}, code="OK"')
REQUESTS = rate("convserve_requests_total", "model", f"{SELECTED}, {INFERENCE}")
