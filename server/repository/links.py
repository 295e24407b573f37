"""Symbolic links in a repository: which are followed, and why others are not.

A model, a version or a file may be a link: ConfigMaps of Kubernetes, DVC and the cache of Hugging
Face use them. A link is followed if it leads into the repository, however it is mounted, or into a
folder that the operator allows. So no link makes the server read other files.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from server.repository.manifest import InvalidVersion


class Links(NamedTuple):
    """The folders into which links may lead, as real paths."""

    roots: tuple[Path, ...]

    @classmethod
    def within(cls, root: Path, allowed_roots: Sequence[Path] = ()) -> Links:
        """Links may lead into `root` and `allowed_roots`. Raises OSError if `root` is missing."""
        real = [os.path.realpath(root, strict=True), *map(os.path.realpath, allowed_roots)]
        return cls(tuple(map(Path, real)))

    def real_path(self, path: Path, name: str = "it") -> Path:
        """The path of a file or folder, without links.

        Raises FileNotFoundError, and InvalidVersion with `name` if a link must not be followed.
        """
        try:
            real = Path(os.path.realpath(path, strict=True))
        except FileNotFoundError:
            if not path.is_symlink():
                raise
            target = printable(os.readlink(path))
            raise InvalidVersion(
                f"{name} is a symbolic link to {target}, which does not exist"
            ) from None
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise InvalidVersion(f"{name} is a symbolic link that leads to itself") from None
            raise InvalidVersion(f"{name} can't be read: {error.strerror}") from None
        if not any(real.is_relative_to(root) for root in self.roots):
            raise InvalidVersion(
                f"{name} is a symbolic link to {printable(real)}, which is outside the repository; "
                "allow a folder above it with --allowed-roots"
            )
        return real


ANYWHERE = Links((Path("/"),))


def printable(path: str | Path) -> str:
    """A path as text that can be encoded and stays on its line, for any bytes."""
    text = os.fsencode(path).decode("utf-8", "backslashreplace")
    return "".join(one if one.isprintable() else ascii(one)[1:-1] for one in text)
