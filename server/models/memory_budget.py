"""Compares the memory that an engine will need with the memory that is free, before it is loaded.

An engine that does not fit would not fail alone: the kernel ends the whole process with all the
models it serves.
"""

from __future__ import annotations

import math

from server.process import allocator
from server.process.memory import free_bytes
from server.repository.manifest import EngineRecord, InvalidVersion

RESERVED_BYTES = 64 << 20  # stays free for everything that is not an engine

# Memory of a compiled network, as a multiple of its file size: weights are mapped, and held a
# second time in the order that suits the processor. With several threads two networks are
# compiled, see engines.openvino. Measured with OpenVINO, VGG-16 in bf16: 2.1 with one thread, 4.2
# with two.
WEIGHT_COPIES = 2.2
# Activation memory of one row, as a multiple of its pixels. The largest is VGG-16: two layers of 64
# channels in two bytes each.
ACTIVATION_FACTORS = {"null": 1}
DEFAULT_ACTIVATION_FACTOR = 24
# A GPU engine holds the rows of two instances in host memory. While it is loaded, its file is there
# twice: as read, and as the library parses it. Its activations are in device memory.
GPU_FILE_COPIES = 2
GPU_INSTANCES = 2


def check_memory(record: EngineRecord, row: tuple[int, int, int], threads: int) -> None:
    """Raises InvalidVersion if an engine needs more memory than is free."""
    needed, free = needed_bytes(record, row, threads), free_bytes()
    if free is not None and needed + RESERVED_BYTES > free:
        allocator.give_back()  # freed memory that is kept for later requests counts as used
        free = free_bytes()
    if free is not None and needed + RESERVED_BYTES > free:
        raise InvalidVersion(
            f"the engine needs about {needed >> 20} MiB of memory; {free >> 20} MiB are free, of "
            f"which {RESERVED_BYTES >> 20} MiB stay reserved; unload a model, or give the process "
            "more memory"
        )


def needed_bytes(record: EngineRecord, row: tuple[int, int, int], threads: int) -> int:
    """Estimates the host memory of an engine; `row` is (height, width, channels), in bytes."""
    files = sum(file.bytes for file in record.files)
    row_bytes = math.prod(row)
    if record.backend == "tensorrt" or record.hardware.startswith("cuda"):
        return GPU_FILE_COPIES * files + GPU_INSTANCES * record.max_batch * row_bytes
    networks, instances = (2, threads + 1) if threads > 1 else (1, 1)
    factor = ACTIVATION_FACTORS.get(record.backend, DEFAULT_ACTIVATION_FACTOR)
    activations = instances * record.max_batch * row_bytes * factor
    return round(WEIGHT_COPIES * networks * files + activations)
