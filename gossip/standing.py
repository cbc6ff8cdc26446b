"""Who has earned trust: faults and good deeds in, a score and a verdict out.

Rules: core. A score is in -100..100, starts at 0 and halves every HALF_LIFE_S; good deeds lift it to GOOD_MAX at most.
Peers of one public network (/24, IPv6 /56) share a group score, half the sum of theirs, so that a new identity does
not start clean; private and loopback networks have none, for there one bad process must not ban the others. What
counts is the worse of the two. A fatal fault bans the peer for BAN_FATAL_S; bans outlive a restart. Scores are this
node's own opinion and never sent to anybody: slander would be an attack.
Source: SECURITY.md section 6.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum, StrEnum
from typing import Annotated, TypeVar

from msgspec import Meta, Struct

from crypto.identity import PeerId
from p2p.address import seen_group

Key = TypeVar("Key", PeerId, str)
SCORE_MIN, SCORE_MAX = -100.0, 100.0
GOOD_MAX = 20.0  # nobody buys a fatal fault with good deeds
HALF_LIFE_S = 600.0
FORGIVEN = -1.0  # what is left of a fault counts no more
DISCONNECT_AT = -20.0
BAN_AT = -50.0
BAN_S = 3600.0  # for many small faults
BAN_FATAL_S = 12 * 3600.0
PEERS_MAX = 4096
GROUPS_MAX = 4096
BANS_MAX = 4096
REASON_CHARS_MAX = 300


class Fault(Enum):
    """What a peer did wrong, with what it costs."""

    FATAL = -100.0  # bad signature of its own making, equivocation, proven false inference, replay
    MALFORMED = -10.0
    TIMEOUT = -5.0  # it accepted and then let the request down
    OVER_QUOTA = -1.0


class Deed(Enum):
    """What a peer did well, with what it earns."""

    AUDITED = 1.0  # an answer that was checked and found right


class Verdict(StrEnum):
    """What to do with a peer."""

    FINE = "fine"
    DISCONNECT = "disconnect"  # and it may come back
    BANNED = "banned"


@dataclass(frozen=True, slots=True, kw_only=True)
class Ban:
    """A peer that is refused, until when (monotonic seconds), and why."""

    peer: PeerId
    until_s: float
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StandingStatistics:
    """Counts since start by fault; peers with a score, networks with one, and peers banned now."""

    faults: dict[str, int]
    scored: int
    groups: int
    banned: int


@dataclass(slots=True)
class _Score:
    value: float = 0.0
    at_s: float = 0.0
    group: str | None = None

    def at(self, now: float) -> float:
        if not self.value:
            return 0.0
        faded = self.value * 0.5 ** (max(0.0, now - self.at_s) / HALF_LIFE_S)
        return faded if abs(faded) > 1e-9 else 0.0

    def add(self, amount: float, now: float, most: float) -> None:
        before = self.at(now)
        after = before + amount if amount < 0 else max(before, min(most, before + amount))
        self.value, self.at_s = min(SCORE_MAX, max(SCORE_MIN, after)), now


class SavedBan(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A ban on disk, in unix milliseconds."""

    peer: Annotated[str, Meta(min_length=1, max_length=64)]
    until_ms: Annotated[int, Meta(ge=0, le=1 << 53)]
    reason: Annotated[str, Meta(max_length=REASON_CHARS_MAX)]


class Standing:
    """This node's opinion of every peer. `now` is monotonic seconds."""

    def __init__(self, *, peers_max: int = PEERS_MAX, groups_max: int = GROUPS_MAX) -> None:
        self._scores: dict[PeerId, _Score] = {}
        self._groups: dict[str, _Score] = {}
        self._bans: dict[PeerId, Ban] = {}
        self._faults: dict[str, int] = {fault.name.lower(): 0 for fault in Fault}
        self._peers_max, self._groups_max = peers_max, groups_max

    # --- in ---

    def seen_at(self, peer: PeerId, address: str | None, now: float) -> Verdict:
        """A connected peer is seen at this multiaddr: from now on it belongs to that network's group.

        Behind a relay it belongs to none: the relay's network has no part in what it does.
        """
        self._score(peer, now).group = seen_group(address)
        return self.verdict(peer, now)

    def blame(self, peer: PeerId, fault: Fault, now: float, reason: str = "") -> Verdict:
        """The peer did wrong; returns what to do with it now."""
        self._faults[fault.name.lower()] += 1
        self._add(peer, fault.value, now)
        reason = (reason or fault.name.lower())[:REASON_CHARS_MAX]
        if fault is Fault.FATAL:
            self._ban(peer, now, BAN_FATAL_S, reason)
        elif self._own(peer, now) <= BAN_AT:
            self._ban(peer, now, BAN_S, reason)
        return self.verdict(peer, now)

    def praise(self, peer: PeerId, deed: Deed, now: float) -> None:
        """The peer did well."""
        self._add(peer, deed.value, now)

    def pardon(self, peer: PeerId) -> None:
        """The operator says that all is forgiven."""
        self._bans.pop(peer, None)
        self._scores.pop(peer, None)

    def _add(self, peer: PeerId, amount: float, now: float) -> None:
        score = self._score(peer, now)
        before = score.at(now)
        score.add(amount, now, GOOD_MAX)
        if score.group is not None:
            change = score.value - before if amount > 0 else amount  # past its own floor a peer still harms its group
            self._group(score.group, now).add(change / 2, now, GOOD_MAX)

    def _ban(self, peer: PeerId, now: float, seconds: float, reason: str) -> None:
        known = self._bans.get(peer)
        if known is None or known.until_s < now + seconds:
            self._bans[peer] = Ban(peer=peer, until_s=now + seconds, reason=reason)
        if len(self._bans) > BANS_MAX:
            del self._bans[min(self._bans, key=lambda banned: self._bans[banned].until_s)]

    def _score(self, peer: PeerId, now: float) -> _Score:
        if peer not in self._scores:
            if len(self._scores) >= self._peers_max:
                _drop_mildest(self._scores, now)
            self._scores[peer] = _Score(at_s=now)
        return self._scores[peer]

    def _group(self, group: str, now: float) -> _Score:
        if group not in self._groups:
            if len(self._groups) >= self._groups_max:
                _drop_mildest(self._groups, now)
            self._groups[group] = _Score(at_s=now)
        return self._groups[group]

    # --- out ---

    def _own(self, peer: PeerId, now: float) -> float:
        score = self._scores.get(peer)
        return score.at(now) if score else 0.0

    def score(self, peer: PeerId, now: float) -> float:
        """The worse of the peer's own score and its group's."""
        score = self._scores.get(peer)
        if score is None:
            return 0.0
        group = self._groups.get(score.group) if score.group else None
        return min(score.at(now), group.at(now)) if group else score.at(now)

    def verdict(self, peer: PeerId, now: float) -> Verdict:
        """What to do with the peer."""
        if peer in self._bans and self.ban_of(peer, now) is not None:
            return Verdict.BANNED
        score = self.score(peer, now)
        if score <= BAN_AT:
            return Verdict.BANNED
        return Verdict.DISCONNECT if score <= DISCONNECT_AT else Verdict.FINE

    def ban_of(self, peer: PeerId, now: float) -> Ban | None:
        """The ban that is on the peer now."""
        ban = self._bans.get(peer)
        if ban is not None and ban.until_s <= now:
            del self._bans[peer]
            return None
        return ban

    def bans(self, now: float) -> tuple[Ban, ...]:
        """All bans on now, soonest end first."""
        live = (ban for peer in list(self._bans) if (ban := self.ban_of(peer, now)) is not None)
        return tuple(sorted(live, key=lambda ban: ban.until_s))

    def statistics(self, now: float) -> StandingStatistics:
        """A snapshot of the counters."""
        return StandingStatistics(
            faults=dict(self._faults),
            scored=len(self._scores),
            groups=len(self._groups),
            banned=len(self.bans(now)),
        )

    # --- over a restart ---

    def saved_bans(self, now: float, now_ms: int) -> tuple[SavedBan, ...]:
        """The bans, for disk."""
        return tuple(
            SavedBan(peer=ban.peer, until_ms=max(0, now_ms + int((ban.until_s - now) * 1000)), reason=ban.reason)
            for ban in self.bans(now)
        )

    def restore(self, bans: Iterable[SavedBan], now: float, now_ms: int) -> None:
        """Take back what `saved_bans` gave before a restart; the clocks may differ."""
        for ban in bans:
            left_s = min(BAN_FATAL_S, (ban.until_ms - now_ms) / 1000)  # a clock set back must not ban for ever
            if left_s > 0:
                self._ban(PeerId(ban.peer), now, left_s, ban.reason)


def _drop_mildest(scores: dict[Key, _Score], now: float) -> None:
    """Make room: an eighth of the scores goes, those nearest to 0."""
    count = max(1, len(scores) // 8)
    for key in heapq.nsmallest(count, scores, key=lambda key: abs(scores[key].at(now))):
        del scores[key]
