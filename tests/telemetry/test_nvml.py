"""GPU metrics: the readings of NVML, in the units that the metric names state."""

from __future__ import annotations

from server.telemetry.metrics import Metrics
from server.telemetry.nvml import GpuMonitor
from tests.telemetry.fake_nvml import FakeNvml


def test_gpu_metrics_have_the_units_in_their_names() -> None:
    metrics = Metrics()
    metrics.read_gpus(GpuMonitor(FakeNvml()))
    assert {
        sample.name: (sample.labels, sample.value)
        for family in metrics.registry.collect()
        for sample in family.samples
        if family.name.startswith("convserve_gpu")
    } == {
        "convserve_gpu_busy_ratio": ({"gpu": "0"}, 0.5),
        "convserve_gpu_memory_used_bytes": ({"gpu": "0"}, float(1 << 30)),
        "convserve_gpu_memory_total_bytes": ({"gpu": "0"}, float(2 << 30)),
        "convserve_gpu_power_watts": ({"gpu": "0"}, 75.0),
        "convserve_gpu_temperature_celsius": ({"gpu": "0"}, 60.0),
    }


def test_an_unsupported_gpu_reading_is_left_out_and_the_others_remain() -> None:
    class NoPowerReading(FakeNvml):
        def nvmlDeviceGetPowerUsage(self, handle: int) -> int:
            raise OSError("not supported")

    gpus = GpuMonitor(NoPowerReading())
    assert (gpus.power_watts(), gpus.busy_ratio()) == ({}, {"0": 0.5})
