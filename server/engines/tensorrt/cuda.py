"""What convserve asks of CUDA, and nothing more: one device's memory, streams, events and graphs.

Small, so that a fake of it can record the order of everything an engine does. Handles are plain
numbers. Calls release the GIL while they wait. Needs the library `cuda.bindings`, and no compiler.
"""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

# After one of these every further call of the process fails too (cudaError_t in the CUDA Runtime
# API: "this leaves the process in an inconsistent state"); only a new process helps.
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
    """A call failed; `sticky` where the device is lost to this process."""

    def __init__(self, name: str, call: str) -> None:
        super().__init__(f"{call}: {name}")
        self.sticky = name in STICKY


class Absent(Exception):
    """There is no GPU to use here; the message says why and what to do."""


class Gpu(NamedTuple):
    """What is known of a device."""

    name: str
    capability: str  # for example "sm90"
    cuda: int  # newest version that the driver runs, for example 13000 for CUDA 13.0
    needed: int  # oldest driver, on the same scale, that the libraries here were made for
    free_bytes: int


def library() -> Any:
    """The bindings of the CUDA Runtime API. Raises Absent."""
    try:
        from cuda.bindings import driver, runtime
    except ImportError as error:
        raise Absent(
            f"cuda-bindings is not installed ({error}): pip install 'convserve[gpu]'"
        ) from None
    try:
        (status,) = driver.cuInit(0)
    except Exception:  # the bindings' own, of several kinds, where they find no libcuda
        raise Absent("this machine has no NVIDIA driver, and so no GPU to use") from None
    if status != driver.CUresult.CUDA_SUCCESS:
        raise Absent(f"the NVIDIA driver finds no GPU to use ({status.name})")
    return runtime


class Cuda:
    """Device 0, which is the first of CUDA_VISIBLE_DEVICES. Raises Absent; its methods CudaError.

    Memory and handles belong to whoever asked for them, until `free` and its like.
    """

    def __init__(self) -> None:
        self._api = library()
        count = self._call("cudaGetDeviceCount")
        if not count:
            raise Absent("the NVIDIA driver finds no GPU")

    def gpu(self) -> Gpu:
        api, properties = self._api, self._call("cudaGetDeviceProperties", 0)
        free_bytes, _ = self._call("cudaMemGetInfo")
        name = properties.name
        return Gpu(
            name=name.decode() if isinstance(name, bytes) else str(name),
            capability=f"sm{properties.major}{properties.minor}",
            cuda=self._call("cudaDriverGetVersion"),
            needed=api.CUDART_VERSION // 1000 * 1000,  # any driver of the same major version
            free_bytes=free_bytes,
        )

    # --- memory ---

    def pinned(self, size: int) -> tuple[int, NDArray[np.uint8]]:
        """Page-locked memory of this host, which copies to and from the device need not stage."""
        address = int(self._call("cudaHostAlloc", size, self._api.cudaHostAllocDefault))
        buffer = (ctypes.c_uint8 * size).from_address(address)
        return address, np.ctypeslib.as_array(buffer)

    def free_pinned(self, address: int) -> None:
        self._call("cudaFreeHost", address)

    def memory(self, size: int) -> int:
        """Memory of the device."""
        return int(self._call("cudaMalloc", size))

    def free(self, address: int) -> None:
        self._call("cudaFree", address)

    def copy_in(self, to: int, source: int, size: int, stream: int) -> None:
        """Host to device, in the stream's order."""
        kind = self._api.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._call("cudaMemcpyAsync", to, source, size, kind, stream)

    def copy_out(self, to: int, source: int, size: int, stream: int) -> None:
        """Device to host, in the stream's order."""
        kind = self._api.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._call("cudaMemcpyAsync", to, source, size, kind, stream)

    # --- order ---

    def stream(self) -> int:
        return int(self._call("cudaStreamCreateWithFlags", self._api.cudaStreamNonBlocking))

    def free_stream(self, stream: int) -> None:
        self._call("cudaStreamDestroy", stream)

    def event(self) -> int:
        """One to wait for without keeping a core busy."""
        flags = self._api.cudaEventBlockingSync | self._api.cudaEventDisableTiming
        return int(self._call("cudaEventCreateWithFlags", flags))

    def free_event(self, event: int) -> None:
        self._call("cudaEventDestroy", event)

    def record(self, event: int, stream: int) -> None:
        """The event happens once all that is in the stream by now is done."""
        self._call("cudaEventRecord", event, stream)

    def wait(self, event: int) -> None:
        """Blocks until the event has happened; raises what went wrong in its stream."""
        self._call("cudaEventSynchronize", event)

    def finish(self, stream: int) -> None:
        """Blocks until the stream is empty."""
        self._call("cudaStreamSynchronize", stream)

    # --- graphs ---

    def begin_capture(self, stream: int) -> None:
        """From now on the stream's work is written down, not done. Other threads go on as usual."""
        mode = self._api.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._call("cudaStreamBeginCapture", stream, mode)

    def end_capture(self, stream: int) -> int:
        """What was written down, as one thing to `launch`."""
        graph = self._call("cudaStreamEndCapture", stream)
        try:
            return int(self._call("cudaGraphInstantiate", graph, 0))
        finally:
            self._call("cudaGraphDestroy", graph)

    def launch(self, graph: int, stream: int) -> None:
        self._call("cudaGraphLaunch", graph, stream)

    def free_graph(self, graph: int) -> None:
        self._call("cudaGraphExecDestroy", graph)

    def _call(self, name: str, *arguments: Any) -> Any:
        status, *results = getattr(self._api, name)(*arguments)
        if status != self._api.cudaError_t.cudaSuccess:
            raise CudaError(status.name, name)
        return results[0] if len(results) == 1 else tuple(results)
