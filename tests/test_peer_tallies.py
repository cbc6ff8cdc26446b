"""How requests to peers ended: bounded, and true of whoever is asked most."""

from __future__ import annotations

from crypto.identity import PeerId
from node.peer_tallies import KEPT_MAX, TOLD_MAX, PeerTallies


def test_ends_are_counted_by_peer_the_busiest_first() -> None:
    tallies = PeerTallies()
    tallies.failed(PeerId("a"))
    for _ in range(3):
        tallies.finished(PeerId("b"))
    assert list(tallies.busiest().items()) == [("b", {"finished": 3, "failed": 0}), ("a", {"finished": 0, "failed": 1})]


def test_a_swarm_of_newcomers_is_bounded_and_hides_nobody() -> None:
    tallies = PeerTallies()
    for _ in range(2):
        tallies.finished(PeerId("old friend"))
    for number in range(10 * KEPT_MAX):
        tallies.failed(PeerId(f"newcomer {number}"))
    assert len(tallies._peers) == KEPT_MAX
    assert len(tallies.busiest()) == TOLD_MAX
    assert tallies.busiest()["old friend"] == {"finished": 2, "failed": 0}
