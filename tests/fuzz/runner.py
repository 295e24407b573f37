"""Runs fuzz targets, and keeps the inputs that they fail on."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from random import Random

from tests.fuzz.target import Feed, Target

MIN_INPUTS = 200  # however slow the machine is
MAX_INPUT_S = 1.0  # of processor time, for one input


class SlowInput(Exception):
    """An input costs too much processor time."""


@dataclass
class Result:
    """What became of the inputs of one target."""

    target: str
    inputs: int = 0
    accepted: int = 0
    seconds: float = 0.0
    faults: list[tuple[Path, Exception]] = field(default_factory=list)


def made_input(target: Target, seed: int, number: int) -> bytes:
    """The input with this number. The same seed and number give the same input."""
    return target.make(Random(f"{seed} {target.name} {number}"))


def run(
    target: Target, seed: int, inputs: int, keep: Path, seconds: float = float("inf")
) -> Result:
    """Feeds up to that many inputs to the target, for about so long."""
    result = Result(target.name)
    with target.feed() as feed:
        began_s = time.monotonic()
        for number in range(inputs):
            data = made_input(target, seed, number)
            try:
                result.accepted += fed(feed, data)
            except Exception as fault:
                result.faults.append((kept(target, data, keep), fault))
                if len(result.faults) == 5:
                    break
            result.inputs += 1
            result.seconds = time.monotonic() - began_s
            if result.seconds > seconds and result.inputs >= MIN_INPUTS:
                break
    return result


def fed(feed: Feed, data: bytes) -> bool:
    """Feeds one input. Raises what the target raises, and SlowInput."""
    began_s = time.process_time()
    is_accepted = feed(data)
    took_s = time.process_time() - began_s
    if took_s > MAX_INPUT_S:
        raise SlowInput(f"{len(data)} bytes took {took_s:.1f} s of processor time")
    return is_accepted


def kept(target: Target, data: bytes, keep: Path) -> Path:
    """Writes the input to a file that `python -m tests.fuzz --again FILE` reads."""
    folder = keep / target.name
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / sha256(data).hexdigest()[:16]
    path.write_bytes(data)
    return path


def split(targets: Sequence[Target], inputs: int) -> dict[str, int]:
    """How many of all inputs each target gets."""
    whole = sum(one.share for one in targets)
    return {one.name: round(inputs * one.share / whole) for one in targets}
