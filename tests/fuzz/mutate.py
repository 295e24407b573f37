"""Small random changes of bytes and of JSON values."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

MAX_CHANGES = 4
INTERESTING = (
    0,
    1,
    2,
    127,
    128,
    255,
    256,
    32767,
    65535,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**63,
    2**64 - 1,
)

ODD_VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 3, 255, 256, 2**31, 2**63, 2**64, 10**30, 0.5, -0.0, 1e308,
    "", "a", "\0", "é", "\ud800", "x" * 300, "-1", "NaN", [], {}, [[]], [None], [{}], {"a": {}},
    {"": 0}, [1, "a", None], [[1], [2, [3]]],
)  # fmt: skip


def mutated(data: bytes, draw: Random) -> bytes:
    """The bytes with one to four changes."""
    changed = bytearray(data)
    for _ in range(draw.randint(1, MAX_CHANGES)):
        draw.choice(_CHANGES)(changed, draw)
    return bytes(changed)


def sometimes_mutated(data: bytes, draw: Random, chance: float = 0.5) -> bytes:
    return mutated(data, draw) if draw.random() < chance else data


def _place(data: bytearray, draw: Random) -> int:
    return draw.randint(0, max(0, len(data) - 1))


def _part(data: bytearray, draw: Random) -> tuple[int, int]:
    start = _place(data, draw)
    return start, start + draw.choice((1, 2, 4, 8, 32, 200))


def _flip(data: bytearray, draw: Random) -> None:
    if data:
        data[_place(data, draw)] ^= 1 << draw.randrange(8)


def _set(data: bytearray, draw: Random) -> None:
    if data:
        data[_place(data, draw)] = draw.randrange(256)


def _insert(data: bytearray, draw: Random) -> None:
    start = _place(data, draw)
    data[start:start] = draw.randbytes(draw.choice((1, 2, 4, 16)))


def _repeat(data: bytearray, draw: Random) -> None:
    start, end = _part(data, draw)
    data[start:start] = data[start:end] * draw.choice((1, 1, 2, 20))


def _delete(data: bytearray, draw: Random) -> None:
    start, end = _part(data, draw)
    del data[start:end]


def _truncate(data: bytearray, draw: Random) -> None:
    del data[_place(data, draw) :]


def _number(data: bytearray, draw: Random) -> None:
    size = draw.choice((1, 2, 4, 8))
    value = draw.choice(INTERESTING) % (1 << 8 * size)
    start = _place(data, draw)
    data[start : start + size] = value.to_bytes(size, draw.choice(("big", "little")))


def _swap(data: bytearray, draw: Random) -> None:
    start, end = _part(data, draw)
    part = data[start:end]
    del data[start:end]
    start = _place(data, draw)
    data[start:start] = part


_CHANGES: Sequence[Callable[[bytearray, Random], None]] = (
    _flip, _flip, _set, _insert, _repeat, _delete, _truncate, _number, _number, _swap,
)  # fmt: skip


def changed_json(value: Any, draw: Random) -> Any:
    """A JSON value with one of the values in it changed, removed or doubled."""
    if isinstance(value, dict) and value and draw.random() < 0.9:
        name = draw.choice(list(value))
        copy = dict(value)
        match draw.randrange(8):
            case 0:
                del copy[name]
            case 1:
                copy[name + draw.choice(("", "_", "é"))] = draw.choice(ODD_VALUES)
            case _:
                copy[name] = changed_json(value[name], draw)
        return copy
    if isinstance(value, list) and value and draw.random() < 0.8:
        copy_of_list = list(value)
        place = draw.randrange(len(value))
        match draw.randrange(6):
            case 0:
                del copy_of_list[place]
            case 1:
                copy_of_list.insert(place, draw.choice(ODD_VALUES))
            case 2:
                copy_of_list *= draw.choice((2, 50))
            case _:
                copy_of_list[place] = changed_json(value[place], draw)
        return copy_of_list
    return draw.choice(ODD_VALUES)


def json_text(value: Any, draw: Random) -> bytes:
    """The value as JSON, sometimes with changed bytes."""
    for _ in range(draw.choice((0, 1, 1, 1, 2, 3))):
        value = changed_json(value, draw)
    text = json.dumps(value, ensure_ascii=draw.random() < 0.5)
    return sometimes_mutated(text.encode("utf-8", "surrogatepass"), draw, 0.3)
