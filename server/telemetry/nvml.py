"""GPU readings from NVML for the metrics. Needs a GPU and the package nvidia-ml-py.

https://docs.nvidia.com/deploy/nvml-api/
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

log = logging.getLogger(__name__)

Readings = dict[str, float]  # by the GPU's number


class GpuMonitor:
    """Reads all GPUs that NVML lists. Each call queries the driver."""

    def __init__(self, library: Any) -> None:
        self._nvml = library
        self._handles = {
            str(number): library.nvmlDeviceGetHandleByIndex(number)
            for number in range(library.nvmlDeviceGetCount())
        }

    def busy_ratio(self) -> Readings:
        return self._each(lambda handle: self._nvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100)

    def memory_used(self) -> Readings:
        return self._each(lambda handle: self._nvml.nvmlDeviceGetMemoryInfo(handle).used)

    def memory_total(self) -> Readings:
        return self._each(lambda handle: self._nvml.nvmlDeviceGetMemoryInfo(handle).total)

    def power_watts(self) -> Readings:
        return self._each(lambda handle: self._nvml.nvmlDeviceGetPowerUsage(handle) / 1e3)

    def temperature(self) -> Readings:
        kind = self._nvml.NVML_TEMPERATURE_GPU
        return self._each(lambda handle: self._nvml.nvmlDeviceGetTemperature(handle, kind))

    def _each(self, read: Callable[[Any], float]) -> Readings:
        """The readings of all GPUs; a GPU that does not support one is left out."""
        found = {}
        for number, handle in self._handles.items():
            try:
                found[number] = float(read(handle))
            except self._nvml.NVMLError as error:
                log.debug("gpu_reading_failed", extra={"gpu": number, "error": str(error)})
        return found


def gpu_monitor() -> GpuMonitor | None:
    """A monitor for this machine's GPUs; None without a GPU or without nvidia-ml-py."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        return GpuMonitor(pynvml)
    except pynvml.NVMLError as error:
        log.debug("nvml_unavailable", extra={"error": str(error)})
        return None
