"""Tensor data as JSON: pixels and files from the text of a request.

The text is known to be valid JSON. Pixels are read from its bytes as a whole: as Python objects
they would take ten times as long and hold up all threads.
"""

from __future__ import annotations

from collections.abc import Awaitable, Iterator, Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray

from server.api.decode_time import Data
from server.api.decoders import Decoders
from server.api.v2.base64_text import NotBase64, decode_base64
from server.api.v2.tensors import InputTensor, TensorData, check_size, decode_files
from server.errors import InvalidInput
from server.images.input_spec import InputSpec, Pixels

CHUNK_BYTES = 1 << 20  # of text read at a time; reading takes about ten times as much memory
ZERO = np.uint8(ord("0"))
NOT_A_DIGIT = 10  # bytes minus "0": values from here on are not digits
SPACES = b" \t\r\n"

_Bytes = NDArray[np.uint8]


class JsonData(TensorData):
    """The JSON array of a tensor's elements."""

    __slots__ = ("_field", "_text")

    def __init__(self, field: str, text: memoryview) -> None:
        self._field = field
        self._text = text

    def thread_work(self, *, is_encoded: bool) -> Sequence[Data]:
        return (self._text,)

    def pixels(self, tensor: InputTensor, spec: InputSpec, decoders: Decoders) -> Awaitable[Pixels]:
        arguments = self._text, tensor.shape, self._field
        return decoders.batch(tensor.shape[0], numbers_from_json, *arguments)

    async def decode(self, tensor: InputTensor, spec: InputSpec, decoders: Decoders) -> Pixels:
        images, is_nested = tensor.shape[0], len(tensor.shape) > 1
        files = await decoders.batch(images, files_from_json, self._text, self._field, is_nested)
        check_size(self._field, "elements", len(files), tensor, tensor.shape[0])
        return await decode_files(files, self._field, spec, decoders)


def numbers_from_json(
    text: bytes | memoryview, shape: Sequence[int], field: str
) -> NDArray[np.uint8]:
    """[*shape] from an array of whole numbers from 0 to 255, flat or nested as the shape is.

    Raises InvalidInput.
    """
    values, rest = [], []
    for chunk in _chunks(np.frombuffer(text, np.uint8)):
        digits = chunk - ZERO
        values.append(_numbers(digits, field))
        rest.append(chunk[digits >= NOT_A_DIGIT].tobytes())
    brackets = b"".join(rest).translate(None, SPACES)
    if unexpected := brackets.translate(None, b"[],")[:1]:
        character = unexpected.decode("ascii", "replace")
        raise InvalidInput(field, f"contains {character!r}; whole numbers are needed")
    numbers = np.concatenate(values)
    needed = np.prod(shape, dtype=object)
    if len(numbers) != needed:
        raise InvalidInput(
            field, f"has {len(numbers):,} numbers; shape {list(shape)} needs {needed:,}"
        )
    if brackets not in (_brackets(shape[:1] and [len(numbers)]), _brackets(shape)):
        raise InvalidInput(
            field, f"is neither flat nor nested as its shape {list(shape)} is; use one of the two"
        )
    return numbers.reshape(shape)


def files_from_json(text: bytes | memoryview, field: str, nested: bool = False) -> list[bytes]:
    """The files in an array of base64 texts; if `nested`, each may be in an array of its own.

    Raises InvalidInput.
    """
    try:
        try:
            texts = msgspec.json.decode(text, type=list[str])
        except msgspec.ValidationError:
            if not nested:
                raise
            texts = [alone for (alone,) in msgspec.json.decode(text, type=list[tuple[str]])]
    except (msgspec.DecodeError, UnicodeDecodeError):  # the text may not be UTF-8
        raise InvalidInput(field, "must be an array of files, each as a text in base64") from None
    files = []
    for index, encoded in enumerate(texts):
        try:
            files.append(decode_base64(encoded))
        except NotBase64 as error:
            raise InvalidInput(f"{field}[{index}]", f"is {error}") from None
    return files


def _chunks(text: _Bytes) -> Iterator[_Bytes]:
    """The text in pieces. Each ends with the byte after its last number."""
    begin = 0
    while begin < len(text):
        end = begin + CHUNK_BYTES
        while end < len(text) and 48 <= text[end - 1] < 58:
            end += 1
        yield text[begin:end]
        begin = end


def _numbers(digits: _Bytes, field: str) -> _Bytes:
    """The numbers in a text, given as the values of its digits; higher values are no digits.

    The last value must be no digit: it also serves as the one before the first number. Raises
    InvalidInput.
    """
    is_digit = digits < NOT_A_DIGIT
    last = np.flatnonzero(is_digit[:-1] & ~is_digit[1:])  # the last digit of each number
    values = digits[last].astype(np.uint16)
    is_part = np.ones(len(last), np.bool_)
    for place, weight in ((1, 10), (2, 100)):
        before = digits[np.maximum(last - place, -1)]
        is_part &= before < NOT_A_DIGIT
        values += np.where(is_part, before, 0) * np.uint16(weight)
    is_part &= digits[np.maximum(last - 3, -1)] < NOT_A_DIGIT  # a fourth digit
    if is_part.any() or (values > 255).any():
        raise InvalidInput(field, "has a number above 255")
    return values.astype(np.uint8)


def _brackets(shape: Sequence[int]) -> bytes:
    """The brackets and commas of a JSON array of that shape, without the numbers."""
    inner = b""
    for size in reversed(shape):
        inner = b"[" + b",".join([inner] * size) + b"]"
    return inner
