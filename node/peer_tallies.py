"""How this node's requests to each peer ended, for the busiest peers.

Rules: core. At most KEPT_MAX peers are kept: one more puts out the one with the fewest, so that a swarm of newcomers
costs no memory and hides nobody who is asked often. At most TOLD_MAX are told.
"""

from __future__ import annotations

from dataclasses import dataclass

from crypto.identity import PeerId

KEPT_MAX = 256
TOLD_MAX = 32


@dataclass(slots=True)
class _Counts:
    finished: int = 0
    failed: int = 0


class PeerTallies:
    """Attempts at peers, by how they ended; one that the client left counts as neither."""

    def __init__(self) -> None:
        self._peers: dict[PeerId, _Counts] = {}

    def finished(self, peer: PeerId) -> None:
        """The peer answered in full."""
        self._counts(peer).finished += 1

    def failed(self, peer: PeerId) -> None:
        """It did not, whatever the reason."""
        self._counts(peer).failed += 1

    def busiest(self) -> dict[str, dict[str, int]]:
        """Of the peers with the most attempts: {peer: {"finished", "failed"}}, the busiest first."""
        ranked = sorted(self._peers.items(), key=lambda each: -_total(each[1]))[:TOLD_MAX]
        return {peer: {"finished": counts.finished, "failed": counts.failed} for peer, counts in ranked}

    def _counts(self, peer: PeerId) -> _Counts:
        counts = self._peers.get(peer)
        if counts is None:
            if len(self._peers) >= KEPT_MAX:
                del self._peers[min(self._peers, key=lambda each: _total(self._peers[each]))]
            counts = self._peers[peer] = _Counts()
        return counts


def _total(counts: _Counts) -> int:
    return counts.finished + counts.failed
