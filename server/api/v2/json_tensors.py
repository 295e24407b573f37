"""Tensors as JSON: pixels and files out of the text of a request.

The text of a tensor has been found to be JSON when it comes here. Pixels are read from its bytes as
a whole: as objects of Python they would take ten times as long and hold up all threads.
"""

from __future__ import annotations

import binascii
from collections.abc import Iterator, Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray

from server.errors import InvalidInput

CHUNK_BYTES = 1 << 20  # of text read at a time, which takes some ten times as much memory
ZERO = np.uint8(ord("0"))
SPACES = b" \t\r\n"

_Bytes = NDArray[np.uint8]


def numbers_from_json(
    text: bytes | memoryview, shape: Sequence[int], field: str
) -> NDArray[np.uint8]:
    """An array of whole numbers from 0 to 255, flat or nested as the shape is -> [*shape].

    Raises InvalidInput.
    """
    values, rest = [], []
    for chunk in _chunks(np.frombuffer(text, np.uint8)):
        digits = chunk - ZERO
        values.append(_numbers(digits, field))
        rest.append(chunk[digits > 9].tobytes())
    brackets = b"".join(rest).translate(None, SPACES)
    if strange := brackets.translate(None, b"[],")[:1]:
        raise InvalidInput(
            field, f"has {strange.decode('ascii', 'replace')!r} in it; whole numbers are needed"
        )
    found = np.concatenate(values)
    if len(found) != np.prod(shape, dtype=object):
        needed = f"shape {list(shape)} needs {np.prod(shape, dtype=object):,}"
        raise InvalidInput(field, f"has {len(found):,} numbers; {needed}")
    if brackets not in (_brackets(shape[:1] and [len(found)]), _brackets(shape)):
        raise InvalidInput(field, f"is nested otherwise than shape {list(shape)}, and is not flat")
    return found.reshape(shape)


def files_from_json(text: bytes | memoryview, field: str, *, nested: bool = False) -> list[bytes]:
    """An array of files, each as a text in base64; `nested` ones may stand in arrays of their own.

    Raises InvalidInput.
    """
    try:
        try:
            texts = msgspec.json.decode(text, type=list[str])
        except msgspec.ValidationError:
            if not nested:
                raise
            texts = [alone for (alone,) in msgspec.json.decode(text, type=list[tuple[str]])]
    except (msgspec.DecodeError, UnicodeDecodeError):  # or a text that is not UTF-8
        raise InvalidInput(field, "must be an array of files, each as a text in base64") from None
    files = []
    for index, encoded in enumerate(texts):
        try:
            files.append(binascii.a2b_base64(encoded.encode(), strict_mode=True))
        except binascii.Error as error:
            raise InvalidInput(f"{field}[{index}]", f"is no base64: {error}") from None
    return files


def _chunks(text: _Bytes) -> Iterator[_Bytes]:
    """The text in pieces, each with the first byte behind its last number."""
    begin = 0
    while begin < len(text):
        end = begin + CHUNK_BYTES
        while end < len(text) and 48 <= text[end - 1] < 58:
            end += 1
        yield text[begin:end]
        begin = end


def _numbers(digits: _Bytes, field: str) -> _Bytes:
    """The numbers in a text, given as the values of its digits, what is above 9 being none.

    Raises InvalidInput. The last must be none, and is what stands before the first.
    """
    is_digit = digits < 10
    last = np.flatnonzero(is_digit[:-1] & ~is_digit[1:])
    values = digits[last].astype(np.uint16)
    part = np.ones(len(last), np.bool_)
    for place, weight in ((1, 10), (2, 100)):
        before = digits[np.maximum(last - place, -1)]
        part &= before < 10
        values += np.where(part, before, 0) * np.uint16(weight)
    part &= digits[np.maximum(last - 3, -1)] < 10
    if part.any() or (values > 255).any():
        raise InvalidInput(field, "has a number above 255")
    return values.astype(np.uint8)


def _brackets(shape: Sequence[int]) -> bytes:
    """What an array of that shape is without its numbers."""
    inner = b""
    for size in reversed(shape):
        inner = b"[" + b",".join([inner] * size) + b"]"
    return inner
