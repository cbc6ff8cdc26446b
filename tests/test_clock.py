"""A wall clock that is wrong by minutes or days: nothing stops, whoever is wrong is refused and told in a sentence."""

from __future__ import annotations

import pytest
from trio.testing import MockClock

from crypto.identity import PeerId
from gossip.directory import SKEW_MS
from gossip.standing import BAN_FATAL_S, Fault, Standing, Verdict
from node.state import CLOCK_PEERS_MIN, clock_problem
from p2p.loopback import LoopbackNetwork
from tests.test_gossip_service import CAPACITY, network, node, until, wall_clock_ms

__all__ = ["network"]  # a fixture
SKEWS_MS = [sign * minutes * 60_000 for minutes in (10, 10 * 1440) for sign in (1, -1)]


@pytest.mark.parametrize("skew_ms", SKEWS_MS)
async def test_a_wrong_clock_is_refused_told_to_its_owner_and_harms_nobody(
    network: LoopbackNetwork, autojump_clock: MockClock, skew_ms: int
) -> None:
    async with (
        node(network) as a,
        node(network) as b,
        node(network) as c,
        node(network, wall_clock_ms=lambda: wall_clock_ms() + skew_ms) as wrong,
    ):
        right = (a, b, c)
        for here in (*right, wrong):
            here.gossip.offer(CAPACITY)
            for other in right:
                if other is not here:
                    await here.transport.dial(other.transport.addresses()[0])
        await until(lambda: all(here.sees() == {one.peer for one in right} - {here.peer} for here in right), 30)
        await until(lambda: wrong.gossip.statistics().directory.clock_peers == 3, 60)
        assert wrong.sees() == set()
        for here in right:
            heard = here.gossip.statistics()
            assert set(heard.standing.faults.values()) == {0}, "a wrong clock is no breach"
            outcomes = heard.directory.outcomes
            assert outcomes.get("future" if skew_ms > 0 else "expired", 0) > 0
            assert clock_problem(heard.directory.clock_offset_ms, heard.directory.clock_peers) == ""
            assert wrong.peer in here.transport.peers(), "it may stay, and mend"
        told = wrong.gossip.statistics().directory
        assert told.clock_offset_ms == pytest.approx(-skew_ms, abs=1_000)
        sentence = clock_problem(told.clock_offset_ms, told.clock_peers)
        assert ("ahead of" if skew_ms > 0 else "behind") in sentence
        assert "set it (NTP)" in sentence


async def test_nodes_whose_clocks_are_wrong_alike_serve_each_other(
    network: LoopbackNetwork, autojump_clock: MockClock
) -> None:
    def wrong() -> int:
        return wall_clock_ms() + 10 * 86_400_000

    async with node(network, wall_clock_ms=wrong) as one, node(network, wall_clock_ms=wrong) as other:
        one.gossip.offer(CAPACITY)
        await one.transport.dial(other.transport.addresses()[0])
        await until(lambda: one.peer in other.sees(), 30)


async def test_a_clock_that_jumps_while_a_node_runs_ends_no_offer(
    network: LoopbackNetwork, autojump_clock: MockClock
) -> None:
    """Offers live by the monotonic clock; when the wall clock is right again all is as before."""
    skew_ms = 0
    async with node(network) as one, node(network, wall_clock_ms=lambda: wall_clock_ms() + skew_ms) as jumping:
        one.gossip.offer(CAPACITY)
        await one.transport.dial(jumping.transport.addresses()[0])
        await until(lambda: one.peer in jumping.sees(), 30)
        skew_ms = 10 * 86_400_000
        await until(lambda: jumping.gossip.statistics().directory.outcomes.get("expired", 0) > 0, 60)
        skew_ms = 0
        await until(lambda: one.peer in jumping.sees(), 30)


@pytest.mark.parametrize("skew_ms", SKEWS_MS)
def test_a_ban_outlives_a_restart_under_another_time(skew_ms: int) -> None:
    """Set back, it lasts no longer than a ban can; set forward, what it says is over is over."""
    before, after = Standing(), Standing()
    peer = PeerId("eve")
    before.blame(peer, Fault.FATAL, 0.0)
    after.restore(before.saved_bans(0.0, 1_800_000_000_000), 0.0, 1_800_000_000_000 + skew_ms)
    over = skew_ms / 1000 > BAN_FATAL_S
    assert after.verdict(peer, 1.0) is (Verdict.FINE if over else Verdict.BANNED)
    assert after.verdict(peer, BAN_FATAL_S + 1.0) is Verdict.FINE


def test_too_few_peers_or_too_little_say_nothing() -> None:
    assert clock_problem(None, 0) == ""
    assert clock_problem(10 * SKEW_MS, CLOCK_PEERS_MIN - 1) == ""
    assert clock_problem(SKEW_MS, 9) == ""
    assert "behind those of most of the 3 peers" in clock_problem(SKEW_MS + 1, 3)
    assert "ahead of" in clock_problem(-SKEW_MS - 1, 3)
