"""p2p/admission.py: who may connect, counted."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import given

from p2p.admission import Admission, Refusal, Ticket
from p2p.host_config import HostConfig

CONFIG = HostConfig(
    pending_max=6, pending_per_ip_max=2, connections_per_ip_max=3, accepts_per_ip_burst=5, inbound_max=5, places_kept=1
)


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


def test_ipv6_counts_by_link_and_by_site() -> None:
    admission = Admission(HostConfig(pending_per_ip_max=2, pending_per_subnet_max=3))
    for last in (1, 2):
        take(admission, f"2600:1:2:3::{last}")
    assert admission.open("2600:1:2:3:ffff::3", 0.0) == (Refusal("pending_per_ip"), None), "one link, one machine"
    take(admission, "2600:1:2:4::1")
    assert admission.open("2600:1:2:5::1", 0.0) == (Refusal("pending_per_subnet"), None), "one /56, one site"
    take(admission, "2600:1:2:100::1")


def test_a_public_subnet_has_few_places_before_and_after_the_handshake() -> None:
    admission = Admission(HostConfig(pending_per_subnet_max=3, connections_per_subnet_max=5))
    first = [take(admission, f"8.8.8.{n}") for n in range(3)]
    assert admission.open("8.8.8.200", 0.0) == (Refusal("pending_per_subnet"), None)
    take(admission, "8.8.9.1")
    for ticket in first:
        admission.establish(ticket)
    for n in (10, 11):
        admission.establish(take(admission, f"8.8.8.{n}"))
    assert admission.open("8.8.8.201", 0.0) == (Refusal("connections_per_subnet"), None)
    admission.close(first[0])
    take(admission, "8.8.8.202")


def test_a_public_subnet_is_slowed_as_one_whatever_its_addresses() -> None:
    admission = Admission(HostConfig(accepts_per_subnet_burst=20, accepts_per_subnet_s=4.0))
    for n in range(20):
        admission.close(take(admission, f"8.8.8.{n}"))
    assert admission.open("8.8.8.99", 0.0) == (Refusal("accept_rate"), None)
    take(admission, "8.8.8.99", now=0.25)


@pytest.mark.parametrize("network", ["192.168.1.{}", "10.0.0.{}", "fd00:1:2:{}::1"])
def test_a_lan_of_fifty_nodes_in_one_subnet_connects(network: str) -> None:
    admission = Admission(HostConfig())
    for n in range(1, 51):
        for _ in range(2):
            assert admission.establish(take(admission, network.format(n))) == (None, None)
    assert admission.live == 100


def test_twelve_processes_of_one_machine_connect_at_once() -> None:
    admission = Admission(HostConfig())
    tickets = [take(admission, "127.0.0.1") for _ in range(12 * 4)]
    assert all(admission.establish(ticket) == (None, None) for ticket in tickets)


def test_whoever_fills_the_places_yields_to_a_newcomer_of_another_network() -> None:
    admission = Admission(HostConfig(inbound_max=12, places_kept=4, connections_max=16))
    crowd = [take(admission, f"8.8.8.{n}") for n in range(7)]
    alone = take(admission, "1.1.1.1")
    for ticket in (*crowd, alone):
        assert admission.establish(ticket) == (None, None)
    assert admission.establish(take(admission, "9.9.9.9")) == (None, crowd[6]), "its newest"
    assert admission.establish(take(admission, "8.8.8.100")) == (Refusal("no_place"), None), "not to one of its own"
    assert admission.live == 8
    assert admission.pending == 0


def test_small_networks_do_not_push_each_other_out() -> None:
    admission = Admission(HostConfig(inbound_max=12, places_kept=4, connections_max=16))
    for n in range(8):
        admission.establish(take(admission, f"8.8.{n}.1"))
    assert admission.establish(take(admission, "9.9.9.9")) == (Refusal("no_place"), None)


def test_places_are_kept_for_peers_that_we_know_and_for_our_own_dials() -> None:
    config = HostConfig(inbound_max=12, places_kept=4, connections_max=16)
    admission = Admission(config)
    strangers = [take(admission, f"8.8.{n}.1") for n in range(8)]
    for ticket in strangers:
        admission.establish(ticket)
    for n in range(4):
        assert admission.establish(take(admission, f"7.7.{n}.1"), known=True) == (None, None)
    assert admission.establish(take(admission, "7.7.9.1"), known=True) == (None, strangers[7])
    for n in range(10, 17):
        _, yielding = admission.establish(take(admission, f"7.7.{n}.1"), known=True)
        assert yielding in strangers
    assert admission.establish(take(admission, "7.7.99.1"), known=True) == (Refusal("no_place"), None)
    assert admission.live == config.inbound_max < config.connections_max


def test_of_the_unfinished_the_most_crowded_network_yields() -> None:
    admission = Admission(HostConfig(pending_max=6, pending_per_ip_max=4))
    honest = take(admission, "1.1.1.1")
    crowd = [take(admission, "8.8.8.8") for _ in range(3)]
    other = [take(admission, "9.9.9.9") for _ in range(2)]
    _, yielding = admission.open("7.7.7.7", 0.0)
    assert yielding is crowd[0]
    assert honest is not yielding
    assert other


@given(st.lists(st.tuples(st.sampled_from("oec"), st.integers(0, 8), st.floats(0, 5)), max_size=120))
def test_counts_never_drift(history: list[tuple[str, int, float]]) -> None:
    admission, now = Admission(CONFIG), 0.0
    tickets: list[Ticket] = []
    gone: set[int] = set()
    for what, number, wait in history:
        now += wait
        if what == "o":
            ticket, yielding = admission.open(f"{(1, 8, 192)[number % 3]}.0.{number % 2}.{number % 4}", now)
            if isinstance(ticket, Ticket):
                tickets.append(ticket)
            if yielding is not None:
                gone.add(id(yielding))
        elif tickets:
            ticket = tickets[number % len(tickets)]
            if what == "e":
                refusal, yielding = admission.establish(ticket, known=number % 4 == 0)
                if yielding is not None:
                    gone.add(id(yielding))
                if refusal is not None:
                    gone.add(id(ticket))
            else:
                admission.close(ticket)
                gone.add(id(ticket))
        pending = sum(1 for t in tickets if id(t) not in gone and not t.established)
        live = sum(1 for t in tickets if t.established)
        assert admission.pending == pending <= CONFIG.pending_max
        assert admission.live == live <= CONFIG.inbound_max
    for ticket in tickets:
        admission.close(ticket)
    assert admission.pending == 0
    assert not any(group.pending or group.live for group in admission._groups.values())


def test_the_table_of_addresses_is_bounded() -> None:
    admission = Admission(CONFIG)
    for n in range(10_000):
        admission.close(take(admission, f"198.{n & 255}.{n >> 8}.1"))
    assert len(admission._groups) <= 4096
