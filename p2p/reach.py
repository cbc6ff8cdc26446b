"""Whether others can reach this node, in its own judgement, and what it says and answers to find out.

Rules: core. The judgement rests on dial-backs: a peer that is connected to us connects once more, to the IP address at
which it sees us and a port that we listen on. No single peer decides: VOTES_MIN networks (a /24 or /56 has one vote)
must agree, and of a tie the cautious side is taken. A peer is asked seldom, and asked seldom it answers: who asks names
ports only, so that nobody can have us dial a third party. Times are monotonic seconds.

Why a call of our own and not libp2p's AutoNAT: its verdict stayed UNKNOWN in 0.8.1, AutoNAT v1 dials what the asker
names, and its decision rests on any three dials, be they one peer's.
Source: libp2p specs, autonat/autonat-v2.md (dial-back to the asker's own IP without paying); SECURITY.md S1, S2.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from crypto.canonical import Value
from crypto.identity import PeerId
from p2p.address import Scope
from p2p.allowance import Buckets
from p2p.errors import RemoteProtocolError

PORTS_MAX = 4  # of one ask
VOTES_MIN = 2  # networks that must agree
VOTERS_WANTED = 4  # peers with a fresh answer, above which nobody more is asked
VOTERS_MAX = 16  # whose answers are kept; the oldest goes
FRESH_S = 1800.0  # an answer counts for so long
ASK_AGAIN_S = 900.0  # the same peer
ASK_SOON_S = 60.0  # while nothing is settled
ASK_RETRY_S = 5.0  # after no answer, as from a peer that has not greeted us yet; doubles with each
ANSWER_EVERY_S = 30.0  # one network's asks
ANSWERS_PER_S, ANSWERS_BURST = 0.5, 8.0  # everybody's
ASKERS_MAX = 1024  # networks whose last ask is remembered
UNKNOWN_GRACE_S = 15.0  # with peers, before a node that knows nothing looks for a relay
WHY_CHARS_MAX = 200
FORWARD = "forward its TCP port in the router"


class Ask(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Please connect to me at the address you see me at, on these ports."""

    ports: Annotated[list[Annotated[int, Meta(ge=1, le=65535)]], Meta(min_length=1, max_length=PORTS_MAX)]


class Told(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Where I see you, at which of the ports you answered, and why not at the others."""

    ip: Annotated[str, Meta(min_length=2, max_length=45)]
    reached: Annotated[list[Annotated[int, Meta(ge=1, le=65535)]], Meta(max_length=PORTS_MAX)]
    why: Annotated[str, Meta(max_length=WHY_CHARS_MAX)] = ""


def to_value(message: Ask | Told) -> Value:
    """A message as plain values for a call."""
    plain: Value = msgspec.to_builtins(message)
    return plain


def read_ask(value: Value) -> Ask:
    """Raises RemoteProtocolError."""
    try:
        return msgspec.convert(value, Ask, strict=True)
    except msgspec.ValidationError as exc:
        raise RemoteProtocolError(f"not an Ask: {exc}") from exc


def read_told(value: Value) -> Told:
    """Raises RemoteProtocolError."""
    try:
        return msgspec.convert(value, Told, strict=True)
    except msgspec.ValidationError as exc:
        raise RemoteProtocolError(f"not a Told: {exc}") from exc


class Verdict(StrEnum):
    """What a node believes of itself."""

    PUBLIC = "public"  # anybody can connect
    LOCAL = "local"  # the private network can; nobody outside it could tell
    RELAYED = "relayed"  # not known to be public; a relay connects others to it
    UNREACHABLE = "unreachable"  # only those that it dials itself
    UNKNOWN = "unknown"  # nobody could tell yet


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """A verdict, why in words, what to do about it ('' for nothing), and whether a place at a relay is wanted."""

    verdict: Verdict
    reason: str
    advice: str = ""
    wants_relay: bool = False
    hidden: bool = False  # it is settled that others cannot connect: nothing is offered to them


@dataclass(frozen=True, slots=True, kw_only=True)
class _Opinion:
    group: str
    scope: Scope
    told: Told
    at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Voter:
    """A connected peer that may be asked. `group`: its /24 or /56, or itself where neighbours are no threat."""

    peer: PeerId
    group: str


class Reach:
    """What peers say of our reachability, and what follows."""

    def __init__(self) -> None:
        self._opinions: OrderedDict[PeerId, _Opinion] = OrderedDict()  # the newest last
        self._again_at: dict[PeerId, float] = {}
        self._missed: dict[PeerId, int] = {}
        self._peers_since: float | None = None

    def due(self, voters: Collection[Voter], now: float) -> list[PeerId]:
        """Whom to ask now: peers of networks not heard yet first. Noted as asked."""
        if not voters:
            self._peers_since = None
        elif self._peers_since is None:
            self._peers_since = now
        here = {voter.peer for voter in voters}
        self._again_at = {peer: at for peer, at in self._again_at.items() if at > now}
        self._missed = {peer: count for peer, count in self._missed.items() if peer in here}
        fresh = self._fresh(now)
        heard = {opinion.group for opinion in fresh}
        settled = self._settled(now)
        room = VOTERS_WANTED - (len(fresh) if settled else 0)
        chosen: list[PeerId] = []
        for voter in sorted(voters, key=lambda voter: voter.group in heard):
            if len(chosen) < room and voter.peer not in self._again_at:
                chosen.append(voter.peer)
                self._again_at[voter.peer] = now + (ASK_AGAIN_S if settled else ASK_SOON_S)
        return chosen

    def unanswered(self, peer: PeerId, now: float) -> None:
        """A peer gave no answer; it is asked again soon, each time later."""
        count = self._missed[peer] = self._missed.get(peer, 0) + 1
        self._again_at[peer] = now + min(ASK_RETRY_S * 2.0 ** (count - 1), ASK_AGAIN_S)

    def heard(self, voter: Voter, scope: Scope, told: Told, now: float) -> None:
        """A peer answered; `scope`: of the IP at which it sees us."""
        self._opinions.pop(voter.peer, None)
        self._missed.pop(voter.peer, None)
        self._opinions[voter.peer] = _Opinion(group=voter.group, scope=scope, told=told, at=now)
        if len(self._opinions) > VOTERS_MAX:
            self._opinions.popitem(last=False)

    def confirmed(self, now: float) -> tuple[tuple[str, int], ...]:
        """IP addresses and ports at which VOTES_MIN networks have reached us from outside."""
        groups: dict[tuple[str, int], set[str]] = {}
        for opinion in self._fresh(now):
            if opinion.scope is Scope.PUBLIC:
                for port in opinion.told.reached:
                    groups.setdefault((opinion.told.ip, port), set()).add(opinion.group)
        return tuple(where for where, names in groups.items() if len(names) >= VOTES_MIN)

    def seen_as(self, now: float) -> tuple[str, ...]:
        """The IP addresses at which public peers see us, the newest first."""
        newest = [each.told.ip for each in self._fresh(now) if each.scope is Scope.PUBLIC][::-1]
        return tuple(dict.fromkeys(newest))

    def judge(self, now: float, relays: Collection[PeerId] = (), why_no_relay: str = "") -> Judgement:
        """The verdict now. `relays`: at which this node holds a place; `why_no_relay`: '' when none was asked."""
        v4, v6 = (self._of_family(now, Scope.PUBLIC, family) for family in (4, 6))
        near = self._ballots(now, Scope.LOOPBACK) | self._ballots(now, Scope.PRIVATE)
        outside = "; ".join(_words(name, votes) for name, votes in (("IPv4", v4), ("IPv6", v6)) if votes)
        decided = {_decision(votes) for votes in (v4, v6) if votes}
        if True in decided:
            return Judgement(verdict=Verdict.PUBLIC, reason=outside, wants_relay=_decision(v4) is False)
        inside = _words("the private network", near) if near else ""
        if not decided and _decision(near) is True:
            return Judgement(verdict=Verdict.LOCAL, reason=f"{inside}; nobody outside it could tell")
        hidden = False in decided or (not decided and _decision(near) is False)
        waited = self._peers_since is not None and now - self._peers_since >= UNKNOWN_GRACE_S
        lost = 2 * sum(bool(each.told.reached) for each in self._fresh(now)) <= len(self._fresh(now))
        said = outside or inside or "no peer has tried to connect to this node yet"
        if relays:
            reason = f"{said}; others reach it through {len(relays)} relay{'s' * (len(relays) > 1)}"
            return Judgement(verdict=Verdict.RELAYED, reason=reason, wants_relay=hidden or lost, hidden=hidden)
        if not hidden:
            reason = f"{said}; {VOTES_MIN} networks must agree" if outside or inside else said
            return Judgement(verdict=Verdict.UNKNOWN, reason=reason, wants_relay=waited and lost)
        return Judgement(
            verdict=Verdict.UNREACHABLE,
            reason=f"{said}; no relay: {why_no_relay or 'none was asked yet'}",
            advice=f"{FORWARD}, or name a public node with --bootstrap: it can relay",
            wants_relay=True,
            hidden=True,
        )

    def _fresh(self, now: float) -> list[_Opinion]:
        return [opinion for opinion in self._opinions.values() if now - opinion.at < FRESH_S]

    def _settled(self, now: float) -> bool:
        votes = [self._of_family(now, Scope.PUBLIC, 4), self._of_family(now, Scope.PUBLIC, 6)]
        votes = [each for each in votes if each] or [self._ballots(now, Scope.PRIVATE)]
        return all(_decision(each) is not None for each in votes)

    def _of_family(self, now: float, scope: Scope, family: int) -> dict[str, _Opinion]:
        ballots = self._ballots(now, scope)
        return {name: each for name, each in ballots.items() if (":" in each.told.ip) == (family == 6)}

    def _ballots(self, now: float, scope: Scope) -> dict[str, _Opinion]:
        """The newest opinion of each network."""
        return {opinion.group: opinion for opinion in self._fresh(now) if opinion.scope is scope}


def _decision(ballots: dict[str, _Opinion]) -> bool | None:
    """Whether networks agree that we are reached; None when too few have spoken."""
    yes = sum(bool(each.told.reached) for each in ballots.values())
    no = len(ballots) - yes
    if yes >= VOTES_MIN and yes > no:
        return True
    return False if no >= VOTES_MIN else None


def _words(name: str, ballots: dict[str, _Opinion]) -> str:
    """As "IPv4: 2 of 3 networks reached 5.6.7.8"."""
    yes = [each for each in ballots.values() if each.told.reached]
    where = " and ".join(sorted({each.told.ip for each in ballots.values()}))
    why = next((each.told.why for each in ballots.values() if not each.told.reached and each.told.why), "")
    return f"{name}: {len(yes)} of {len(ballots)} reached {where}" + (f" ({why})" if why else "")


class DialBacks:
    """How often we dial back, for whom."""

    def __init__(self) -> None:
        self._asked: OrderedDict[str, float] = OrderedDict()
        self._all = Buckets(rate_per_s=ANSWERS_PER_S, burst=ANSWERS_BURST)

    def may(self, group: str, now: float) -> bool:
        """Whether to answer an ask from that network now."""
        last = self._asked.get(group)
        if (last is not None and now - last < ANSWER_EVERY_S) or not self._all.take("all", now):
            return False
        self._asked[group] = now
        self._asked.move_to_end(group)
        if len(self._asked) > ASKERS_MAX:
            self._asked.popitem(last=False)
        return True


def ports_of(pairs: Iterable[tuple[str, int]]) -> list[int]:
    """The ports worth asking about, of the hosts and ports that we listen on: each once, at most PORTS_MAX."""
    return list(dict.fromkeys(port for _, port in pairs))[:PORTS_MAX]
