"""Retries of failed calls: when the client sends a call again, and how often in total."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

from convserve_client.errors import (
    ClassifierError,
    ModelNotReady,
    Overloaded,
    QuotaExceeded,
    ServerUnreachable,
    TlsError,
)

TOKENS_PER_RETRY = 1000  # integers, because ten floats of 0.1 do not add up to 1


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """How often a failed call is sent again, and how long the client waits before each retry.

    Retries over all calls of a client stay below `budget_burst + budget_ratio * calls`. If most
    calls fail, retrying all of them would multiply the load of an overloaded server.
    """

    attempts: int = 4  # of one call, including the first; 1 never retries
    first_backoff_s: float = 0.05  # upper bound of the first wait; doubles with every attempt
    max_backoff_s: float = 2.0
    budget_ratio: float = 0.1
    budget_burst: int = 10

    def __post_init__(self) -> None:
        if not 1 <= self.attempts <= 100:
            raise ValueError(f"attempts {self.attempts} must be 1 to 100")
        if not 0 < self.first_backoff_s <= self.max_backoff_s < math.inf:
            raise ValueError(
                f"first_backoff_s {self.first_backoff_s} must be above 0 and at most"
                f" max_backoff_s {self.max_backoff_s}, which must be finite"
            )
        if not 0 <= self.budget_ratio <= 1:
            raise ValueError(f"budget_ratio {self.budget_ratio} must be 0 to 1")
        if self.budget_burst < 0:
            raise ValueError(f"budget_burst {self.budget_burst} must not be negative")

    def wait_s(self, attempt: int, retry_after_s: float | None, rng: random.Random) -> float:
        """Seconds to wait after failure number `attempt`; the first failure is number 1.

        The wait is `retry_after_s` plus full jitter, so that callers that were refused together
        do not come back together.
        """
        ceiling_s = min(self.max_backoff_s, self.first_backoff_s * 2 ** (attempt - 1))
        return (retry_after_s or 0.0) + rng.uniform(0, ceiling_s)


NO_RETRY = RetryPolicy(attempts=1)


class RetryBudget:
    """Token bucket for retries: each call adds a fraction of a retry, each retry takes one."""

    def __init__(self, ratio: float, burst: int) -> None:
        self._tokens_per_call = round(ratio * TOKENS_PER_RETRY)
        self._max_tokens = burst * TOKENS_PER_RETRY + self._tokens_per_call
        self._tokens = burst * TOKENS_PER_RETRY

    def add_call(self) -> None:
        self._tokens = min(self._tokens + self._tokens_per_call, self._max_tokens)

    def take_retry(self) -> bool:
        """Takes the tokens for one retry. Returns False if there are too few."""
        if self._tokens < TOKENS_PER_RETRY:
            return False
        self._tokens -= TOKENS_PER_RETRY
        return True


def is_retriable(error: ClassifierError) -> bool:
    """Whether the same request may succeed later.

    A refusal without `retry_after_s` may come from a limit, which would refuse again. A TLS
    handshake fails again until somebody changes a file.
    """
    if isinstance(error, Overloaded | QuotaExceeded):
        return error.retry_after_s is not None
    if isinstance(error, TlsError):
        return False
    return isinstance(error, ModelNotReady | ServerUnreachable)
