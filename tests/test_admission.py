"""p2p/admission.py: who may connect, counted."""

from __future__ import annotations

import hypothesis.strategies as st
from hypothesis import given

from p2p.admission import Admission, Refusal, Ticket
from p2p.host_config import HostConfig

CONFIG = HostConfig(pending_max=6, pending_per_ip_max=2, connections_per_ip_max=3, accepts_per_ip_burst=5)


def take(admission: Admission, ip: str, now: float = 0.0) -> Ticket:
    ticket, _ = admission.open(ip, now)
    assert isinstance(ticket, Ticket)
    return ticket


def test_one_address_has_few_pending_places_and_gets_them_back() -> None:
    admission = Admission(CONFIG)
    first, _ = take(admission, "192.0.2.1"), take(admission, "192.0.2.1")
    assert admission.open("192.0.2.1", 0.0) == (Refusal("pending_per_ip"), None)
    admission.establish(first)
    take(admission, "192.0.2.1")


def test_when_all_places_are_taken_the_oldest_yields() -> None:
    admission = Admission(CONFIG)
    tickets = [take(admission, f"192.0.2.{n}") for n in range(6)]
    newest, yielding = admission.open("198.51.100.1", 0.0)
    assert isinstance(newest, Ticket)
    assert yielding is tickets[0]
    assert admission.pending == 6
    admission.close(tickets[0])  # its task ends later: no place is given back twice
    admission.establish(tickets[0])
    assert admission.pending == 6


def test_one_address_has_a_bounded_number_of_live_connections() -> None:
    admission = Admission(CONFIG)
    live = [take(admission, "192.0.2.1") for _ in range(2)]
    for ticket in live:
        admission.establish(ticket)
    admission.establish(take(admission, "192.0.2.1"))
    assert admission.open("192.0.2.1", 0.0) == (Refusal("connections_per_ip"), None)
    admission.close(live[0])
    take(admission, "192.0.2.1")


def test_new_connections_of_one_address_are_slowed() -> None:
    admission = Admission(CONFIG)
    for _ in range(5):
        admission.close(take(admission, "192.0.2.1"))
    assert admission.open("192.0.2.1", 0.0) == (Refusal("accept_rate"), None)
    take(admission, "192.0.2.2")
    take(admission, "192.0.2.1", now=0.25)


def test_loopback_is_this_machine_and_is_not_slowed() -> None:
    admission = Admission(CONFIG)
    for _ in range(100):
        admission.close(take(admission, "127.0.0.1"))
        admission.close(take(admission, "::ffff:127.0.0.1"))


def test_ipv6_counts_by_site() -> None:
    admission = Admission(CONFIG)
    take(admission, "2001:db8:1:2::1")
    take(admission, "2001:db8:1:3::2")
    assert admission.open("2001:db8:1:4::3", 0.0) == (Refusal("pending_per_ip"), None)
    take(admission, "2001:db8:9::1")


@given(st.lists(st.tuples(st.sampled_from("oec"), st.integers(0, 8), st.floats(0, 5)), max_size=120))
def test_counts_never_drift(history: list[tuple[str, int, float]]) -> None:
    admission, now = Admission(CONFIG), 0.0
    tickets: list[Ticket] = []
    gone: set[int] = set()
    for what, number, wait in history:
        now += wait
        if what == "o":
            ticket, yielding = admission.open(f"192.0.2.{number % 3}", now)
            if isinstance(ticket, Ticket):
                tickets.append(ticket)
            if yielding is not None:
                gone.add(id(yielding))
        elif tickets:
            ticket = tickets[number % len(tickets)]
            if what == "e":
                admission.establish(ticket)
            else:
                admission.close(ticket)
                gone.add(id(ticket))
        pending = sum(1 for t in tickets if id(t) not in gone and not t.established)
        assert admission.pending == pending <= CONFIG.pending_max
    for ticket in tickets:
        admission.close(ticket)
    assert admission.pending == 0
    assert not any(group.pending or group.live for group in admission._groups.values())


def test_the_table_of_addresses_is_bounded() -> None:
    admission = Admission(CONFIG)
    for n in range(10_000):
        admission.close(take(admission, f"198.{n >> 16}.{n >> 8 & 255}.{n & 255}"))
    assert len(admission._groups) <= 4096
