"""Samples: the outcome of each request in 40 bytes. Times are seconds from the run's start."""

import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

OK = "OK"  # every other status is a refusal or a failure
NOT_SENT = "NOT_SENT"  # due while `max_in_flight` requests were in flight; never sent
REFUSED = frozenset({"RESOURCE_EXHAUSTED"})  # the server chose not to answer
# gRPC's statuses in its order, so that the index is gRPC's number; then the generator's own.
STATUSES = (
    *(OK, "CANCELLED", "UNKNOWN", "INVALID_ARGUMENT", "DEADLINE_EXCEEDED", "NOT_FOUND"),
    *("ALREADY_EXISTS", "PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "FAILED_PRECONDITION"),
    *("ABORTED", "OUT_OF_RANGE", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS"),
    *("UNAUTHENTICATED", NOT_SENT),
)
STATUS_NUMBER = {status: number for number, status in enumerate(STATUSES)}

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True)
class Sample:
    """Outcome of one request."""

    due_s: float  # when it should have been sent
    sent_s: float
    finished_s: float
    status: str  # one of STATUSES
    images: int
    request_class: int = 0  # index in the plan
    tries: int = 1  # how often it was sent; above 1 only if the server asked to retry
    retry_after_s: float = -1.0  # of the last refusal; below 0: it had none
    rows: float = 0.0  # mean rows of its batches; 0: the answer does not say

    @property
    def latency_s(self) -> float:
        return self.finished_s - self.due_s  # includes the delay before sending


_RECORD = struct.Struct("<dddffIHBB")
_COLUMNS = np.dtype(
    [
        *[(name, "<f8") for name in ("due_s", "sent_s", "finished_s")],
        *[("retry_after_s", "<f4"), ("rows", "<f4"), ("images", "<u4")],
        *[("request_class", "<u2"), ("status", "u1"), ("tries", "u1")],
    ]
)


class Samples:
    """Samples of 40 bytes each. Processes exchange them in this packed form."""

    def __init__(self, samples: Iterable[Sample] = (), packed: bytes = b"") -> None:
        self._packed = bytearray(packed)
        for sample in samples:
            self.add(*(getattr(sample, field.name) for field in fields(Sample)))

    def add(
        self,
        due_s: float,
        sent_s: float,
        finished_s: float,
        status: str,
        images: int,
        request_class: int = 0,
        tries: int = 1,
        retry_after_s: float = -1.0,
        rows: float = 0.0,
    ) -> None:
        """Adds a sample; the values are those of Sample."""
        number = STATUS_NUMBER[status]
        tries = tries if tries < 256 else 255
        self._packed += _RECORD.pack(
            due_s, sent_s, finished_s, retry_after_s, rows, images, request_class, number, tries
        )

    def extend(self, packed: bytes) -> None:
        """Adds the samples of another object's `packed`."""
        self._packed += packed

    @property
    def packed(self) -> bytes:
        return bytes(self._packed)

    @property
    def columns(self) -> Array:
        """A copy as a structured array; `status` is an index of STATUSES."""
        return np.frombuffer(bytes(self._packed), _COLUMNS)

    def __len__(self) -> int:
        return len(self._packed) // _RECORD.size

    def __iter__(self) -> Iterator[Sample]:
        for record in _RECORD.iter_unpack(self.packed):
            due_s, sent_s, finished_s, retry_after_s, rows, images, index, status, tries = record
            yield Sample(
                *(due_s, sent_s, finished_s, STATUSES[status], images, index, tries),
                *(retry_after_s, rows),
            )
