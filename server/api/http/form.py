"""Multipart forms (RFC 7578) with one image file, as `curl -F image=@cat.jpg` and browsers send."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, NamedTuple

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import Request

from server.api.content import ImageFile, OneImage
from server.api.v2.base64_text import NotBase64, decode_base64
from server.api.v2.versions import MAX_QUOTED
from server.errors import InvalidInput
from server.images.decode import decode
from server.images.input_spec import ImageLimits, InputSpec, Pixels

logging.getLogger("python_multipart").setLevel(logging.ERROR)  # it warns of each broken form

MULTIPART = "multipart/"
FORM_DATA = b"multipart/form-data"
MAX_FORM_BYTES = 16 << 10  # of a form beyond its file: boundaries, headers and short texts
MAX_PARTS = 8
MAX_TEXT_BYTES = 1024


class Form(NamedTuple):
    """The image file of a form, and the other fields."""

    image: OneImage
    texts: dict[str, str]


class Base64File(NamedTuple):
    """An image file in base64."""

    data: bytes  # its text
    field: str  # its name in the form

    def work(self, spec: InputSpec, limits: ImageLimits) -> tuple[Callable[..., Pixels], Any]:
        return _decode_base64_file, (self.data, spec, limits, self.field)

    def has_shape(self, spec: InputSpec) -> bool:
        return False


def is_form(request: Request) -> bool:
    return request.headers.get("content-type", "").lower().startswith(MULTIPART)


def parse_form(body: bytes, content_type: str) -> Form:
    """The one file in a form. Raises InvalidInput.

    A form whose only part has no file name is accepted too: `curl -F 'image=<cat.jpg'` sends it.
    """
    kind, options = parse_options_header(content_type)
    boundary = options.get(b"boundary", b"")
    if kind != FORM_DATA or not boundary:
        given = content_type[:MAX_QUOTED]
        message = f"is {given!r}; multipart/form-data with a boundary is needed for a form"
        raise InvalidInput("Content-Type", message)
    parts = _Parts()
    try:
        parser = parts.parser(boundary)
        parser.write(body)
        parser.finalize()
    except (FormParserError, UnicodeDecodeError) as error:
        raise InvalidInput("body", f"is not a valid form: {error}") from None
    if not parts.has_ended:
        raise InvalidInput("body", "is a form that ends too early")
    found = parts.found
    files = [part for part in found if part.is_file] or (found if len(found) == 1 else [])
    if len(files) != 1:
        given = f"has {len(files)} files" if files else "has no file"
        raise InvalidInput("body", f"is a form that {given}; send one, as in -F image=@cat.jpg")
    (file,) = files
    return Form(file.image(), {p.name: p.text() for p in found if p is not file})


def _decode_base64_file(text: bytes, spec: InputSpec, limits: ImageLimits, field: str) -> Pixels:
    """Raises as `decode` does."""
    try:
        file = decode_base64(text.decode("latin-1"))
    except NotBase64 as error:
        raise InvalidInput(field, f"is {error}") from None
    return decode(file, spec, limits, field)


class _Part:
    """One part of a form, filled by the parser."""

    def __init__(self) -> None:
        self.headers: dict[str, str] = {}
        self.data = bytearray()
        self.name = ""
        self.is_file = False

    def read_headers(self) -> None:
        """Sets the name and the kind. Raises InvalidInput."""
        _, options = parse_options_header(self.headers.get("content-disposition", ""))
        self.name = options.get(b"name", b"").decode("latin-1")[:MAX_QUOTED] or "file"
        self.is_file = b"filename" in options

    def image(self) -> OneImage:
        """The image in this part. Raises InvalidInput."""
        encoding = self.headers.get("content-transfer-encoding", "binary").strip().lower()
        if encoding == "base64":
            return Base64File(self._take(), self.name)
        if encoding not in ("binary", "8bit", "7bit"):
            given = encoding[:MAX_QUOTED]
            message = f"has the Content-Transfer-Encoding {given!r}; binary or base64 is allowed"
            raise InvalidInput(self.name, message)
        return ImageFile(self._take(), self.name)

    def _take(self) -> bytes:
        data = bytes(self.data)
        self.data = bytearray()
        return data

    def text(self) -> str:
        """The value of a field that is no file. Raises InvalidInput."""
        if len(self.data) > MAX_TEXT_BYTES:
            raise InvalidInput(self.name, f"has more than {MAX_TEXT_BYTES:,} bytes of text")
        return self.data.decode(errors="replace").strip()


class _Parts:
    """Collects the parts that the parser finds."""

    def __init__(self) -> None:
        self.found: list[_Part] = []
        self.has_ended = False
        self._name = bytearray()
        self._value = bytearray()

    def parser(self, boundary: bytes) -> MultipartParser:
        """A parser that fills the parts. It refuses many or long headers."""
        return MultipartParser(
            boundary,
            {
                "on_part_begin": self._begin,
                "on_header_field": self._header_name,
                "on_header_value": self._header_value,
                "on_header_end": self._header_end,
                "on_headers_finished": self._headers_end,
                "on_part_data": self._part_data,
                "on_end": self._end,
            },
        )

    def _begin(self) -> None:
        if len(self.found) == MAX_PARTS:
            raise InvalidInput("body", f"is a form of more than {MAX_PARTS} parts")
        self.found.append(_Part())

    def _header_name(self, data: bytes, start: int, end: int) -> None:
        self._name += data[start:end]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _header_end(self) -> None:
        name, value = self._name.decode("latin-1").lower(), self._value.decode("latin-1")
        self.found[-1].headers[name] = value
        self._name.clear()
        self._value.clear()

    def _headers_end(self) -> None:
        self.found[-1].read_headers()

    def _part_data(self, data: bytes, start: int, end: int) -> None:
        self.found[-1].data += memoryview(data)[start:end]

    def _end(self) -> None:
        self.has_ended = True
