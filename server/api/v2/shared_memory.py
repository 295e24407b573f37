"""System shared memory: clients on this machine register regions for pixels and results.

A region is a file in /dev/shm, open while it is registered or in use. The server reads and writes
it by system calls and never maps it: a process that touches mapped memory is killed (SIGBUS) once
the file's owner makes the file smaller, and no check beforehand can prevent that. Reading costs no
extra copy: rows go from the file straight into the batch.

A region stays until it is unregistered. The connection that registered it cannot own it, because
client libraries reconnect at will. When a region is registered, the server forgets those whose file
is deleted and that were not used for `FORGET_S`.
"""

from __future__ import annotations

import errno
import math
import os
import stat
import time
from collections.abc import Awaitable
from dataclasses import dataclass, field
from pathlib import Path

from server.api.context import CallContext
from server.api.decoders import Decoders
from server.api.in_flight import InFlightLimits
from server.api.v2.tensors import (
    REGION,
    REGION_BYTES,
    REGION_OFFSET,
    InputTensor,
    Parameters,
    RegionPart,
    TensorData,
    check_size,
    decode_files,
    split_files,
    whole_number,
)
from server.engines.base import RowSource
from server.errors import InvalidInput, Overloaded
from server.images.input_spec import InputSpec, Pixels
from server.security.audit import AuditLog
from server.security.principal import Principal

FOLDER = Path("/dev/shm")
MAX_NAME = 128  # characters
MAX_REGIONS = 512  # each takes a file descriptor; a process may have 1,024
FORGET_S = 60.0
RETRY_S = 1.0
MAX_U64 = (1 << 64) - 1
LENGTH_BYTES = 4  # before each file


@dataclass(slots=True, eq=False)
class Region:
    """A part of a file that is open while it is registered or in use."""

    name: str
    key: str
    offset: int
    byte_size: int
    descriptor: int
    users: int = 0
    is_registered: bool = True
    used_s: float = field(default_factory=time.monotonic)

    def begin_use(self) -> None:
        self.users += 1
        self.used_s = time.monotonic()

    def end_use(self) -> None:
        self.users -= 1
        self._close_if_unused()

    def unregister(self) -> None:
        self.is_registered = False
        self._close_if_unused()

    def _close_if_unused(self) -> None:
        if not self.users and not self.is_registered:
            os.close(self.descriptor)


class RegionWindow:
    """A part of a region that a call uses. The region's file stays open until `close`."""

    def __init__(self, region: Region, field: str, offset: int, byte_size: int) -> None:
        region.begin_use()
        self.field = field  # of the request, for errors
        self.part = RegionPart(region.name, offset, byte_size)
        self._region = region
        self._begin = region.offset + offset

    def close(self) -> None:
        self._region.end_use()

    def read_into(self, target: memoryview, position: int = 0) -> None:
        """Fills a flat view of bytes from `position` of the window on. Raises InvalidInput."""
        position += self._begin
        while target:
            count = os.preadv(self._region.descriptor, [target], position)
            if not count:
                raise self._shrunk()
            target = target[count:]
            position += count

    def read(self) -> memoryview:
        """A copy of all bytes. Raises InvalidInput."""
        copy = memoryview(bytearray(self.part.byte_size))
        self.read_into(copy)
        return copy

    def write(self, data: memoryview) -> RegionPart:
        """Writes flat bytes that fit into the window; returns where. Raises InvalidInput."""
        assert len(data) <= self.part.byte_size, "the size was checked before inference"
        written = self.part._replace(byte_size=len(data))
        position = self._begin
        if os.fstat(self._region.descriptor).st_size < position + len(data):
            raise self._shrunk()  # writing would make the file larger again
        try:
            while data:
                count = os.pwrite(self._region.descriptor, data, position)
                data = data[count:]
                position += count
        except OSError as error:  # out of memory; with a mapped file it would kill the process
            raise InvalidInput(self.field, f"can't be written: {error.strerror}") from None
        return written

    def _shrunk(self) -> InvalidInput:
        size = os.fstat(self._region.descriptor).st_size
        return InvalidInput(
            self.field,
            f"is a region of {self._region.key!r}, which has become smaller: {size:,} bytes",
        )


class SharedMemoryRegions:
    """The registered regions by name. Used on the event loop's thread only."""

    def __init__(self, folder: Path = FOLDER) -> None:
        self._folder = folder
        self._regions: dict[str, Region] = {}

    def register(self, name: str, key: str, offset: int, byte_size: int) -> None:
        """Opens the file `key` of the folder. Raises InvalidInput or Overloaded."""
        if not 1 <= len(name) <= MAX_NAME:
            raise InvalidInput("name", f"has {len(name)} characters; 1 to {MAX_NAME} are allowed")
        if name in self._regions:
            raise InvalidInput("name", f"is {name!r}, which is registered already; unregister it")
        if byte_size < 1:
            raise InvalidInput("byte_size", f"is {byte_size}; at least 1 is needed")
        self._forget_deleted()
        if len(self._regions) >= MAX_REGIONS:
            raise InvalidInput("name", f"would be one of more than {MAX_REGIONS} regions")
        descriptor = self._open(key)
        try:
            size = os.fstat(descriptor).st_size
            if offset < 0 or offset + byte_size > size:
                raise InvalidInput(
                    "byte_size",
                    f"is {byte_size:,} from offset {offset:,} on; {key!r} has {size:,} bytes",
                )
        except BaseException:
            os.close(descriptor)
            raise
        self._regions[name] = Region(name, key, offset, byte_size, descriptor)

    def unregister(self, name: str = "") -> None:
        """Unregisters one region, or all without a name. An unknown name is no error.

        Calls that use a region continue.
        """
        for known in [name] if name else list(self._regions):
            region = self._regions.pop(known, None)
            if region is not None:
                region.unregister()

    def status(self, name: str = "") -> list[Region]:
        """One region, or all without a name. Raises InvalidInput."""
        if not name:
            return list(self._regions.values())
        return [self._known("name", name)]

    def window(self, field: str, name: str, offset: int, byte_size: int) -> RegionWindow:
        """Opens a part of a region. Raises InvalidInput, naming the field."""
        region = self._known(field, name)
        if offset < 0 or byte_size < 0 or offset + byte_size > region.byte_size:
            raise InvalidInput(
                field,
                f"is {byte_size:,} bytes from offset {offset:,} on; "
                f"region {name!r} has {region.byte_size:,}",
            )
        return RegionWindow(region, field, offset, byte_size)

    def _known(self, field: str, name: str) -> Region:
        region = self._regions.get(name)
        if region is None:
            raise InvalidInput(field, f"is {name[:MAX_NAME]!r}; no such region is registered")
        return region

    def _open(self, key: str) -> int:
        """A descriptor of the file. Raises InvalidInput, Overloaded."""
        file = key.removeprefix("/")  # shm_open allows one slash
        if not file or file in (".", "..") or "/" in file or "\0" in file:
            raise InvalidInput(
                "key", f"is {key[:MAX_NAME]!r}; the name of a file in {self._folder} is needed"
            )
        flags = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
        try:
            descriptor = os.open(self._folder / file, flags)
        except OSError as error:
            raise _open_error(key, error) from None
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise InvalidInput("key", f"is {key!r}, which is not a regular file")
        return descriptor

    def _forget_deleted(self) -> None:
        """Unregisters idle regions whose file is deleted."""
        now_s = time.monotonic()
        for region in list(self._regions.values()):
            is_idle = not region.users and now_s - region.used_s >= FORGET_S
            if is_idle and not os.fstat(region.descriptor).st_nlink:
                self.unregister(region.name)


class RegionControl:
    """Registers regions for clients, and writes that to the audit log."""

    def __init__(self, regions: SharedMemoryRegions, audit: AuditLog) -> None:
        self._regions = regions
        self._audit = audit

    def register(
        self, context: CallContext, name: str, key: str, offset: int, byte_size: int
    ) -> None:
        with self._audit.action(context.caller, "SystemSharedMemoryRegister", name):
            self._regions.register(name, key, offset, byte_size)

    def unregister(self, context: CallContext, name: str) -> None:
        """All regions if the name is empty."""
        with self._audit.action(context.caller, "SystemSharedMemoryUnregister", name):
            self._regions.unregister(name)

    def status(self, name: str) -> list[Region]:
        return self._regions.status(name)


class CallWindows:
    """The windows that one call has open."""

    def __init__(self, regions: SharedMemoryRegions | None) -> None:
        self._regions = regions  # None if shared memory is not served
        self._open: list[RegionWindow] = []

    def open(self, field: str, parameters: Parameters) -> RegionWindow | None:
        """The window that a tensor's parameters name; None without one. Raises InvalidInput."""
        if REGION not in parameters:
            if unused := sorted(parameters.keys() & {REGION_OFFSET, REGION_BYTES}):
                raise InvalidInput(f"{field}[{unused[0]}]", f"is given without {REGION}")
            return None
        region_field = f"{field}[{REGION}]"
        if self._regions is None:
            raise InvalidInput(
                region_field, "is given; shared memory is not served without --allow-shared-memory"
            )
        if REGION_BYTES not in parameters:
            raise InvalidInput(f"{field}[{REGION_BYTES}]", "is missing")
        byte_size = whole_number(f"{field}[{REGION_BYTES}]", parameters[REGION_BYTES], 0, MAX_U64)
        given_offset = parameters.get(REGION_OFFSET, 0)
        offset = whole_number(f"{field}[{REGION_OFFSET}]", given_offset, 0, MAX_U64)
        name = parameters[REGION]
        name = name if isinstance(name, str) else ""
        window = self._regions.window(region_field, name, offset, byte_size)
        self._open.append(window)
        return window

    def close(self) -> None:
        for window in self._open:
            window.close()


class WindowRows(RowSource):
    """Pixels [N, H, W, C] in a window of exactly their size."""

    def __init__(self, window: RegionWindow, shape: tuple[int, ...]) -> None:
        self._window = window
        self._count = shape[0]
        self._row_bytes = math.prod(shape[1:])

    def __len__(self) -> int:
        return self._count

    def copy_into(self, target: Pixels, first: int) -> None:
        flat = memoryview(target.data).cast("B")
        self._window.read_into(flat, first * self._row_bytes)


class SharedData(TensorData):
    """Elements of an input in shared memory."""

    __slots__ = ("_in_flight", "_principal", "_window")

    def __init__(
        self, window: RegionWindow, in_flight: InFlightLimits, principal: Principal
    ) -> None:
        self._window = window
        self._in_flight = in_flight
        self._principal = principal

    def pixels(self, tensor: InputTensor, spec: InputSpec, decoders: Decoders) -> RowSource:
        byte_size = self._window.part.byte_size
        check_size(self._window.field, "bytes", byte_size, tensor, math.prod(tensor.shape))
        return WindowRows(self._window, tensor.shape)

    def decode(self, tensor: InputTensor, spec: InputSpec, decoders: Decoders) -> Awaitable[Pixels]:
        return self._read_and_decode(tensor, spec, decoders)

    async def _read_and_decode(
        self, tensor: InputTensor, spec: InputSpec, decoders: Decoders
    ) -> Pixels:
        """Copies the files before decoding, and counts them as if they were part of the message."""
        window, byte_size = self._window, self._window.part.byte_size
        most = tensor.shape[0] * (decoders.limits.encoded_bytes + LENGTH_BYTES)
        if byte_size > most:
            raise InvalidInput(
                window.field,
                f"has {byte_size:,} bytes; {tensor.name!r} of shape {list(tensor.shape)} "
                f"needs at most {most:,}",
            )
        try:
            self._in_flight.add_bytes(self._principal, byte_size)
            files = split_files(window.read(), window.field, tensor)
            return await decode_files(files, window.field, spec, decoders)
        finally:
            self._in_flight.remove_bytes(self._principal, byte_size)


def _open_error(key: str, error: OSError) -> InvalidInput | Overloaded:
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return Overloaded("too many files are open", retry_after_s=RETRY_S)
    return InvalidInput("key", f"is {key[:MAX_NAME]!r}, which can't be opened: {error.strerror}")
