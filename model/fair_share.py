"""Fairness between requesters: who has been served how many tokens, within each class.

Rules: core. The requester with the fewest tokens served goes first. Who comes, or comes back, starts level with the
least served of those that are there, so that absence earns nothing; debts end when nobody of the class is left.
Source: start-time fair queueing (Goyal, Vin, Cheng 1996); the virtual token counter of arXiv 2401.00588.
"""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

from model.step import Priority

ABSENT_MAX = 1_024  # requesters without a request whose tokens are remembered; the longest absent is forgotten


class Account(NamedTuple):
    """One requester within one class."""

    priority: Priority
    requester: str


class FairShare:
    """Tokens served of every requester that has a request, and of some that had one lately."""

    def __init__(self) -> None:
        self._requests: Counter[Account] = Counter()
        self._served: dict[Account, int] = {}
        self._absent: dict[Account, int] = {}
        self._level = dict.fromkeys(Priority, 0)  # the most that one who left a class had been served

    def join(self, account: Account) -> None:
        """One more request of this requester is there."""
        self._served[account] = self.served(account)
        self._absent.pop(account, None)
        self._requests[account] += 1

    def leave(self, account: Account) -> None:
        """One request fewer."""
        self._requests[account] -= 1
        if self._requests[account]:
            return
        del self._requests[account]
        self._absent[account] = served = self._served.pop(account)
        self._level[account.priority] = max(self._level[account.priority], served)
        if len(self._absent) > ABSENT_MAX:
            del self._absent[next(iter(self._absent))]

    def serve(self, account: Account, tokens: int) -> None:
        """So many tokens were computed for this requester."""
        self._served[account] += tokens

    def served(self, account: Account) -> int:
        """Tokens served, on the scale of its class; of one without a request, where it would start."""
        if account in self._served:
            return self._served[account]
        present = [served for other, served in self._served.items() if other.priority == account.priority]
        return max(min(present), self._absent.get(account, 0)) if present else self._level[account.priority]
