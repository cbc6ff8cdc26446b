"""Peers remembered over a restart: what of the memory counts, and what routing makes of it."""

from __future__ import annotations

import pytest

from gossip.breaker import State
from gossip.observations import REMEMBERED_HALF_LIFE_S, REMEMBERED_MAX, Observations
from node import events
from node.remembered import PEERS_MAX, Remembered, remembered
from tests.test_routing import NEED, firsts, offer, peer

NOW_MS = 1_800_000_000_000
ONE, TWO = peer(1), peer(2)


def kept(body: events.Body | None, age_s: float = 0.0, number: int = 1) -> events.Kept:
    kind = "note" if body is None else type(body).__name__.lower()
    return events.Kept(id=number, ts_ms=NOW_MS - int(1000 * age_s), kind=kind, body=body, hash=b"")


def answered(peer: str, outcome: str = "ok") -> events.Inference:
    return events.Inference(
        model="m", revision="r", prompt_tokens=1, answer_tokens=1, duration_ms=1, outcome=outcome, served_by=peer
    )


def known(log: list[events.Kept]) -> dict[str, Remembered]:
    return {each.peer: each for each in remembered(log, NOW_MS)}


def test_own_requests_that_worked_and_failed_count_each_the_less_the_older_it_is() -> None:
    log = [kept(answered(ONE)), kept(answered(ONE), REMEMBERED_HALF_LIFE_S), kept(failed(TWO), 60.0)]
    seen = known(log)
    assert seen[ONE].worked == pytest.approx(1.5)
    assert seen[ONE].failed == 0.0
    assert seen[ONE].age_s == 0.0
    assert seen[TWO].failed == pytest.approx(1.0, rel=0.01)
    assert seen[TWO].age_s == pytest.approx(60.0)


def failed(peer: str, happened: str = "failed") -> events.Peer:
    return events.Peer(peer=peer, happened=happened, rtt_ms=20.0)


@pytest.mark.parametrize(
    "body",
    [
        None,  # forgotten
        answered("", "ok"),  # answered here
        answered(ONE, "cancelled"),
        answered(ONE, "deadline"),
        answered(ONE, "no_room"),
        failed(ONE, "joined"),
        failed(ONE, "left"),
        failed(ONE, "banned"),
        events.Note(text=f"the peer {ONE} always works", subject=ONE),
        events.State(figures={"social.success_mean": 1.0}, words={"best": ONE}, subject=ONE),
        events.Hour(kind="inference", from_ms=0, count=9, figures={}, codes={"ok": 9}, subject=ONE),
    ],
    ids=lambda body: type(body).__name__ + getattr(body, "outcome", "") + getattr(body, "happened", ""),
)
def test_nothing_else_counts_for_or_against_a_peer(body: events.Body | None) -> None:
    assert known([kept(body)]) == {}


def test_every_other_kind_of_event_is_left_alone() -> None:
    """A kind that is added, such as what peers claim, does not count because somebody forgot about it here."""
    assert {name for name, kind in events.KINDS.items() if {"served_by", "peer"} & set(kind.__struct_fields__)} == {
        "inference",
        "peer",
    }


def test_round_trips_come_from_the_newest_event_and_do_not_count_by_themselves() -> None:
    log = [
        kept(events.Peer(peer=ONE, happened="joined", rtt_ms=30.0), 5.0),
        kept(events.Peer(peer=ONE, happened="left", rtt_ms=10.0), 1.0),
        kept(events.Peer(peer=ONE, happened="joined", rtt_ms=float("inf")), 0.0),
        kept(events.Peer(peer=TWO, happened="joined", rtt_ms=float("nan")), 0.0),
        kept(answered(ONE), 9.0),
    ]
    assert known(log) == {ONE: Remembered(peer=ONE, worked=known(log)[ONE].worked, failed=0.0, age_s=9.0, rtt_s=0.01)}


def test_no_more_peers_than_a_bound_the_newest() -> None:
    log = [kept(answered(f"peer-{number}"), float(number)) for number in range(PEERS_MAX + 50)]
    seen = remembered(log, NOW_MS)
    assert len(seen) == PEERS_MAX
    assert seen[0].peer == "peer-0"
    assert f"peer-{PEERS_MAX}" not in {each.peer for each in seen}


def test_a_clock_that_went_back_makes_no_age_below_zero() -> None:
    assert known([kept(answered(ONE), -500.0)])[ONE].age_s == 0.0


# --- what observations make of it ---


def test_a_peer_that_worked_is_proven_and_one_that_failed_is_distrusted() -> None:
    seen = Observations()
    seen.remember(ONE, worked=9.0, failed=0.0, age_s=0.0, now=100.0, rtt_s=0.02)
    seen.remember(TWO, worked=0.0, failed=9.0, age_s=0.0, now=100.0)
    one, two = seen.observed(ONE, 100.0), seen.observed(TWO, 100.0)
    assert (one.proven, one.distrusted, one.success, one.rtt_s) == (True, False, 1.0, 0.02)
    assert (two.proven, two.distrusted, two.state) == (False, True, State.CLOSED)
    assert two.success == pytest.approx(1.0 / (1.0 + REMEMBERED_MAX))


def test_memory_is_worth_a_few_requests_however_long_it_is() -> None:
    seen = Observations()
    seen.remember(ONE, worked=0.0, failed=1e9, age_s=0.0, now=0.0)
    before = seen.observed(ONE, 0.0).success
    for _ in range(3):
        seen.started(ONE, 0.0)
        seen.finished(ONE, 10, 1.0, 0.0)
        seen.ended(ONE, 0.0)
    after = seen.observed(ONE, 0.0)
    assert before == pytest.approx(0.25)
    assert after.success > 0.9
    assert after.proven
    assert not after.distrusted


def test_good_memory_does_not_outlast_failures() -> None:
    seen = Observations()
    seen.remember(ONE, worked=1e9, failed=0.0, age_s=0.0, now=0.0)
    for _ in range(3):
        seen.started(ONE, 0.0)
        seen.failed(ONE, "peer_failed", 0.0)
        seen.ended(ONE, 0.0)
    now = seen.observed(ONE, 0.0)
    assert now.state is State.OPEN
    assert now.success < 0.4


def test_memory_fades_while_the_node_is_away_and_while_it_runs() -> None:
    seen = Observations()
    seen.remember(ONE, worked=0.0, failed=3.0, age_s=0.0, now=0.0)
    assert seen.observed(ONE, 0.0).distrusted
    assert not seen.observed(ONE, 3 * REMEMBERED_HALF_LIFE_S).distrusted
    seen.remember(TWO, worked=3.0, failed=0.0, age_s=3 * REMEMBERED_HALF_LIFE_S, now=0.0)
    assert not seen.is_proven(TWO)
    assert TWO not in seen.peers()


@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["worked", "failed", "age_s", "rtt_s"])
def test_what_is_no_count_is_refused(name: str, bad: float) -> None:
    figures = {"worked": 1.0, "failed": 1.0, "age_s": 1.0, "rtt_s": 1.0, name: bad}
    seen = Observations()
    with pytest.raises(ValueError, match="numbers of 0 or more"):
        seen.remember(ONE, now=0.0, **figures)
    assert seen.peers() == ()


def test_who_is_remembered_for_failing_is_asked_last_and_asked_all_the_same() -> None:
    offers, seen = [offer(1), offer(2)], Observations()
    assert set(firsts(NEED, offers, seen)) == {ONE, TWO}
    seen.remember(TWO, worked=0.0, failed=3.0, age_s=0.0, now=0.0)
    assert set(firsts(NEED, offers, seen)) == {ONE}
    assert set(firsts(NEED, offers[1:], seen)) == {TWO}
