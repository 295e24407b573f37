"""Shares a device between its models by weighted fair queueing.

Each model has a virtual time: the device seconds it has used, divided by its weight. The model with
the smallest virtual time runs next. Device time that one model does not use goes to the others.
"""

from __future__ import annotations

import math
from typing import NamedTuple

USAGE_WINDOW_S = 0.5  # time constant of the average use of the device

# Device seconds that a model may use immediately after a time below its share. Requests come in
# bursts: a model that asks for its share on average has to get it. The same holds for a principal.
# (ResNet-50 on two cores, deadlines of 40 ms, beside a flood, requests for exactly half of the
# device: 95 % are answered in time with 0.1 s, 89 % with 0.02 s.)
MAX_CREDIT_S = 0.1


class ShareAccount:
    """The device time that one model, or one principal, has used.

    Written by the shares that opened it alone.
    """

    __slots__ = ("used_s", "used_updated_s", "virtual_s", "weight")

    def __init__(self, weight: float, virtual_s: float) -> None:
        self.weight = weight
        self.virtual_s = virtual_s  # device seconds divided by the weight
        self.used_s = 0.0  # average use, as a fraction of the device, when last updated
        self.used_updated_s = 0.0

    def used_ratio(self, now_s: float) -> float:
        """The fraction of the device that was used lately, 0 to 1."""
        return self.used_s * math.exp(-(now_s - self.used_updated_s) / USAGE_WINDOW_S)

    def record_use(self, device_s: float, now_s: float) -> None:
        """A batch has used `device_s` when it ended."""
        self.used_s = self.used_ratio(now_s) + device_s / USAGE_WINDOW_S
        self.used_updated_s = now_s


class Share(NamedTuple):
    """The device time that a model can count on."""

    ratio: float  # fraction of the device
    credit_s: float  # device seconds that it may use before that


class DeviceShares:
    """Keeps the accounts of all models of a device."""

    def __init__(self) -> None:
        self._virtual_s = 0.0  # of the model that ran last

    def open_account(self, weight: float) -> ShareAccount:
        return ShareAccount(weight, self._virtual_s)

    def resume(self, account: ShareAccount) -> None:
        """Limits the credit of a model that had nothing to run until now."""
        least_s = self._virtual_s - MAX_CREDIT_S / account.weight
        account.virtual_s = max(account.virtual_s, least_s)

    def charge(self, account: ShareAccount, expected_s: float) -> None:
        """Charges a batch that starts for the device seconds that it is expected to use."""
        self._virtual_s = max(self._virtual_s, account.virtual_s)
        account.virtual_s += expected_s / account.weight

    def settle(
        self, account: ShareAccount, device_s: float, expected_s: float, now_s: float
    ) -> None:
        """A batch that was charged as `expected_s` has used `device_s`."""
        account.virtual_s += (device_s - expected_s) / account.weight
        account.record_use(device_s, now_s)

    def share_of(self, account: ShareAccount, others_ratio: float, others_weight: float) -> Share:
        """The share of a model beside the other models that use the device.

        `others_ratio` is the fraction of the device that they used lately, `others_weight` the sum
        of their weights. The model gets its own share, or what the others leave if that is more.
        """
        own = account.weight / (account.weight + others_weight)
        credit_s = account.weight * (self._virtual_s - account.virtual_s)
        ratio = max(own, min(1.0, 1.0 - others_ratio))
        return Share(ratio, min(max(credit_s, 0.0), MAX_CREDIT_S))
