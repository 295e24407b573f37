"""Tables in docs/ agree with the code."""

import re

from server.api.status import HTTP_STATUS, STATUS
from tests.docs.pages import PAGES, ROOT, name_of
from tests.support.doc_tables import TABLES, updated


def test_the_generated_tables_are_up_to_date() -> None:
    for page in {page for page, _ in TABLES.values()}:
        text = (ROOT / page).read_text(encoding="utf-8")
        assert updated(text) == text, f"{page}: run python -m tests.support.doc_tables"


def test_every_generated_table_is_on_its_page() -> None:
    found = {
        (name, name_of(page))
        for page in PAGES
        for name in re.findall(r"<!-- table: (\w+) -->", page.read_text(encoding="utf-8"))
    }
    assert found == {(name, page) for name, (page, _) in TABLES.items()}


def test_the_error_table_lists_every_error_with_its_statuses() -> None:
    text = (ROOT / "docs/api.md").read_text(encoding="utf-8")
    rows = set(re.findall(r"^\| `(\w+)` \| `(\w+)` \| (\d+) ", text, flags=re.MULTILINE))
    assert rows == {
        (error.__name__, code.name, str(int(HTTP_STATUS[code]))) for error, code in STATUS.items()
    }
