"""What to make of gossip that comes: whether to listen, to believe, to forward, and whom to blame.

Rules: core. A banned peer is not heard; quotas are asked before any signature is looked at; one message a second of
a peer over its quota is looked at all the same, so that whoever replays others' messages blames nobody. Only what is
new to this node is forwarded, proof that a peer contradicts itself included; in a crowd only of a share of the peers,
always the same (gossip/flow.py). Every drop is counted with its reason.
Source: SECURITY.md P5, P9, P12 and section 6.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from crypto.identity import PeerId
from gossip.directory import Directory, Outcome, Receipt
from gossip.flow import Flow
from gossip.pace import Quota
from gossip.standing import Fault, Standing, Verdict
from gossip.view import Preference

OVER_QUOTA_BLAMES = 10  # for one sample

# Whose fault a refused advert is, and how grave; what is not here is nobody's.
FAULTS: dict[Outcome, Fault] = {
    Outcome.MALFORMED: Fault.MALFORMED,
    Outcome.WRONG_NETWORK: Fault.MALFORMED,
    Outcome.BAD_SIGNATURE: Fault.FATAL,
    Outcome.WRONG_SENDER: Fault.FATAL,
    Outcome.EQUIVOCATION: Fault.FATAL,
    Outcome.TWO_INSTANCES: Fault.MALFORMED,
}
FRESH = frozenset({Outcome.ACCEPTED, Outcome.DUPLICATE, Outcome.STALE})
# A contradiction is signed by who is guilty of it, so it slanders nobody; it is passed on once, for the next is banned.
FORWARDED = frozenset({Outcome.ACCEPTED, Outcome.EQUIVOCATION})


class Hearing:
    """One node's ear. Times are monotonic seconds and unix milliseconds."""

    def __init__(
        self,
        directory: Directory,
        standing: Standing,
        *,
        on_verdict: Callable[[PeerId, Verdict, str], None],
        on_duplicate: Callable[[str], None],
        on_believed: Callable[[PeerId, int], bool] = lambda _peer, _sequence: True,
        preference: Preference | None = None,
    ) -> None:
        """preference: whose adverts to pass on when not all can be. on_duplicate: another process has our identity.

        on_verdict: a peer is to be cut off, and why.
        on_believed: an advert under this sequence is taken for true, so no older one is ever again, though the
        process be killed now; returns False when that cannot be kept.
        """
        self._directory, self._standing = directory, standing
        self._on_verdict, self._on_duplicate, self._on_believed = on_verdict, on_duplicate, on_believed
        self._quota = Quota()
        self._preference = preference or Preference(b"")
        self.flow = Flow()
        self.drops: Counter[str] = Counter()
        self.duplicate: str | None = None  # what was last heard of a copy of this node

    def heard(self, publisher: PeerId, raw: bytes, now: float, now_ms: int) -> bool:
        """Gossip came; whether it is worth forwarding."""
        if self.is_banned(publisher, now):
            return self._drop("banned")
        is_stranger = self._directory.offer_of(publisher, now) is None
        refusal = self._quota.refusal(publisher, is_stranger=is_stranger, now=now)
        if refusal and not (refusal == "over_quota" and self._quota.sampled(publisher, now)):
            return self._drop(refusal)
        receipt = self._receive(raw, publisher, now, now_ms)
        if not refusal:
            self._judge(receipt, publisher, now)
            return self._is_forwarded(receipt, publisher, now)
        if receipt.outcome in FRESH:  # only who speaks too much now is to blame, not whom others replay
            self.blame(publisher, Fault.OVER_QUOTA, "more adverts than its quota", now, times=OVER_QUOTA_BLAMES)
        else:
            self._judge(receipt, publisher, now)
        return self._drop("over_quota")

    def _is_forwarded(self, receipt: Receipt, publisher: PeerId, now: float) -> bool:
        if receipt.outcome is not Outcome.ACCEPTED:
            return receipt.outcome in FORWARDED
        return self.flow.passes_on(self._preference(publisher), now) or self._drop("not_passed_on_in_a_crowd")

    def handed(self, giver: PeerId, raw: bytes, now: float, now_ms: int) -> None:
        """A peer that we asked hands on an advert that it knows."""
        receipt = self._receive(raw, None, now, now_ms)
        if receipt.peer is not None and self.is_banned(receipt.peer, now):
            self._directory.forget(receipt.peer)
        self._judge(receipt, giver, now)

    def is_banned(self, peer: PeerId, now: float) -> bool:
        """Whether nothing of the peer is heard."""
        return self._standing.verdict(peer, now) is Verdict.BANNED

    def may_ask(self, peer: PeerId, now: float) -> bool:
        """Whether a peer may ask for what we know; counted when not."""
        return self._quota.may_ask(peer, now) or self._drop("asked_too_often")

    def may_find(self, peer: PeerId, now: float) -> bool:
        """Whether a peer may ask for a sample or for who serves a model; counted when not."""
        return self._quota.may_find(peer, now) or self._drop("searched_too_often")

    def blame(self, peer: PeerId, fault: Fault, reason: str, now: float, *, times: int = 1) -> None:
        """A peer did wrong, so many times: its standing falls, and it is cut off, once, when that says so."""
        verdict = [self._standing.blame(peer, fault, now, reason) for _ in range(times)][-1]
        if verdict is not Verdict.FINE:
            self.enforce(peer, verdict, reason)

    def enforce(self, peer: PeerId, verdict: Verdict, reason: str) -> None:
        """Have a verdict carried out."""
        if verdict is Verdict.BANNED:
            self._directory.forget(peer)
        self._on_verdict(peer, verdict, reason)

    def _receive(self, raw: bytes, publisher: PeerId | None, now: float, now_ms: int) -> Receipt:
        receipt = self._directory.receive(raw, publisher=publisher, now=now, now_ms=now_ms)
        believed = receipt.peer if receipt.outcome is Outcome.ACCEPTED else None
        if believed is not None and not self._on_believed(believed, receipt.sequence):
            self._drop("not_kept_over_a_kill")
        return receipt

    def _judge(self, receipt: Receipt, came_from: PeerId, now: float) -> None:
        if receipt.outcome is Outcome.DUPLICATE_IDENTITY:
            self.duplicate = receipt.detail
            self._on_duplicate(receipt.detail)
        fault = FAULTS.get(receipt.outcome)
        if fault is not None:
            self.blame(receipt.peer or came_from, fault, receipt.detail or receipt.outcome.value, now)

    def _drop(self, reason: str) -> bool:
        self.drops[reason] += 1
        return False
