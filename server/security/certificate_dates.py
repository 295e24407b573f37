"""When a certificate is valid. The standard library tells it only of a peer's certificate."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import NamedTuple

SEQUENCE, UTC_TIME, GENERALIZED_TIME, VERSION = 0x30, 0x17, 0x18, 0xA0


class Validity(NamedTuple):
    """From when to when a certificate is valid."""

    starts: datetime
    ends: datetime


def validity_of(der: bytes) -> Validity:
    """Reads the dates of an X.509 certificate (RFC 5280, 4.1). Raises ValueError."""
    fields = list(_elements(_content(_content(der, SEQUENCE), SEQUENCE)))
    if fields and fields[0][0] == VERSION:
        fields = fields[1:]
    tag, content = fields[3] if len(fields) > 3 else (0, b"")  # after serial, algorithm, issuer
    dates = [_date(*element) for element in _elements(content)]
    if tag != SEQUENCE or len(dates) != 2:
        raise ValueError("the certificate has no dates")
    return Validity(*dates)


def _content(data: bytes, tag: int) -> bytes:
    """The content of the first element, which must have the tag."""
    for found, content in _elements(data):
        if found == tag:
            return content
        break
    raise ValueError(f"the certificate has no element 0x{tag:02x} where one must be")


def _elements(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Tag and content of each element of DER."""
    at = 0
    while at + 2 <= len(data):
        tag, size, at = data[at], data[at + 1], at + 2
        if size & 0x80:
            digits = size & 0x7F
            size, at = int.from_bytes(data[at : at + digits], "big"), at + digits
        if at + size > len(data):
            raise ValueError("the certificate is cut off")
        yield tag, data[at : at + size]
        at += size


def _date(tag: int, content: bytes) -> datetime:
    text = content.decode("ascii")
    if tag == UTC_TIME:  # two digits of the year; 50 and above are of the last century
        text = ("19" if text[:2] >= "50" else "20") + text
    elif tag != GENERALIZED_TIME:
        raise ValueError(f"the certificate has a date of kind 0x{tag:02x}")
    return datetime.strptime(text, "%Y%m%d%H%M%SZ").replace(tzinfo=UTC)
