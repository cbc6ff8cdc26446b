"""What to make of summaries that come: whether to listen, to keep, to forward, and whom to blame.

Rules: core, beside gossip/hearing.py and by its standing and its counts of drops. One summary in CLAIM_EVERY_S is taken
of a peer, before any signature is looked at; faster ones are dropped and counted, and one that comes too fast for too
long is to blame, if what it says is new: whoever replays others' summaries blames nobody. Only of peers that we know
is anything taken. What is new is passed on; of a crowd only the share of peers that adverts are passed on of
(gossip/flow.py), and never more than PASSED_ON_PER_S: what a node hears does not grow with the network.
Source: SECURITY.md P5, P12 and section 6; SELF.md.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from crypto.identity import PeerId
from gossip.claims import Claims, Heard, Receipt
from gossip.hearing import OVER_QUOTA_BLAMES, Hearing
from gossip.standing import Fault
from gossip.view import Preference
from p2p.allowance import Buckets

CLAIM_EVERY_S = 30.0  # of one peer
TOO_FAST_BURST = 4.0  # so many beyond that at once are restarts and lateness, not a flood
SAMPLE_PER_S = 1.0  # of a flood, so much is looked at
LOOKED_AT_PER_S, LOOKED_AT_BURST = 4.0, 64.0  # of all peers together
PASSED_ON_PER_S, PASSED_ON_BURST = 1.0, 20.0

# Whose fault a refused summary is, and how grave, as for adverts; what is not here is nobody's. Two summaries under one
# sequence may come from a copied identity, which nothing in them tells apart from a lie.
FAULTS: dict[Heard, Fault] = {
    Heard.TOO_LARGE: Fault.MALFORMED,
    Heard.MALFORMED: Fault.MALFORMED,
    Heard.WRONG_NETWORK: Fault.MALFORMED,
    Heard.CONTRADICTION: Fault.MALFORMED,
    Heard.BAD_SIGNATURE: Fault.FATAL,
    Heard.WRONG_SENDER: Fault.FATAL,
}


class ClaimsHearing:
    """One node's ear for summaries. Times are monotonic seconds and unix milliseconds."""

    def __init__(
        self, claims: Claims, hearing: Hearing, preference: Preference, is_known: Callable[[PeerId, float], bool]
    ) -> None:
        """is_known: connected, or with a live advert."""
        self.claims = claims
        self.drops: Counter[str] = hearing.drops  # of all gossip
        self._hearing, self._preference, self._is_known = hearing, preference, is_known
        self._each = Buckets(rate_per_s=1 / CLAIM_EVERY_S, burst=1)
        self._floods = Buckets(rate_per_s=1 / CLAIM_EVERY_S, burst=TOO_FAST_BURST)
        self._samples = Buckets(rate_per_s=SAMPLE_PER_S, burst=1)
        self._all = Buckets(rate_per_s=LOOKED_AT_PER_S, burst=LOOKED_AT_BURST)
        self._passed_on = Buckets(rate_per_s=PASSED_ON_PER_S, burst=PASSED_ON_BURST)

    def heard(self, publisher: PeerId, raw: bytes, now: float, now_ms: int) -> bool:
        """A summary came; whether it is worth forwarding."""
        if self._hearing.is_banned(publisher, now):
            return self._drop("banned")
        if not self._is_known(publisher, now):
            return self._drop("summary_of_a_stranger")
        if not self._each.take(publisher, now):
            self._too_fast(publisher, raw, now, now_ms)
            return self._drop("summary_over_quota")
        if not self._all.take("all", now):
            return self._drop("summaries_over_quota")
        receipt = self.claims.receive(raw, publisher, now, now_ms)
        self._judge(receipt, publisher, now)
        if receipt.heard is not Heard.ACCEPTED:
            return False
        is_near = self._preference(publisher) < self._hearing.flow.share
        return (is_near and self._passed_on.take("all", now)) or self._drop("summary_not_passed_on")

    def _too_fast(self, publisher: PeerId, raw: bytes, now: float, now_ms: int) -> None:
        if self._floods.take(publisher, now) or not self._samples.take(publisher, now):
            return
        receipt = self.claims.receive(raw, publisher, now, now_ms, is_kept=False)
        if receipt.heard is Heard.ACCEPTED:
            what = "more summaries than its quota"
            self._hearing.blame(publisher, Fault.OVER_QUOTA, what, now, times=OVER_QUOTA_BLAMES)
        else:
            self._judge(receipt, publisher, now)

    def _judge(self, receipt: Receipt, publisher: PeerId, now: float) -> None:
        if (fault := FAULTS.get(receipt.heard)) is not None:
            self._hearing.blame(publisher, fault, receipt.detail or str(receipt.heard), now)

    def _drop(self, reason: str) -> bool:
        self.drops[reason] += 1
        return False
