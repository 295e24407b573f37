"""Files that are no supported image: the error says what they seem to be, and quotes nothing."""

from __future__ import annotations

import pytest

from server.images.formats import UnreadableImage, first_image

REST = b"4e1b9c77 a part of the file"
FILES = {
    b"II*\0": "is a TIFF file",
    b"MM\0*": "is a TIFF file",
    b"\0\0\0\x18ftypheic": "is a HEIC file",
    b"\0\0\0\x1cftypavif": "is an AVIF file",
    b"\0\0\0\x0cJXL \r\n": "is a JPEG XL file",
    b"\xff\x0a": "is a JPEG XL file",
    b"%PDF-1.7": "is a PDF file",
    b"PK\x03\x04": "is a ZIP archive",
    b"\x1f\x8b\x08": "is a gzip file",
    b"\n <svg xmlns=": "is an HTML, XML or SVG text",
    b'{"image": ': "is a JSON text",
    b"/9j/4AAQSkZJRg": "is an image as base64 text",
    b"data:image/png;base64,": "is an image as base64 text",
    b"\0\1\2\3": "has an unknown signature",
    b"": "has an unknown signature",
}


@pytest.mark.parametrize("start", FILES, ids=[repr(start) for start in FILES])
def test_the_error_says_what_the_file_seems_to_be(start: bytes) -> None:
    with pytest.raises(UnreadableImage) as caught:
        first_image(start + REST)
    assert str(caught.value) == f"{FILES[start]}, which is not a supported format"
