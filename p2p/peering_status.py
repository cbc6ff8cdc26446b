"""What a person is told of the node's peers: who is connected, which bootstrap peer failed and why, who was refused.

Rules: pure; every failure is one sentence in words that came from where it happened. Ages are
seconds, not times of day.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from crypto.identity import PeerId
from p2p.address import Address, is_relayed
from p2p.book import BookStatistics
from p2p.bootstrap import BootstrapPeer
from p2p.roster import Phase, Roster
from p2p.transport import Transport


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerRow:
    """One connected peer. `phase`: new, greeted, foreign or refused."""

    peer: PeerId
    address: str
    direction: str  # "out": we dialled; "in": it came to us
    relayed: bool  # through a relay, which the address names
    phase: str
    agent: str
    rtt_ms: float | None
    connected_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class BootstrapResult:
    """What came of one bootstrap entry. `state`: connected, failed, not tried yet, this node."""

    address: str
    note: str
    state: str
    reason: str  # why, when failed; a word of explanation otherwise
    tries: int
    tried_ago_s: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RefusalRow:
    """A peer that cannot be ours or will not have us."""

    peer: PeerId
    reason: str
    address: str
    ago_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PeeringStatus:
    """A snapshot of p2p/peering.py."""

    peers: tuple[PeerRow, ...]
    book: BookStatistics
    bootstrap: tuple[BootstrapResult, ...]
    refusals: tuple[RefusalRow, ...]
    duplicate: str  # '' or a sentence: another live process has our identity
    mdns: str  # off, starting, on, or why not
    dialling: int
    drops: dict[str, int]  # reason -> count since start

    @property
    def connected(self) -> int:
        """Peers of our network."""
        return sum(row.phase == Phase.GREETED.value for row in self.peers)

    @property
    def known(self) -> int:
        """Peers with an address in the book."""
        return self.book.peers

    def to_dict(self) -> dict[str, object]:
        """Plain values for JSON."""
        plain: dict[str, object] = msgspec.to_builtins(self)
        return {"connected": self.connected, "known": self.known, **plain}


def peer_rows(roster: Roster, transport: Transport, now: float) -> tuple[PeerRow, ...]:
    """The connected peers, oldest acquaintance first."""
    return tuple(
        PeerRow(
            peer=member.peer,
            address=transport.remote_address(member.peer) or "",
            relayed=is_relayed(transport.remote_address(member.peer)),
            direction="out" if member.dialled is not None else "in",
            phase=member.phase.value,
            agent=member.hello.agent if member.hello is not None else "",
            rtt_ms=None if member.rtt_s is None else round(member.rtt_s * 1000.0, 3),
            connected_s=round(now - member.since, 3),
        )
        for member in roster.members.values()
    )


def refusal_rows(roster: Roster, now: float) -> tuple[RefusalRow, ...]:
    """The remembered refusals, the newest last."""
    return tuple(
        RefusalRow(peer=known.peer, reason=known.reason, address=known.address, ago_s=round(now - known.at, 1))
        for known in roster.refusals()
    )


class BootstrapLog:
    """What came of each bootstrap entry, the last time."""

    def __init__(self, entries: tuple[BootstrapPeer, ...]) -> None:
        self._entries = entries
        self._last: dict[str, tuple[str, float]] = {}
        self._tries: dict[str, int] = {entry.address.text: 0 for entry in entries}

    def tried(self, address: Address) -> None:
        """A dial of an address begins; others than bootstrap entries are passed over."""
        if address.text in self._tries:
            self._tries[address.text] += 1

    def note(self, address: Address, reason: str, now: float) -> None:
        """What came of it; '' is a connection."""
        if address.text in self._tries:
            self._last[address.text] = (reason, now)

    def results(self, roster: Roster, transport: Transport, now: float) -> tuple[BootstrapResult, ...]:
        """One row per entry, in the order of the file."""
        return tuple(self._result(entry, roster, transport, now) for entry in self._entries)

    def _result(self, entry: BootstrapPeer, roster: Roster, transport: Transport, now: float) -> BootstrapResult:
        address = entry.address
        last = self._last.get(address.text)
        if address.peer == transport.peer_id:
            state, reason = "this node", _ourselves(address, transport)
        elif address.peer in roster.greeted:
            state, reason = "connected", ""
        elif last is None:
            state, reason = "not tried yet", ""
        elif last[0]:
            state, reason = "failed", last[0]
        else:
            state, reason = "failed", "the connection was lost; it will be tried again"
        return BootstrapResult(
            address=address.text,
            note=entry.note,
            state=state,
            reason=reason,
            tries=self._tries[address.text],
            tried_ago_s=None if last is None else round(now - last[1], 1),
        )


def _ourselves(address: Address, transport: Transport) -> str:
    if address.text in transport.addresses():
        return "names this node itself"
    return (
        f"names this node's own identity at {address.bare}, where it does not listen as far as it knows: if another "
        "machine runs with a copied data directory, give one of them a new identity (keys identity rotate)"
    )
