"""What peers say of their own state: the newest signed summary of each, apart from all that was observed here.

Rules: core. A claim is never evidence: it enters no observation, no standing, no vote, no weight, and no file; tests
hold those modules to it. It is read for two things: to be shown as a claim, and for `hint`, which routing uses between
peers that own observation rates alike, and only where own observation of the peer bears the claim out. Nothing here
can be made to grow: CLAIMS_MAX peers, one claim each; whoever was heard least lately goes first, protected ones never.
A head of a memory that contradicts the one told before is counted and shown, and is no fault: a corrupt file that was
moved aside begins anew.
Source: SELF.md "Peers' states are claims"; SECURITY.md P7, P9, P12.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from msgspec import Struct
from msgspec.structs import asdict

from crypto.envelope import SKEW_MS, Envelope, open_envelope
from crypto.errors import BadEncoding, BadSignature, Expired, WrongNetwork
from crypto.identity import PeerId
from gossip.breaker import State
from gossip.errors import RemoteProtocolError
from gossip.observations import Observed
from gossip.summaries import SUMMARY_BYTES_MAX, SUMMARY_DOMAIN, SUMMARY_LIFE_MS_MAX, SelfSummary, summary_of

CLAIMS_MAX = 512  # as many as live offers are kept (gossip/view.py); at most 1 MB
LIFE_MS_MIN = 10_000  # of a claim whose sender's clock is behind ours
ANSWERS_MIN = 8  # own requests that the peer answered, before a claim of its can agree with anything
SUCCESS_MIN = 0.9  # of them; a peer that fails us is not to be talked up
AGREES_FACTOR = 2.0  # between the first token claimed and the one seen
AGREES_SLACK_S = 0.05  # added to both: below it a factor is noise
LAG_FULL_MS = 250.0  # an event loop so late is as bad as no free slot


class Heard(StrEnum):
    """What became of a received summary."""

    ACCEPTED = "accepted"
    DUPLICATE = "duplicate"
    STALE = "stale"  # an older sequence than one already seen
    OTHER_TIME = "other_time"  # over, or from the future, by our clock
    TOO_LARGE = "too_large"
    MALFORMED = "malformed"
    BAD_SIGNATURE = "bad_signature"
    WRONG_NETWORK = "wrong_network"
    WRONG_SENDER = "wrong_sender"  # published by another peer than the one that signed it
    CONTRADICTION = "contradiction"  # two summaries under one sequence
    OWN = "own"
    FULL = "full"


class Agreement(StrEnum):
    """What own observation of a peer says to its claim."""

    UNKNOWN = "unknown"  # too little was seen, or claimed
    AGREES = "agrees"
    DISAGREES = "disagrees"


class Receipt(Struct, frozen=True, kw_only=True, gc=False):
    """The outcome, and one sentence for the log."""

    heard: Heard
    detail: str = ""


class Claim(Struct, kw_only=True):
    """One peer's newest summary. Times are monotonic seconds of receipt. is_head_broken: its memory's head contradicts
    the one of the claim before: another hash under the same id, or an older id."""

    summary: SelfSummary
    sequence: int
    raw: bytes
    received_s: float
    expires_s: float
    is_head_broken: bool = False
    judged: Agreement = Agreement.UNKNOWN  # as last asked


@dataclass(frozen=True, slots=True, kw_only=True)
class ClaimsStatistics:
    """Counts since start: summaries said, heard by outcome, claims by how they were judged, memories whose head
    contradicted the one before, claims put out to make room; claims now."""

    said: int
    heard: dict[str, int]
    judged: dict[str, int]
    heads_broken: int
    evicted: int
    claims: int


def agreement(summary: SelfSummary, observed: Observed) -> Agreement:
    """Whether what was measured of the peer here bears out what it says of itself."""
    seen_s, claimed_s = observed.first_token_s, summary.first_token_s
    if observed.answers < ANSWERS_MIN or seen_s is None or claimed_s is None:
        return Agreement.UNKNOWN
    if observed.state is not State.CLOSED or observed.success < SUCCESS_MIN:
        return Agreement.UNKNOWN
    if observed.refusing and summary.busy is not None and summary.busy < 1.0:
        return Agreement.DISAGREES
    at_peer_s = max(0.0, seen_s - (observed.rtt_s or 0.0)) + AGREES_SLACK_S
    claimed_s += AGREES_SLACK_S
    is_near = max(at_peer_s, claimed_s) <= AGREES_FACTOR * min(at_peer_s, claimed_s)
    return Agreement.AGREES if is_near else Agreement.DISAGREES


def hint(summary: SelfSummary, observed: Observed) -> float:
    """-1 (says that it is strained) to 1 (idle), for a tie only; 0: the claim does not count, or says nothing of it."""
    if agreement(summary, observed) is not Agreement.AGREES:
        return 0.0
    lag = None if summary.loop_lag_ms is None else min(1.0, summary.loop_lag_ms / LAG_FULL_MS)
    strains = [each for each in (summary.busy, summary.queued, lag) if each is not None]
    return 1.0 - 2.0 * max(strains) if strains else 0.0


class Claims:
    """The claims that one node has heard."""

    def __init__(
        self,
        own: PeerId,
        network: str,
        protected: Callable[[PeerId], bool] = lambda _peer: False,
        claims_max: int = CLAIMS_MAX,
    ) -> None:
        """protected: whose claims never make room for others'."""
        self._own, self._network, self._protected, self._claims_max = own, network, protected, claims_max
        self._claims: dict[PeerId, Claim] = {}  # heard least lately first
        self._heard: Counter[Heard] = Counter()
        self._judged: Counter[Agreement] = Counter()
        self._heads_broken = 0
        self._evicted = 0

    # --- in ---

    def receive(self, raw: bytes, publisher: PeerId, now: float, now_ms: int, *, is_kept: bool = True) -> Receipt:
        """Take in a summary as it came from the network; never raises, whatever the bytes.

        publisher: the peer that the transport says published it. is_kept: else it is only looked at.
        """
        receipt = self._receive(raw, publisher, now, now_ms, is_kept=is_kept)
        if is_kept:
            self._heard[receipt.heard] += 1
        return receipt

    def _receive(self, raw: bytes, publisher: PeerId, now: float, now_ms: int, *, is_kept: bool) -> Receipt:
        known = self._claims.get(publisher)
        if known is not None and known.raw == raw:
            return Receipt(heard=Heard.DUPLICATE)
        opened = self._opened(raw, publisher, now_ms)
        if isinstance(opened, Receipt):
            return opened
        envelope, summary = opened
        if known is not None and envelope.sequence <= known.sequence:
            if envelope.sequence < known.sequence:
                return Receipt(heard=Heard.STALE)
            detail = f"{publisher} signed two different summaries with sequence {known.sequence}"
            return Receipt(heard=Heard.CONTRADICTION, detail=detail)
        if not is_kept:
            return Receipt(heard=Heard.ACCEPTED)
        if known is None and not self._make_room(now):
            return Receipt(heard=Heard.FULL)
        self._keep(raw, envelope, summary, now, now_ms)
        return Receipt(heard=Heard.ACCEPTED)

    def _opened(self, raw: bytes, publisher: PeerId, now_ms: int) -> Receipt | tuple[Envelope, SelfSummary]:
        """The statement, or why it is none: size before form, form before signature."""
        if len(raw) > SUMMARY_BYTES_MAX:
            detail = f"a summary of {len(raw)} bytes, at most {SUMMARY_BYTES_MAX} are taken"
            return Receipt(heard=Heard.TOO_LARGE, detail=detail)
        try:
            envelope = open_envelope(raw, domain=SUMMARY_DOMAIN, network=self._network, now_ms=now_ms)
        except BadEncoding as exc:
            return Receipt(heard=Heard.MALFORMED, detail=str(exc))
        except BadSignature as exc:
            return Receipt(heard=Heard.BAD_SIGNATURE, detail=str(exc))
        except WrongNetwork as exc:
            return Receipt(heard=Heard.WRONG_NETWORK, detail=str(exc))
        except Expired as exc:
            return Receipt(heard=Heard.OTHER_TIME, detail=str(exc))
        sender = envelope.sender
        if sender != publisher:
            return Receipt(heard=Heard.WRONG_SENDER, detail=f"{publisher} published a summary signed by {sender}")
        if sender == self._own:
            return Receipt(heard=Heard.OWN)
        if envelope.time_ms + _life_ms(envelope) + SKEW_MS < now_ms:
            return Receipt(heard=Heard.OTHER_TIME, detail="it says that it lives longer than a summary may")
        try:
            return envelope, summary_of(envelope)
        except RemoteProtocolError as exc:
            return Receipt(heard=Heard.MALFORMED, detail=str(exc))

    def _keep(self, raw: bytes, envelope: Envelope, summary: SelfSummary, now: float, now_ms: int) -> None:
        life_ms = _life_ms(envelope)
        age_ms = min(max(0, now_ms - envelope.time_ms), max(0, life_ms - LIFE_MS_MIN))  # one that is replayed is old
        before = self._claims.pop(envelope.sender, None)
        is_broken = before is not None and _breaks(before.summary, summary)
        self._heads_broken += is_broken
        self._claims[envelope.sender] = Claim(
            summary=summary,
            sequence=envelope.sequence,
            raw=raw,
            received_s=now,
            expires_s=now + (life_ms - age_ms) / 1000,
            is_head_broken=is_broken,
        )

    def _make_room(self, now: float) -> bool:
        """Whether there is room for one more peer, after the first in line without protection had to go."""
        if len(self._claims) < self._claims_max:
            return True
        self.tick(now)
        if len(self._claims) < self._claims_max:
            return True
        loose = next((peer for peer in self._claims if not self._protected(peer)), None)
        if loose is None:
            return False
        del self._claims[loose]
        self._evicted += 1
        return True

    def forget(self, peer: PeerId) -> None:
        """Drop a peer's claim: it is banned, say."""
        self._claims.pop(peer, None)

    def tick(self, now: float) -> None:
        """End what expired."""
        for peer in [peer for peer, claim in self._claims.items() if claim.expires_s <= now]:
            del self._claims[peer]

    # --- out ---

    def __len__(self) -> int:
        return len(self._claims)

    def claim_of(self, peer: PeerId, now: float) -> Claim | None:
        """A peer's live claim."""
        claim = self._claims.get(peer)
        return claim if claim is not None and claim.expires_s > now else None

    def hint(self, peer: PeerId, observed: Observed, now: float) -> float:
        """See `hint`; 0 for a peer that claims nothing. What own observation said to a claim is counted once."""
        claim = self.claim_of(peer, now)
        if claim is None:
            return 0.0
        judged = agreement(claim.summary, observed)
        if judged is not claim.judged and judged is not Agreement.UNKNOWN:
            self._judged[judged] += 1
        claim.judged = judged
        return hint(claim.summary, observed)

    def told(self, peer: PeerId, observed: Observed, now: float) -> dict[str, Any] | None:
        """JSON of a peer's claim: its figures, its age, what own observation says to it; None: it claims nothing."""
        claim = self.claim_of(peer, now)
        if claim is None:
            return None
        figures = asdict(claim.summary)
        head = figures.pop("head_hash")
        return {
            **figures,
            "head_hash": None if head is None else head.hex(),
            "head_broken": claim.is_head_broken,
            "age_s": round(now - claim.received_s, 1),
            "observation": str(agreement(claim.summary, observed)),
        }

    def statistics(self, said: int) -> ClaimsStatistics:
        """A snapshot of the counters."""
        return ClaimsStatistics(
            said=said,
            heard={str(heard): count for heard, count in self._heard.items()},
            judged={str(judged): count for judged, count in self._judged.items()},
            heads_broken=self._heads_broken,
            evicted=self._evicted,
            claims=len(self._claims),
        )


def _life_ms(envelope: Envelope) -> int:
    return min(SUMMARY_LIFE_MS_MAX, envelope.expires_ms - envelope.time_ms)


def _breaks(before: SelfSummary, after: SelfSummary) -> bool:
    """Whether a memory that had the head of `before` cannot have that of `after`, as far as both tell."""
    if before.head_id is None or after.head_id is None:
        return False
    return after.head_id < before.head_id or (after.head_id == before.head_id and after.head_hash != before.head_hash)
