"""Stand-in for pynvml: one GPU with constant values."""

from types import SimpleNamespace


class FakeNvml:
    """The functions of pynvml that GpuMonitor calls."""

    NVML_TEMPERATURE_GPU = 0
    NVMLError = OSError

    def nvmlDeviceGetCount(self) -> int:
        return 1

    def nvmlDeviceGetHandleByIndex(self, number: int) -> int:
        return number

    def nvmlDeviceGetUtilizationRates(self, handle: int) -> SimpleNamespace:
        return SimpleNamespace(gpu=50)

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> SimpleNamespace:
        return SimpleNamespace(used=1 << 30, total=2 << 30)

    def nvmlDeviceGetPowerUsage(self, handle: int) -> int:
        return 75_000

    def nvmlDeviceGetTemperature(self, handle: int, kind: int) -> int:
        return 60
