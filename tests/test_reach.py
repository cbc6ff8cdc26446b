"""p2p/reach.py: what a node believes of its own reachability, and whom it asks."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crypto.identity import PeerId
from p2p.address import Scope
from p2p.errors import RemoteProtocolError
from p2p.reach import (
    ANSWER_EVERY_S,
    ANSWERS_BURST,
    ASK_AGAIN_S,
    ASK_RETRY_S,
    ASK_SOON_S,
    FORWARD,
    FRESH_S,
    PORTS_MAX,
    UNKNOWN_GRACE_S,
    VOTERS_WANTED,
    Ask,
    DialBacks,
    Reach,
    Told,
    Verdict,
    Voter,
    read_ask,
    read_told,
    to_value,
)

PUBLIC_IP, PORT = "11.0.3.1", 4001


def voter(number: int, group: int | None = None) -> Voter:
    return Voter(peer=PeerId(f"peer{number}"), group=f"11.0.{number if group is None else group}.0/24")


def vote(reach: Reach, who: Voter, reached: bool, now: float = 0.0, ip: str = PUBLIC_IP) -> None:
    scope = Scope.PRIVATE if ip.startswith("192.") else Scope.PUBLIC
    reach.heard(who, scope, Told(ip=ip, reached=[PORT] if reached else [], why="" if reached else "nobody"), now)


def test_no_single_peer_decides() -> None:
    for reached in (True, False):
        reach = Reach()
        vote(reach, voter(1), reached)
        for again in range(5):
            vote(reach, voter(1), reached, now=float(again))
        assert reach.judge(5.0).verdict is Verdict.UNKNOWN
        assert reach.confirmed(5.0) == ()


def test_peers_of_one_network_have_one_vote() -> None:
    reach = Reach()
    for number in range(10):
        vote(reach, voter(number, group=1), reached=True)
    assert reach.judge(0.0).verdict is Verdict.UNKNOWN
    vote(reach, voter(11, group=2), reached=True)
    assert reach.judge(0.0).verdict is Verdict.PUBLIC
    assert reach.confirmed(0.0) == ((PUBLIC_IP, PORT),)


def test_of_a_tie_the_cautious_side_is_taken() -> None:
    reach = Reach()
    for number in range(4):
        vote(reach, voter(number), reached=number < 2)
    judged = reach.judge(0.0)
    assert judged.verdict is Verdict.UNREACHABLE
    assert "2 of 4 reached 11.0.3.1 (nobody)" in judged.reason
    vote(reach, voter(5), reached=True)
    assert reach.judge(0.0).verdict is Verdict.PUBLIC


def test_an_unreachable_node_is_told_what_to_do_and_a_relayed_one_is_relayed() -> None:
    reach = Reach()
    for number in range(2):
        vote(reach, voter(number), reached=False)
    alone = reach.judge(0.0, (), "no public peer is connected")
    assert (alone.verdict, alone.wants_relay, alone.hidden) == (Verdict.UNREACHABLE, True, True)
    assert "no public peer is connected" in alone.reason
    assert FORWARD in alone.advice
    assert "--bootstrap" in alone.advice
    relayed = reach.judge(0.0, (PeerId("relay"),))
    assert (relayed.verdict, relayed.wants_relay, relayed.hidden) == (Verdict.RELAYED, True, True)
    assert "through 1 relay" in relayed.reason


def test_the_private_network_is_not_the_world() -> None:
    reach = Reach()
    for number in range(2):
        vote(reach, voter(number), reached=True, ip="192.168.1.5")
    judged = reach.judge(0.0)
    assert (judged.verdict, judged.wants_relay) == (Verdict.LOCAL, False)
    assert "nobody outside it could tell" in judged.reason
    assert reach.confirmed(0.0) == (), "a private address is not announced"
    for number in range(3, 5):
        vote(reach, voter(number), reached=False)
    assert reach.judge(0.0).verdict is Verdict.UNREACHABLE, "those outside know better"


def test_ipv4_and_ipv6_are_judged_apart() -> None:
    reach = Reach()
    for number in range(2):
        vote(reach, voter(number), reached=True, ip="2a00::5")
        vote(reach, voter(number + 2), reached=False)
    judged = reach.judge(0.0)
    assert judged.verdict is Verdict.PUBLIC
    assert judged.wants_relay, "who has IPv4 only cannot connect"
    assert "IPv4: 0 of 2" in judged.reason
    assert "IPv6: 2 of 2" in judged.reason


def test_a_node_of_which_nobody_could_tell_takes_a_relay_after_a_while() -> None:
    reach = Reach()
    assert not reach.judge(1000.0).wants_relay, "nobody is there"
    reach.due([voter(1)], 1000.0)
    assert not reach.judge(1000.0 + UNKNOWN_GRACE_S / 2).wants_relay
    judged = reach.judge(1000.0 + UNKNOWN_GRACE_S)
    assert (judged.verdict, judged.wants_relay, judged.hidden) == (Verdict.UNKNOWN, True, False)
    vote(reach, voter(1), reached=True, now=1001.0)
    assert not reach.judge(1000.0 + UNKNOWN_GRACE_S).wants_relay, "one peer reached us: wait for a second"


def test_an_answer_grows_old() -> None:
    reach = Reach()
    for number in range(2):
        vote(reach, voter(number), reached=True)
    assert reach.judge(FRESH_S - 1).verdict is Verdict.PUBLIC
    assert reach.judge(FRESH_S).verdict is Verdict.UNKNOWN


def test_who_is_asked_and_how_often() -> None:
    reach = Reach()
    many = [voter(number) for number in range(10)]
    first = reach.due(many, 0.0)
    assert len(first) == VOTERS_WANTED
    assert reach.due(many[:VOTERS_WANTED], 1.0) == []
    for number in range(VOTERS_WANTED):
        vote(reach, many[number], reached=True)
    assert reach.due(many, ASK_SOON_S) == [], "settled"
    assert set(reach.due(many[:VOTERS_WANTED], max(ASK_AGAIN_S, FRESH_S))) == set(first), "old answers are renewed"


def test_a_peer_without_an_answer_is_asked_soon_and_then_later_still() -> None:
    reach, asked_at = Reach(), []
    for second in range(4000):
        if reach.due([voter(1)], float(second)):
            asked_at.append(second)
            reach.unanswered(PeerId("peer1"), float(second))
    waits = [after - before for before, after in itertools.pairwise(asked_at)]
    assert waits[:3] == [ASK_RETRY_S, 2 * ASK_RETRY_S, 4 * ASK_RETRY_S]
    assert max(waits) == ASK_AGAIN_S


def test_networks_not_heard_yet_are_asked_first() -> None:
    reach = Reach()
    vote(reach, voter(1), reached=True)
    crowd = [*(voter(number, group=1) for number in range(10, 20)), voter(2)]
    assert reach.due(crowd, 0.0)[0] == "peer2"


def test_dial_backs_are_bounded_by_network_and_in_all() -> None:
    backs = DialBacks()
    assert backs.may("11.0.1.0/24", 0.0)
    assert not backs.may("11.0.1.0/24", ANSWER_EVERY_S - 1)
    assert backs.may("11.0.1.0/24", ANSWER_EVERY_S)
    others = [backs.may(f"11.1.{number}.0/24", ANSWER_EVERY_S) for number in range(20)]
    assert sum(others) == int(ANSWERS_BURST) - 1


@pytest.mark.parametrize(
    "value",
    [
        {"ports": []},
        {"ports": [0]},
        {"ports": [65536]},
        {"ports": list(range(1, PORTS_MAX + 2))},
        {"ports": [4001], "ip": "8.8.8.8"},
        {"ports": ["4001"]},
        {},
        None,
        [],
    ],
)
def test_an_ask_names_ports_and_nothing_else(value: object) -> None:
    with pytest.raises(RemoteProtocolError):
        read_ask(value)  # type: ignore[arg-type]  # what a peer may send


@given(st.recursive(st.none() | st.integers() | st.text(), lambda inner: st.dictionaries(st.text(), inner)))
def test_any_value_is_a_message_or_the_peers_fault(value: object) -> None:
    for read in (read_ask, read_told):
        try:
            read(value)  # type: ignore[operator]  # what a peer may send
        except RemoteProtocolError:
            pass


def test_messages_come_back_as_they_went() -> None:
    ask, told = Ask(ports=[1, 65535]), Told(ip="11.0.3.1", reached=[1], why="x")
    assert read_ask(to_value(ask)) == ask
    assert read_told(to_value(told)) == told
