"""An image file in a multipart form is classified like the file as body."""

from __future__ import annotations

import base64
from pathlib import Path

import httpx
import pytest

from tests.api.http.rest_calls import client_of, problem
from tests.api.v2.tensor_calls import png
from tests.support.serving import publish

CLASSIFY = "/v1/models/tiny:classify"
TYPE = {"content-type": "multipart/form-data; boundary=X"}


def part(content: bytes, *headers: str) -> bytes:
    return (
        b"--X\r\n"
        + "".join(f"{line}\r\n" for line in headers).encode()
        + b"\r\n"
        + content
        + b"\r\n"
    )


FILE = 'Content-Disposition: form-data; name="image"; filename="cat.png"'
NO_FILE = 'Content-Disposition: form-data; name="image"'
END = b"--X--\r\n"


async def test_a_broken_form_is_not_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Otherwise its sender could fill the disk."""
    publish(tmp_path)
    async with client_of(tmp_path) as (_, client):
        caplog.clear()
        answer = await client.post(CLASSIFY, content=b"--X\r\n\xff: a\r\n", headers=TYPE)
        assert answer.status_code == 400
    assert not [one for one in caplog.records if one.name.startswith("python_multipart")]


async def test_one_file_of_any_name_is_classified(tmp_path: Path) -> None:
    publish(tmp_path)
    async with client_of(tmp_path) as (_, client):
        for name in ("image", "file", "images[]"):
            answer = await client.post(CLASSIFY, files={name: ("cat.png", png(7), "image/png")})
            assert answer.json()["classes"][0]["index"] == 7
        boundary_like = png(7) + b"\r\n--Y\r\n"  # bytes after the end of the image
        forms = [
            part(png(7), NO_FILE) + END,  # curl -F 'image=<cat.png'
            part(boundary_like, FILE, "Content-Type: image/png") + END,
            part(png(7), FILE, "Content-Transfer-Encoding: binary") + END + b"epilogue",
            part(base64.encodebytes(png(7)), FILE, "Content-Transfer-Encoding: base64") + END,
            part(b"3", 'Content-Disposition: form-data; name="top_k"') + part(png(7), FILE) + END,
        ]
        for form in forms:
            answer = await client.post(CLASSIFY, content=form, headers=TYPE)
            assert answer.status_code == 200, answer.text
            assert answer.json()["classes"][0]["index"] == 7
        assert len(answer.json()["classes"]) == 3


@pytest.mark.parametrize(
    ("form", "field", "words"),
    [
        (END, "body", "is a form that has no file; send one"),
        (part(png(1), FILE) + part(png(2), FILE) + END, "body", "has 2 files; send one"),
        (part(png(1), FILE), "body", "ends too early"),
        (part(png(1), FILE)[:-30], "body", "ends too early"),
        (b"no form at all", "body", "is not a valid form"),
        (part(b"no image", FILE) + END, "image", "JPEG"),
        (part(b"", FILE) + END, "image", ""),
        (part(b"x", NO_FILE.replace("image", "size")) + part(png(1), FILE) + END, "size", "is not"),
        (part(png(1), FILE, "Content-Transfer-Encoding: gzip") + END, "image", "'gzip'; binary or"),
        (part(b"?", FILE, "Content-Transfer-Encoding: base64") + END, "image", "is not base64"),
        (20 * part(b"", FILE) + END, "body", "more than 8 parts"),
        (part(b"", FILE, *(f"h{n}: v" for n in range(50))) + END, "body", "not a valid form"),
    ],
)
async def test_a_wrong_form_is_refused_with_the_reason(
    form: bytes, field: str, words: str, tmp_path: Path
) -> None:
    publish(tmp_path)
    async with client_of(tmp_path) as (_, client):
        refused: httpx.Response = await client.post(CLASSIFY, content=form, headers=TYPE)
        assert refused.status_code == 400, refused.text
        assert problem(refused)["field"] == field
        assert words in problem(refused)["detail"]


async def test_another_kind_of_form_is_refused(tmp_path: Path) -> None:
    publish(tmp_path)
    async with client_of(tmp_path) as (_, client):
        for kind in ("multipart/mixed; boundary=X", "multipart/form-data"):
            headers = {"content-type": kind}
            refused = await client.post(CLASSIFY, content=part(png(1), FILE) + END, headers=headers)
            assert problem(refused)["field"] == "Content-Type"


async def test_a_form_may_be_larger_than_its_file_may(tmp_path: Path) -> None:
    publish(tmp_path)
    async with client_of(tmp_path, max_image_bytes=len(png(7))) as (_, client):
        answer = await client.post(CLASSIFY, files={"image": png(7)})
        assert answer.status_code == 200
        refused = await client.post(CLASSIFY, files={"image": png(7) + b"x"})
        assert refused.status_code == 400
