"""Downloads a checkpoint once and keeps it in a cache folder.

Resumes interrupted downloads. Checks the sha256 before anyone can use the file, and moves it into
place in one step.
"""

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

from model_repo.checkpoints.file_kinds import why_no_checkpoint

Progress = Callable[[int, int | None], None]  # bytes done, bytes in all or None if unknown

CHUNK_BYTES = 1 << 20
HASH_IN_NAME = re.compile(r"-([0-9a-f]{8,64})\.\w+$")  # resnet50-0676ba61.pth
FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,200}")
FULL_HASH = 64  # hexadecimal digits
ADVICE = (
    "Download the weights by other means and build with --weights file:PATH, "
    "or publish an untrained network with --or-random"
)


class WeightsError(Exception):
    """Weights cannot be loaded. The message says why and what to do."""


class WeightsUnavailable(WeightsError):
    """The file is missing or its server does not deliver it. `reason` is the message without the
    advice."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"{reason}. {ADVICE}")
        self.reason = reason


class WrongHash(WeightsError):
    """The downloaded file has another hash than expected. It has been removed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DownloadRetries:
    """How often and how long to try."""

    timeout_s: float = 30.0  # to connect, and between two reads
    attempts: int = 4
    pause_s: float = 1.0  # before the second attempt; doubles each time

    def __post_init__(self) -> None:
        if self.timeout_s <= 0:
            raise ValueError(f"timeout_s must be above 0, not {self.timeout_s}")
        if self.attempts < 1:
            raise ValueError(f"attempts must be at least 1, not {self.attempts}")
        if self.pause_s < 0:
            raise ValueError(f"pause_s must be 0 or more, not {self.pause_s}")


def redacted(url: str) -> str:
    """The URL without user, query and fragment: the first two may hold secrets."""
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    return urlunsplit((parts.scheme, host, parts.path, "", ""))


def fetch(
    url: str,
    cache: Path,
    retries: DownloadRetries = DownloadRetries(),  # noqa: B008 (it is frozen)
    progress: Progress | None = None,
) -> Path:
    """Path of the file in the folder `cache`. Downloads it from an https://, http:// or file:// URL
    if it is not there.

    The URL holds the sha256: all 64 digits as `#sha256=...`, or the first 8 or more at the end of
    the file name. Eight digits detect damage but can be forged, so without TLS all 64 are required.
    If several processes ask for the same file, one downloads it and the others wait. Raises
    WeightsUnavailable, WrongHash, or WeightsError for a URL without a hash.
    """
    try:
        remote = _RemoteFile.parse(url)
    except ValueError as error:  # from urlsplit
        raise WeightsError(f"{url!r} is not a valid URL: {error}") from error
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with _exclusive_lock(cache / f"{remote.cache_name}.lock"):
            return _fetch_locked(remote, cache, retries, progress)
    except OSError as error:  # from the disk; network errors are converted where they occur
        raise WeightsUnavailable(
            f"downloaded weights cannot be stored in {cache}: {error.strerror or error}; set "
            "CONVSERVE_CACHE to a folder that can be written"
        ) from error


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True, slots=True)
class _RemoteFile:
    """A checked URL."""

    url: str  # without its fragment
    sha256: str  # all digits or the first ones
    cache_name: str

    @classmethod
    def parse(cls, url: str) -> _RemoteFile:
        parts = urlsplit(url)
        name = PurePosixPath(unquote(parts.path)).name
        if not FILE_NAME.fullmatch(name):
            raise WeightsError(f"{redacted(url)} must end in a file name")
        if parts.username or parts.password:
            raise WeightsError(f"{redacted(url)} must not contain a user name or a password")
        sha256 = cls._sha256(parts, name, url)
        cache_name = name if sha256 in name else f"{sha256[:16]}-{name}"
        return cls(urlunsplit(parts._replace(fragment="")), sha256, cache_name)

    @staticmethod
    def _sha256(parts: SplitResult, name: str, url: str) -> str:
        if parts.fragment:
            match = re.fullmatch(r"sha256=([0-9a-f]{64})", parts.fragment.lower())
            if not match:
                raise WeightsError(
                    f"{redacted(url)} must end in #sha256= and 64 hexadecimal digits, "
                    f"not in #{parts.fragment}"
                )
            return match[1]
        match = HASH_IN_NAME.search(name)
        if not match:
            raise WeightsError(
                f"{redacted(url)} has no hash: add #sha256= and its 64 hexadecimal digits"
            )
        if parts.scheme == "http" and len(match[1]) < FULL_HASH:
            raise WeightsError(
                f"{redacted(url)} uses plain http: add #sha256= and its 64 hexadecimal digits, "
                "or use https"
            )
        return match[1]

    @property
    def needs_tls(self) -> bool:
        return len(self.sha256) < FULL_HASH

    def wrong_hash(self, actual: str, partial: Path) -> WrongHash:
        kind = why_no_checkpoint(partial)
        expected = f"{self.sha256}{'...' if self.needs_tls else ''}"
        return WrongHash(
            f"{redacted(self.url)} has the wrong content: its sha256 is {actual}, not {expected}. "
            f"It has been removed{f'; the downloaded file {kind}' if kind else ''}"
        )


class _Interrupted(Exception):
    """The connection ended before the file was complete."""


def _fetch_locked(
    remote: _RemoteFile, cache: Path, retries: DownloadRetries, progress: Progress | None
) -> Path:
    complete, partial = cache / remote.cache_name, cache / f"{remote.cache_name}.partial"
    if complete.is_file():
        if sha256_of(complete).startswith(remote.sha256):
            return complete
        complete.unlink()  # damaged after it was downloaded
    resumed = _download(remote, partial, retries, progress)
    actual = sha256_of(partial)
    if resumed and not actual.startswith(remote.sha256):
        partial.unlink()  # its parts may come from two different files, so start again
        _download(remote, partial, retries, progress)
        actual = sha256_of(partial)
    if not actual.startswith(remote.sha256):
        error = remote.wrong_hash(actual, partial)
        partial.unlink()
        raise error
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    partial.replace(complete)
    return complete


def _download(
    remote: _RemoteFile, partial: Path, retries: DownloadRetries, progress: Progress | None
) -> bool:
    """Completes `partial`. True if it has more than one part. Raises WeightsUnavailable."""
    attempts = 1 if remote.url.startswith("file:") else retries.attempts
    resumed = False
    reason = ""
    for attempt in range(attempts):
        if attempt:
            time.sleep(retries.pause_s * 2 ** (attempt - 1))
        try:
            resumed |= _continue(remote, partial, retries.timeout_s, progress)
            return resumed
        except HTTPError as error:
            reason = f"HTTP {error.code} {error.reason}"
            error.close()
            if error.code == 416 and partial.exists():  # nothing is left to send; the hash decides
                return True
            if error.code < 500 and error.code not in (408, 429):
                break
        except URLError as error:
            reason = str(error.reason)
        except (_Interrupted, HTTPException, TimeoutError, ConnectionError) as error:
            reason = str(error) or type(error).__name__
            resumed = True
    raise WeightsUnavailable(f"{redacted(remote.url)} cannot be downloaded: {reason}")


def _continue(
    remote: _RemoteFile, partial: Path, timeout_s: float, progress: Progress | None
) -> bool:
    """Downloads what is missing in `partial`. True if the server continued the existing part."""
    done = partial.stat().st_size if partial.exists() else 0
    request = Request(remote.url, headers={"User-Agent": "convserve"})
    if done:
        request.add_header("Range", f"bytes={done}-")
    with urlopen(request, timeout=timeout_s) as response:
        if remote.needs_tls and urlsplit(response.url).scheme not in ("https", "file"):
            raise WeightsError(
                f"{redacted(remote.url)} redirects from https to http: "
                "add #sha256= and its 64 hexadecimal digits"
            )
        continues: bool = response.status == 206
        if continues and not response.headers.get("Content-Range", "").startswith(f"bytes {done}-"):
            partial.unlink(missing_ok=True)
            raise _Interrupted("the server sent another range than requested")
        if not continues:  # the server does not support ranges and sends the whole file
            done = 0
        length = response.headers.get("Content-Length")
        total = done + int(length) if length and length.isdecimal() else None
        with partial.open("ab" if continues else "wb") as file:
            while chunk := response.read(CHUNK_BYTES):
                file.write(chunk)
                done += len(chunk)
                if progress is not None:
                    progress(done, total)
        if total is not None and done < total:
            raise _Interrupted(f"the connection closed after {done:,} of {total:,} bytes")
    return continues


@contextmanager
def _exclusive_lock(path: Path) -> Iterator[None]:
    """Excludes other processes. The kernel releases the lock if its holder dies."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
