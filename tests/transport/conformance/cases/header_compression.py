"""RFC 7541: header blocks."""

from __future__ import annotations

from hpack import Encoder

from tests.support.http2_frames import (
    COMPRESSION_ERROR,
    DATA,
    END_HEADERS,
    END_STREAM,
    HEADER_TABLE_SIZE,
    HEADERS,
    block,
    frame,
    indexed,
    indexed_literal,
    integer,
    literal,
    message,
    request_block,
    request_fields,
    settings,
    table_size,
    text,
)
from tests.transport.conformance.case import ECHO, Case, Reaction, answers, connection_error, lives

BODY = message(b"word")
FIELDS = request_fields(ECHO)
# :method POST and :scheme http are in the static table.
START = indexed(3) + indexed(6)
REST = block(FIELDS[2:])
BROKEN = connection_error(COMPRESSION_ERROR)


def request(header_block: bytes, stream: int = 1) -> bytes:
    return frame(HEADERS, END_HEADERS, stream, header_block) + frame(DATA, END_STREAM, stream, BODY)


def broken(section: str, name: str, header_block: bytes) -> Case:
    return Case(f"hpack {section}", name, request(header_block), BROKEN)


def valid(section: str, name: str, header_block: bytes) -> Case:
    return Case(f"hpack {section}", name, request(header_block), answers)


def answers_both(seen: Reaction) -> bool:
    return lives(seen) and seen.has_answered(1) and seen.has_answered(3)


def with_huffman() -> bytes:
    encoded: bytes = Encoder().encode(FIELDS, huffman=True)
    return encoded


PATH = b"\x04" + text(ECHO.encode())  # a literal whose name is the static table's entry 4

CASES = (
    valid("6.1", "fields of the static table", START + REST),
    valid(
        "6.2.1",
        "a literal that is added, with an indexed name",
        START + b"\x44" + PATH[1:] + block(FIELDS[3:]),
    ),
    valid(
        "6.2.1",
        "a literal that is added, with a new name",
        request_block(ECHO) + indexed_literal(b"x-test", b"ok"),
    ),
    valid(
        "6.2.2",
        "a literal that is not added, with an indexed name",
        START + PATH + block(FIELDS[3:]),
    ),
    valid(
        "6.2.2",
        "a literal that is not added, with a new name",
        request_block(ECHO) + literal(b"x-test", b"ok"),
    ),
    valid(
        "6.2.3",
        "a literal that is never added, with an indexed name",
        START + b"\x14" + PATH[1:] + block(FIELDS[3:]),
    ),
    valid(
        "6.2.3",
        "a literal that is never added, with a new name",
        request_block(ECHO) + b"\x10" + text(b"x-test") + text(b"ok"),
    ),
    valid("5.2", "Huffman codes", with_huffman()),
    valid("6.3", "a table size update", table_size(128) + request_block(ECHO)),
    valid(
        "6.3", "two table size updates", table_size(128) + table_size(4096) + request_block(ECHO)
    ),
    Case(
        "hpack 2.3.2",
        "a field of the dynamic table",
        request(request_block(ECHO) + indexed_literal(b"x-test", b"ok"))
        + request(request_block(ECHO) + indexed(62), 3),
        answers_both,
    ),
    Case(
        "hpack 4.4",
        "a field larger than the table empties it",
        request(request_block(ECHO) + indexed_literal(b"x-test", b"ok"))
        + request(request_block(ECHO) + indexed_literal(b"x-large", b"x" * 5_000), 3)
        + request(request_block(ECHO) + indexed(62), 5),
        BROKEN,
    ),
    Case(
        "hpack 4.2",
        "the client's own table size does not matter",
        settings((HEADER_TABLE_SIZE, 0)) + request(request_block(ECHO)),
        answers,
    ),
    broken("2.3.3", "an index beyond both tables", request_block(ECHO) + indexed(70)),
    broken(
        "2.3.3",
        "a literal whose name is beyond both tables",
        request_block(ECHO) + integer(70, 6, 0x40) + text(b"empty"),
    ),
    broken("4.2", "a table size update at the end of a block", request_block(ECHO) + table_size(1)),
    broken("5.1", "an integer without end", request_block(ECHO) + b"\xff" + b"\xff" * 12),
    broken("5.2", "a string longer than the block", request_block(ECHO) + b"\0\x7f\x10abc"),
    # The codes of "x-test" and "test"; then 8 bits of padding, or zeros, or the code of EOS.
    broken(
        "5.2",
        "padding of more than 7 bits",
        request_block(ECHO) + b"\0\x85\xf2\xb2\x4a\x84\xff\x85\x49\x50\x9f\xff\xff",
    ),
    broken(
        "5.2",
        "padding that is not ones",
        request_block(ECHO) + b"\0\x85\xf2\xb2\x4a\x84\xff\x83\x49\x50\x90",
    ),
    broken(
        "5.2",
        "the code of EOS",
        request_block(ECHO) + b"\0\x85\xf2\xb2\x4a\x84\xff\x88\x49\x51\xff\xff\xff\xfa\x7f\xff",
    ),
    broken("6.1", "the index 0", request_block(ECHO) + indexed(0)),
    broken("6.3", "a table size above the limit", table_size(4097) + request_block(ECHO)),
)
