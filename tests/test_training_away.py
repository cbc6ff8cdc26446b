"""When a quorum counts as away, and since when."""

from __future__ import annotations

import pytest

from crypto.identity import Identity, PeerId
from gossip.electors import Electors, Terms
from node.training_away import AWAY_ROUNDS, AWAY_S_MIN, Absence
from node.training_session import NEAR_EVERY_S

PEERS = tuple(sorted(Identity.make().peer_id for _ in range(4)))
STRANGER = Identity.make().peer_id


def electors(voters: int) -> Electors:
    return Electors.of_founders(PEERS[:voters], Terms())


def looked(voters: int, *near: PeerId, now_s: float = 100.0) -> Absence:
    absence = Absence()
    absence.look(electors(voters), near, now_s)
    return absence


@pytest.mark.parametrize(
    ("voters", "near", "is_away"),
    [(1, 1, False), (2, 1, True), (2, 2, False), (3, 1, True), (3, 2, False), (4, 2, True), (4, 3, False)],
)
def test_a_quorum_is_away_when_fewer_voters_can_be_reached(voters: int, near: int, is_away: bool) -> None:
    absence = looked(voters, *PEERS[:near])
    assert absence.is_long(100.0 + AWAY_S_MIN, None) is is_away
    assert bool(absence.why) is is_away


def test_who_has_no_vote_ends_no_round_and_counts_for_nothing() -> None:
    assert looked(2, PEERS[0], STRANGER).why == "of 2 voters 1 can be reached, a round needs 2"
    assert looked(2, STRANGER).why == "of 2 voters 0 can be reached, a round needs 2"
    assert looked(2, STRANGER, *PEERS).why == ""


def test_it_is_long_after_a_while_and_after_two_rounds_of_the_usual_length() -> None:
    absence = looked(2, PEERS[0])
    assert not absence.is_long(100.0 + AWAY_S_MIN - 0.1, None)
    assert absence.is_long(100.0 + AWAY_S_MIN, None)
    assert absence.is_long(100.0 + AWAY_S_MIN, AWAY_S_MIN / AWAY_ROUNDS)
    assert not absence.is_long(100.0 + AWAY_S_MIN, AWAY_S_MIN)
    assert absence.is_long(100.0 + AWAY_ROUNDS * AWAY_S_MIN, AWAY_S_MIN)
    assert AWAY_S_MIN > NEAR_EVERY_S  # who is away was dialled once more


def test_it_counts_from_when_it_began_and_anew_when_they_were_back() -> None:
    absence = looked(2, PEERS[0])
    absence.look(electors(2), PEERS[:1], 110.0)
    assert absence.is_long(100.0 + AWAY_S_MIN, None)
    absence.look(electors(2), PEERS[:2], 120.0)
    assert absence.why == ""
    assert not absence.is_long(1e9, None)
    absence.look(electors(2), PEERS[:1], 130.0)
    assert not absence.is_long(130.0 + AWAY_S_MIN - 0.1, None)
    assert absence.is_long(130.0 + AWAY_S_MIN, None)
