"""How much each account has taken: requests, tokens, and answers under way; and when more may be had.

Rules: core. What is refused takes nothing. A wait that is told is true: who waits that long, and is alone on its
account, is served. Tokens are charged before the work as the prompt's estimate and all that may be made, and settled by
what was made. All is bounded; what is forgotten is as if it had rested.
Source: SECURITY.md section 5 and C1.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

from node.errors import TooLarge
from node.requester import LOCAL, STRANGER_PREFIX
from node.web.caller import Limits, Rate
from node.web.errors import Limited
from p2p.allowance import Buckets

ACCOUNTS_MAX = 16_384  # of each rate; 3 MB when full
RATES_MAX = 2_048  # two for each of KEYS_MAX keys, and ours
RUNNING_RETRY_S = 1.0  # an answer may end at any time


@dataclass(frozen=True, slots=True)
class Charge:
    """Tokens that were charged, and to whom at which rate."""

    tokens: int
    rates: dict[str, Rate]


class Meter:
    """See the module. Times are monotonic seconds of the caller."""

    def __init__(self) -> None:
        self._buckets: dict[tuple[str, Rate], Buckets] = {}
        self._running: Counter[str] = Counter()
        self._tokens: dict[str, dict[str, Rate]] = {}  # of accounts with answers under way: who is charged with them

    def request(self, taken: dict[tuple[str, str], Rate], now: float) -> None:
        """One request on all these (what, account), each at its rate. Raises Limited, and then none has paid."""
        limited = self.refusal(taken, now)
        if limited is not None:
            raise limited
        for (what, account), rate in taken.items():
            self._of(what, rate).take(account, now)

    def refusal(self, taken: dict[tuple[str, str], Rate], now: float) -> Limited | None:
        """What `request` would raise now; nothing is taken."""
        wait_s, what, account = max((self._of(key[0], rate).wait_s(key[1], now), *key) for key, rate in taken.items())
        if wait_s == 0:
            return None
        rate = taken[what, account]
        return Limited(
            f"{named(what, account)} may ask {rate.per_s:g} times a second and {rate.burst:g} times at once: "
            f"wait {math.ceil(wait_s)} s",
            counter=f"limited_{what}",
            retry_after_s=wait_s,
        )

    def enter(self, account: str, limits: dict[str, Limits]) -> None:
        """An answer begins, of these accounts: its own, and whose limits it shares. Raises Limited. Whoever enters
        leaves."""
        for name, limit in limits.items():
            if self._running[name] >= limit.concurrent:
                raise Limited(
                    f"{named('', name)} has {self._running[name]} requests under way, as many as it may: "
                    "wait for one to end",
                    counter="limited_concurrent",
                    retry_after_s=RUNNING_RETRY_S,
                )
        self._running.update(limits.keys())
        self._tokens[account] = {name: limit.tokens for name, limit in limits.items() if limit.tokens is not None}

    def leave(self, account: str, limits: dict[str, Limits]) -> None:
        """An answer ended."""
        for name in limits:
            self._running[name] -= 1
            if not self._running[name]:
                del self._running[name]
        if account not in self._running:
            self._tokens.pop(account, None)

    def charge(self, account: str, tokens: int, now: float) -> Charge | None:
        """Charge tokens before the work; what to settle, None when this account has no such limit.

        Raises Limited; TooLarge when it is more than there may ever be at once.
        """
        rates = self._tokens.get(account)
        if not rates:
            return None
        for name, rate in rates.items():
            if tokens > rate.burst:
                raise TooLarge(
                    f"prompt and max_tokens come to about {tokens} tokens, and {named('', name)} has "
                    f"{rate.per_s * 60:.0f} a minute: ask for fewer",
                    param="max_tokens",
                )
        waits = {name: self._of("tokens", rate).wait_s(name, now, tokens) for name, rate in rates.items()}
        name = max(waits, key=lambda each: waits[each])
        if waits[name] > 0:
            raise Limited(
                f"{named('', name)} has {rates[name].per_s * 60:.0f} tokens a minute, and prompt and max_tokens come "
                f"to about {tokens}: wait {math.ceil(waits[name])} s, or ask for fewer",
                counter="limited_tokens",
                retry_after_s=waits[name],
            )
        for name, rate in rates.items():
            self._of("tokens", rate).take(name, now, tokens)
        return Charge(tokens, rates)

    def settle(self, charge: Charge, used: int) -> None:
        """The work has ended: what was not used comes back, what was used beyond the estimate is owed."""
        for name, rate in charge.rates.items():
            self._of("tokens", rate).settle(name, charge.tokens, used)

    def _of(self, what: str, rate: Rate) -> Buckets:
        buckets = self._buckets.get((what, rate))
        if buckets is None:
            if len(self._buckets) >= RATES_MAX:
                del self._buckets[next(iter(self._buckets))]
            burst = max(rate.burst, 1.0)
            buckets = Buckets(rate_per_s=rate.per_s, burst=burst, keys_max=ACCOUNTS_MAX)
            self._buckets[what, rate] = buckets
        return buckets


def named(what: str, account: str) -> str:
    """An account as its owner knows it."""
    if what == "subnet":
        return f"the network {account}"
    if account == LOCAL:
        return "this machine"
    kind, _, rest = account.removeprefix(STRANGER_PREFIX).partition(":")
    if kind == "shared":
        return f"whoever signs from {named('', rest).removeprefix('the address ')}"
    words = {"key": f"the API key {rest}", "ed25519": f"the key {rest[:16]}...", "wallet": f"the wallet {rest}"}
    return words.get(kind, f"the address {account}")
