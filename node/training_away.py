"""When a member trains ahead since a round cannot end, and how far: fewer voters are connected than a quorum.

Rules: core; who is connected and the time come in. Nothing is committed without a quorum, and nothing here changes
that. What is trained ahead is carried by the error feedback into the member's next updates. It is bounded, since each
step goes on from weights that nobody else has: copies that drifted apart merge badly, and a round cuts every update to
the median norm, so that most of a long way would be cut off.
Source: TRAINING.md 1 (never merge peers that drifted without rounds), 3 (7); model/gate.py clips.
"""

from __future__ import annotations

from collections.abc import Collection

from crypto.identity import PeerId
from gossip.electors import Electors

AWAY_ROUNDS = 2  # a round that takes so many times the usual is held up by more than a slow member
AWAY_S_MIN = 20.0  # longer than a session's NEAR_EVERY_S: who is away was dialled again by then
AHEAD_ROUNDS = 3  # of steps after a round's update, at most: two toys that both go so far gain by it, and one that did
# alone neither gains nor loses, since its next update is cut to the other's norm; with six it loses


class Absence:
    """Of a quorum, in one round. `look` now and then."""

    def __init__(self) -> None:
        self.why = ""  # for people: who is missing; '' while a quorum can be reached
        self._since_s = float("inf")

    def look(self, electors: Electors, near: Collection[PeerId], now_s: float) -> None:
        """near: who can be reached now, this member itself among them."""
        voters = electors.voters
        here = sum(voter in near for voter in voters)
        if here >= electors.quorum:
            self.why, self._since_s = "", float("inf")
            return
        self._since_s = min(self._since_s, now_s)
        self.why = f"of {len(voters)} voters {here} can be reached, a round needs {electors.quorum}"

    def is_long(self, now_s: float, round_s: float | None) -> bool:
        """Whether it has lasted. round_s: what a round takes, the median; None: there was none yet."""
        return now_s - self._since_s >= max(AWAY_S_MIN, AWAY_ROUNDS * (round_s or 0.0))
