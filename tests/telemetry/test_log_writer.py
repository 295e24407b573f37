"""Logging never waits for the reader of the log; dropped lines are counted and reported."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
from io import FileIO
from pathlib import Path

import pytest

from server.telemetry import log_writer
from server.telemetry.log_writer import LogWriter, dropped_log_lines
from server.telemetry.logs import TextLines
from server.telemetry.metrics import Metrics

LIMIT_S = 20  # of a step that should take milliseconds
LONG = "x" * 1000
ROOT = Path(__file__).resolve().parents[2]


class Log:
    """A logger whose writer writes into a pipe."""

    def __init__(self, max_queued_bytes: int = 10_000, *, blocking: bool = True) -> None:
        reader, pipe = os.pipe()
        os.set_blocking(pipe, blocking)
        self.reader, self.pipe = (FileIO(reader), FileIO(pipe, "w"))
        self.writer = LogWriter(pipe, max_queued_bytes)
        self.writer.setFormatter(TextLines())
        self.logger = logging.Logger("server.test")
        self.logger.addHandler(self.writer)
        self._read: list[bytes] = []
        self._reading = threading.Thread(target=lambda: self._read.append(self.reader.read()))

    def start_reading(self) -> None:
        """Reads in a thread until `lines` closes the pipe."""
        self._reading.start()

    def lines(self) -> list[str]:
        """All lines, without their time. Ends the writer."""
        self.writer.close()
        self.writer._thread.join(LIMIT_S)
        self.pipe.close()
        self._reading.join(LIMIT_S)
        self.reader.close()
        return [line.split(" ", 1)[1] for line in self._read[0].decode().splitlines()]


@pytest.fixture(autouse=True)
def fast_flush(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_writer, "FLUSH_S", 0.01)


def close(log: Log) -> None:
    log.writer.close()
    log.reader.close()
    log.writer._thread.join(LIMIT_S)
    log.pipe.close()


def test_lines_arrive_in_order() -> None:
    log = Log()
    log.start_reading()
    for number in range(100):
        log.logger.info("happened", extra={"number": number})
    assert log.lines() == [f"info happened number={number}" for number in range(100)]


@pytest.mark.parametrize("blocking", [True, False])
def test_lines_that_the_reader_is_too_slow_for_are_dropped_counted_and_reported(
    blocking: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = Log(blocking=blocking)
    for number in range(300):  # the pipe holds 64 KiB, the queue 10 KB
        log.logger.info(LONG, extra={"number": number})
    assert 150 < log.writer.dropped < 300
    log.writer.flush()  # times out
    log.start_reading()
    monkeypatch.setattr(log_writer, "FLUSH_S", LIMIT_S)
    log.writer.flush()
    log.logger.info("afterwards")
    *lines, last = log.lines()
    assert last == "info afterwards"
    number = 0
    for line in lines:
        if line.startswith("warning log_lines_dropped count="):
            number += int(line.rpartition("=")[2])
        else:
            assert line == f"info {LONG} number={number}"
            number += 1
    assert number == 300


def test_a_reader_that_is_gone_costs_lines_but_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_writer, "FLUSH_S", LIMIT_S)
    log = Log()
    log.reader.close()
    log.logger.info("first")
    log.logger.info("second")
    log.writer.flush()
    assert log.writer.dropped == 2
    close(log)


def test_a_value_that_can_not_be_formatted_is_counted(capfd: pytest.CaptureFixture[str]) -> None:
    class Odd:
        def __str__(self) -> str:
            raise ValueError("odd")

    log = Log()
    log.start_reading()
    log.logger.info("happened", extra={"value": Odd()})
    log.logger.info("\ud800")
    assert sorted(log.lines()) == ['info "\\ud800"', "warning log_lines_dropped count=1"]
    assert capfd.readouterr().err == ""


def test_dropped_lines_are_a_metric(monkeypatch: pytest.MonkeyPatch) -> None:
    log = Log(max_queued_bytes=0)
    monkeypatch.setattr(logging.getLogger(), "handlers", [log.writer])
    log.logger.info("dropped")
    assert dropped_log_lines() == 1
    assert "convserve_log_lines_dropped_total 1.0\n" in Metrics().render().decode()
    close(log)


PYTHON_MESSAGES = """
import threading, warnings
from server.telemetry import logs

class Unraisable:
    def __del__(self):
        raise ValueError("in __del__")

def fail():
    raise ValueError("in a thread")

logs.configure("info", "json")
logs.log_python_messages()
Unraisable()
thread = threading.Thread(target=fail, name="failing")
thread.start()
thread.join()
warnings.warn("careful", stacklevel=1)
"""


def test_what_python_writes_to_standard_error_is_logged() -> None:
    """In a process of its own: libraries that other tests use change how warnings are shown."""
    child = subprocess.run(
        [sys.executable, "-c", PYTHON_MESSAGES],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    unraisable, failed, warned = map(json.loads, child.stderr.splitlines())
    assert (unraisable["event"], failed["event"]) == ("error_ignored", "thread_failed")
    assert failed["thread_name"] == "failing"
    assert "careful" in warned["event"]
