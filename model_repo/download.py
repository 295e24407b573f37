"""Fetches a checkpoint once: resumable, never used before its hash is checked, never half there."""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path, PurePosixPath
from urllib.error import HTTPError, URLError
from urllib.parse import SplitResult, unquote, urlsplit, urlunsplit
from urllib.request import Request, urlopen

Progress = Callable[[int, int | None], None]  # done, of how many in all where that is known

CHUNK_BYTES = 1 << 20
NAMED_HASH = re.compile(r"-([0-9a-f]{8,64})\.\w+$")  # resnet50-0676ba61.pth
FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,200}")


class WeightsError(Exception):
    """Parameters can't be loaded; the message says why and what to do."""


class WeightsUnavailable(WeightsError):
    """They can't be had now: the file or the place it comes from does not answer."""


class WrongHash(WeightsError):
    """A file came that is not the one asked for. It has been removed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How long to try."""

    timeout_s: float = 30.0  # for a connection, and for the next bytes
    attempts: int = 4
    pause_s: float = 1.0  # before the second attempt; doubles with each

    def __post_init__(self) -> None:
        if self.timeout_s <= 0:
            raise ValueError(f"timeout_s must be above 0, not {self.timeout_s}")
        if self.attempts < 1:
            raise ValueError(f"attempts must be at least 1, not {self.attempts}")
        if self.pause_s < 0:
            raise ValueError(f"pause_s must be 0 or more, not {self.pause_s}")


def public(url: str) -> str:
    """The address without what may be secret in it (user, query) and without its hash."""
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    return urlunsplit((parts.scheme, host, parts.path, "", ""))


def fetch(
    url: str,
    cache: Path,
    patience: Patience = Patience(),  # noqa: B008 (it is frozen)
    progress: Progress | None = None,
) -> Path:
    """The file at an https://, http:// or file:// address, in the folder `cache`.

    Its sha256 is in the address: whole, as `#sha256=...`, or its first digits at the end of the
    file's name. Eight digits find out damage but can be forged, so without TLS all 64 are needed.
    What an interrupted run left is continued where the server can. Processes may ask for the same
    file at the same time; one fetches it. Raises WeightsUnavailable, WrongHash, or WeightsError for
    an address without a hash.
    """
    try:
        wanted = _Wanted.read(url)
    except ValueError as error:  # urlsplit's
        raise WeightsError(f"{url!r} is no address: {error}") from error
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with _alone(cache / f"{wanted.file}.lock"):
            return _fetched(wanted, cache, patience, progress)
    except OSError as error:  # the disk's; the network's are translated where they happen
        raise WeightsUnavailable(f"{cache} can't keep weights: {error}") from error


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True, slots=True)
class _Wanted:
    url: str  # without its fragment
    digest: str  # the first digits of its sha256, or all
    file: str  # its name in the cache

    @classmethod
    def read(cls, url: str) -> _Wanted:
        parts = urlsplit(url)
        name = PurePosixPath(unquote(parts.path)).name
        if not FILE_NAME.fullmatch(name):
            raise WeightsError(f"{public(url)} does not end in the name of a file")
        if parts.username or parts.password:
            raise WeightsError(f"{public(url)} must not hold a user or a password")
        digest = cls._digest(parts, name, url)
        file = name if digest in name else f"{digest[:16]}-{name}"
        return cls(urlunsplit(parts._replace(fragment="")), digest, file)

    @staticmethod
    def _digest(parts: SplitResult, name: str, url: str) -> str:
        if parts.fragment:
            found = re.fullmatch(r"sha256=([0-9a-f]{64})", parts.fragment.lower())
            if not found:
                raise WeightsError(
                    f"{public(url)} must end in #sha256= and 64 hexadecimal digits, "
                    f"not in #{parts.fragment}"
                )
            return found[1]
        found = NAMED_HASH.search(name)
        if not found:
            raise WeightsError(
                f"{public(url)} comes without a hash: add #sha256= and its 64 hexadecimal digits"
            )
        if parts.scheme == "http" and len(found[1]) < 64:
            raise WeightsError(
                f"{public(url)} comes over plain http: add #sha256= and its 64 hexadecimal digits, "
                f"or use https"
            )
        return found[1]

    @property
    def needs_tls(self) -> bool:
        return len(self.digest) < 64


class _Interrupted(Exception):
    """The bytes stopped coming before the end."""


def _fetched(wanted: _Wanted, cache: Path, patience: Patience, progress: Progress | None) -> Path:
    complete, partial = cache / wanted.file, cache / f"{wanted.file}.partial"
    if complete.is_file():
        if sha256_of(complete).startswith(wanted.digest):
            return complete
        complete.unlink()  # spoilt since it was fetched
    for _ in range(2):
        in_pieces = _download(wanted, partial, patience, progress)
        digest = sha256_of(partial)
        if digest.startswith(wanted.digest):
            break
        partial.unlink()
        if not in_pieces:  # pieces may be of two different files; then it is worth a whole one
            raise WrongHash(_wrong_hash(wanted, digest))
    else:
        raise WrongHash(_wrong_hash(wanted, digest))
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    partial.replace(complete)
    return complete


def _wrong_hash(wanted: _Wanted, digest: str) -> str:
    return (
        f"{public(wanted.url)} is not the file asked for: its sha256 is {digest}, not "
        f"{wanted.digest}{'...' if wanted.needs_tls else ''}. It has been removed"
    )


def _download(
    wanted: _Wanted, partial: Path, patience: Patience, progress: Progress | None
) -> bool:
    """Makes `partial` complete; whether in more than one piece. Raises WeightsUnavailable."""
    attempts = 1 if wanted.url.startswith("file:") else patience.attempts
    in_pieces = False
    reason = ""
    for attempt in range(attempts):
        if attempt:
            time.sleep(patience.pause_s * 2 ** (attempt - 1))
        try:
            in_pieces |= _continue(wanted, partial, patience.timeout_s, progress)
            return in_pieces
        except HTTPError as error:
            reason = f"HTTP {error.code} {error.reason}"
            error.close()
            if error.code == 416 and partial.exists():  # nothing is left to send: its hash decides
                return True
            if error.code < 500 and error.code not in (408, 429):
                break
        except URLError as error:
            reason = str(error.reason)
        except (_Interrupted, HTTPException, TimeoutError, ConnectionError) as error:
            reason = str(error) or type(error).__name__
            in_pieces = True
    raise WeightsUnavailable(
        f"{public(wanted.url)} can't be fetched: {reason}. Download it by other means and build "
        f"with --weights file:PATH, or go on with untrained parameters with --or-random"
    )


def _continue(wanted: _Wanted, partial: Path, timeout_s: float, progress: Progress | None) -> bool:
    """Fetches what `partial` lacks; whether it kept what was there."""
    have = partial.stat().st_size if partial.exists() else 0
    request = Request(wanted.url, headers={"User-Agent": "convserve"})
    if have:
        request.add_header("Range", f"bytes={have}-")
    with urlopen(request, timeout=timeout_s) as response:
        if wanted.needs_tls and urlsplit(response.url).scheme not in ("https", "file"):
            raise WeightsError(
                f"{public(wanted.url)} leads away from https: add #sha256= and its 64 digits"
            )
        goes_on: bool = response.status == 206
        if goes_on and not response.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
            partial.unlink(missing_ok=True)
            raise _Interrupted("the server sent another range than was asked for")
        if not goes_on:  # the server knows no ranges: from the start, then
            have = 0
        length = response.headers.get("Content-Length")
        total = have + int(length) if length and length.isdecimal() else None
        with partial.open("ab" if goes_on else "wb") as file:
            while chunk := response.read(CHUNK_BYTES):
                file.write(chunk)
                have += len(chunk)
                if progress is not None:
                    progress(have, total)
        if total is not None and have < total:
            raise _Interrupted(f"the connection closed after {have:,} of {total:,} bytes")
    return goes_on


@contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """Keeps other processes out; the lock ends with its holder, however that ends."""
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
