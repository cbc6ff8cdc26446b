"""gossip/donors.py and gossip/allowance.py: whom to ask, when it is hopeless, how fast bytes go out."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crypto.identity import PeerId
from gossip.blob_wire import Here, Piece, Refusal, decode_answer
from gossip.donors import CANDIDATES_MAX, REASON_CHARS_MAX, TOLD_MAX, Donors, DonorsConfig
from gossip.errors import RemoteProtocolError
from p2p.allowance import Allowance

ALICE, BOB, EVE = PeerId("alice"), PeerId("bob"), PeerId("eve")
CONFIG = DonorsConfig(donors_max=2, pause_s=1.0, pause_s_max=4.0, patience_s=60.0)


def test_a_pause_doubles_up_to_its_bound_and_begins_anew_after_a_chunk() -> None:
    donors = Donors([ALICE], CONFIG, 0.0)
    now = 0.0
    for pause_s in (1, 2, 4, 4):
        assert donors.due(now) == [ALICE]
        assert donors.due(now) == []
        donors.failed(ALICE, "broke off", now)
        assert donors.deadline() == now + pause_s
        assert donors.due(now + pause_s - 0.1) == []
        now += pause_s
    assert donors.due(now) == [ALICE]
    donors.stored(ALICE, now)
    donors.failed(ALICE, "broke off", now)
    assert donors.deadline() == now + 1


def test_few_are_tried_at_a_time_and_those_that_failed_least_first() -> None:
    donors = Donors([ALICE, BOB, EVE], CONFIG, 0.0)
    assert donors.due(0.0) == [ALICE, BOB]
    assert donors.deadline() == 60.0
    donors.failed(ALICE, "is busy", 0.0)
    assert donors.due(5.0) == [EVE]
    donors.out(EVE, "lied")
    assert donors.due(5.0) == [ALICE]


def test_who_is_out_stays_out() -> None:
    donors = Donors([ALICE, BOB], CONFIG, 0.0)
    donors.due(0.0)
    assert donors.out(ALICE, "lied")
    assert not donors.out(ALICE, "lied again")
    donors.failed(ALICE, "broke off", 0.0)
    donors.came(ALICE, 0.0)
    assert donors.due(50.0) == []
    assert "alice lied; bob" in donors.reasons()
    assert not donors.hopeless(0.0)
    donors.out(BOB, "does not have it")
    assert donors.hopeless(0.0)
    assert donors.reasons() == "alice lied; bob does not have it"


def test_who_comes_back_is_tried_at_once() -> None:
    donors = Donors([ALICE], CONFIG, 0.0)
    donors.due(0.0)
    donors.came(ALICE, 0.0)
    donors.came(EVE, 0.0)
    assert donors.due(0.0) == []  # it is tried already
    donors.failed(ALICE, "broke off", 10.0)
    donors.came(ALICE, 10.5)
    assert donors.due(10.5) == [ALICE]


def test_it_is_hopeless_when_nothing_was_stored_for_long() -> None:
    donors = Donors([ALICE], CONFIG, 0.0)
    donors.due(0.0)
    assert not donors.hopeless(59.9)
    donors.stored(ALICE, 59.0)
    assert donors.deadline() == 119.0
    assert not donors.hopeless(118.9)
    assert donors.hopeless(119.0)
    assert Donors([], CONFIG, 0.0).hopeless(0.0)


def test_candidates_and_what_is_told_of_them_are_bounded() -> None:
    donors = Donors([PeerId(f"p{number}") for number in range(CANDIDATES_MAX + 9)], CONFIG, 0.0)
    donors.due(0.0)
    donors.out(PeerId("p0"), "x" * 10_000)
    told = donors.reasons()
    assert told.endswith(f"and {CANDIDATES_MAX - TOLD_MAX} more")
    assert len(told) < TOLD_MAX * (REASON_CHARS_MAX + 20) + 20


@given(st.lists(st.tuples(st.integers(0, 1000), st.floats(0, 3)), max_size=40))
def test_no_more_goes_out_than_is_allowed(spent: list[tuple[int, float]]) -> None:
    allowance, now, sent = Allowance(100.0, 200), 0.0, list[tuple[float, int]]()
    for size, pause_s in spent:
        now += pause_s
        wait_s = allowance.spend(size, now)
        assert wait_s >= 0
        sent.append((now + wait_s, size))
    assert all(later >= earlier - 1e-9 for (earlier, _), (later, _) in pairwise(sent))
    for first, (begin, _) in enumerate(sent):
        for last in range(first, len(sent)):
            total = sum(size for _, size in sent[first + 1 : last + 1])
            assert total <= 200 + 100 * (sent[last][0] - begin) + 1e-6


def test_a_rest_earns_a_burst_and_no_more() -> None:
    allowance = Allowance(100.0, 200)
    assert allowance.spend(200, 0.0) == 0
    assert allowance.spend(100, 0.0) == pytest.approx(1.0)
    assert allowance.spend(300, 1000.0) == pytest.approx(1.0)


@given(st.binary(max_size=40))
def test_any_answer_decodes_or_is_refused(raw: bytes) -> None:
    try:
        answer = decode_answer(raw)
    except RemoteProtocolError:
        return
    assert isinstance(answer, Here | Piece | Refusal)
