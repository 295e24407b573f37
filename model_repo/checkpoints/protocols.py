"""Rewrites pickles of protocols 3 to 5 in protocol 2, the only one that torch loads without code.

Only the spelling changes. Nothing is loaded, so torch's own checks of types still apply.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import struct
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any

CHUNK_BYTES = 1 << 20
UNCHANGED = frozenset(
    {
        *("MARK", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_TUPLE", "EMPTY_LIST"),
        *("EMPTY_DICT", "EMPTY_SET", "NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1"),
        *("BININT2", "BINFLOAT", "LONG1", "GLOBAL", "REDUCE", "NEWOBJ", "BUILD", "APPEND"),
        *("APPENDS", "SETITEM", "SETITEMS", "BINPERSID", "STOP"),
    }
)
TEXTS = frozenset({"SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"})
BYTES = frozenset({"SHORT_BINBYTES", "BINBYTES", "BINBYTES8"})


@contextmanager
def rewritten(path: Path) -> Iterator[IO[bytes]]:
    """A temporary copy of a zip checkpoint whose pickle has protocol 2.

    Raises ValueError if the pickle does something that protocol 2 cannot say.
    """
    with TemporaryFile() as copy:
        with zipfile.ZipFile(path) as source, zipfile.ZipFile(copy, "w") as target:
            for member in source.infolist():
                if member.filename.endswith("/data.pkl"):
                    target.writestr(member.filename, protocol_2(source.read(member)))
                    continue
                with source.open(member) as file, target.open(member.filename, "w") as out:
                    while chunk := file.read(CHUNK_BYTES):
                        out.write(chunk)
        copy.seek(0)
        yield copy


def protocol_2(content: bytes) -> bytes:
    """The same pickle in protocol 2. Raises ValueError."""
    pieces: list[bytes | str] = [b"\x80\x02"]  # a text is a string that is pushed
    memo: dict[int, str | None] = {}  # None: not a text
    operations = list(pickletools.genops(content))
    ends = [position for _, _, position in operations[1:]] + [len(content)]
    for (operation, argument, start), end in zip(operations, ends, strict=True):
        name = operation.name
        if name in ("PROTO", "FRAME"):
            continue
        if name in ("MEMOIZE", "BINPUT", "LONG_BINPUT"):
            index = len(memo) if name == "MEMOIZE" else int(argument or 0)
            last = pieces[-1]
            memo[index] = last if isinstance(last, str) else None
            if memo[index] is None:
                pieces.append(pickle.LONG_BINPUT + struct.pack("<I", index))
        elif name in ("BINGET", "LONG_BINGET"):
            index = int(argument or 0)
            known = memo.get(index)
            pieces.append(known if known is not None else _get(index))
        elif name == "STACK_GLOBAL":
            attribute, module = pieces.pop(), pieces.pop()
            if not isinstance(attribute, str) or not isinstance(module, str):
                raise ValueError("a name is not a text")
            pieces.append(f"c{module}\n{attribute}\n".encode())
        elif name in TEXTS:
            pieces.append(str(argument))
        elif name in BYTES:
            pieces += _bytes(argument)
        elif name in UNCHANGED:
            pieces.append(content[start:end])
        else:
            raise ValueError(f"{name} has no equivalent in protocol 2")
    joined = io.BytesIO()
    for piece in pieces:
        joined.write(_text(piece) if isinstance(piece, str) else piece)
    return joined.getvalue()


def _get(index: int) -> bytes:
    return pickle.LONG_BINGET + struct.pack("<I", index)


def _bytes(content: Any) -> list[bytes | str]:
    """Pushes bytes as Python 3 writes them in protocol 2: an encoded text."""
    encode = b"c_codecs\nencode\n"
    return [encode, content.decode("latin-1"), "latin1", pickle.TUPLE2 + pickle.REDUCE]


def _text(text: str) -> bytes:
    encoded = text.encode("utf-8", "surrogatepass")
    return pickle.BINUNICODE + struct.pack("<I", len(encoded)) + encoded
