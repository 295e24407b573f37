"""Decodes text files that people write, whatever editor and system they use."""

from __future__ import annotations

import codecs

# The mark of UTF-32 starts with the mark of UTF-16, so it comes first.
BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def decode_text(content: bytes) -> str:
    """Decodes UTF-8, or UTF-16 and UTF-32 with a byte-order mark. Line ends become newlines.

    The mark is not part of the text. Raises ValueError with the reason in words.
    """
    encodings = (name for mark, name in BYTE_ORDER_MARKS if content.startswith(mark))
    encoding = next(encodings, "utf-8")
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        name = encoding.upper().removesuffix("-SIG")
        line = content.count(b"\n", 0, error.start) + 1
        where = f"line {line}" if name == "UTF-8" else "it"
        raise ValueError(f"{where} is not {name} text; save the file as UTF-8") from None
    if "\0" in text:
        raise ValueError("it contains zero bytes, so it is not UTF-8 text; save the file as UTF-8")
    return text.replace("\r\n", "\n").replace("\r", "\n")
