"""Types of command line arguments, for argparse."""

import argparse
import math
from collections.abc import Callable
from typing import TypeVar

from convserve_client.loadgen.results.objective import Objective, parse_objective

T = TypeVar("T")

PRIORITY_LIMIT = 1 << 31


def at_least(minimum: int) -> Callable[[str], int]:
    """A whole number that is not below `minimum`."""

    def parse(text: str) -> int:
        value = int(text)
        if value < minimum:
            raise argparse.ArgumentTypeError(f"{value} given; it must be at least {minimum}")
        return value

    return _named(parse, "whole number")


def positive(text: str) -> float:
    """A finite number above 0."""
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{value} given; it must be positive and finite")
    return value


def not_negative(text: str) -> float:
    """A finite number that is 0 or above."""
    return 0.0 if float(text) == 0 else positive(text)


def priority(text: str) -> int:
    value = at_least(0)(text)
    if value >= PRIORITY_LIMIT:
        raise argparse.ArgumentTypeError(f"{value} given; it must be below {PRIORITY_LIMIT}")
    return value


def list_of(item: Callable[[str], T]) -> Callable[[str], list[T]]:
    """Values separated by commas."""

    def parse(text: str) -> list[T]:
        return [item(part.strip()) for part in text.split(",")]

    return _named(parse, "list")


def mix_of(item: Callable[[str], T]) -> Callable[[str], list[tuple[T, float]]]:
    """Values separated by commas, each with a weight; the default weight is 1."""

    def parse(text: str) -> list[tuple[T, float]]:
        found = []
        for part in text.split(","):
            value, separator, weight = part.strip().partition("=")
            if not value:
                raise argparse.ArgumentTypeError(f"{text!r} has an empty value")
            found.append((item(value), positive(weight) if separator else 1.0))
        return found

    return _named(parse, "mix of VALUE=WEIGHT,...")


def shape(text: str) -> tuple[str, tuple[int, ...]]:
    """NAME:D,D,..."""
    name, separator, dimensions = text.rpartition(":")
    if not separator or not name:
        raise argparse.ArgumentTypeError(f"{text!r} is not a shape; write NAME:D,D,...")
    return name, tuple(at_least(1)(part) for part in dimensions.split(","))


def objective(text: str) -> Objective:
    try:
        return parse_objective(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _named(function: Callable[[str], T], name: str) -> Callable[[str], T]:
    function.__name__ = name  # argparse's error messages contain it
    return function
