"""base64 as people send it: with line breaks, in the URL-safe alphabet, unpadded, as a data URL."""

from __future__ import annotations

import binascii
import re

DATA_URL = re.compile(rb"\s*data:([^,]{0,200}),", re.IGNORECASE)
URL_SAFE = bytes.maketrans(b"-_", b"+/")
SPACES = b" \t\r\n\f\v"
FOREIGN = re.compile(rb"[^A-Za-z0-9+/=]")
PADDING = b"="
PERCENT = b"%"

# What percent-encoding makes of the bytes of base64 that URLs give a meaning, and of line breaks.
ESCAPES = {
    b"%2B": b"+",
    b"%2F": b"/",
    b"%3D": b"=",
    b"%2D": b"-",
    b"%5F": b"_",
    b"%20": b"",
    b"%0A": b"",
    b"%0D": b"",
}
CHUNK_BYTES = 256 << 10  # decoded at a time: other threads run between chunks


class NotBase64(ValueError):
    """The text is not base64. The message continues "is "."""


def decode_base64(text: str) -> bytes:
    """The bytes of a text in base64, of either alphabet, or of a data URL. Raises NotBase64.

    White space is ignored, and padding may be missing.
    """
    given = text.encode()
    try:
        return _decoded(given)  # most texts; three times as fast
    except binascii.Error:
        pass
    if head := DATA_URL.match(given):
        if not head[1].lower().rstrip().endswith(b";base64"):
            raise NotBase64("a data URL without base64; it must begin as data:image/png;base64,")
        given = given[head.end() :]
        if PERCENT in given:
            given = _unescaped(given)
    digits = given.translate(URL_SAFE, SPACES).rstrip(PADDING)
    if (foreign := FOREIGN.search(digits)) is not None:
        character = digits[foreign.start() :].decode(errors="replace")[0]
        raise NotBase64(f"not base64: it contains {character!r}")
    if PADDING in digits:
        raise NotBase64("not base64: it continues after its padding")
    if len(digits) % 4 == 1:
        raise NotBase64(f"not base64: {len(digits):,} characters are one too many or too few")
    return _decoded(digits + PADDING * (-len(digits) % 4))


def _decoded(digits: bytes) -> bytes:
    """The bytes of base64 without spaces. Raises binascii.Error."""
    if digits.find(PADDING, 0, -2) != -1:
        raise binascii.Error("padding before the end")
    chunks = range(0, len(digits), CHUNK_BYTES)
    return b"".join(
        binascii.a2b_base64(digits[begin : begin + CHUNK_BYTES], strict_mode=True)
        for begin in chunks
    )


def _unescaped(given: bytes) -> bytes:
    """Undoes percent-encoding, as far as base64 needs it."""
    for escape, byte in ESCAPES.items():
        given = given.replace(escape, byte).replace(escape.lower(), byte)
    return given
