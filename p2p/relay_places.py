"""At which relays this node holds a place, when to renew one, and which peer to ask next.

Rules: core. RELAYS_WANTED places while they are wanted; what is lost is replaced at once by another peer; a peer that
refused or failed is asked again later, each time later still. A place is given back in silence: it is told to nobody,
and ends by itself. Times are monotonic seconds.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from crypto.identity import PeerId

RELAYS_WANTED = 2
RENEW_AT = 0.5  # of a place's time
FIRST_WAIT_S = 60.0  # after a refusal; doubles with each
WAIT_MAX_S = 3600.0
REFUSERS_MAX = 256  # that are remembered


@dataclass(slots=True, kw_only=True)
class _Place:
    until: float
    renew_at: float


@dataclass(slots=True, kw_only=True)
class _Refuser:
    again_at: float
    wait_s: float
    reason: str


class Places:
    """The places of this node."""

    def __init__(self) -> None:
        self._held: dict[PeerId, _Place] = {}
        self._refusers: OrderedDict[PeerId, _Refuser] = OrderedDict()

    def held(self, now: float) -> Mapping[PeerId, float]:
        """Relays and for how many seconds more they hold our place."""
        return {relay: place.until - now for relay, place in self._held.items()}

    def due(self, candidates: Sequence[PeerId], wanted: bool, now: float) -> list[PeerId]:
        """Relays to ask now, for a new place or to keep one. `candidates`: connected peers that may be relays."""
        for relay in [relay for relay, place in self._held.items() if place.until <= now or relay not in candidates]:
            del self._held[relay]
        if not wanted:
            return []
        ask = [relay for relay, place in self._held.items() if place.renew_at <= now]
        room = RELAYS_WANTED - len(self._held)
        free = [peer for peer in candidates if peer not in self._held and not self._waits(peer, now)]
        return ask + free[: max(room, 0)]

    def leave(self) -> list[PeerId]:
        """No place is wanted any more; gives those that were held."""
        left, self._held = list(self._held), {}
        return left

    def given(self, relay: PeerId, lasts_s: float, now: float) -> None:
        """A place for so long."""
        self._held[relay] = _Place(until=now + lasts_s, renew_at=now + lasts_s * RENEW_AT)
        self._refusers.pop(relay, None)

    def refused(self, relay: PeerId, reason: str, now: float) -> None:
        """No place there, or not any more."""
        self._held.pop(relay, None)
        before = self._refusers.pop(relay, None)
        wait_s = FIRST_WAIT_S if before is None else min(before.wait_s * 2, WAIT_MAX_S)
        self._refusers[relay] = _Refuser(again_at=now + wait_s, wait_s=wait_s, reason=reason)
        if len(self._refusers) > REFUSERS_MAX:
            self._refusers.popitem(last=False)

    def why_none(self, candidates: Sequence[PeerId]) -> str:
        """Why no relay was found, as far as peers were asked."""
        if not candidates:
            return "no public peer is connected"
        return "; ".join(each.reason for each in list(self._refusers.values())[-2:])

    def _waits(self, peer: PeerId, now: float) -> bool:
        refuser = self._refusers.get(peer)
        return refuser is not None and now < refuser.again_at
