"""Bounds what parsing a message costs, by a look at its fields before it is parsed.

The parser runs on the event loop, and a thread would not help: it keeps all threads waiting. A
field of two bytes costs it 0.2 us and up to 40 bytes of memory, a number of one byte in a packed
field 5 to 9 ns and up to 8 bytes. So a message of 64 MiB could stop the server for seconds. A
message with more fields or numbers than any honest request is refused before it is parsed. The look
costs 0.6 us a field, and skips over the bytes of images.
"""

from __future__ import annotations

from google.protobuf.descriptor import Descriptor, FieldDescriptor

from server.api.turns import WorkTurns
from server.errors import InvalidInput

VARINT, FIXED64, BYTES, GROUP, GROUP_END, FIXED32 = range(6)

# Smaller messages are parsed within a millisecond, whatever is in them.
SMALL_BYTES = 4096

# Fields of one request message: its own, and for each image up to six (the image, its raw pixels
# and their four fields). Twice as many are allowed, for later versions of the contract.
MAX_REQUEST_FIELDS = 64
MAX_FIELDS_PER_IMAGE = 12

# A message with more fields, or one that takes longer, waits for its turn.
LIGHT_FIELDS = 64
LIGHT_S = 100e-6

FIELD_S = 1e-6  # of the check and the parser, for a field
SLOW_BYTE_S = 9e-9  # of the parser, for a byte that it reads one by one

MAX_NAMED_FIELDS = 256  # of a broken message, in which an error is looked for

# Bytes that the parser reads one by one: texts, and the numbers of packed fields. They are 37
# images of 224 x 224 as numbers, and take 20 to 75 ms. Numbers of a fixed size and bytes are only
# copied, and not counted here.
MAX_SLOW_BYTES = 8 << 20

_COPIED = {  # repeated fields of these types are copied as a whole
    FieldDescriptor.TYPE_DOUBLE,
    FieldDescriptor.TYPE_FLOAT,
    FieldDescriptor.TYPE_FIXED64,
    FieldDescriptor.TYPE_FIXED32,
    FieldDescriptor.TYPE_SFIXED64,
    FieldDescriptor.TYPE_SFIXED32,
    FieldDescriptor.TYPE_BYTES,
}


def max_fields(max_images: int) -> int:
    """The most fields of a request with up to `max_images` images."""
    return MAX_REQUEST_FIELDS + MAX_FIELDS_PER_IMAGE * max_images


class MessageCheck:
    """Checks the fields of one message, those of nested messages included.

    It ends where the bytes are not a message: the parser stops there too.
    """

    __slots__ = ("_limit", "_scan", "_slow_bytes")

    def __init__(self, data: bytes, message: Descriptor, limit: int) -> None:
        self._scan = _Scan(data, message)
        self._limit = limit
        self._slow_bytes = 0

    def cost_s(self, size: int) -> float:
        """About how long the rest of the check and the parser take for a message of `size` bytes.

        It assumes that the fields are as long as those checked so far.
        """
        scan = self._scan
        fields = min(self._limit, scan.count * size / max(1, scan.position))
        return fields * FIELD_S + self._slow_bytes * SLOW_BYTE_S

    def read(self, fields: int) -> bool:
        """Checks up to `fields` more fields. Returns whether there are no others.

        Raises InvalidInput for more than `limit` fields in all, for more than MAX_SLOW_BYTES of
        texts and numbers, and for groups.
        """
        scan, until = self._scan, self._scan.count + fields
        while scan.next_field():
            known = scan.field
            if known is not None and scan.size and known.type not in _COPIED:
                self._slow_bytes += scan.size
                if self._slow_bytes > MAX_SLOW_BYTES:
                    raise _too_slow(known.name)
            if scan.count > self._limit:
                message = f"has more than {self._limit:,} fields; no request needs more"
                raise InvalidInput("request", message)
            if scan.count == until:
                return False
        if scan.has_group:
            raise InvalidInput("request", "has a group, which no version of this message has")
        return True


async def check_fields(data: bytes, message: Descriptor, limit: int, turns: WorkTurns) -> None:
    """Checks all fields. Raises InvalidInput."""
    check = MessageCheck(data, message, limit)
    is_done = check.read(LIGHT_FIELDS)
    cost_s = check.cost_s(len(data))
    if not is_done or cost_s > LIGHT_S:
        await turns.wait(cost_s)
        if not is_done:
            check.read(limit + 1)


def text_that_is_not_utf8(data: bytes, message: Descriptor) -> str:
    """The name of the first text that is not UTF-8; empty if it is not in the first fields."""
    scan = _Scan(data, message)
    while scan.next_field() and scan.count <= MAX_NAMED_FIELDS:
        known = scan.field
        if known is not None and known.type == FieldDescriptor.TYPE_STRING and scan.size:
            try:
                data[scan.position - scan.size : scan.position].decode()
            except UnicodeDecodeError:
                return known.name
    return ""


def _too_slow(field: str) -> InvalidInput:
    return InvalidInput(
        field,
        f"makes more than {MAX_SLOW_BYTES:,} bytes of texts and numbers in the request; send large "
        "tensors as raw bytes",
    )


class _Scan:
    """Walks over the fields of a message and of the messages in it, in the order of the bytes."""

    __slots__ = (
        "_data",
        "_end",
        "_message",
        "_outer",
        "count",
        "field",
        "has_group",
        "position",
        "size",
    )

    def __init__(self, data: bytes, message: Descriptor) -> None:
        self.position = 0  # after the current field; after its head, if it is a message
        self.field: FieldDescriptor | None = None  # the current one; None if it is unknown
        self.size = 0  # its bytes, if it is a text, bytes, or packed numbers
        self._data = data
        self._message = message  # the type of the message that the position is in
        self._end = len(data)  # of that message
        self._outer: list[tuple[int, Descriptor]] = []  # the ends and types of those around it
        self.count = 0  # fields so far
        self.has_group = False  # the scan ends there

    def next_field(self) -> bool:
        """Goes to the next field. False at the end, at a group, and at bytes without sense."""
        while self.position >= self._end:
            if not self._outer:
                return False
            self._end, self._message = self._outer.pop()
        self.count += 1
        self.size = 0
        try:
            return self._read()
        except IndexError:
            return False

    def _read(self) -> bool:
        tag, position = _varint(self._data, self.position)
        kind = tag & 7
        self.field = self._message.fields_by_number.get(tag >> 3)
        if kind == VARINT:
            _, position = _varint(self._data, position)
        elif kind == FIXED64:
            position += 8
        elif kind == FIXED32:
            position += 4
        elif kind == BYTES:
            size, position = _varint(self._data, position)
            if position + size > self._end:
                return False
            inner = None if self.field is None else self.field.message_type
            if inner is not None:
                self._outer.append((self._end, self._message))
                self._end, self._message = position + size, inner
            else:
                self.size = size
                position += size
        else:
            self.has_group = kind in (GROUP, GROUP_END)
            return False
        self.position = position
        return True


def _varint(data: bytes, position: int) -> tuple[int, int]:
    """The number that begins at `position`, and where it ends. Raises IndexError if it has none."""
    byte = data[position]
    if byte < 128:
        return byte, position + 1
    value = 0
    for shift in range(0, 70, 7):
        byte = data[position]
        position += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, position
    raise IndexError("a varint has at most ten bytes")
