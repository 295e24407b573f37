"""The few CUDA functions that the engines need: memory, streams, events and graphs of one device.

The interface is small, so that a fake can record the order of all calls. Handles are plain
numbers. Calls release the GIL while they wait. Needs `cuda.bindings`, but no compiler.
"""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

# After one of these errors every further call in this process fails, so only a new process helps.
# See cudaError_t in the CUDA Runtime API: "this leaves the process in an inconsistent state".
STICKY = {
    "cudaErrorAssert",
    "cudaErrorContained",
    "cudaErrorECCUncorrectable",
    "cudaErrorExternalDevice",
    "cudaErrorHardwareStackError",
    "cudaErrorIllegalAddress",
    "cudaErrorIllegalInstruction",
    "cudaErrorInvalidAddressSpace",
    "cudaErrorInvalidPc",
    "cudaErrorLaunchFailure",
    "cudaErrorLaunchTimeout",
    "cudaErrorMisalignedAddress",
    "cudaErrorMpsClientTerminated",
    "cudaErrorNvlinkUncorrectable",
    "cudaErrorTensorMemoryLeak",
}


class CudaError(Exception):
    """A CUDA call failed. It is `sticky` if this process can no longer use the device."""

    def __init__(self, name: str, call: str) -> None:
        super().__init__(f"{call}: {name}")
        self.sticky = name in STICKY


class GpuUnavailable(Exception):
    """There is no usable GPU. The message says why and what to do."""


class Gpu(NamedTuple):
    """The properties of a device that matter here. CUDA 13.0 is written as 13000."""

    name: str
    capability: str  # for example "sm90"
    driver_cuda: int  # the newest CUDA version that the driver supports
    required_cuda: int  # the oldest CUDA version that the installed libraries work with
    free_bytes: int


def import_runtime() -> Any:
    """The Python bindings of the CUDA Runtime API. Raises GpuUnavailable."""
    try:
        from cuda.bindings import driver, runtime
    except ImportError as error:
        raise GpuUnavailable(
            f"cuda-bindings is not installed ({error}): pip install 'convserve[gpu]'"
        ) from None
    try:
        (status,) = driver.cuInit(0)
    except Exception:  # without libcuda the bindings raise several kinds
        raise GpuUnavailable("this machine has no NVIDIA driver; install it to use a GPU") from None
    if status != driver.CUresult.CUDA_SUCCESS:
        raise GpuUnavailable(f"the NVIDIA driver finds no usable GPU ({status.name})")
    return runtime


class Cuda:
    """Device 0, the first of CUDA_VISIBLE_DEVICES.

    The caller frees the memory and handles it gets. The constructor raises GpuUnavailable, and all
    methods raise CudaError.
    """

    def __init__(self) -> None:
        self._api = import_runtime()
        count = self._call("cudaGetDeviceCount")
        if not count:
            raise GpuUnavailable("the NVIDIA driver finds no GPU")

    def gpu(self) -> Gpu:
        api, properties = self._api, self._call("cudaGetDeviceProperties", 0)
        free_bytes, _ = self._call("cudaMemGetInfo")
        name = properties.name
        return Gpu(
            name=name.decode() if isinstance(name, bytes) else str(name),
            capability=f"sm{properties.major}{properties.minor}",
            driver_cuda=self._call("cudaDriverGetVersion"),
            required_cuda=api.CUDART_VERSION // 1000 * 1000,  # any driver of the major version
            free_bytes=free_bytes,
        )

    def allocate_pinned(self, size: int) -> tuple[int, NDArray[np.uint8]]:
        """Page-locked host memory, which the device copies directly."""
        address = int(self._call("cudaHostAlloc", size, self._api.cudaHostAllocDefault))
        buffer = (ctypes.c_uint8 * size).from_address(address)
        return address, np.ctypeslib.as_array(buffer)

    def free_pinned(self, address: int) -> None:
        self._call("cudaFreeHost", address)

    def allocate(self, size: int) -> int:
        """Device memory."""
        return int(self._call("cudaMalloc", size))

    def free(self, address: int) -> None:
        self._call("cudaFree", address)

    def copy_to_device(self, to: int, source: int, size: int, stream: int) -> None:
        """Copies from the host, asynchronously and in stream order."""
        kind = self._api.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._call("cudaMemcpyAsync", to, source, size, kind, stream)

    def copy_to_host(self, to: int, source: int, size: int, stream: int) -> None:
        """Copies from the device, asynchronously and in stream order."""
        kind = self._api.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._call("cudaMemcpyAsync", to, source, size, kind, stream)

    def create_stream(self) -> int:
        return int(self._call("cudaStreamCreateWithFlags", self._api.cudaStreamNonBlocking))

    def destroy_stream(self, stream: int) -> None:
        self._call("cudaStreamDestroy", stream)

    def synchronize(self, stream: int) -> None:
        """Blocks until the stream is empty."""
        self._call("cudaStreamSynchronize", stream)

    def create_event(self) -> int:
        """An event whose waiters sleep instead of spinning."""
        flags = self._api.cudaEventBlockingSync | self._api.cudaEventDisableTiming
        return int(self._call("cudaEventCreateWithFlags", flags))

    def destroy_event(self, event: int) -> None:
        self._call("cudaEventDestroy", event)

    def record_event(self, event: int, stream: int) -> None:
        """The event completes when all work that is now in the stream is done."""
        self._call("cudaEventRecord", event, stream)

    def wait_event(self, event: int) -> None:
        """Blocks until the event completes. Raises the error of its stream, if there is one."""
        self._call("cudaEventSynchronize", event)

    def begin_capture(self, stream: int) -> None:
        """Records the stream's work from now on instead of running it.

        Other threads are not affected.
        """
        mode = self._api.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._call("cudaStreamBeginCapture", stream, mode)

    def end_capture(self, stream: int) -> int:
        """The recorded work, as a graph for `launch_graph`."""
        graph = self._call("cudaStreamEndCapture", stream)
        try:
            return int(self._call("cudaGraphInstantiate", graph, 0))
        finally:
            self._call("cudaGraphDestroy", graph)

    def launch_graph(self, graph: int, stream: int) -> None:
        self._call("cudaGraphLaunch", graph, stream)

    def destroy_graph(self, graph: int) -> None:
        self._call("cudaGraphExecDestroy", graph)

    def _call(self, name: str, *arguments: Any) -> Any:
        status, *results = getattr(self._api, name)(*arguments)
        if status != self._api.cudaError_t.cudaSuccess:
            raise CudaError(status.name, name)
        return results[0] if len(results) == 1 else tuple(results)
