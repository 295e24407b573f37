"""Version numbers and labels as text, as the Open Inference Protocol and URLs have them."""

from __future__ import annotations

from typing import NamedTuple

from server.errors import InvalidInput
from server.repository.serving_config import VERSION_LABELS

MAX_DIGITS = 18  # such a number fits into 64 bits
MAX_QUOTED = 80  # characters of a caller's text in an error


class VersionChoice(NamedTuple):
    """A version by number or by label; 0 and empty if the request names none."""

    number: int = 0
    label: str = ""


def parse_version(field: str, text: str) -> VersionChoice:
    """Raises InvalidInput."""
    if not text:
        return VersionChoice()
    if text in VERSION_LABELS:
        return VersionChoice(label=text)
    if not is_whole_number(text) or not int(text):
        raise InvalidInput(
            field,
            f"is {text[:MAX_QUOTED]!r}; a whole number from 1 is allowed, "
            f"{' or '.join(VERSION_LABELS)}, or nothing for the version that gets requests",
        )
    return VersionChoice(number=int(text))


def is_whole_number(text: str) -> bool:
    """Whether the text is a number of decimal digits that fits into 64 bits."""
    return text.isascii() and text.isdecimal() and len(text) <= MAX_DIGITS
