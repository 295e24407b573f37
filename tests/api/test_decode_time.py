"""The time to decode images is learned by size and format."""

from __future__ import annotations

import pytest

from server.api import decode_time
from server.api.decode_time import FRESH_S, DecodeBacklog, DecodeTimes

JPEG, PNG = b"\xff" + bytes(999), b"\x89" + bytes(999)


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time; a test changes it."""
    now = [100.0]
    monkeypatch.setattr(decode_time, "clock", lambda: now[0])
    return now


def test_images_of_the_same_format_and_about_the_same_size_are_alike(now: list[float]) -> None:
    times = DecodeTimes()
    assert times.expected_s(JPEG) == 0
    times.record(JPEG, 0.010)
    assert times.expected_s(JPEG[:600]) == 0.010
    assert times.expected_s(memoryview(JPEG)) == 0.010
    assert times.expected_s(JPEG[:500]) == times.expected_s(PNG) == times.expected_s(b"") == 0


def test_an_estimate_expires(now: list[float]) -> None:
    """Else requests that are refused for it could never correct it."""
    times = DecodeTimes()
    times.record(JPEG, 5.0)
    now[0] += FRESH_S - 0.1
    assert times.expected_s(JPEG) == 5.0
    now[0] += 0.2
    assert times.expected_s(JPEG) == 0


def test_a_few_slow_images_do_not_change_the_estimate_much(now: list[float]) -> None:
    times = DecodeTimes()
    for number in range(300):
        times.record(JPEG, 2.0 if number % 10 == 0 else 0.010)
    assert 0.005 < times.expected_s(JPEG) < 0.015
    for _ in range(100):
        times.record(JPEG, 0.100)
    assert times.expected_s(JPEG) == pytest.approx(0.100, rel=0.2)


def test_work_waits_for_the_work_before_it_and_principals_take_turns(now: list[float]) -> None:
    backlog = DecodeBacklog(threads=2)
    backlog.times.record(JPEG, 0.010)
    assert backlog.ready_in_s("a", [JPEG]) == pytest.approx(0.010)
    assert backlog.ready_in_s("a", [JPEG] * 4) == pytest.approx(0.020)
    counted = [backlog.add("a", [JPEG] * 5) for _ in range(4)]
    assert backlog.ready_in_s("a", [JPEG]) == pytest.approx(0.105)
    assert backlog.ready_in_s("b", [JPEG]) == pytest.approx(0.010)
    assert backlog.ready_in_s("b", [JPEG] * 4) == pytest.approx(0.040)
    unknown = backlog.add("a", [PNG])
    for seconds in [*counted, unknown]:
        backlog.remove("a", seconds)
    assert backlog.ready_in_s("a", [JPEG]) == pytest.approx(0.010)
