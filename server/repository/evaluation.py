"""evaluation.json: how well a version classified labelled images, as `convserve evaluate` found.

    <root>/<model>/<version>/evaluation.json

It stands beside the manifest, which stays as it was published. The server shows it to callers and
does not depend on it: a missing or damaged file changes nothing else.
"""

from __future__ import annotations

import logging
import os
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from server.repository.links import ANYWHERE, Links
from server.repository.manifest import InvalidVersion, Text
from server.repository.reader import read_limited
from server.repository.writer import exclusive_lock, fsync

EVALUATION_FILE = "evaluation.json"
EVALUATION_FORMAT = 1
MAX_BYTES = 16 << 20

log = logging.getLogger(__name__)

Fraction = Annotated[float, Meta(ge=0, le=1)]


class EvaluationRecord(Struct, frozen=True, kw_only=True):
    """The summary of an evaluation. The file may hold more fields, which the server ignores."""

    format: int = EVALUATION_FORMAT
    created: Text  # UTC, ISO 8601
    data: Text  # name of the folder or file of the labelled images
    engine: Text  # name of the engine that was measured
    images: Annotated[int, Meta(ge=1, le=1 << 40)]
    top1: Fraction
    top1_low: Fraction  # the interval holds the true value with 95 % probability
    top1_high: Fraction
    top5: Fraction | None = None  # None: the model has five classes or fewer
    calibration_error: Fraction


def read_evaluation(folder: Path, links: Links = ANYWHERE) -> EvaluationRecord | None:
    """The evaluation of a version; None if there is none, or if the file is of no use."""
    try:
        text = read_limited(folder / EVALUATION_FILE, MAX_BYTES, links)
        record = msgspec.json.decode(text, type=EvaluationRecord)
    except FileNotFoundError:
        return None
    except (InvalidVersion, msgspec.DecodeError, ValueError, RecursionError) as error:
        extra = {"path": str(folder / EVALUATION_FILE), "reason": str(error)}
        log.debug("evaluation_ignored", extra=extra)
        return None
    return record if record.format == EVALUATION_FORMAT else None


def write_evaluation(folder: Path, content: bytes) -> Path:
    """Writes the file in one step, over an earlier one. Raises OSError."""
    path = folder / EVALUATION_FILE
    with exclusive_lock(folder.parent):
        descriptor, name = tempfile.mkstemp(dir=folder, prefix=".evaluation-")
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
                os.fchmod(file.fileno(), 0o644)
            fsync(Path(name))
            os.replace(name, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(name)
            raise
        fsync(folder)
    return path
