"""Labelled images: which files a data set has, and which class each of them has."""

from __future__ import annotations

from pathlib import Path

import pytest

from model_repo.evaluation.dataset import DataError, read_data

FOOD = ("apple_pie", "french fries", "Ice cream", "crème brûlée")


def make(root: Path, *files: str) -> Path:
    for file in files:
        path = root / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"not read here")
    return root


def classes(root: Path, labels: tuple[str, ...] = FOOD) -> dict[str, int]:
    data = read_data(root, labels)
    base = root if root.is_dir() else root.parent
    return {sample.path.relative_to(base).as_posix(): sample.label for sample in data.samples}


def test_folders_are_named_by_label(tmp_path: Path) -> None:
    make(tmp_path, "apple_pie/1.jpg", "French-Fries/a.PNG", "ice_cream/x/y/2.webp")
    assert classes(tmp_path) == {
        "French-Fries/a.PNG": 1,
        "apple_pie/1.jpg": 0,
        "ice_cream/x/y/2.webp": 2,
    }


def test_folders_are_named_by_index(tmp_path: Path) -> None:
    make(tmp_path, "0/1.jpg", "3/1.jpg", "002/1.jpg")
    assert classes(tmp_path) == {"0/1.jpg": 0, "002/1.jpg": 2, "3/1.jpg": 3}


def test_numbers_that_are_labels_are_labels(tmp_path: Path) -> None:
    make(tmp_path, "1/a.png", "2/a.png")
    assert classes(tmp_path, ("1", "2", "3")) == {"1/a.png": 0, "2/a.png": 1}


def test_reports_files_that_are_not_images(tmp_path: Path) -> None:
    make(tmp_path, "apple_pie/1.jpg", "apple_pie/notes.txt", "readme.md", ".cache/2.jpg")
    data = read_data(tmp_path, FOOD)
    assert len(data.samples) == 1
    assert sorted(path.name for path in data.ignored) == ["notes.txt", "readme.md"]


def test_a_link_to_a_parent_folder_ends(tmp_path: Path) -> None:
    make(tmp_path, "apple_pie/1.jpg")
    (tmp_path / "apple_pie" / "again").symlink_to(tmp_path / "apple_pie")
    assert len(read_data(tmp_path, FOOD).samples) == 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("file,label\na.jpg,apple_pie\nb.jpg,2\n", "'2' is neither a label"),
        ("file,label\na.jpg,apple_pie\nb.jpg,french fries\n", {"a.jpg": 0, "b.jpg": 1}),
        ("label;note;path\n3;x;b.jpg\n", {"b.jpg": 3}),
        ("a.jpg\t0\nb.jpg\t1\n", {"a.jpg": 0, "b.jpg": 1}),
        ("a.jpg,0\n\nc.jpg,1\n", "line 3: there is no file c.jpg"),
        ("a.jpg,9\n", "label 9 is not a class: the model has 4 classes, 0 to 3"),
        ("a.jpg\n", "line 1 has 1 columns"),
        ("", "is empty"),
    ],
    ids=[
        "labels and indices mixed",
        "header",
        "other columns",
        "tabs",
        "missing file",
        "index too high",
        "one column",
        "empty",
    ],
)
def test_csv(tmp_path: Path, text: str, expected: str | dict[str, int]) -> None:
    make(tmp_path, "a.jpg", "b.jpg")
    path = tmp_path / "val.csv"
    path.write_text(text)
    if isinstance(expected, dict):
        assert classes(path) == expected
    else:
        with pytest.raises(DataError, match=expected):
            read_data(path, FOOD)


def test_an_unknown_folder_names_similar_labels(tmp_path: Path) -> None:
    make(tmp_path, "apple_pies/1.jpg", "ice_cream/1.jpg")
    with pytest.raises(DataError, match=r"'apple_pies' is neither .*; similar: apple_pie\. "):
        read_data(tmp_path, FOOD)


def test_a_label_of_two_classes_needs_indices(tmp_path: Path) -> None:
    make(tmp_path, "crane/1.jpg")
    with pytest.raises(DataError, match=r"several classes \(1, 2\); name them all by index"):
        read_data(tmp_path, ("bird", "crane", "crane"))


@pytest.mark.parametrize("files", [[], ["1.jpg"], ["apple_pie/readme.md"]])
def test_data_without_images_is_an_error(tmp_path: Path, files: list[str]) -> None:
    with pytest.raises(DataError, match=r"one subfolder per"):
        read_data(make(tmp_path, *files), FOOD)


def test_a_missing_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="val does not exist"):
        read_data(tmp_path / "val", FOOD)
