"""What libp2p remembers of peers: little, and never instead of our own key.

Rules: a peer's part is bounded and forgotten when it disconnects; p2p/book.py is the address book that we use.

Source: SECURITY.md P7.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from libp2p.peer.peerstore import PeerStore

from p2p.guard import Drops

PEERS_MAX = 1024
ADDRESSES_MAX = 16  # of one peer
PROTOCOLS_MAX = 64
PROTOCOL_CHARS_MAX = 128
RECORD_BYTES_MAX = 4096  # a signed list of addresses


class GuardedPeerStore(PeerStore):  # type: ignore[misc]  # libp2p's types are not followed
    """A peer store with bounds.

    Around: (1) lists of any length are kept of each peer, and compared one by one; (2) when the store is full, the
    entry without addresses goes first, and that is our own, with the key.
    """

    def __init__(self, own: Any, drops: Drops) -> None:
        self._drops = drops
        super().__init__(max_records=PEERS_MAX, max_peers=PEERS_MAX)
        self._own = own

    def add_addrs(self, peer_id: Any, addrs: Sequence[Any], ttl: int = 0) -> None:
        """Keep the first addresses of a peer, up to the bound."""
        known = self.peer_data_map.get(peer_id)
        room = ADDRESSES_MAX - (len(known.get_addrs()) if known is not None else 0)
        self._left_out("peerstore_addresses", len(addrs) - max(room, 0))
        super().add_addrs(peer_id, list(addrs)[: max(room, 0)], ttl)

    def set_protocols(self, peer_id: Any, protocols: Sequence[str]) -> None:
        """Keep a peer's first protocols, up to the bounds."""
        kept = [each for each in protocols if len(each) <= PROTOCOL_CHARS_MAX][:PROTOCOLS_MAX]
        self._left_out("peerstore_protocols", len(protocols) - len(kept))
        super().set_protocols(peer_id, kept)

    def add_protocols(self, peer_id: Any, protocols: Sequence[str]) -> None:
        """As set_protocols, beside those known."""
        self.set_protocols(peer_id, [*self.get_known_protocols(peer_id), *protocols])

    def get_known_protocols(self, peer_id: Any) -> list[str]:
        """A peer's protocols, none when it is not known."""
        known = self.peer_data_map.get(peer_id)
        return list(known.get_protocols()) if known is not None else []

    def consume_peer_record(self, envelope: Any, ttl: int) -> bool:
        """Keep a signed list of addresses unless it is too large."""
        if len(envelope.raw_payload) > RECORD_BYTES_MAX:
            self._left_out("peerstore_record", 1)
            return False
        return bool(super().consume_peer_record(envelope, ttl))

    def _left_out(self, reason: str, count: int) -> None:
        if count > 0:
            self._drops.counts[reason] += count

    def forget(self, peer_id: Any) -> None:
        """Drop all that is known of a peer."""
        if peer_id != self._own and self.has_peer(peer_id):
            self.clear_peerdata(peer_id)

    def _enforce_peer_limit(self) -> None:
        """The longest known peers go, we stay."""
        surplus = len(self.peer_data_map) - self.max_peers
        for peer_id in [each for each in self.peer_data_map if each != self._own][: max(surplus, 0)]:
            self.forget(peer_id)
