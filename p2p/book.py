"""The address book: where each peer may be reached, how we know, and when to dial it again.

Rules: everything is bounded, and what strangers tell can push out only what nobody has proved. A bootstrap entry and
an anchor are never forgotten. An address waits longer after each failure, up to a cap that is low while we are alone,
so a node that lost everybody is back within seconds of the network's return. One dial per peer at a time: its best
address first, the next when that one has failed. Times are monotonic seconds, on disk unix seconds.
Source: SECURITY.md S1 (anchors, groups), bitcoin's addrman (tried and new tables, reduced to one mark).
"""

from __future__ import annotations

import heapq
import random
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from crypto.identity import PeerId
from p2p.address import Address, Scope, tellable
from p2p.book_saved import SavedAddress, decode_book, encode_book

PEERS_MAX = 4096
PEERS_EVICTED_AT_ONCE = 64  # one scan of the whole book makes room for so many newcomers
ADDRESSES_MAX = 16  # per peer
ANCHORS_MAX = 3  # peers that stay first in line, so that a flood of strangers cannot take all our places
ANCHOR_AFTER_S = 300.0  # a peer that we dialled and that stayed so long may become one
ADDRESSES_PER_GROUP_MAX = 128  # known in one public /24 or /56, so that one network cannot fill the book
PEERS_PER_GROUP_MAX = 2  # connections we choose ourselves into one public /24 or /56
FAILURES_MAX = 8  # an address that never worked is forgotten after so many tries
FAILURES_FORGIVEN_MAX = 32  # the count stops here: the wait no longer changes
FIRST_WAIT_S = 2.0  # after one failure; doubles with each
WAIT_MAX_S = 300.0
ALONE_WAIT_MAX_S = 15.0  # the cap while no peer is connected
JITTER = 0.5  # a wait is drawn from 50 % to 150 % of its length, so that nodes cut off together do not return together
REMEMBERED_S = 14 * 86400.0  # a proven address that has not worked for so long counts as unproven
SHARED_S = 86400.0  # only addresses that worked within a day are told to others
SHARED_ADDRESSES_MAX = 4  # of one peer, the best ones


class Source(StrEnum):
    """How we learned an address; the order is the order of trust between unproven ones."""

    BOOTSTRAP = "bootstrap"
    MDNS = "mdns"
    INBOUND = "inbound"
    ADVERT = "advert"
    EXCHANGE = "exchange"


_RANK = {source: rank for rank, source in enumerate(Source)}


@dataclass(slots=True, kw_only=True)
class _Entry:
    """What is known of one address.

    `added`: also the first time it is due. `vouched`: when its peer, connected from that very host, last claimed it.
    `factor`: the jitter drawn at the last failure.
    """

    address: Address
    group: str | None  # the address's own, worked out once
    source: Source
    added: float
    succeeded: float | None = None
    failed: float | None = None
    vouched: float | None = None
    failures: int = 0
    factor: float = 1.0
    reason: str = ""

    def due(self, alone: bool) -> float:
        if self.failed is None or self.failures == 0:
            return self.added
        cap = ALONE_WAIT_MAX_S if alone else WAIT_MAX_S
        return self.failed + min(FIRST_WAIT_S * 2.0 ** (self.failures - 1), cap) * self.factor

    def shareable(self, now: float, listener: Scope) -> bool:
        fresh = any(when is not None and now - when < SHARED_S for when in (self.succeeded, self.vouched))
        return fresh and tellable(self.address, listener) and self.address.scope is not Scope.NAMED

    def proven(self, now: float) -> bool:
        return self.succeeded is not None and now - self.succeeded < REMEMBERED_S

    def preference(self, now: float) -> tuple[bool, int, int, float]:
        """Smaller is better: proven, then few failures, then a trusted source, then the newest success."""
        newest = -self.succeeded if self.succeeded is not None else 0.0
        return (not self.proven(now), self.failures, _RANK[self.source], newest)


@dataclass(slots=True, kw_only=True)
class _Peer:
    entries: dict[str, _Entry] = field(default_factory=dict)

    def best(self, now: float) -> list[_Entry]:
        return sorted(self.entries.values(), key=lambda entry: entry.preference(now))


@dataclass(frozen=True, slots=True, kw_only=True)
class BookStatistics:
    """Counts; `dropped` says why addresses were not taken or were forgotten."""

    peers: int
    addresses: int
    proven: int
    anchors: int
    dropped: dict[str, int]


class Book:
    """Addresses per peer, with what came of dialling them."""

    def __init__(self, own: PeerId, rng: random.Random, *, peers_max: int = PEERS_MAX) -> None:
        assert peers_max >= 1
        self._own = own
        self._rng = rng
        self._peers_max = peers_max
        self._peers: dict[PeerId, _Peer] = {}
        self._anchors: list[PeerId] = []
        self._per_group: Counter[str] = Counter()  # addresses known
        self._held: OrderedDict[PeerId, float] = OrderedDict()  # until when
        self._dropped: dict[str, int] = {}

    def __contains__(self, peer: PeerId) -> bool:
        return peer in self._peers

    def __len__(self) -> int:
        return len(self._peers)

    @property
    def anchors(self) -> tuple[PeerId, ...]:
        """The peers that stay first in line."""
        return tuple(self._anchors)

    def add(self, address: Address, source: Source, now: float) -> bool:
        """Learn an address. False when it is our own, or there is no room for it (counted)."""
        if address.peer == self._own:
            return False  # a shared bootstrap file names us too
        if source is not Source.BOOTSTRAP and address.scope is Scope.NAMED:
            return self._drop("name from a stranger")
        peer, group = self._peers.get(address.peer), address.group
        is_crowded = group is not None and self._per_group[group] >= ADDRESSES_PER_GROUP_MAX
        if is_crowded and source is not Source.BOOTSTRAP and (peer is None or address.text not in peer.entries):
            return self._drop("addresses of one network")
        if peer is None:
            if len(self._peers) >= self._peers_max and not self._evict(now):
                return self._drop("book full")
            peer = self._peers[address.peer] = _Peer()
        known = peer.entries.get(address.text)
        if known is not None:
            known.source = min(known.source, source, key=_RANK.__getitem__)
            return True
        if len(peer.entries) >= ADDRESSES_MAX and not self._evict_address(peer, now):
            return self._drop("addresses of one peer")
        peer.entries[address.text] = _Entry(address=address, group=group, source=source, added=now)
        if group is not None:
            self._per_group[group] += 1
        return True

    def due(
        self,
        now: float,
        *,
        exclude: frozenset[PeerId] = frozenset(),
        groups: Mapping[str, int] | None = None,
        alone: bool = False,
        limit: int = PEERS_MAX,
    ) -> list[Address]:
        """The addresses to dial now, best first, at most one per peer and none of a peer in `exclude`.

        `groups`: connections held already per group. A network that has none comes before one that has; one over
        PEERS_PER_GROUP_MAX is passed over, unless the operator named the address. `alone` lowers the waits.
        """
        ready = []
        for peer_id, peer in self._peers.items():
            if peer_id in exclude or self.held(peer_id, now):
                continue
            entry = min(
                (entry for entry in peer.entries.values() if entry.due(alone) <= now),
                key=lambda entry: entry.preference(now),
                default=None,
            )
            if entry is not None:
                first = peer_id not in self._anchors
                ready.append((first, entry.preference(now)[:3], self._rng.random(), peer_id, entry))
        ready.sort(key=lambda row: row[:3])
        taken, chosen = Counter(groups or {}), dict[PeerId, Address]()
        for most in range(1, PEERS_PER_GROUP_MAX + 1):
            for first, _, _, peer_id, entry in ready:
                if len(chosen) == limit:
                    break
                group = entry.group
                free = group is None or entry.source is Source.BOOTSTRAP or not first
                if peer_id not in chosen and (free or taken[group or ""] < most):
                    chosen[peer_id] = entry.address
                    taken[group or ""] += 1
        return list(chosen.values())

    def succeeded(self, address: Address, now: float) -> None:
        """A dial of this address reached its peer, and the peer is one of our network."""
        entry = self._entry(address)
        if entry is None:
            return
        entry.succeeded, entry.reason = now, ""

    def lasted(self, address: Address, connected_s: float) -> None:
        """The connection to an address that we dialled is up for so long; after ANCHOR_AFTER_S it may be an anchor."""
        if connected_s >= ANCHOR_AFTER_S and self._entry(address) is not None:
            self._consider_anchor(address)

    def is_known(self, peer: PeerId) -> bool:
        """Whether we reached this peer ourselves once, or the operator named it: not a stranger."""
        entries = known.entries.values() if (known := self._peers.get(peer)) else ()
        return any(entry.succeeded is not None or entry.source is Source.BOOTSTRAP for entry in entries)

    def steady(self, address: Address) -> None:
        """A connection there lasted: what failed before no longer counts. One that is cut at once counts as failed."""
        entry = self._entry(address)
        if entry is not None:
            entry.failures = 0

    def vouch(self, address: Address, now: float) -> None:
        """The peer, connected now from this address's own host, says that it listens there."""
        entry = self._entry(address)
        if entry is not None and entry.address.scope is not Scope.NAMED:
            entry.vouched = now

    def failed(self, address: Address, now: float, reason: str) -> None:
        """A dial of this address failed; a stranger's address that never worked is forgotten after FAILURES_MAX."""
        entry = self._entry(address)
        if entry is None:
            return
        entry.failed, entry.reason = now, reason
        entry.failures = min(entry.failures + 1, FAILURES_FORGIVEN_MAX)
        entry.factor = 1.0 - JITTER + 2 * JITTER * self._rng.random()
        if entry.failures >= FAILURES_MAX and entry.source is not Source.BOOTSTRAP and not entry.proven(now):
            self._remove(address.peer, entry)
            self._drop("never worked")

    def hold(self, peer: PeerId, now: float, wait_s: float) -> None:
        """Do not dial this peer for `wait_s`: it refused us or we it. Of more than PEERS_MAX holds the oldest goes."""
        self._held[peer] = max(self._held.get(peer, now), now + wait_s)
        self._held.move_to_end(peer)
        if len(self._held) > PEERS_MAX:
            self._held.popitem(last=False)
        self._anchors = [anchor for anchor in self._anchors if anchor != peer]

    def held(self, peer: PeerId, now: float) -> bool:
        """Whether a hold is on."""
        return now < self._held.get(peer, float("-inf"))

    def release(self, peer: PeerId) -> None:
        """Lift a hold: the peer has come to us, or its reason is gone."""
        self._held.pop(peer, None)

    def deadline(self, now: float, *, exclude: frozenset[PeerId] = frozenset(), alone: bool = False) -> float:
        """When an address that is not due now will be."""
        soonest = float("inf")
        for peer_id, peer in self._peers.items():
            if peer_id not in exclude:
                free = self._held.get(peer_id, float("-inf"))
                for entry in peer.entries.values():
                    if now < (when := max(free, entry.due(alone))) < soonest:
                        soonest = when
        return soonest

    def addresses(self, peer: PeerId, now: float) -> list[Address]:
        """All we know of one peer, best first."""
        known = self._peers.get(peer)
        return [entry.address for entry in known.best(now)] if known else []

    def share(self, now: float, listener: Scope, limit: int, exclude: PeerId) -> Iterator[tuple[PeerId, list[str]]]:
        """A random choice of peers whose addresses worked within SHARED_S and are of use to that listener.

        An address of a peer that only came to us counts when the peer is seen at that host: nobody can have us send
        others to a stranger's machine.
        """
        fresh: list[tuple[PeerId, list[str]]] = []
        for peer_id, peer in self._peers.items():
            texts = [entry.address.text for entry in peer.best(now) if entry.shareable(now, listener)]
            if texts and peer_id != exclude:
                fresh.append((peer_id, texts[:SHARED_ADDRESSES_MAX]))
        yield from self._rng.sample(fresh, min(limit, len(fresh)))

    def reasons(self, peer: PeerId) -> dict[str, str]:
        """Why each failing address of a peer failed last."""
        known = self._peers.get(peer)
        return {text: entry.reason for text, entry in known.entries.items() if entry.reason} if known else {}

    def statistics(self, now: float) -> BookStatistics:
        """Counts of what is known."""
        entries = [entry for peer in self._peers.values() for entry in peer.entries.values()]
        return BookStatistics(
            peers=len(self._peers),
            addresses=len(entries),
            proven=sum(entry.proven(now) for entry in entries),
            anchors=len(self._anchors),
            dropped=dict(self._dropped),
        )

    def to_json(self, now: float, unix_s: float) -> bytes:
        """The book for the disk. Operator's entries are kept too: they may have proved good.

        Failures are not: a restart is a new chance, the network may be another one today.
        """
        shift = unix_s - now
        return encode_book(
            self._anchors,
            [
                SavedAddress(
                    addr=entry.address.text,
                    source=entry.source,
                    added=entry.added + shift,
                    succeeded=None if entry.succeeded is None else entry.succeeded + shift,
                )
                for peer in self._peers.values()
                for entry in peer.entries.values()
            ],
        )

    def read_json(self, raw: bytes, now: float, unix_s: float) -> None:
        """Add what a saved book holds. Raises BadFile; nothing is added then.

        An entry that the operator's bootstrap file no longer names comes back as an ordinary one.
        """
        anchors, addresses = decode_book(raw, frozenset(Source))
        shift = unix_s - now
        for address, row in addresses:
            source = Source.EXCHANGE if row.source == Source.BOOTSTRAP else Source(row.source)
            entry = self._entry(address) if self.add(address, source, now) else None
            if entry is None:
                continue
            # a clock that was set back must not make an address look young or blocked for ever
            entry.added = min(row.added - shift, now)
            entry.succeeded = None if row.succeeded is None else min(row.succeeded - shift, now)
        self._anchors = [peer for peer in dict.fromkeys(anchors) if peer in self._peers][:ANCHORS_MAX]

    def _entry(self, address: Address) -> _Entry | None:
        peer = self._peers.get(address.peer)
        return peer.entries.get(address.text) if peer else None

    def _drop(self, reason: str) -> bool:
        self._dropped[reason] = self._dropped.get(reason, 0) + 1
        return False

    def _remove(self, peer_id: PeerId, entry: _Entry) -> None:
        peer = self._peers[peer_id]
        self._uncount(peer.entries.pop(entry.address.text))
        if not peer.entries:
            del self._peers[peer_id]
            self._anchors = [anchor for anchor in self._anchors if anchor != peer_id]

    def _uncount(self, *entries: _Entry) -> None:
        for entry in entries:
            if (group := entry.group) is not None:
                self._per_group[group] -= 1
                if not self._per_group[group]:
                    del self._per_group[group]

    def _consider_anchor(self, address: Address) -> None:
        """Take an anchor while there is room, or in place of one that is gone for good; others stay."""
        if address.peer in self._anchors:
            return
        lost = [peer for peer in self._anchors if self._peers[peer].best(0.0)[0].failures >= FAILURES_MAX]
        self._anchors = [peer for peer in self._anchors if peer not in lost]
        if len(self._anchors) >= ANCHORS_MAX:
            return
        groups = {entry.group for peer in self._anchors for entry in self._peers[peer].entries.values()}
        if address.group is None or address.group not in groups:
            self._anchors.append(address.peer)

    def _kept(self, peer_id: PeerId, entries: Iterable[_Entry]) -> bool:
        return peer_id in self._anchors or any(entry.source is Source.BOOTSTRAP for entry in entries)

    def _evict(self, now: float) -> bool:
        """Make room for peers: unproven ones with failures first, then the oldest; proven ones never for strangers."""
        candidates = []
        for peer_id, peer in self._peers.items():
            entries = peer.entries.values()
            if not self._kept(peer_id, entries) and not any(entry.proven(now) for entry in entries):
                failures = min(entry.failures for entry in entries)
                candidates.append((-failures, min(entry.added for entry in entries), peer_id))
        for _, _, peer_id in heapq.nsmallest(min(PEERS_EVICTED_AT_ONCE, max(1, self._peers_max // 8)), candidates):
            self._uncount(*self._peers.pop(peer_id).entries.values())
            self._drop("made room")
        return bool(candidates)

    def _evict_address(self, peer: _Peer, now: float) -> bool:
        worst = max(
            (entry for entry in peer.entries.values() if entry.source is not Source.BOOTSTRAP and entry.failures),
            key=lambda entry: entry.preference(now),
            default=None,
        )
        if worst is None:
            return False
        self._uncount(peer.entries.pop(worst.address.text))
        self._drop("made room")
        return True
