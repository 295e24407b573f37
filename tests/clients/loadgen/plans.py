"""Plans for tests of the load generator."""

from typing import Any

from convserve_client.loadgen.plan import Plan, RequestClass


def make_plan(target: str = "", request_class: RequestClass | None = None, **changes: Any) -> Plan:
    """A short closed loop for the model "small"."""
    values: dict[str, Any] = {
        "target": target,
        "classes": (request_class or RequestClass(model="small", deadline_ms=5000),),
        "concurrency": 4,
        "duration_s": 0.3,
        "warmup_s": 0.0,
        "max_in_flight": 100,
    }
    return Plan(**values | changes)


def open_loop_plan(target: str, rate_hz: float, **changes: Any) -> Plan:
    return make_plan(target, **{"concurrency": None, "rate_hz": rate_hz, **changes})
