"""Estimates the time between a finished batch and a response on the wire."""

from __future__ import annotations

import math


class ResponseDelayEstimator:
    """Estimates the response delay: the time to leave between a batch and the deadline.

    The measured part is the encoding of the response. Its estimate is the mean plus four times the
    mean deviation, like the retransmission timeout of TCP (Jacobson 1988). A constant is added for
    the wire. The client's own processing is not included.

    Without new measurements the estimate decays, and it never takes more than half of the time that
    is left for a request. Otherwise, after one pause of the process, all requests with shorter
    deadlines would be refused, and without requests there would be no new measurement. (Seen with
    LeNet-5 and deadlines of 20 ms: after the first pause, no request was ever answered again.)
    """

    WIRE_S = 0.001
    HALF_LIFE_S = 0.05
    MAX_FRACTION = 0.5  # of the time that is left

    def __init__(self) -> None:
        self._mean_s = 0.0
        self._deviation_s = 0.0
        self._recorded_s = -math.inf

    def record(self, seconds: float, now_s: float) -> None:
        """A response was encoded `seconds` after its batch was done."""
        error_s = seconds - self._mean_s
        self._mean_s += error_s / 8
        self._deviation_s += (abs(error_s) - self._deviation_s) / 4
        self._recorded_s = now_s

    def batch_deadline_s(self, deadline_s: float, now_s: float) -> float:
        """The time by which the batch must be done, so that the response meets `deadline_s`."""
        kept: float = 0.5 ** ((now_s - self._recorded_s) / self.HALF_LIFE_S)
        seconds = self.WIRE_S + kept * (self._mean_s + 4 * self._deviation_s)
        return deadline_s - max(0.0, min(seconds, self.MAX_FRACTION * (deadline_s - now_s)))
