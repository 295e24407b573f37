"""base64 is read in every form in which people send it, and refused with the reason otherwise."""

from __future__ import annotations

import base64
import textwrap

import pytest

from server.api.v2.base64_text import NotBase64, decode_base64

DATA = bytes(range(256)) + b"\xfb\xff\xfe"  # has "+" and "/"
TEXT = base64.b64encode(DATA).decode()
URL_SAFE = base64.urlsafe_b64encode(DATA).decode()


@pytest.mark.parametrize("cut", [0, 1, 2])
@pytest.mark.parametrize(
    "form",
    [
        lambda text: text,
        lambda text: text.rstrip("="),
        lambda text: "\n".join(textwrap.wrap(text, 76)),
        lambda text: "\r\n".join(textwrap.wrap(text, 64)) + "\r\n",
        lambda text: "  " + "\n\t".join(textwrap.wrap(text.rstrip("="), 60)),
        lambda text: text.replace("+", "-").replace("/", "_"),
        lambda text: text.replace("+", "-").replace("/", "_").rstrip("="),
        lambda text: "data:image/png;base64," + text,
        lambda text: "DATA:image/jpeg;charset=utf-8;BASE64," + text.rstrip("="),
        lambda text: "data:;base64, " + text,
        lambda text: "\ndata:image/png;base64," + text.replace("+", "%2B").replace("=", "%3D"),
    ],
)
def test_every_usual_form_is_read(form: object, cut: int) -> None:
    data = DATA[: len(DATA) - cut]
    assert callable(form)
    assert decode_base64(form(base64.b64encode(data).decode())) == data


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("ab?d", "not base64: it contains '?'"),
        ("b'YWJj'", 'not base64: it contains "\'"'),
        ("YWJjé", "not base64: it contains 'é'"),
        ("YQ==YQ==", "not base64: it continues after its padding"),
        ("YWJjZ", "not base64: 5 characters are one too many or too few"),
        (
            "data:image/png,abc",
            "a data URL without base64; it must begin as data:image/png;base64,",
        ),
        ("/images/cat.jpg", "not base64: it contains '.'"),
    ],
)
def test_other_texts_are_refused_with_the_reason(text: str, reason: str) -> None:
    with pytest.raises(NotBase64) as caught:
        decode_base64(text)
    assert str(caught.value) == reason


def test_an_empty_text_is_empty() -> None:
    assert decode_base64("") == decode_base64("data:image/png;base64,") == b""
