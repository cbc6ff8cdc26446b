"""How much gossip a connected peer may hand us, before any signature is looked at, and when it has handed us too much.

Rules: core. Whoever forwards is held to it, whoever may have written it: an honest peer forwards only what it has
checked. Reading is slowed first, so that a flood costs its sender's own stream; what is over the quota of signatures
is dropped unseen. A second with such drops is a strike, as is a forged message; strikes fade, and at STRIKES_MAX the
peer is to be cut. What was counted outlives the connection, so that coming back at once is no new chance.
Source: SECURITY.md P5, P7, F9.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from crypto.identity import PeerId

UNITS_PER_S, UNITS_BURST = 500.0, 1500.0  # messages, subscriptions and ids in control messages: what costs a look
SIGNATURES_PER_S, SIGNATURES_BURST = 200.0, 400.0  # of messages not seen before: 0.2 ms each
STRIKES_MAX = 1.5  # two within a few seconds: one burst, as after a partition, is nobody's fault
STRIKE_EVERY_S = 1.0  # at most one in so long
STRIKE_FADES_S = 10.0
NEIGHBOURS_MAX = 1024  # remembered; the longest unheard is forgotten
WAIT_S_MAX = 5.0


@dataclass(slots=True)
class _Neighbour:
    units: float = UNITS_BURST
    signatures: float = SIGNATURES_BURST
    at: float = 0.0
    strikes: float = 0.0
    struck_at: float = float("-inf")


class Neighbours:
    """What each neighbour has used of its share. Times are monotonic seconds."""

    def __init__(self) -> None:
        self._known: OrderedDict[PeerId, _Neighbour] = OrderedDict()

    def __len__(self) -> int:
        return len(self._known)

    def read(self, peer: PeerId, units: int, now: float) -> float:
        """A frame with so much in it came: how many seconds to wait before the next is read."""
        known = self._filled(peer, now)
        known.units -= max(1, units)
        return min(WAIT_S_MAX, max(0.0, -known.units / UNITS_PER_S))

    def may_check(self, peer: PeerId, now: float) -> bool:
        """Whether one more signature may be checked for this neighbour; a strike when not."""
        known = self._filled(peer, now)
        if known.signatures < 1.0:
            self.strike(peer, now)
            return False
        known.signatures -= 1.0
        return True

    def strike(self, peer: PeerId, now: float) -> None:
        """It did what no honest neighbour does."""
        known = self._filled(peer, now)
        if now - known.struck_at >= STRIKE_EVERY_S:
            known.strikes += 1.0
            known.struck_at = now

    def is_out(self, peer: PeerId, now: float) -> bool:
        """Whether it is to be cut off now."""
        return self._filled(peer, now).strikes >= STRIKES_MAX

    def _filled(self, peer: PeerId, now: float) -> _Neighbour:
        known = self._known.get(peer)
        if known is None:
            if len(self._known) >= NEIGHBOURS_MAX:
                self._known.popitem(last=False)
            known = self._known[peer] = _Neighbour(at=now)
        past_s, known.at = max(0.0, now - known.at), now
        known.units = min(UNITS_BURST, known.units + past_s * UNITS_PER_S)
        known.signatures = min(SIGNATURES_BURST, known.signatures + past_s * SIGNATURES_PER_S)
        known.strikes = max(0.0, known.strikes - past_s / STRIKE_FADES_S)
        self._known.move_to_end(peer)
        return known
