"""Which peers worked for this node before it started, read out of its own memory.

Rules: core, pure. Only events that this node wrote of its own requests count: an `inference` that a peer answered, and
a `peer` that failed one, of which there is one for each attempt. What peers claim of themselves or of others is kept
apart and is never read here. Of each peer the newest events count, each the less the older it is; PEERS_MAX peers,
those with the newest events. What it makes is a hint to routing (gossip/observations.py), never a vote or a weight.
Source: SELF.md, "Used".
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from gossip.observations import REMEMBERED_HALF_LIFE_S
from node import events

EVENTS_MAX: Final = 1_000  # of each kind that are looked at, the newest
KINDS: Final = ("inference", "peer")
PEERS_MAX: Final = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class Remembered:
    """Requests of this node's to one peer, older ones counting less than the newest, which was age_s ago."""

    peer: str
    worked: float
    failed: float
    age_s: float
    rtt_s: float | None = None


def remembered(log: Iterable[events.Kept], now_ms: int) -> list[Remembered]:
    """What these events, in any order, say of each peer, that with the newest event first."""
    ended: dict[str, list[tuple[int, bool]]] = {}
    rtts: dict[str, tuple[int, float]] = {}
    for event in log:
        peer, is_good = _said(event.body)
        if not peer:
            continue
        if isinstance(event.body, events.Peer) and (rtt_ms := event.body.rtt_ms) is not None and math.isfinite(rtt_ms):
            rtts[peer] = max(rtts.get(peer, (0, 0.0)), (event.ts_ms, max(0.0, rtt_ms / 1000)))
        if is_good is not None:
            ended.setdefault(peer, []).append((event.ts_ms, is_good))
    newest = {peer: max(ts_ms for ts_ms, _ in ends) for peer, ends in ended.items()}
    order = sorted(newest, key=lambda peer: (-newest[peer], peer))[:PEERS_MAX]

    def worth(peer: str, *, is_good: bool) -> float:
        ages_s = [(newest[peer] - ts_ms) / 1000 for ts_ms, good in ended[peer] if good is is_good]
        return math.fsum(0.5 ** (age_s / REMEMBERED_HALF_LIFE_S) for age_s in ages_s)

    return [
        Remembered(
            peer=peer,
            worked=worth(peer, is_good=True),
            failed=worth(peer, is_good=False),
            age_s=max(0.0, (now_ms - newest[peer]) / 1000),
            rtt_s=rtts[peer][1] if peer in rtts else None,
        )
        for peer in order
    ]


def _said(body: events.Body | None) -> tuple[str, bool | None]:
    """Which peer an event is of, and whether a request to it worked; None: it tells nothing of that."""
    match body:
        case events.Inference(served_by=peer, outcome="ok"):
            return peer, True
        case events.Peer(peer=peer, happened="failed"):
            return peer, False
        case events.Peer(peer=peer):
            return peer, None
    return "", None
