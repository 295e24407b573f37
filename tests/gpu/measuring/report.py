"""The results as Markdown tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Results = dict[str, Any]


def report(results: Results) -> str:
    lines = [*_machine(results), *_speed(results), *_served(results), *_deviation(results)]
    lines += _plans(results)
    lines += [f"- failed: {failed['step']}: {failed['reason']}" for failed in results["failed"]]
    if results["skipped"]:
        lines.append(f"- skipped, the time was up: {', '.join(results['skipped'])}")
    return "\n".join(lines).rstrip("\n") + "\n"


def _machine(results: Results) -> list[str]:
    about = results["machine"]
    lines = [
        f"{results['date']}, `{results['command']}`",
        "",
        f"GPU: {about['gpu'] or 'none, ' + about.get('why_no_gpu', '')}; TensorRT: "
        f"{about['tensorrt']}; torch {about['torch']}; Python {about['python']}; "
        f"{about['processor']}, {about['cores']} cores",
        "",
    ]
    for tried in results["tried"]:
        lines.append(f"- TensorRT {tried['tensorrt']}: {tried['reason'] or 'runs'}")
    if found := results.get("copies"):
        lines.append(
            f"- copies: {found['to_device'] / 1e9:.1f} GB/s to the device, "
            f"{found['to_host'] / 1e9:.1f} GB/s to the host"
        )
    if found := results.get("damaged_plans"):
        lines.append(
            f"- damaged plans: {found['loads']} loads, {found['rejected']} rejected, "
            f"{found['lost_bytes'] / 1e6:,.1f} MB of device memory lost"
        )
    return lines


def _speed(results: Results) -> list[str]:
    return _table(
        ("model", "by", "batch", "p50 ms", "p99 ms", "images/s", "of the roofline"),
        [
            (
                name,
                how,
                f"{row['batch']}",
                f"{row['p50_ms']:.3f}",
                f"{row['p99_ms']:.3f}",
                f"{row['images_hz']:,.0f}",
                f"{row['roofline']:.1%}" if "roofline" in row else "",
            )
            for name, found in results["models"].items()
            for how, key in (
                ("the engine", "speed"),
                ("eager", "eager"),
                ("compile", "torch.compile"),
            )
            for row in found.get(key) or ()
        ],
    )


def _served(results: Results) -> list[str]:
    return _table(
        (
            "engine",
            "images per call",
            "served images/s",
            "bare images/s",
            "ratio",
            "p50 ms",
            "p99 ms",
        ),
        [
            (
                row["engine"],
                f"{row['images_per_call']}",
                f"{row['images_hz']:,.0f}",
                f"{row['bare_hz']:,.0f}",
                f"{row['ratio']:.1%}",
                f"{row['p50_ms']:.2f}",
                f"{row['p99_ms']:.2f}",
            )
            for row in results.get("served") or ()
        ],
    )


def _deviation(results: Results) -> list[str]:
    return _table(
        ("model", "largest deviation", "at batch sizes"),
        [
            (name, f"{max(found['deviation'].values()):.2%}", " ".join(found["deviation"]))
            for name, found in results["models"].items()
            if found.get("deviation")
        ],
    )


def _plans(results: Results) -> list[str]:
    return _table(
        ("model", "plan", "seconds", "MB"),
        [
            (name, plan["engine"], f"{plan['seconds']:.1f}", f"{plan['plan_bytes'] / 1e6:,.1f}")
            for name, plan in results.get("plans", {}).items()
        ],
    )


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    if not rows:
        return []
    return ["", *(f"| {' | '.join(row)} |" for row in (titles, ["---"] * len(titles), *rows)), ""]
