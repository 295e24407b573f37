"""Log formats: one line per event, and no value can break or forge a line."""

from __future__ import annotations

import json
import logging
import sys
from datetime import datetime
from typing import Any

import pytest

from server.telemetry.logs import JsonLines, TextLines, configure

HOSTILE = 'a\nb\r\x1b[31m\x00\u2028\u202e"=\ud800 \N{SNOWMAN}'


def record(event: str = "happened", **extra: object) -> logging.LogRecord:
    made = logging.makeLogRecord({"name": "server", "levelno": 20, "levelname": "INFO"})
    made.msg = event
    vars(made).update(extra)
    return made


def failed(error: Exception) -> logging.LogRecord:
    try:
        raise error
    except Exception:
        return record("failed", exc_info=sys.exc_info(), model="tiny")


def test_a_json_line_contains_time_level_event_and_all_values() -> None:
    line = json.loads(JsonLines().format(record(model="tiny", version=1, seconds=0.25)))
    moment = datetime.fromisoformat(line.pop("time"))
    assert moment.utcoffset() is not None
    assert line == {
        "level": "info",
        "event": "happened",
        "model": "tiny",
        "version": 1,
        "seconds": 0.25,
    }


def test_a_json_line_is_valid_json_for_any_value() -> None:
    unusual: dict[str, Any] = {
        "nan": float("nan"),
        "infinite": float("inf"),
        "object": object(),
        "text": HOSTILE,
    }
    text = JsonLines().format(record(**unusual))

    def reject(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    line = json.loads(text, parse_constant=reject)
    assert (line["nan"], line["infinite"], line["text"]) == ("nan", "inf", HOSTILE)
    assert text.isascii()
    assert "\n" not in text


def test_a_text_line_rounds_numbers_and_quotes_values_with_spaces() -> None:
    line = TextLines().format(record(model="tiny", seconds=0.123456, reason="no such file"))
    assert line.split(" ", 1)[1] == 'info happened model=tiny seconds=0.1235 reason="no such file"'


@pytest.mark.parametrize("formatter", [TextLines(), JsonLines()], ids=["text", "json"])
@pytest.mark.parametrize("value", [HOSTILE, "\u2028", "\x85", "\x9b1A", "", "\t"])
def test_a_value_cannot_forge_a_line_or_control_a_terminal(
    formatter: logging.Formatter, value: str
) -> None:
    for line in (formatter.format(record(value=value)), formatter.format(record(value))):
        assert line.isprintable()
        assert len(line.splitlines()) == 1


def test_a_json_line_contains_the_stack_of_an_error() -> None:
    line = json.loads(JsonLines().format(failed(ValueError("wrong\nvalue"))))
    assert (line["event"], line["model"]) == ("failed", "tiny")
    assert "Traceback" in line["stack"]
    assert "ValueError: wrong\nvalue" in line["stack"]


def test_the_stack_of_an_error_is_indented_below_the_text_line() -> None:
    forged = "12:00:00.000 info version_loaded\x1b[2J"
    first, *stack = TextLines().format(failed(ValueError(f"wrong\n{forged}"))).split("\n")
    assert first.endswith("failed model=tiny")
    assert all(line.startswith("    ") and line.isprintable() for line in stack)
    assert any("ValueError: wrong" in line for line in stack)


@pytest.mark.parametrize(
    "library", ["uvicorn.error", "watchfiles.main", "hpack.hpack", "PIL.Image"]
)
def test_libraries_log_only_warnings_and_errors(
    library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, ours = logging.getLogger(), logging.getLogger("server")
    monkeypatch.setattr(root, "handlers", [])
    for logger in (root, ours):
        monkeypatch.setattr(logger, "level", logger.level)
    configure("debug", "text")
    root.handlers[0].close()
    assert logging.getLogger(library).getEffectiveLevel() == logging.WARNING
    assert logging.getLogger("server.models.registry").getEffectiveLevel() == logging.DEBUG
