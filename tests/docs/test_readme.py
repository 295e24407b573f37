"""The README says what is so: its tables, its commands and its links."""

from __future__ import annotations

import re
from importlib.util import find_spec

import pytest

from server.api.handlers import STATUS
from server.api.http.routes import HTTP_STATUS
from tests.support.doc_tables import README, TABLES, renewed

TEXT = README.read_text(encoding="utf-8")
ROOT = README.parent


def test_the_tables_are_those_of_the_code() -> None:
    assert renewed(TEXT) == TEXT, "python -m tests.support.doc_tables writes them anew"


def test_no_table_is_missing() -> None:
    assert set(re.findall(r"<!-- table: (\w+) -->", TEXT)) == TABLES.keys()


def test_every_error_stands_with_its_status() -> None:
    rows = set(re.findall(r"^\| `(\w+)` \| `(\w+)` \| (\d+) ", TEXT, flags=re.MULTILINE))
    expected = {
        (error.__name__, code.name, str(int(HTTP_STATUS[code]))) for error, code in STATUS.items()
    }
    assert rows == expected


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\bmake ([a-z-]+)\b", TEXT))))
def test_every_make_command_is_one(target: str) -> None:
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)


@pytest.mark.parametrize("module", sorted(set(re.findall(r"python -m ([\w.]+)", TEXT))))
def test_every_module_that_is_run_is_there(module: str) -> None:
    assert find_spec(module)


@pytest.mark.parametrize("script", sorted(set(re.findall(r"python (\w+/\w+\.py)", TEXT))))
def test_every_script_that_is_run_is_there(script: str) -> None:
    assert (ROOT / script).is_file()


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\(([^)#:]+)\)", TEXT))))
def test_every_link_leads_somewhere(target: str) -> None:
    assert (ROOT / target).exists()


def test_it_begins_with_how_to_run_it_and_how_to_test_it() -> None:
    commands = re.findall(r"^(make \w+)", TEXT, flags=re.MULTILINE)
    assert commands[:2] == ["make demo", "make test"]
