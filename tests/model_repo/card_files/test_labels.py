"""Class names come out clean, whatever the editor that saved the label file."""

from __future__ import annotations

from pathlib import Path

import pytest

from model_repo.card_files.labels import read_labels, repeated_names


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


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("list.json", '["cat", " dog ", "sea cow"]'),
        (
            "imagenet_class_index.json",
            '{"0": ["n1", "cat"], "1": ["n2", "dog"], "2": ["n3", "sea cow"]}',
        ),
        ("index_to_name.json", '{"2": "sea cow", "0": "cat", "1": "dog"}'),
        ("class_indices.json", '{"sea cow": 2, "cat": 0, "dog": 1}'),
        ("config.json", '{"hidden": [1], "id2label": {"0": "cat", "1": "dog", "2": "sea cow"}}'),
        ("config.json", '{"label2id": {"dog": 1, "cat": 0, "sea cow": 2}}'),
        ("classes.json", '{"classes": ["cat", "dog", "sea cow"]}'),
        ("bom.json", '\ufeff["cat", "dog", "sea cow"]'),
        ("one.csv", "cat\ndog\nsea cow\n"),
        ("header.csv", "name\ncat\ndog\nsea cow\n"),
        ("index.csv", "0,cat\n2,sea cow\n1,dog\n"),
        ("behind.csv", "cat,0\r\ndog,1\r\nsea cow,2\r\n"),
        ("both.csv", 'index,name\n0,cat\n1,"dog"\n2,sea cow\n'),
        ("more.csv", "id,group,label\n0,pet,cat\n1,pet,dog\n2,wild,sea cow\n"),
        ("excel.csv", "\ufeffclass_id;class_name\n0;cat\n1;dog\n2;sea cow\n\n"),
        ("tabs.tsv", "0\tcat\n1\tdog\n2\tsea cow\n"),
    ],
)
def test_every_usual_form_of_a_label_file_is_read(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    assert read_labels(tmp_path / name) == ("cat", "dog", "sea cow")


def test_names_in_csv_may_hold_commas_and_look_like_numbers(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('index,name\n0,"tench, Tinca tinca"\n1,2\n')
    assert read_labels(tmp_path / "a.csv") == ("tench, Tinca tinca", "2")
    (tmp_path / "b.csv").write_text("7\n8\n9\n")
    assert read_labels(tmp_path / "b.csv") == ("7", "8", "9")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", "", "it is not JSON: "),
        ("a.json", '"cat"', "it must be a list of names, index to name, or name to index"),
        ("a.json", "[]", "it has no names"),
        ("a.json", "[" * 100_000, "it is not JSON: maximum recursion depth"),
        ("a.csv", f'"{"x" * 200_000}"', "field larger than field limit"),
        ("a.json", "{}", "it must be a list of names, index to name, or name to index"),
        ("a.json", '["cat", ""]', "name 2 is empty; each name must be the name of one class"),
        ("a.json", '["cat", 3]', "3 is not a name; names must be texts"),
        ("a.json", '{"0": "cat", "2": "dog"}', "there are 2 names, but index 1 has none; indices"),
        ("a.json", '{"cat": 1, "dog": 2}', "there are 2 names, but index 0 has none; indices"),
        ("a.json", '{"cat": 0, "dog": 0}', "index 0 has two names, 'cat' and 'dog'"),
        ("a.json", '{"cat": "dog"}', "'cat' is neither an index nor a name with an index"),
        ("a.csv", "", "it has no names"),
        (
            "a.csv",
            "cat,dog\nbird,cow\n",
            "it has 2 columns; which one is the name? Add a first row",
        ),
        ("a.csv", "index,name\n0,cat\nx,dog\n", "'x' is not an index; indices are 0, 1, 2, ..."),
        (
            "a.csv",
            "0,tench, Tinca\n1,dog\n",
            "row 2 has 2 columns, the first row 3; put names with",
        ),
        ("a.csv", "0,cat\n2,dog\n", "there are 2 names, but index 1 has none"),
    ],
)
def test_a_wrong_json_or_csv_file_is_described(
    tmp_path: Path, name: str, content: str, message: str
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match="labels") as caught:
        read_labels(tmp_path / name)
    assert str(caught.value).startswith(f"labels in {name}: {message}")


def test_repeated_names_are_found_with_their_classes() -> None:
    assert repeated_names(["crane", "dog", "maillot", "crane"]) == {"crane": [0, 3]}
    assert repeated_names(["cat", "dog"]) == {}
