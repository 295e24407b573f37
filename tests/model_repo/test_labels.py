"""Class names come out clean, whatever the editor that saved the label file."""

from __future__ import annotations

from pathlib import Path

import pytest

from model_repo.labels import read_labels, repeated_names


def labels(folder: Path, content: bytes) -> tuple[str, ...]:
    (folder / "mine.txt").write_bytes(content)
    return read_labels(folder / "mine.txt")


@pytest.mark.parametrize(
    "content",
    [
        b"hot dog\nnot hot dog\n",
        b"hot dog\nnot hot dog",
        b"\xef\xbb\xbfhot dog\nnot hot dog\n",
        b"\xef\xbb\xbf hot dog\n\xef\xbb\xbfnot hot dog\n",
        b"hot dog\r\nnot hot dog\r\n",
        b"hot dog\rnot hot dog\r",
        b"hot dog \t\n  not hot dog  \n",
        b"hot dog\nnot hot dog\n\n \r\n\n",
        "\ufeffhot dog\r\nnot hot dog\r\n".encode("utf-16-le"),
        "\ufeffhot dog\r\nnot hot dog\r\n".encode("utf-16-be"),
        "\ufeffhot dog\nnot hot dog\n".encode("utf-32-le"),
        "hot dog\N{NO-BREAK SPACE}\n\N{IDEOGRAPHIC SPACE}not hot dog".encode(),
        "hot dog \N{ZERO WIDTH SPACE} \nnot hot dog\N{WORD JOINER}\n".encode(),
    ],
)
def test_marks_blanks_and_line_ends_are_not_part_of_a_name(tmp_path: Path, content: bytes) -> None:
    assert labels(tmp_path, content) == ("hot dog", "not hot dog")


def test_a_name_keeps_its_inner_blanks_and_all_letters(tmp_path: Path) -> None:
    names = ("crème  brûlée", "n01440764\ttench", "鯉", "line\N{LINE SEPARATOR}end")
    assert labels(tmp_path, "\n".join(names).encode()) == names


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it has no names; each line must be the name of one class"),
        (b"\xef\xbb\xbf\r\n \r\n", "it has no names; each line must be the name of one class"),
        (b"cat\n\ndog\n", "line 2 is empty; each line must be the name of one class"),
        (b"\r\ncat\r\n", "line 1 is empty; each line must be the name of one class"),
        (b"cat\ndo\x1bg\n", "line 2 contains the control character U+001B; remove it"),
        (
            "cat\nBär\n".encode("latin-1"),
            "line 2 is not UTF-8 text; save the file as UTF-8",
        ),
        (
            "cat\ndog\n".encode("utf-16-le"),
            "it contains zero bytes, so it is not UTF-8 text; save the file as UTF-8",
        ),
        (b"\xff\xfec", "it is not UTF-16 text; save the file as UTF-8"),
    ],
)
def test_the_message_about_a_wrong_file_names_the_line_and_what_to_do(
    tmp_path: Path, content: bytes, message: str
) -> None:
    with pytest.raises(ValueError, match="labels") as caught:
        labels(tmp_path, content)
    assert str(caught.value) == f"labels in mine.txt: {message}"


def test_repeated_names_are_found_with_their_classes() -> None:
    assert repeated_names(["crane", "dog", "maillot", "crane"]) == {"crane": [0, 3]}
    assert repeated_names(["cat", "dog"]) == {}
