"""An event is one line, whatever its values hold."""

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


def test_a_json_line_has_time_level_event_and_every_value() -> None:
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


def test_json_lines_stay_json_whatever_the_values() -> None:
    odd: dict[str, Any] = {
        "nan": float("nan"),
        "infinite": float("inf"),
        "thing": object(),
        "text": HOSTILE,
    }
    text = JsonLines().format(record(**odd))

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    line = json.loads(text, parse_constant=refuse)
    assert (line["nan"], line["infinite"], line["text"]) == ("nan", "inf", HOSTILE)
    assert text.isascii()
    assert "\n" not in text


def test_a_text_line_is_for_reading() -> None:
    line = TextLines().format(record(model="tiny", seconds=0.123456, reason="no such file"))
    assert line.split(" ", 1)[1] == 'info happened model=tiny seconds=0.1235 reason="no such file"'


@pytest.mark.parametrize("formatter", [TextLines(), JsonLines()], ids=["text", "json"])
@pytest.mark.parametrize("value", [HOSTILE, "\u2028", "\x85", "\x9b1A", "", "\t"])
def test_no_value_forges_a_line_or_commands_a_terminal(
    formatter: logging.Formatter, value: str
) -> None:
    for line in (formatter.format(record(value=value)), formatter.format(record(value))):
        assert line.isprintable()
        assert len(line.splitlines()) == 1


def test_the_stack_of_an_error_stands_in_its_json_line() -> None:
    line = json.loads(JsonLines().format(failed(ValueError("odd\nthing"))))
    assert (line["event"], line["model"]) == ("failed", "tiny")
    assert "Traceback" in line["stack"]
    assert "ValueError: odd\nthing" in line["stack"]


def test_the_stack_of_an_error_is_indented_below_its_text_line() -> None:
    forged = "12:00:00.000 info model_ready\x1b[2J"
    first, *stack = TextLines().format(failed(ValueError(f"odd\n{forged}"))).split("\n")
    assert first.endswith("failed model=tiny")
    assert all(line.startswith("    ") and line.isprintable() for line in stack)
    assert any("ValueError: odd" in line for line in stack)


@pytest.mark.parametrize(
    "library", ["uvicorn.error", "watchfiles.main", "hpack.hpack", "PIL.Image"]
)
def test_libraries_tell_of_trouble_only(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    root, ours = logging.getLogger(), logging.getLogger("server")
    monkeypatch.setattr(root, "handlers", [])
    for logger in (root, ours):
        monkeypatch.setattr(logger, "level", logger.level)
    configure("debug", "text")
    assert logging.getLogger(library).getEffectiveLevel() == logging.WARNING
    assert logging.getLogger("server.models.registry").getEffectiveLevel() == logging.DEBUG
