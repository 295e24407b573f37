"""How many fields a message has, counted before it is parsed.

A field of two bytes costs the parser a fifth of a microsecond and up to forty bytes of memory, on
the event loop: 64 MiB of them stop the server for seconds. So what has more fields than any honest
request is refused before it is parsed.
"""

from __future__ import annotations

from google.protobuf.descriptor import Descriptor

VARINT, FIXED64, BYTES, GROUP, GROUP_END, FIXED32 = range(6)

SMALL_BYTES = 16 << 10  # so much is parsed in a few milliseconds, whatever it is


def has_more_fields(data: bytes, message: Descriptor, limit: int) -> bool:
    """Whether there are more than `limit` fields in `data`, those of messages within it included.

    Takes time for at most `limit` fields. Where the bytes are no message the rest is not counted:
    there the parser stops too.
    """
    if len(data) <= SMALL_BYTES:
        return False
    fields = 0
    within: list[tuple[int, Descriptor]] = []  # the messages around this one, with where they end
    position, end = 0, len(data)
    while True:
        while position >= end:
            if not within:
                return False
            end, message = within.pop()
        fields += 1
        if fields > limit:
            return True
        try:
            tag, position = _varint(data, position)
            kind = tag & 7
            if kind == VARINT:
                _, position = _varint(data, position)
            elif kind == FIXED64:
                position += 8
            elif kind == FIXED32:
                position += 4
            elif kind == BYTES:
                length, position = _varint(data, position)
                if position + length > end:
                    return False
                known = message.fields_by_number.get(tag >> 3)
                inner = None if known is None else known.message_type
                if inner is not None:
                    within.append((end, message))
                    end, message = position + length, inner
                else:
                    position += length
            elif kind not in (GROUP, GROUP_END):
                return False
        except IndexError:
            return False


def _varint(data: bytes, position: int) -> tuple[int, int]:
    """The number that begins there, and where it ends. Raises IndexError where there is none."""
    value = 0
    for shift in range(0, 70, 7):
        byte = data[position]
        position += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, position
    raise IndexError("a varint has at most ten bytes")
