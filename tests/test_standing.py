"""gossip/standing.py and gossip/breaker.py: faults cost, time heals, a new identity does not, bans outlive restarts."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crypto.identity import PeerId
from gossip.breaker import FAILURES_IN_A_ROW, OPEN_S_MAX, OPEN_S_MIN, TRANSITIONS, Breaker, Event, State
from gossip.standing import (
    BAN_FATAL_S,
    BAN_S,
    BANS_MAX,
    GOOD_MAX,
    HALF_LIFE_S,
    Deed,
    Fault,
    SavedBan,
    Standing,
    Verdict,
)
from p2p.address import network_of

EVE, MAL, ANN = PeerId("eve"), PeerId("mal"), PeerId("ann")
NOW_MS = 1_800_000_000_000
PUBLIC = "/ip4/93.184.216.{}/tcp/4001"


def test_a_fatal_fault_bans_for_twelve_hours() -> None:
    standing = Standing()
    assert standing.blame(EVE, Fault.FATAL, 0.0, "equivocation") is Verdict.BANNED
    assert standing.verdict(EVE, BAN_FATAL_S - 1) is Verdict.BANNED
    assert standing.verdict(EVE, BAN_FATAL_S) is Verdict.FINE
    assert standing.verdict(ANN, 0.0) is Verdict.FINE


def test_small_faults_add_up_to_a_disconnect_then_a_ban() -> None:
    standing = Standing()
    verdicts = [standing.blame(EVE, Fault.MALFORMED, 0.0) for _ in range(5)]
    assert verdicts == [Verdict.FINE, Verdict.DISCONNECT, Verdict.DISCONNECT, Verdict.DISCONNECT, Verdict.BANNED]
    assert standing.verdict(EVE, BAN_S - 1) is Verdict.BANNED
    assert standing.verdict(EVE, BAN_S + 1) is Verdict.FINE


def test_time_heals() -> None:
    standing = Standing()
    for _ in range(3):
        standing.blame(EVE, Fault.MALFORMED, 0.0)
    assert standing.verdict(EVE, 0.0) is Verdict.DISCONNECT
    assert standing.score(EVE, HALF_LIFE_S) == pytest.approx(-15.0)
    assert standing.verdict(EVE, HALF_LIFE_S) is Verdict.FINE


def test_good_deeds_buy_no_fatal_fault() -> None:
    standing = Standing()
    for _ in range(1000):
        standing.praise(EVE, Deed.AUDITED, 0.0)
    assert standing.score(EVE, 0.0) == GOOD_MAX
    assert standing.blame(EVE, Fault.FATAL, 0.0) is Verdict.BANNED


def test_new_identities_of_one_network_do_not_start_clean() -> None:
    standing = Standing()
    for number in range(4):
        peer = PeerId(f"sybil-{number}")
        standing.seen_at(peer, PUBLIC.format(number), 0.0)
        standing.blame(peer, Fault.MALFORMED, 0.0)
    assert standing.score(PeerId("sybil-0"), 0.0) == -20.0  # half the sum, worse than its own
    assert standing.seen_at(PeerId("fresh"), PUBLIC.format(99), 0.0) is Verdict.DISCONNECT
    assert standing.seen_at(ANN, "/ip4/93.184.217.1/tcp/4001", 0.0) is Verdict.FINE


def test_a_fatal_member_bans_its_network_for_a_while_only() -> None:
    standing = Standing()
    standing.seen_at(EVE, PUBLIC.format(1), 0.0)
    standing.blame(EVE, Fault.FATAL, 0.0)
    assert standing.seen_at(ANN, PUBLIC.format(2), 0.0) is Verdict.BANNED
    assert standing.verdict(ANN, 1.4 * HALF_LIFE_S) is Verdict.FINE
    assert standing.verdict(EVE, 1.4 * HALF_LIFE_S) is Verdict.BANNED


@pytest.mark.parametrize(
    ("address", "group"),
    [
        ("/ip4/93.184.216.34/tcp/1", "93.184.216.0/24"),
        ("/ip6/2a00:1450:4001:81b::200e/tcp/1", "2a00:1450:4001:800::/56"),
        ("/ip6/::ffff:93.184.216.34/tcp/1", "93.184.216.0/24"),
        ("/ip4/127.0.0.1/tcp/1", None),
        ("/ip4/192.168.1.4/tcp/1", None),
        ("/ip6/fe80::1%eth0/tcp/1", None),
        ("/dns4/example.org/tcp/1", None),
        ("/ip4/999.1.1.1/tcp/1", None),
        ("", None),
        (None, None),
    ],
)
def test_groups_are_public_networks(address: str | None, group: str | None) -> None:
    assert network_of(address) == group


def test_on_one_machine_a_bad_process_does_not_ban_the_others() -> None:
    standing = Standing()
    standing.seen_at(EVE, "/ip4/127.0.0.1/tcp/1", 0.0)
    standing.blame(EVE, Fault.FATAL, 0.0)
    assert standing.seen_at(ANN, "/ip4/127.0.0.1/tcp/2", 0.0) is Verdict.FINE


def test_bans_outlive_a_restart() -> None:
    before, after = Standing(), Standing()
    before.blame(EVE, Fault.FATAL, 100.0, "equivocation")
    before.blame(MAL, Fault.FATAL, 0.0)
    saved = before.saved_bans(100.0, NOW_MS)
    after.restore(saved, 5.0, NOW_MS + 1_000)  # another monotonic clock, a second later
    ban = after.ban_of(EVE, 5.0)
    assert ban is not None
    assert ban.reason == "equivocation"
    assert ban.until_s == pytest.approx(5.0 + BAN_FATAL_S - 1.0)
    assert [ban.peer for ban in after.bans(5.0)] == [MAL, EVE]
    late = Standing()
    late.restore(saved, 0.0, NOW_MS + 13 * 3_600_000)
    assert late.bans(0.0) == ()


def test_a_clock_set_back_bans_nobody_for_ever() -> None:
    standing = Standing()
    standing.restore([SavedBan(peer=EVE, until_ms=NOW_MS, reason="")], 0.0, 0)
    assert standing.verdict(EVE, BAN_FATAL_S) is Verdict.FINE


def test_pardon() -> None:
    standing = Standing()
    standing.blame(EVE, Fault.FATAL, 0.0)
    standing.pardon(EVE)
    assert standing.verdict(EVE, 0.0) is Verdict.FINE


def test_a_million_strangers_take_no_room() -> None:
    standing = Standing(peers_max=64)
    standing.blame(EVE, Fault.MALFORMED, 0.0)
    for number in range(500):
        standing.seen_at(PeerId(f"s{number}"), f"/ip4/93.{number % 200}.{number // 200}.1/tcp/1", 0.0)
    assert standing.statistics(0.0).scored <= 64
    assert standing.score(EVE, 0.0) == -10.0  # those with the least to remember went


def test_networks_are_bounded_and_the_worst_is_remembered() -> None:
    standing = Standing(groups_max=16)
    standing.seen_at(EVE, PUBLIC.format(1), 0.0)
    standing.blame(EVE, Fault.FATAL, 0.0)
    for number in range(100):
        peer = PeerId(f"s{number}")
        standing.seen_at(peer, f"/ip4/93.10.{number}.1/tcp/1", 0.0)
        standing.blame(peer, Fault.OVER_QUOTA, 0.0)
    assert standing.statistics(0.0).groups <= 16
    assert standing.seen_at(ANN, PUBLIC.format(2), 0.0) is Verdict.BANNED


def test_bans_are_bounded() -> None:
    standing = Standing()
    for number in range(BANS_MAX + 5):
        standing.blame(PeerId(f"s{number}"), Fault.FATAL, float(number))
    assert standing.statistics(0.0).banned == BANS_MAX
    assert standing.ban_of(PeerId("s0"), 0.0) is None


CONDUCT = st.one_of(
    st.tuples(st.sampled_from(list(Fault)), st.sampled_from((EVE, MAL))),
    st.tuples(st.just(Deed.AUDITED), st.sampled_from((EVE, MAL))),
    st.tuples(st.floats(0.0, 2000.0), st.just(EVE)),
)


@settings(deadline=None, max_examples=50)
@given(st.lists(CONDUCT, max_size=25))
def test_scores_stay_in_range_and_bans_hold(history: list[tuple[Fault | Deed | float, PeerId]]) -> None:
    standing, now = Standing(), 0.0
    fatal: dict[PeerId, float] = {}
    for peer in (EVE, MAL):
        standing.seen_at(peer, PUBLIC.format(1), 0.0)
    for what, peer in history:
        if isinstance(what, float):
            now += what
        elif isinstance(what, Deed):
            standing.praise(peer, what, now)
        else:
            standing.blame(peer, what, now)
            if what is Fault.FATAL:
                fatal[peer] = now
        for judged in (EVE, MAL):
            assert -100.0 <= standing.score(judged, now) <= GOOD_MAX
            if judged in fatal and now < fatal[judged] + BAN_FATAL_S:
                assert standing.verdict(judged, now) is Verdict.BANNED


# --- breaker ---


def test_the_table_is_total() -> None:
    assert set(TRANSITIONS) == set(State)
    assert all(set(row) == set(Event) for row in TRANSITIONS.values())


def test_a_stranger_is_cut_off_at_once_and_probed_ever_more_seldom() -> None:
    breaker, now, probes = Breaker(), 0.0, []
    while now < 3600.0:
        if breaker.allows(now):
            probes.append(now)
            breaker.started(now)
            assert not breaker.allows(now) or now == 0.0  # one probe at a time
            breaker.failed(now + 1.0)
            breaker.released(now + 1.0)
        now += 1.0
    gaps = [later - earlier for earlier, later in pairwise(probes)]
    assert gaps[:3] == [OPEN_S_MIN + 1, 2 * OPEN_S_MIN + 1, 4 * OPEN_S_MIN + 1]
    assert gaps == sorted(gaps)
    assert max(gaps) == OPEN_S_MAX + 1
    assert len([probe for probe in probes if probe < 150]) <= 5


def test_a_proven_peer_has_credit() -> None:
    breaker = Breaker()
    breaker.worked(0.0)
    for _ in range(FAILURES_IN_A_ROW - 1):
        breaker.failed(1.0)
        assert breaker.allows(1.0)
    breaker.failed(1.0)
    assert breaker.state(1.0) is State.OPEN
    assert breaker.retry_in_s(1.0) == OPEN_S_MIN


def test_a_probe_that_works_closes_and_one_that_was_cancelled_may_be_repeated() -> None:
    breaker = Breaker()
    breaker.failed(0.0)
    assert breaker.allows(OPEN_S_MIN)
    breaker.started(OPEN_S_MIN)
    assert not breaker.allows(OPEN_S_MIN)
    breaker.released(OPEN_S_MIN)  # the client went away
    assert breaker.allows(OPEN_S_MIN)
    breaker.started(OPEN_S_MIN)
    breaker.worked(OPEN_S_MIN)
    breaker.released(OPEN_S_MIN)
    assert breaker.state(OPEN_S_MIN) is State.CLOSED


def test_many_failures_at_once_open_it_once() -> None:
    breaker = Breaker()
    for _ in range(50):
        breaker.started(0.0)
    for _ in range(50):
        breaker.failed(1.0)
    assert breaker.allows(1.0 + OPEN_S_MIN)


def test_a_new_connection_mends_a_lost_one_but_no_black_hole() -> None:
    gone, hole = Breaker(), Breaker()
    gone.failed(0.0, unreachable=True)
    hole.failed(0.0)
    for breaker in (gone, hole):
        breaker.reconnected(1.0)
    assert gone.allows(1.0)
    assert not hole.allows(1.0)


HAPPENINGS = st.sampled_from(("start", "work", "fail", "lose", "release", "reconnect", "wait", "wait"))


@settings(deadline=None)
@given(st.lists(HAPPENINGS, max_size=60))
def test_no_history_cuts_a_peer_off_for_ever_or_lets_two_probes_go(history: list[str]) -> None:
    breaker, now = Breaker(), 0.0
    for what in history:
        match what:
            case "start" if breaker.allows(now):
                probing = breaker.state(now) is State.HALF_OPEN
                breaker.started(now)
                assert breaker.allows(now) is not probing
            case "work":
                breaker.worked(now)
                assert breaker.state(now) is State.CLOSED
            case "fail" | "lose":
                breaker.failed(now, unreachable=what == "lose")
            case "release":
                breaker.released(now)
            case "reconnect":
                breaker.reconnected(now)
            case _:
                now += 7.0
        assert 0.0 <= breaker.retry_in_s(now) <= OPEN_S_MAX
    breaker.released(now)
    assert breaker.allows(now + OPEN_S_MAX)


def test_a_relay_is_not_to_blame_for_who_comes_through_it() -> None:
    standing = Standing()
    relayed = "/ip4/45.0.0.1/tcp/4001/p2p/12D3KooWRelay/p2p-circuit"
    for number in range(40):
        standing.seen_at(PeerId(f"bad{number}"), relayed, 0.0)
        standing.blame(PeerId(f"bad{number}"), Fault.FATAL, 0.0)
    assert standing.seen_at(PeerId("relay"), "/ip4/45.0.0.1/tcp/4001", 0.0) is Verdict.FINE
    assert standing.seen_at(PeerId("other"), relayed, 0.0) is Verdict.FINE
