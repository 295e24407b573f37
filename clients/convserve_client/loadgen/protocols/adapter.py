"""Interface between the load generator and a protocol."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from convserve_client.loadgen.plan import Plan, RequestClass

PHASES = ("decode", "queue", "compute", "total")


class UnsupportedModel(Exception):
    """The model cannot be measured with these options. The message says why."""


@dataclass(slots=True)
class AnswerTotals:
    """Totals of the figures that the server reports in its answers."""

    answers: int = 0  # those that have timings
    phases_ms: list[float] = field(default_factory=lambda: [0.0] * len(PHASES))
    answered_by: set[tuple[str, str, bool | None]] = field(default_factory=set)
    """Model, version, and whether it is trained, if the server says."""

    def add(self, other: AnswerTotals) -> None:
        self.answers += other.answers
        self.phases_ms = [sum(both) for both in zip(self.phases_ms, other.phases_ms, strict=True)]
        self.answered_by |= other.answered_by


RequestBuilder = Callable[[Sequence[int]], bytes]
"""Makes a request for the samples with these indices."""


class ProtocolAdapter(Protocol):
    """Makes requests and reads answers of one protocol."""

    method: str

    async def prepare_requests(self, plan: Plan, request_class: RequestClass) -> list[bytes]:
        """Serialised requests of a class, to be sent in turn.

        Raises ClassifierError if the server cannot describe the model, UnsupportedModel if the
        options do not fit it, and OSError or ImportError if there are no images.
        """

    async def sample_library(
        self, plan: Plan, request_class: RequestClass, samples: int
    ) -> RequestBuilder:
        """Builder of requests for any of `samples` samples, some of which may be identical.

        A request has at most `request_class.images` samples. Raises as `prepare_requests` does.
        """

    def read_answer(self, answer: bytes, totals: AnswerTotals) -> float:
        """Adds an answer to the totals. Returns the mean rows of its batches; 0 means unknown.

        Raises DecodeError if the answer is not valid.
        """
