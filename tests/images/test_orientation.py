"""The orientation in Exif or XMP is applied, and damaged metadata is ignored."""

import struct
import time
import zlib
from io import BytesIO

import pytest
from PIL import Image, ImageOps

from server.images.decode import decode
from server.images.formats import first_image
from server.images.input_spec import InputSpec
from tests.images.image_files import chunk, difference, encoded, noise


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_every_exif_orientation_is_applied(format: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x010F] = "a maker"
    exif[0x0112] = orientation
    options = {"lossless": True} if format == "WEBP" else {}
    file = encoded(noise(40, 20), format, exif=exif, **options)
    upright = ImageOps.exif_transpose(Image.open(BytesIO(file))).convert("RGB")
    assert upright.size == ((40, 20) if orientation < 5 else (20, 40))
    pixels = decode(file, InputSpec(upright.height, upright.width, 3))
    assert difference(pixels, upright) == 0


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(("kind", "form"), [(3, "HH"), (4, "I"), (1, "BBH")])
def test_the_orientation_may_have_any_integer_type(order: str, kind: int, form: str) -> None:
    value = struct.pack(order + form, 6, *[0] * (len(form) - 1))
    magic = b"II*\0" if order == "<" else b"MM\0*"
    tag = struct.pack(order + "HHI", 0x0112, kind, 1) + value
    exif = magic + struct.pack(order + "IH", 8, 1) + tag + b"\0\0\0\0"
    file = encoded(noise(40, 20), "JPEG", exif=b"Exif\0\0" + exif)
    reference = Image.open(BytesIO(file)).transpose(Image.Transpose.ROTATE_270)
    assert difference(decode(file, InputSpec(40, 20, 3)), reference) == 0


@pytest.mark.parametrize(
    "exif",
    [
        b"",
        b"II*\0",
        b"II*\0\xff\xff\xff\xff",
        b"II*\0\x08\0\0\0\xff\xff",
        b"II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x09\0\0\0",
        b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x02\0\0\0\x01\0\0\0\0",
        b"not exif at all",
    ],
)
def test_a_damaged_exif_block_is_ignored(exif: bytes) -> None:
    image = noise(40, 20)
    file = encoded(image, "PNG")
    file = file[:33] + chunk(b"eXIf", exif) + file[33:]
    assert difference(decode(file, InputSpec(20, 40, 3)), image) == 0
    file = encoded(image, "JPEG", exif=b"Exif\0\0" + exif)
    assert decode(file, InputSpec(20, 40, 3)).shape == (20, 40, 3)


XMP_ATTRIBUTE = (
    b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-'
    b'syntax-ns#"><rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" '
    b'tiff:Orientation="6"/></rdf:RDF></x:xmpmeta>'
)
XMP_ELEMENT = XMP_ATTRIBUTE.replace(
    b' tiff:Orientation="6"/>',
    b">\n<tiff:Orientation>\n 6 </tiff:Orientation></rdf:Description>",
)
XMP_OTHER_PREFIX = XMP_ATTRIBUTE.replace(b"tiff:", b"ns1:").replace(b":tiff=", b":ns1=")
XMP_SINGLE_QUOTES = XMP_ATTRIBUTE.replace(b'"', b"'").replace(b"Orientation=", b"Orientation = ")
WITHOUT_TAG = Image.Exif()
WITHOUT_TAG[0x010F] = "a maker"


def exif(orientation: int) -> bytes:
    block = Image.Exif()
    block[0x0112] = orientation
    return block.tobytes()


def with_segment(jpeg: bytes, body: bytes) -> bytes:
    return jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body + jpeg[2:]


def with_chunk(png: bytes, kind: bytes, body: bytes) -> bytes:
    return png[:33] + chunk(kind, body) + png[33:]


def xmp_segment(packet: bytes) -> bytes:
    return b"http://ns.adobe.com/xap/1.0/\0" + packet


def with_xmp(file_format: str, packet: bytes, exif_block: bytes = b"") -> bytes:
    """A file with an XMP packet as programs embed it in this format."""
    image = noise(40, 20)
    if file_format == "WEBP":
        return encoded(image, "WEBP", lossless=True, xmp=packet, exif=exif_block)
    if file_format == "GIF":
        file = encoded(image.quantize(64), "GIF")
        trailer = b"\1" + bytes(range(255, -1, -1)) + b"\0"
        block = b"!\xff\x0bXMP DataXMP" + packet + trailer
        at = 13 + 3 * 64
        return file[:at] + block + file[at:]
    file = encoded(image, file_format, exif=exif_block)
    if file_format == "JPEG":
        return with_segment(file, xmp_segment(packet))
    return with_chunk(file, b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + packet)


def raw_profile(name: bytes, block: bytes, chunk_type: bytes) -> bytes:
    """A text chunk as ImageMagick writes it: name, length, lines of 36 bytes in hexadecimal."""
    digits = block.hex("\n", -36).encode()
    text = b"\n%s\n%8d\n%s\n" % (name, len(block), digits)
    keyword = b"Raw profile type " + name + b"\0"
    if chunk_type == b"zTXt":
        return chunk(b"zTXt", keyword + b"\0" + zlib.compress(text))
    if chunk_type == b"iTXt":
        return chunk(b"iTXt", keyword + b"\1\0en\0\0" + zlib.compress(text))
    return chunk(b"tEXt", keyword + text)


def is_turned(file: bytes) -> bool:
    """Whether the image is turned as orientation 6 says."""
    as_stored = Image.open(BytesIO(file)).convert("RGB")
    upright = as_stored.transpose(Image.Transpose.ROTATE_270)
    turned = difference(decode(file, InputSpec(40, 20, 3)), upright) == 0
    assert turned or difference(decode(file, InputSpec(20, 40, 3)), as_stored) == 0
    return turned


@pytest.mark.parametrize(
    "packet", [XMP_ATTRIBUTE, XMP_ELEMENT, XMP_OTHER_PREFIX, XMP_SINGLE_QUOTES]
)
@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "GIF"])
def test_the_xmp_orientation_is_applied(file_format: str, packet: bytes) -> None:
    assert is_turned(with_xmp(file_format, packet))


def test_compressed_xmp_in_a_png_is_read() -> None:
    body = b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(XMP_ATTRIBUTE)
    assert is_turned(with_chunk(encoded(noise(40, 20), "PNG"), b"iTXt", body))


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP"])
def test_exif_overrides_xmp(file_format: str) -> None:
    assert not is_turned(with_xmp(file_format, XMP_ATTRIBUTE, exif(1)))
    upside_down = XMP_ATTRIBUTE.replace(b'"6"', b'"3"')
    assert is_turned(with_xmp(file_format, upside_down, exif(6)))


@pytest.mark.parametrize("exif_block", [WITHOUT_TAG.tobytes(), exif(0), exif(9)])
@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP"])
def test_xmp_is_applied_if_exif_has_no_orientation(file_format: str, exif_block: bytes) -> None:
    assert is_turned(with_xmp(file_format, XMP_ATTRIBUTE, exif_block))


@pytest.mark.parametrize("at_end", [False, True])
@pytest.mark.parametrize("name", [b"exif", b"APP1"])
@pytest.mark.parametrize("chunk_type", [b"tEXt", b"zTXt", b"iTXt"])
def test_exif_in_a_raw_profile_is_applied(chunk_type: bytes, name: bytes, at_end: bool) -> None:
    file = encoded(noise(40, 20), "PNG")
    profile = raw_profile(name, exif(6), chunk_type)
    at = len(file) - 12 if at_end else 33
    assert is_turned(file[:at] + profile + file[at:])


@pytest.mark.parametrize(
    ("name", "packet"), [(b"xmp", XMP_ATTRIBUTE), (b"APP1", xmp_segment(XMP_ATTRIBUTE))]
)
def test_xmp_in_a_raw_profile_is_applied(name: bytes, packet: bytes) -> None:
    file = encoded(noise(40, 20), "PNG")
    assert is_turned(file[:33] + raw_profile(name, packet, b"zTXt") + file[33:])


def test_an_exif_chunk_overrides_a_raw_profile() -> None:
    file = encoded(noise(40, 20), "PNG", exif=exif(1))
    assert not is_turned(file[:33] + raw_profile(b"exif", exif(6), b"zTXt") + file[33:])


@pytest.mark.parametrize(
    "body",
    [
        b"Raw profile type exif\0\0" + zlib.compress(b"\nexif\n 4\nxyz!\n"),
        b"Raw profile type exif\0\0not compressed",
        b"Raw profile type exif\0\0",
        b"Raw profile type exif",
    ],
)
def test_a_damaged_raw_profile_is_ignored(body: bytes) -> None:
    assert not is_turned(with_chunk(encoded(noise(40, 20), "PNG"), b"zTXt", body))


@pytest.mark.parametrize(
    "packet", [XMP_ATTRIBUTE.replace(b'"6"', b'"9"'), XMP_ATTRIBUTE[:-60], b"\xff\xfe<\0x\0"]
)
def test_xmp_without_a_valid_orientation_is_ignored(packet: bytes) -> None:
    assert not is_turned(with_xmp("JPEG", packet))


@pytest.mark.parametrize(
    "text", [bytes(100 << 20), b"a:Orientation " * (8 << 20), b"xmlns:a " * (8 << 20)]
)
@pytest.mark.parametrize("keyword", [b"Raw profile type exif", b"Raw profile type xmp"])
def test_only_a_part_of_large_metadata_is_decompressed(keyword: bytes, text: bytes) -> None:
    body = keyword + b"\0\0" + zlib.compress(b"\nexif\n 9\n" + text)
    body_xmp = b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(text)
    file = with_chunk(encoded(noise(40, 20), "PNG"), b"zTXt", body)
    file = with_chunk(file, b"iTXt", body_xmp)
    began_s = time.perf_counter()
    assert first_image(file).orientation == 0
    assert time.perf_counter() - began_s < 1
