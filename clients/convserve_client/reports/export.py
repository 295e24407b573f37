"""Results as files for other programs: CSV with one line per run, and HdrHistogram logs."""

import csv
import io
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from convserve_client.loadgen.results.report import Report
from convserve_client.loadgen.results.samples import OK, STATUS_NUMBER, Array

HDR_MAX_US = 3_600_000_000  # one hour; longer latencies count as one hour
HDR_DIGITS = 3


def write(path: str, text: str) -> None:
    """Writes to a file, or to standard output if the path is "-". Raises OSError."""
    if path == "-":
        sys.stdout.write(text)
    else:
        Path(path).write_text(text, encoding="utf-8")


def csv_of(reports: Sequence[Report]) -> str:
    """A header and one line for each run; empty without runs."""
    lines = [_line(report) for report in reports]
    file = io.StringIO()
    if lines:
        writer = csv.DictWriter(file, list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)
    return file.getvalue()


def _line(report: Report) -> dict[str, object]:
    plan, summary = report.plan, report.summary
    latency = asdict(summary.latency) if summary.latency else {}
    names = ("p50_s", "p90_s", "p95_s", "p99_s", "p999_s", "max_s")
    return {
        "target": plan.target,
        "protocol": plan.protocol,
        "models": ", ".join(plan.models),
        "loop": report.loop,
        "concurrency": plan.concurrency,
        "rate_hz": plan.rate_hz,
        "valid": report.is_valid,
        "measured_s": round(summary.duration_s, 3),
        "calls": summary.total,
        "in_time": summary.in_time,
        "late": summary.late,
        "refused": summary.refused,
        "failed": summary.failed,
        "not_sent": summary.not_sent,
        "goodput_hz": round(summary.goodput_hz, 3),
        "calls_hz": round(summary.calls_hz, 3),
        "images_hz": round(summary.images_hz, 3),
        **{
            f"{name.removesuffix('_s')}_ms": round(latency[name] * 1e3, 4) if latency else None
            for name in names
        },
        "lag_p99_ms": None if summary.lag_p99_s is None else round(summary.lag_p99_s * 1e3, 4),
        "mean_batch_rows": summary.mean_rows,
        "client_cpu_us_per_call": _us(report.client_cpu_s_per_call),
        "server_cpu_us_per_call": _us(report.server_cpu_s_per_call),
    }


def _us(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1e6, 2)


def hdr_log(reports: Sequence[Report]) -> str:
    """Latencies of successes in microseconds, in the format of HdrHistogram's tools.

    One line for each window of each run, tagged with the number of the run. Raises ImportError.
    """
    from hdrh.histogram import HdrHistogram

    lines = [
        "#[Latencies in us from due time to answer, successes only]",
        "#[Histogram log format version 1.3]",
        '"StartTimestamp","Interval_Length","Interval_Max","Interval_Compressed_Histogram"',
    ]
    for number, report in enumerate(reports, 1):
        plan, starts_s = report.plan, report.plan.warmup_s
        for window in report.windows:
            histogram = HdrHistogram(1, HDR_MAX_US, HDR_DIGITS)
            for value in _latencies_us(report.samples, starts_s, starts_s + window.duration_s):
                histogram.record_value(value)
            encoded = histogram.encode().decode()
            longest_ms = histogram.get_max_value() / 1e3
            lines.append(
                f"Tag={plan.protocol}-{number},{starts_s:.3f},{window.duration_s:.3f},"
                f"{longest_ms:.3f},{encoded}"
            )
            starts_s += window.duration_s
    return "\n".join(lines) + "\n"


def _latencies_us(samples: Array, starts_s: float, ends_s: float) -> list[int]:
    due = (samples["due_s"] >= starts_s) & (samples["due_s"] < ends_s)
    good = samples[due & (samples["status"] == STATUS_NUMBER[OK])]
    latencies_us = (good["finished_s"] - good["due_s"]) * 1e6
    found: list[int] = latencies_us.round().astype(int).clip(1, HDR_MAX_US).tolist()
    return found
