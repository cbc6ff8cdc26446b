"""p2p/relay.py and p2p/relay_places.py: what is carried for others, and at which relays we hold a place."""

from __future__ import annotations

import hypothesis.strategies as st
from hypothesis import given

from crypto.identity import PeerId
from p2p.relay import ASKS_BURST, ASKS_PER_S, Circuit, No, RelayDesk, RelayLimits
from p2p.relay_places import FIRST_WAIT_S, RELAYS_WANTED, WAIT_MAX_S, Places

LIMITS = RelayLimits(
    reservations_max=3,
    reservations_per_group_max=2,
    reservation_s=100.0,
    circuits_max=4,
    circuits_per_peer_max=2,
    circuit_s=50.0,
    circuit_bytes_max=1000,
    bytes_per_s=100.0,
    burst_bytes=200,
)
A, B, C, D, E = (PeerId(name) for name in "abcde")


def desk(*placed: PeerId) -> RelayDesk:
    made = RelayDesk(LIMITS, offered=True)
    for peer in placed:
        assert made.reserve(peer, None, 0.0) == 100.0
    return made


def opened(desk: RelayDesk, source: PeerId, target: PeerId, now: float = 0.0) -> Circuit:
    circuit = desk.open(source, target, now)
    assert isinstance(circuit, Circuit), circuit
    return circuit


def test_places_are_bounded_in_all_and_of_one_network() -> None:
    one = RelayDesk(LIMITS, offered=True)
    assert one.reserve(A, "8.8.8.0/24", 0.0) == 100.0
    assert one.reserve(B, "8.8.8.0/24", 0.0) == 100.0
    assert one.reserve(C, "8.8.8.0/24", 0.0) == No("relay_reservations_of_group")
    assert one.reserve(C, None, 0.0) == 100.0
    assert one.reserve(D, None, 0.0) == No("relay_reservations")
    assert one.reserve(A, "8.8.8.0/24", 10.0) == 110.0, "who has one keeps it"
    assert one.statistics(10.0).refused == {"relay_reservations_of_group": 1, "relay_reservations": 1}


def test_a_place_ends_with_its_time_and_with_its_connection() -> None:
    one = desk(A, B)
    one.gone(A)
    assert not one.holds(A, 0.0)
    assert one.holds(B, 99.9)
    assert one.open(C, A, 1.0) == No("relay_no_reservation")
    assert one.open(C, B, 100.0) == No("relay_no_reservation")


def test_a_relay_that_is_off_takes_nobody_and_still_carries_those_it_took() -> None:
    one = desk(A)
    one.offered = False
    assert one.reserve(B, None, 0.0) == No("relay_off")
    opened(one, B, A)


def test_circuits_are_bounded_in_all_and_of_one_peer() -> None:
    one = desk(A, B, C)
    first = opened(one, D, A)
    opened(one, D, B)
    assert one.open(D, C, 0.0) == No("relay_circuits_of_peer")
    opened(one, E, A)
    assert one.open(B, A, 0.0) == No("relay_circuits_of_peer"), "of the target too"
    opened(one, E, C)
    assert one.open(A, C, 0.0) == No("relay_circuits")
    one.close(first)
    one.close(first)
    assert one.statistics(0.0).circuits == 3
    assert one.open(C, C, 0.0) == No("relay_to_itself")


def test_a_peer_asks_seldom() -> None:
    one = desk(A)
    answers = [one.open(B, C, 0.0) for _ in range(int(ASKS_BURST) + 1)]
    assert answers[-1] == No("relay_rate")
    assert answers[-2] == No("relay_no_reservation")
    assert one.reserve(B, None, 0.0) == No("relay_rate")
    assert one.reserve(B, None, 1.1 / ASKS_PER_S) == 1.1 / ASKS_PER_S + 100.0
    assert one.reserve(D, None, 0.0) == 100.0, "another peer is not its fault"


def test_a_circuit_has_its_bytes_and_all_of_them_their_rate() -> None:
    one = desk(A)
    circuit = opened(one, B, A)
    assert one.spend(circuit, 200, 0.0) == 0.0, "a burst goes at once"
    assert one.spend(circuit, 100, 0.0) == 1.0
    assert one.spend(circuit, 100, 10.0) == 0.0, "what was not used is not saved up beyond the burst"
    other = opened(one, C, A, 10.0)
    assert one.spend(other, 300, 10.0) == 2.0, "all circuits together"
    assert one.spend(circuit, 601, 20.0) == No("relay_circuit_bytes")
    assert one.statistics(20.0).bytes_total == 700


@given(st.lists(st.tuples(st.integers(0, 400), st.floats(0.0, 3.0)), max_size=60))
def test_no_history_of_bytes_goes_past_the_rate(history: list[tuple[int, float]]) -> None:
    one = RelayDesk(RelayLimits(bytes_per_s=100.0, burst_bytes=200, circuit_bytes_max=1 << 30), offered=True)
    one.reserve(A, None, 0.0)
    circuit = opened(one, B, A)
    now = carried = 0.0
    for size, pause_s in history:
        wait_s = one.spend(circuit, size, now)
        assert isinstance(wait_s, float)
        now += wait_s
        carried += size
        assert carried <= 100.0 * now + 200 + 1e-6
        now += pause_s


def test_two_relays_are_wanted_and_a_lost_one_is_replaced_at_once() -> None:
    places = Places()
    assert places.due([A, B, C], wanted=False, now=0.0) == []
    asked = places.due([A, B, C], wanted=True, now=0.0)
    assert asked == [A, B]
    assert len(asked) == RELAYS_WANTED
    for relay in asked:
        places.given(relay, 100.0, 0.0)
    assert places.due([A, B, C], wanted=True, now=10.0) == []
    assert places.due([B, C], wanted=True, now=20.0) == [C], "A's connection is gone"
    assert set(places.held(20.0)) == {B}


def test_a_place_is_renewed_at_half_time_and_one_that_ended_is_none() -> None:
    places = Places()
    places.given(A, 100.0, 0.0)
    assert places.due([A], wanted=True, now=49.0) == []
    assert places.due([A], wanted=True, now=50.0) == [A]
    assert places.due([A], wanted=True, now=100.0) == [A]
    assert places.held(100.0) == {}
    places.given(A, 100.0, 100.0)
    assert places.leave() == [A]
    assert places.held(101.0) == {}


def test_who_refused_is_asked_later_each_time_later_still() -> None:
    places, now, waits = Places(), 0.0, []
    for _ in range(10):
        assert places.due([A], wanted=True, now=now) == [A]
        places.refused(A, "it has no place left", now)
        began = now
        while not places.due([A], wanted=True, now=now):
            now += 30.0
        waits.append(now - began)
    assert waits[0] == FIRST_WAIT_S
    assert waits[1] == 2 * FIRST_WAIT_S
    assert waits[-1] == WAIT_MAX_S
    assert places.why_none([A]) == "it has no place left"
    assert places.why_none([]) == "no public peer is connected"
