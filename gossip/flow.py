"""How much this node says and passes on, so that gossip costs each node the same in a network of any size.

Rules: core. What counts is what is heard: distinct adverts a second. Above HEARD_PER_S everybody speaks less often, by
up to STRETCH_MAX; when that does not help, only a share of the peers is passed on, always the same ones, until no more
than CROWDED_PER_S is heard: adverts then stay near their publisher, and the rest of the network is known by samples
that neighbours hand over (gossip/view.py). It goes back the same way.
Source: Chiu and Jain (1989), "Analysis of the increase and decrease algorithms" (multiplicative, with a dead band;
here in proportion to the excess).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from gossip.messages import ADVERT_LIFE_MS, ADVERT_LIFE_MS_MAX
from p2p.allowance import Buckets

HEARD_PER_S = 5.0  # one costs 7 to 15 ms with all its copies (NETWORK.md section 3)
CROWDED_PER_S = 1.0  # when not all adverts can reach everybody, passing them on far is worth little
STRETCH_MAX = ADVERT_LIFE_MS_MAX / ADVERT_LIFE_MS  # an advert still lives for three refreshes
SHARE_MIN = 1 / 64
GAIN_PER_S = 0.05  # of the excess, as a power: ten times too much is answered by 12 % a second
EASE_MAX = 4.0  # a shortfall counts for no more
CALM = 0.7  # below so much of a limit there is room again
MEAN_S = 10.0  # over which what is heard is counted
TICK_S_MIN = 1e-3  # less tells no rate: what was heard counts at the next tick
PASSED_ON_PER_S, PASSED_ON_BURST = 2 * HEARD_PER_S, 100.0  # in any case, however sudden a crowd comes


@dataclass(frozen=True, slots=True, kw_only=True)
class FlowStatistics:
    """heard_per_s: distinct adverts. stretch: of the time between our own. share: of the peers that we pass on."""

    heard_per_s: float
    stretch: float
    share: float


class Flow:
    """One node's part in keeping gossip small. `tick` it each second or so."""

    def __init__(self) -> None:
        self.stretch = 1.0
        self.share = 1.0
        self._heard_per_s = 0.0
        self._heard = 0
        self._at_s: float | None = None
        self._bucket = Buckets(rate_per_s=PASSED_ON_PER_S, burst=PASSED_ON_BURST)

    def passes_on(self, place: float, now: float) -> bool:
        """An advert came by gossip that was news: whether to pass it on. place: its publisher's, from 0 to 1."""
        self._heard += 1
        return place < self.share and self._bucket.take("passed_on", now)

    def tick(self, now: float) -> None:
        """Settle on what is right now."""
        if self._at_s is None:
            self._at_s = now
        passed_s = now - self._at_s
        if passed_s < TICK_S_MIN:
            return
        self._at_s = now
        weight = 1.0 - math.exp(-passed_s / MEAN_S)
        self._heard_per_s += weight * (self._heard / passed_s - self._heard_per_s)
        self._heard = 0
        self._settle(min(passed_s, MEAN_S))

    def _settle(self, passed_s: float) -> None:
        limit_per_s = HEARD_PER_S if self.share == 1.0 else CROWDED_PER_S
        excess = self._heard_per_s / limit_per_s
        if excess > 1.0:
            step = excess ** (GAIN_PER_S * passed_s)
            if self.stretch < STRETCH_MAX:
                self.stretch = min(STRETCH_MAX, self.stretch * step)
            else:
                self.share = max(SHARE_MIN, self.share / step)
        elif excess < CALM:
            step = (CALM / max(excess, CALM / EASE_MAX)) ** (GAIN_PER_S * passed_s)
            if self.share < 1.0:
                self.share = min(1.0, self.share * step)
            else:
                self.stretch = max(1.0, self.stretch / step)

    @property
    def life_ms(self) -> int:
        """How long an advert said now is to be believed."""
        return round(ADVERT_LIFE_MS * self.stretch)

    def statistics(self) -> FlowStatistics:
        """A snapshot."""
        return FlowStatistics(heard_per_s=self._heard_per_s, stretch=self.stretch, share=self.share)
