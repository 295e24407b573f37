"""Shares a model's device time between principals by weighted fair queueing.

Each principal has a virtual time: the device seconds it has used, divided by its weight. The one
with the smallest virtual time runs next. Device time that one does not use goes to the others.
"""

from __future__ import annotations

from collections.abc import Iterable

from server.scheduling.device_share import MAX_CREDIT_S, ShareAccount

MIN_ACTIVE_RATIO = 0.01  # a principal that used less of the device lately is idle


class PrincipalAccount(ShareAccount):
    """The device time that one principal has used. Written by `PrincipalShares` alone."""

    __slots__ = ()

    def is_idle(self, now_s: float) -> bool:
        return self.used_ratio(now_s) < MIN_ACTIVE_RATIO


class PrincipalShares:
    """Keeps the accounts of the principals of one model.

    The fair virtual time is that of a principal that uses exactly its share. A principal below its
    share stays behind it, by `MAX_CREDIT_S` at most. So it may go before one that is above. Between
    two principals below their shares neither goes first: one that was idle and then sends a burst
    takes nothing from the other.

    Without overload nobody is above its share, however much it uses.
    """

    def __init__(self) -> None:
        self._fair_virtual_s = 0.0
        self._updated_s = 0.0
        self._active_weight = 1.0
        self._has_refused = False  # since the last batch
        self._is_overloaded = False

    def open_account(self, weight: float) -> PrincipalAccount:
        return PrincipalAccount(weight, self._fair_virtual_s - MAX_CREDIT_S / weight)

    def set_weight(self, account: PrincipalAccount, weight: float) -> None:
        account.weight = weight

    def set_active(self, accounts: Iterable[PrincipalAccount]) -> None:
        """Tells which principals share the device at this time."""
        self._active_weight = sum(account.weight for account in accounts) or 1.0

    def resume(self, account: PrincipalAccount) -> None:
        """A principal that had nothing to run has a request. Limits its credit."""
        account.virtual_s = self.resumed_virtual_s(account)

    def resumed_virtual_s(self, account: PrincipalAccount) -> float:
        """The virtual time of a principal that has nothing to run, once it has."""
        return max(account.virtual_s, self._fair_virtual_s - MAX_CREDIT_S / account.weight)

    def refused(self) -> None:
        """A request was refused for lack of time."""
        self._has_refused = True

    def batch_starts(self, *, has_more: bool, now_s: float) -> bool:
        """A batch starts; with `has_more` other requests have to wait for another batch.

        Returns whether the principals compete for the device.
        """
        self._is_overloaded = has_more or self._has_refused
        self._has_refused = False
        if not self._is_overloaded:
            self._fair_virtual_s += (now_s - self._updated_s) / self._active_weight
        self._updated_s = now_s
        return self._is_overloaded

    def charge(self, account: PrincipalAccount, device_s: float) -> None:
        """Charges rows that start for the device seconds that they are expected to use.

        Later corrections may be negative.
        """
        account.virtual_s += device_s / account.weight
        if self._is_overloaded:
            self._fair_virtual_s += device_s / self._active_weight

    def record_use(self, account: PrincipalAccount, device_s: float, now_s: float) -> None:
        """Rows have used `device_s` when their batch ended."""
        account.record_use(device_s, now_s)

    def credit_s(self, account: PrincipalAccount) -> float:
        """Device seconds by which a principal is below its share."""
        seconds = account.weight * (self._fair_virtual_s - account.virtual_s)
        return min(max(seconds, 0.0), MAX_CREDIT_S)
