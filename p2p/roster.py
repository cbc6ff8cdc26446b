"""The peers we are connected to: greeted or not, how far away, who was refused and why, and what to do next with each.

Rules: a core; `tick` says whom to greet, ping, ask for peers or disconnect, `peering.py` does it and reports back. At
most one such errand per peer is under way. A peer that misses PINGS_MISSED_MAX pings in a row is dropped, because a
frozen process keeps its connection. Of more peers than are company enough those go that we dialled for a request and
have not needed for IDLE_S, else a peer that many ask would run out of places; if we want more than that, others are
dialled for it. A peer that speaks no /openagi/rpc is let be: it may be a plain libp2p client.
Source: SECURITY.md F10 (reconciler, dial limiter); RFC 6298 section 2 (smoothed round trip).
"""

from __future__ import annotations

import random
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum

from crypto.identity import PeerId
from p2p.address import Address
from p2p.hello import Hello

PEERS_TARGET = 16  # greeted peers, above which we dial nobody new
OUTBOUND_MIN = 8  # networks chosen by ourselves, so that those who come to us cannot be all we know
GREET_GRACE_S = 2.0  # the one that dialled speaks first; then we do
GREETS_MAX = 3  # tries, GREET_AGAIN_S apart
GREET_AGAIN_S = 5.0
PING_EVERY_S = 15.0
PING_AGAIN_S = 2.0  # after one that was missed, to tell a hiccup from a frozen peer
PINGS_MISSED_MAX = 2
EXCHANGE_EVERY_S = 120.0
EXCHANGE_SOON_S = 15.0  # while we want more peers: those that start together with us come to be known one by one
JITTER = 0.2  # of the three above
EXCHANGE_SERVED_EVERY_S = 10.0  # to one peer; a copy of the book is not for the taking
REFUSED_WAIT_S = 1800.0  # a peer of another network is not dialled again before
REFUSALS_MAX = 256
IDLE_S = 120.0  # a connection made for a request stays so long for the next one
RTT_WEIGHT = 0.25  # of the newest measurement


class Phase(Enum):
    """How far the acquaintance went."""

    NEW = "new"
    GREETED = "greeted"
    FOREIGN = "foreign"  # speaks no rpc of ours
    REFUSED = "refused"  # being disconnected


_OURS = (Phase.NEW, Phase.GREETED)  # of our network, or about to be


@dataclass(frozen=True, slots=True)
class Greet:
    """Send our hello."""

    peer: PeerId


@dataclass(frozen=True, slots=True)
class Probe:
    """Measure the round trip."""

    peer: PeerId


@dataclass(frozen=True, slots=True)
class AskPeers:
    """Ask whom it knows."""

    peer: PeerId


@dataclass(frozen=True, slots=True)
class Disconnect:
    """Close the connection; `reason` is for people. blameless: it is as good as before to dial again."""

    peer: PeerId
    reason: str
    blameless: bool = False


Errand = Greet | Probe | AskPeers | Disconnect


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """A peer that cannot be one of ours, or will not have us."""

    peer: PeerId
    reason: str
    address: str
    at: float  # monotonic seconds


@dataclass(slots=True, kw_only=True)
class Member:
    """One connected peer. `dialled`: the address at which we reached it, None when it came to us."""

    peer: PeerId
    since: float
    dialled: Address | None
    phase: Phase = Phase.NEW
    hello: Hello | None = None
    greet_at: float = 0.0  # when refused: when to disconnect
    greets: int = 0
    ping_at: float = 0.0
    missed: int = 0
    rtt_s: float | None = None
    exchange_at: float = 0.0
    served_at: float = float("-inf")
    errand: bool = False
    for_requests: bool = False  # dialled because of one, and not to have company
    used_at: float = float("-inf")


class Roster:
    """Who is connected, and what is to be done about it."""

    def __init__(self, rng: random.Random, *, target: int = PEERS_TARGET, outbound_min: int = OUTBOUND_MIN) -> None:
        self._rng = rng
        self._target = target
        self._outbound_min = outbound_min
        self.is_busy: Callable[[PeerId], bool] = lambda _peer: False
        self.calm_until = float("-inf")  # with a few peers connected nobody is dialled before
        self._members: dict[PeerId, Member] = {}
        self._refusals: OrderedDict[PeerId, Refusal] = OrderedDict()

    @property
    def members(self) -> Mapping[PeerId, Member]:
        """Every connected peer."""
        return self._members

    @property
    def greeted(self) -> frozenset[PeerId]:
        """Connected peers of our network and protocol."""
        return frozenset(peer for peer, member in self._members.items() if member.phase is Phase.GREETED)

    @property
    def alone(self) -> bool:
        """Whether nobody of our network is connected or about to be."""
        return not any(member.phase in _OURS for member in self._members.values())

    def refusals(self) -> tuple[Refusal, ...]:
        """The newest last."""
        return tuple(self._refusals.values())

    def wanted(self) -> int:
        """How many more peers to dial."""
        return max(self._target - self.ours(), self._outbound_min - self.outbound(), 0)

    def ours(self) -> int:
        """How many of our network are connected, or about to be greeted."""
        return sum(member.phase in _OURS for member in self._members.values())

    def outbound(self) -> int:
        """How many networks we dialled: a second peer of a public group adds nothing, for one owner may hold both."""
        dialled = [m.dialled for m in self._members.values() if m.dialled is not None and m.phase in _OURS]
        groups = {address.group for address in dialled if address.group is not None}
        return len(groups) + sum(address.group is None for address in dialled)

    def groups(self) -> Counter[str]:
        """How many peers we dialled in each public group."""
        dialled = (member.dialled for member in self._members.values() if member.dialled is not None)
        return Counter(address.group for address in dialled if address.group is not None)

    # -- what happened ------------------------------------------------------------------------------------------

    def connected(self, peer: PeerId, now: float, dialled: Address | None) -> None:
        """A connection is up; the dialler greets at once. Saying it twice does no harm."""
        member = self._members.get(peer)
        if member is None:
            wait_s = 0.0 if dialled is not None else GREET_GRACE_S
            self._members[peer] = Member(peer=peer, since=now, dialled=dialled, greet_at=now + wait_s)
        elif dialled is not None and member.dialled is None:
            member.dialled, member.greet_at = dialled, min(member.greet_at, now)

    def used(self, peer: PeerId, now: float, *, dialled: bool = False) -> None:
        """A request of ours goes to it; dialled: and for that alone we connected."""
        if (member := self._members.get(peer)) is not None:
            member.used_at = now
            member.for_requests |= dialled

    def lost(self, peer: PeerId) -> Member | None:
        """The last connection went down."""
        return self._members.pop(peer, None)

    def greet(self, peer: PeerId, hello: Hello, now: float) -> bool:
        """Its hello fits ours. True when that is new."""
        member = self._members.get(peer)
        self._refusals.pop(peer, None)
        if member is None:
            return False
        new = member.phase is not Phase.GREETED or (
            member.hello is not None and member.hello.instance != hello.instance
        )
        member.phase, member.hello = Phase.GREETED, hello
        if new:
            member.ping_at, member.missed, member.exchange_at = now, 0, now
        return new

    def foreign(self, peer: PeerId) -> None:
        """It speaks no rpc of ours."""
        if (member := self._members.get(peer)) is not None and member.phase is Phase.NEW:
            member.phase = Phase.FOREIGN

    def ungreeted(self, peer: PeerId, now: float) -> None:
        """Our hello had no answer this time."""
        if (member := self._members.get(peer)) is not None:
            member.greets += 1
            member.greet_at = now + GREET_AGAIN_S

    def refuse(self, peer: PeerId, reason: str, address: str, now: float, *, grace_s: float = 0.0) -> None:
        """It cannot be one of ours; the reason is remembered, and in `grace_s` it will be disconnected."""
        self._refusals[peer] = Refusal(peer=peer, reason=reason, address=address, at=now)
        self._refusals.move_to_end(peer)
        if len(self._refusals) > REFUSALS_MAX:
            self._refusals.popitem(last=False)
        if (member := self._members.get(peer)) is not None:
            member.phase, member.greet_at = Phase.REFUSED, now + grace_s

    def pinged(self, peer: PeerId, rtt_s: float) -> None:
        """A ping was answered."""
        if (member := self._members.get(peer)) is not None:
            member.missed = 0
            old = member.rtt_s
            member.rtt_s = rtt_s if old is None else old + RTT_WEIGHT * (rtt_s - old)

    def missed(self, peer: PeerId, now: float) -> None:
        """A ping was not answered; the next goes out soon."""
        if (member := self._members.get(peer)) is not None:
            member.missed += 1
            member.ping_at = now + PING_AGAIN_S

    def serve_exchange(self, peer: PeerId, now: float) -> bool:
        """Whether a peer may have addresses now: it is greeted and did not ask just before."""
        member = self._members.get(peer)
        if member is None or member.phase is not Phase.GREETED or now - member.served_at < EXCHANGE_SERVED_EVERY_S:
            return False
        member.served_at = now
        return True

    def done(self, peer: PeerId) -> None:
        """An errand is over, whatever came of it."""
        if (member := self._members.get(peer)) is not None:
            member.errand = False

    # -- what to do ---------------------------------------------------------------------------------------------

    def tick(self, now: float) -> list[Errand]:
        """The errands that are due, one per peer; each is under way until `done`."""
        errands = []
        for member in self._members.values():
            if not member.errand and (errand := self._errand(member, now)) is not None:
                member.errand = True
                errands.append(errand)
        return errands

    def idle(self, now: float) -> list[Disconnect]:
        """Whom to let go because there is company enough without them: what was not needed longest first."""
        surplus = self.ours() - min(self._target, self._outbound_min)
        if surplus <= 0:
            return []
        idle = [
            member
            for member in self._members.values()
            if member.for_requests
            and not member.errand
            and now - member.used_at >= IDLE_S
            and not self.is_busy(member.peer)
        ]
        gone = sorted(idle, key=lambda member: member.used_at)[:surplus]
        for member in gone:
            member.errand = True
        return [Disconnect(member.peer, f"was not needed for {IDLE_S:.0f} s", blameless=True) for member in gone]

    def deadline(self) -> float:
        """When `tick` next has something to say."""
        return min((self._due(member) for member in self._members.values() if not member.errand), default=float("inf"))

    def _due(self, member: Member) -> float:
        match member.phase:
            case Phase.NEW | Phase.REFUSED:
                return member.greet_at
            case Phase.GREETED:
                return min(member.ping_at, member.exchange_at)
            case Phase.FOREIGN:
                return float("inf")

    def _errand(self, member: Member, now: float) -> Errand | None:
        if now < self._due(member):
            return None
        if member.phase is Phase.REFUSED:
            refusal = self._refusals.get(member.peer)
            member.greet_at = now + GREET_AGAIN_S
            return Disconnect(member.peer, refusal.reason if refusal else "refused")
        if member.phase is Phase.NEW:
            if member.greets >= GREETS_MAX:
                member.greet_at = now + GREET_AGAIN_S
                return Disconnect(member.peer, f"did not answer {GREETS_MAX} hellos")
            return Greet(member.peer)
        if member.missed >= PINGS_MISSED_MAX:
            member.ping_at = member.exchange_at = now + GREET_AGAIN_S
            return Disconnect(member.peer, f"did not answer {PINGS_MISSED_MAX} pings")
        if now >= member.ping_at:
            member.ping_at = now + PING_EVERY_S * self._draw()
            return Probe(member.peer)
        member.exchange_at = now + (EXCHANGE_SOON_S if self.wanted() else EXCHANGE_EVERY_S) * self._draw()
        return AskPeers(member.peer)

    def _draw(self) -> float:
        return self._rng.uniform(1 - JITTER, 1 + JITTER)
