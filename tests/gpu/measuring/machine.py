"""The machine: its GPU, its libraries, and the speed of its bus."""

from __future__ import annotations

import platform
from statistics import median
from typing import Any

import torch

from server.engines.base import backend
from server.engines.tensorrt.cuda import Cuda, CudaError, GpuUnavailable
from server.process.cores import available_cores
from tests.benchmarks.targets.bare import processor
from tests.gpu.measuring.report import Results
from tests.gpu.measuring.timing import time_runs

COPY_BYTES = 256 << 20


def describe_machine() -> Results:
    found: Results = {
        "system": platform.platform(),
        "processor": processor(),
        "cores": available_cores(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "gpu": None,
    }
    try:
        gpu = Cuda().gpu()
    except (GpuUnavailable, CudaError) as error:
        found["why_no_gpu"] = str(error)
    else:
        found |= {
            "gpu": gpu.name,
            "capability": gpu.capability,
            "driver_cuda": gpu.driver_cuda,
            "free_bytes": gpu.free_bytes,
        }
    try:
        found["tensorrt"] = backend("tensorrt").version()
    except ImportError as error:
        found["tensorrt"] = str(error)
    return found


def measure_copies() -> Results:
    """Bytes a second between page-locked memory and the device."""
    cuda = Cuda()
    address, _ = cuda.allocate_pinned(COPY_BYTES)
    device, stream = cuda.allocate(COPY_BYTES), cuda.create_stream()
    found = {}
    for name, copy, to, source in (
        ("to_device", cuda.copy_to_device, device, address),
        ("to_host", cuda.copy_to_host, address, device),
    ):

        def run(copy: Any = copy, to: int = to, source: int = source) -> None:
            copy(to, source, COPY_BYTES, stream)
            cuda.synchronize(stream)

        found[name] = COPY_BYTES / median(time_runs(0.3, run))
    cuda.destroy_stream(stream)
    cuda.free(device)
    cuda.free_pinned(address)
    return found
