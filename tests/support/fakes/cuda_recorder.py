"""A fake of server/engines/tensorrt/cuda.py that records every call, for tests without a GPU.

It also does the work, but as late as a GPU may: the operations of a stream run only when code
waits for them. So code that reads too early finds old data.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from server.engines.tensorrt.cuda import Cuda, CudaError, Gpu

Operation = Callable[[], None]


class CudaRecorder(Cuda):
    """Records calls as tuples in `calls`, and handles that are not freed in `live`.

    `fail` maps the name of a call to the error that it raises. While `may_finish` is not set,
    nothing on the device finishes, so that waits block.
    """

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.live: set[int] = set()
        self.fail: dict[str, str] = {}
        self.free_bytes = 8 << 30
        self.may_finish = threading.Event()
        self.may_finish.set()
        self._memory: dict[int, NDArray[np.uint8]] = {}
        self._streams: dict[int, list[Operation]] = {}
        self._captures: dict[int, list[Operation]] = {}
        self._graphs: dict[int, list[Operation]] = {}
        self._numbers = itertools.count(1000)

    def names(self) -> list[str]:
        return [call[0] for call in self.calls]

    def gpu(self) -> Gpu:
        self._record("gpu")
        return Gpu(
            "Fake", "sm89", driver_cuda=13000, required_cuda=13000, free_bytes=self.free_bytes
        )

    def allocate_pinned(self, size: int) -> tuple[int, NDArray[np.uint8]]:
        address = self.allocate(size)
        return address, self._memory[address]

    def allocate(self, size: int) -> int:
        self._record("allocate", size)
        address = self._new_handle()
        self._memory[address] = np.full(size, 7, np.uint8)
        return address

    def free(self, address: int) -> None:
        self.live.remove(address)
        del self._memory[address]

    free_pinned = free

    def copy_to_device(self, to: int, source: int, size: int, stream: int) -> None:
        self._copy("copy_to_device", to, source, size, stream)

    def copy_to_host(self, to: int, source: int, size: int, stream: int) -> None:
        self._copy("copy_to_host", to, source, size, stream)

    def create_stream(self) -> int:
        number = self._new_handle()
        self._streams[number] = []
        return number

    def destroy_stream(self, stream: int) -> None:
        self.live.remove(stream)

    def synchronize(self, stream: int) -> None:
        self._record("synchronize", stream)
        self._run(stream)

    def create_event(self) -> int:
        return self._new_handle()

    def destroy_event(self, event: int) -> None:
        self.live.remove(event)

    def record_event(self, event: int, stream: int) -> None:
        self._record("record_event", stream)
        self._streams[event] = self._streams[stream]

    def wait_event(self, event: int) -> None:
        self.may_finish.wait()
        self._record("wait_event", event)
        self._run(event)

    def begin_capture(self, stream: int) -> None:
        self._record("begin_capture", stream)
        self._captures[stream] = []

    def end_capture(self, stream: int) -> int:
        operations = self._captures.pop(stream)
        self._record("end_capture", stream)
        graph = self._new_handle()
        self._graphs[graph] = operations
        return graph

    def launch_graph(self, graph: int, stream: int) -> None:
        self._record("launch_graph", graph, stream)
        self._streams[stream] += self._graphs[graph]

    def destroy_graph(self, graph: int) -> None:
        self.live.remove(graph)

    def enqueue(self, stream: int, operation: Operation) -> None:
        """Adds work to a stream, or to the graph that is being captured from it."""
        self._captures.get(stream, self._streams[stream]).append(operation)

    def content(self, address: int) -> NDArray[np.uint8]:
        return self._memory[address]

    def _copy(self, name: str, to: int, source: int, size: int, stream: int) -> None:
        self._record(name, size, stream)

        def copy() -> None:
            self._memory[to][:size] = self._memory[source][:size]

        self.enqueue(stream, copy)

    def _run(self, stream: int) -> None:
        operations, self._streams[stream][:] = list(self._streams[stream]), []
        for operation in operations:
            operation()

    def _record(self, name: str, *details: int) -> None:
        self.calls.append((name, *details))
        if name in self.fail:
            raise CudaError(self.fail[name], name)

    def _new_handle(self) -> int:
        number = next(self._numbers)
        self.live.add(number)
        return number
