"""Regions of system shared memory that callers on this machine lend: pixels in, results out.

A region is a file of /dev/shm, held open from its registration on. It is read and written by the
system's calls and never mapped: memory mapped from a file that its owner makes smaller kills the
process that touches it (SIGBUS), whenever that happens, so no check beforehand would help. It costs
no copy: rows are read from the region straight into the batch.

A region stays until it is unregistered: the connection that registered it says nothing of the
caller, whose library connects anew when it likes. What its caller has deleted since and nobody has
used for `FORGET_S` is forgotten when the next one is registered.
"""

from __future__ import annotations

import errno
import math
import os
import stat
import time
from dataclasses import dataclass, field
from pathlib import Path

from server.engines.base import RowSource
from server.errors import InvalidInput, Overloaded
from server.images.input_spec import Pixels

FOLDER = Path("/dev/shm")
NAME_LIMIT = 128  # characters of a region's name
KEY_LIMIT = 255  # bytes of a file's name
MOST_REGIONS = 512  # each takes a file descriptor, of which a process may have 1,024
FORGET_S = 60.0
RETRY_S = 1.0


@dataclass(slots=True, eq=False)
class Region:
    """A part of a file, open while it is registered or in use."""

    name: str
    key: str
    offset: int
    byte_size: int
    descriptor: int
    users: int = 0
    registered: bool = True
    used_s: float = field(default_factory=time.monotonic)

    def release(self) -> None:
        """Closes the file where nobody needs it any more."""
        if not self.users and not self.registered:
            os.close(self.descriptor)


class Window:
    """A part of a region that a call uses. `close` it, or the region's file stays open."""

    def __init__(self, region: Region, field: str, offset: int, byte_size: int) -> None:
        region.users += 1
        region.used_s = time.monotonic()
        self.name = region.name
        self.offset = offset  # in the region
        self._region = region
        self._field = field
        self._begin = region.offset + offset
        self.byte_size = byte_size

    def close(self) -> None:
        self._region.users -= 1
        self._region.release()

    def read_into(self, target: memoryview, position: int = 0) -> None:
        """Fills the target, a flat one of bytes, with those from there on. Raises InvalidInput."""
        position += self._begin
        while target:
            count = os.preadv(self._region.descriptor, [target], position)
            if not count:
                raise self._shrunk()
            target = target[count:]
            position += count

    def read(self) -> memoryview:
        """All of it, copied. Raises InvalidInput."""
        found = memoryview(bytearray(self.byte_size))
        self.read_into(found)
        return found

    def write(self, data: memoryview) -> None:
        """Writes flat bytes, at most as many as it has. Raises InvalidInput."""
        assert len(data) <= self.byte_size, "whoever asks for a result has been told what it needs"
        position = self._begin
        if os.fstat(self._region.descriptor).st_size < position + len(data):
            raise self._shrunk()  # writing would make the file larger again
        try:
            while data:
                count = os.pwrite(self._region.descriptor, data, position)
                data = data[count:]
                position += count
        except OSError as error:  # no memory for it, which a mapped file would not have survived
            raise InvalidInput(self._field, f"can't be written: {error.strerror}") from None

    def _shrunk(self) -> InvalidInput:
        size = os.fstat(self._region.descriptor).st_size
        return InvalidInput(
            self._field,
            f"is a region of {self._region.key!r}, which has become smaller: {size:,} bytes",
        )


class WindowRows(RowSource):
    """Pixels [N, H, W, C] in a window of as many bytes."""

    def __init__(self, window: Window, shape: tuple[int, ...]) -> None:
        self._window = window
        self._count = shape[0]
        self._row_bytes = math.prod(shape[1:])

    def __len__(self) -> int:
        return self._count

    def copy_into(self, target: Pixels, first: int) -> None:
        flat = memoryview(target.data).cast("B")
        self._window.read_into(flat, first * self._row_bytes)


class Regions:
    """The regions registered, by name. Used from one thread."""

    def __init__(self, folder: Path = FOLDER) -> None:
        self._folder = folder
        self._regions: dict[str, Region] = {}

    def register(self, name: str, key: str, offset: int, byte_size: int) -> None:
        """Opens the file `key` of the folder. Raises InvalidInput or Overloaded."""
        if not 1 <= len(name) <= NAME_LIMIT:
            raise InvalidInput("name", f"has {len(name)} characters; 1 to {NAME_LIMIT} are allowed")
        if name in self._regions:
            raise InvalidInput("name", f"is {name!r}, which is registered already; unregister it")
        if byte_size < 1:
            raise InvalidInput("byte_size", f"is {byte_size}; at least 1 is needed")
        self._forget()
        if len(self._regions) >= MOST_REGIONS:
            raise InvalidInput("name", f"would be one of more than {MOST_REGIONS} regions")
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
        """One, or all without a name; nothing happens where there is none. Calls that use one go
        on."""
        names = [name] if name else list(self._regions)
        for known in names:
            region = self._regions.pop(known, None)
            if region is not None:
                region.registered = False
                region.release()

    def status(self, name: str = "") -> list[Region]:
        """One, or all without a name. Raises InvalidInput."""
        if not name:
            return list(self._regions.values())
        return [self._known("name", name)]

    def window(self, field: str, name: str, offset: int, byte_size: int) -> Window:
        """A part of a region. Raises InvalidInput with the field that names it."""
        region = self._known(field, name)
        if offset < 0 or byte_size < 0 or offset + byte_size > region.byte_size:
            raise InvalidInput(
                field,
                f"is {byte_size:,} bytes from offset {offset:,} on; "
                f"region {name!r} has {region.byte_size:,}",
            )
        return Window(region, field, offset, byte_size)

    def _known(self, field: str, name: str) -> Region:
        region = self._regions.get(name)
        if region is None:
            raise InvalidInput(field, f"is {name[:NAME_LIMIT]!r}; no such region is registered")
        return region

    def _open(self, key: str) -> int:
        """A descriptor of the file. Raises InvalidInput."""
        file = key.removeprefix("/")  # as shm_open has it
        if not file or file in (".", "..") or "/" in file or "\0" in file:
            given = key[:NAME_LIMIT]
            raise InvalidInput(
                "key", f"is {given!r}; the name of a file in {self._folder} is needed"
            )
        flags = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
        try:
            descriptor = os.open(self._folder / file, flags)
        except OSError as error:
            raise _not_opened(key, error) from None
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise InvalidInput("key", f"is {key!r}, which is no plain file")
        return descriptor

    def _forget(self) -> None:
        """Lets go of regions that their callers have left behind."""
        now_s = time.monotonic()
        for region in list(self._regions.values()):
            idle = not region.users and now_s - region.used_s >= FORGET_S
            if idle and not os.fstat(region.descriptor).st_nlink:
                self.unregister(region.name)


def _not_opened(key: str, error: OSError) -> InvalidInput | Overloaded:
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return Overloaded("too many files are open", retry_after_s=RETRY_S)
    return InvalidInput("key", f"is {key[:NAME_LIMIT]!r}, which can't be opened: {error.strerror}")
