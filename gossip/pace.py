"""When to say something, and how much to listen to: advert times, token buckets.

Rules: core. An advert goes out when its capacity changed in a way that matters to routing, at most one each
INTERVAL_S; each REFRESH_S in any case; and soon after a peer joined, twice, because a new neighbour is not in the
gossip mesh at once. In a crowd both times are stretched (gossip/flow.py). How much is
listened to is asked before anything costly is done for a stranger.
Source: SECURITY.md P5 and section 5 "Rate limits"; NETWORK.md rule 4; ITU-T I.371 (leaky bucket).
"""

from __future__ import annotations

import random

from crypto.identity import PeerId
from gossip.messages import GOODBYE, Capacity
from p2p.allowance import Buckets

INTERVAL_S = 1.0
REFRESH_S = 10.0  # a third of an advert's life
REFRESH_JITTER = 0.1  # nodes that started together must not speak together for ever
JOINED_S, JOINED_AGAIN_S = 0.2, 1.7  # after the subscriptions were exchanged; after the next gossip heartbeat
FEW_NEIGHBOURS = 4  # with more, who is new to one of them is no news to the network
LOAD_STEP = 0.2  # of the slots: a smaller change of load waits for the refresh
RATE_STEP = 0.3  # of a measured rate
PEER_RATE_PER_S, PEER_BURST = 2.0, 10.0  # SECURITY.md section 5
STRANGERS_RATE_PER_S, STRANGERS_BURST = 50.0, 200.0  # of all peers together that have no offer yet
ASK_RATE_PER_S, ASK_BURST = 0.2, 5.0  # a peer asks once for each connection
FIND_RATE_PER_S, FIND_BURST = 1.0, 10.0  # of one peer: a sample now and then, and names that its clients ask for
OVER_QUOTA_SAMPLE_PER_S = 1.0  # of what is over quota so much is looked at, so that an old message blames nobody


class AdvertPace:
    """When the next advert is due. `now` is monotonic seconds."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self.stretch = 1.0
        self._last_s = float("-inf")
        self._wanted_s = float("inf")
        self._again_s = float("-inf")

    def changed(self, now: float) -> None:
        """What the next advert would say matters now."""
        self._wanted_s = min(self._wanted_s, now)

    def joined(self, now: float, neighbours: int) -> None:
        """A peer joined, and is one of so many. Before the first `changed` there is nothing to tell it.

        It asks for our advert anyway; what is said now is for those behind it, who cannot know us yet.
        """
        if self._wanted_s < float("inf") and neighbours <= FEW_NEIGHBOURS:
            self._wanted_s = min(self._wanted_s, now + JOINED_S)
            self._again_s = now + JOINED_AGAIN_S

    def published(self, now: float) -> None:
        """An advert went out."""
        self._last_s = now
        self._wanted_s = now + REFRESH_S * self.stretch * (1.0 - REFRESH_JITTER * self._rng.random())
        if self._again_s > now:
            self._wanted_s = min(self._wanted_s, self._again_s)

    def deadline(self) -> float:
        """When the next advert is due; infinite before the first `changed`."""
        return max(self._wanted_s, self._last_s + INTERVAL_S * self.stretch)


def matters(before: Capacity, after: Capacity) -> bool:
    """Whether peers would route otherwise if they knew of this change."""
    if (before.models, before.accepting, before.trains, before.slots_total) != (
        after.models,
        after.accepting,
        after.trains,
        after.slots_total,
    ):
        return True
    if (before.slots_free == 0) != (after.slots_free == 0):
        return True
    slots = max(1, after.slots_total)
    if abs(_load(before) - _load(after)) >= LOAD_STEP * slots:
        return True
    return abs(before.decode_tok_s - after.decode_tok_s) > RATE_STEP * max(before.decode_tok_s, after.decode_tok_s)


def _load(capacity: Capacity) -> int:
    return capacity.slots_total - capacity.slots_free + capacity.queue_length


class OwnAdvert:
    """What this node says of itself, and when."""

    def __init__(self, rng: random.Random, *, started_ms: int, sequence: int) -> None:
        self.started_ms = started_ms
        self.sequence = sequence  # the last one used
        self.raw: bytes | None = None  # the last one signed
        self.times_said = 0
        self.pace = AdvertPace(rng)
        self._capacity = GOODBYE
        self._said: Capacity | None = None
        self._is_withdrawn = False

    def offer(self, capacity: Capacity, now: float) -> None:
        """The capacity to tell from now on; ignored after `withdraw`."""
        if self._is_withdrawn:
            return
        self._capacity = capacity
        if self._said is None or matters(self._said, capacity):
            self.pace.changed(now)

    def withdraw(self) -> None:
        """Nothing but goodbye is said from now on."""
        self._is_withdrawn = True
        self._capacity = GOODBYE

    def serves(self, model: str) -> bool:
        """Whether the last advert offered a model."""
        return self._said is not None and any(offer.name == model for offer in self._said.models)

    def say(self, now: float, now_ms: int) -> tuple[Capacity, int]:
        """The capacity to tell now, and under which sequence: it grows though the saved one be lost."""
        self.pace.published(now)
        self.times_said += 1
        self.sequence = max(self.sequence + 1, now_ms)
        self._said = self._capacity
        return self._capacity, self.sequence


class Quota:
    """How much is listened to, before any signature is looked at."""

    def __init__(self) -> None:
        self._peers = Buckets(rate_per_s=PEER_RATE_PER_S, burst=PEER_BURST)
        self._strangers = Buckets(rate_per_s=STRANGERS_RATE_PER_S, burst=STRANGERS_BURST)
        self._samples = Buckets(rate_per_s=OVER_QUOTA_SAMPLE_PER_S, burst=1)
        self._asks = Buckets(rate_per_s=ASK_RATE_PER_S, burst=ASK_BURST)
        self._finds = Buckets(rate_per_s=FIND_RATE_PER_S, burst=FIND_BURST)

    def refusal(self, peer: PeerId, *, is_stranger: bool, now: float) -> str:
        """Why the peer is not listened to now; empty when it is."""
        if not self._peers.take(peer, now):
            return "over_quota"
        if is_stranger and not self._strangers.take("strangers", now):
            return "strangers_over_quota"
        return ""

    def sampled(self, peer: PeerId, now: float) -> bool:
        """Whether to look at one message of a peer over its quota."""
        return self._samples.take(peer, now)

    def may_ask(self, peer: PeerId, now: float) -> bool:
        """Whether the peer may ask for what we know."""
        return self._asks.take(peer, now)

    def may_find(self, peer: PeerId, now: float) -> bool:
        """Whether the peer may ask for a sample, or for who serves a model."""
        return self._finds.take(peer, now)
