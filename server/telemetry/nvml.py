"""What NVML tells of the GPUs, for the metrics: nothing where there is no GPU or no nvidia-ml-py.

https://docs.nvidia.com/deploy/nvml-api/
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

log = logging.getLogger(__name__)

Readings = dict[str, float]  # by the GPU's number


class GpuMonitor:
    """The GPUs that NVML counts, asked anew at each reading."""

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
        """What can be read; a GPU that does not tell one thing may tell the others."""
        found = {}
        for number, handle in self._handles.items():
            try:
                found[number] = float(read(handle))
            except self._nvml.NVMLError as error:
                log.debug("nvml", extra={"gpu": number, "error": str(error)})
        return found


def gpus() -> GpuMonitor | None:
    """The GPUs of this machine, or None where there are none to be asked."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        return GpuMonitor(pynvml)
    except pynvml.NVMLError as error:
        log.debug("no_nvml", extra={"error": str(error)})
        return None
