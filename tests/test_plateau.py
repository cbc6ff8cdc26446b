"""A million strangers, addresses and records at every store that strangers can write to: each keeps to its bound."""

from __future__ import annotations

import gc
import random
from collections.abc import Callable

import psutil
import pytest
from libp2p.peer.id import ID
from multiaddr import Multiaddr

from crypto.identity import PeerId
from gossip.standing import PEERS_MAX as SCORES_MAX
from gossip.standing import Fault, Standing
from p2p.address import Address, Scope
from p2p.admission import GROUPS_MAX, Admission, Ticket
from p2p.allowance import Buckets
from p2p.book import PEERS_MAX as BOOK_PEERS_MAX
from p2p.book import Book, Source
from p2p.guard import Drops
from p2p.guard_store import PEERS_MAX as STORE_PEERS_MAX
from p2p.guard_store import GuardedPeerStore
from p2p.host_config import HostConfig
from p2p.neighbours import NEIGHBOURS_MAX, Neighbours
from p2p.roster import REFUSALS_MAX, Roster

FEW, MILLION = 10_000, 1_000_000
SLOPE_BYTES_MAX = 1 << 20  # for each 100,000 of the second half
COUNTS = [FEW, pytest.param(MILLION, marks=pytest.mark.soak)]


def name(number: int) -> PeerId:
    return PeerId(f"12D3KooW{number:044d}")


def ip(number: int) -> str:
    return f"{20 + (number >> 16) % 80}.{number >> 8 & 255}.{number & 255}.7"


def book() -> tuple[Callable[[int], object], Callable[[], int], int]:
    store = Book(name(0), random.Random(1))

    def add(number: int) -> None:
        peer, host = name(number + 1), ip(number)
        text = f"/ip4/{host}/tcp/1/p2p/{peer}"
        address = Address(text=text, host=host, port=1, peer=peer, scope=Scope.PUBLIC)
        store.add(address, Source.EXCHANGE, float(number))

    return add, lambda: len(store), BOOK_PEERS_MAX


def admission() -> tuple[Callable[[int], object], Callable[[], int], int]:
    store = Admission(HostConfig())

    def add(number: int) -> None:
        ticket, _ = store.open(ip(number), float(number))
        assert isinstance(ticket, Ticket)
        store.close(ticket)

    return add, lambda: len(store._groups), GROUPS_MAX


def neighbours() -> tuple[Callable[[int], object], Callable[[], int], int]:
    store = Neighbours()
    return lambda number: store.read(name(number), 1, float(number)), lambda: len(store), NEIGHBOURS_MAX


def buckets() -> tuple[Callable[[int], object], Callable[[], int], int]:
    store = Buckets(rate_per_s=1.0, burst=1.0)
    return lambda number: store.take(name(number), float(number)), lambda: len(store), 4096


def standing() -> tuple[Callable[[int], object], Callable[[], int], int]:
    store = Standing()

    def add(number: int) -> None:
        store.seen_at(name(number), f"/ip4/{ip(number)}/tcp/1", float(number))
        store.blame(name(number), Fault.OVER_QUOTA, float(number))

    return add, lambda: max(store.statistics(0.0).scored, store.statistics(0.0).groups), SCORES_MAX


def refusals() -> tuple[Callable[[int], object], Callable[[], int], int]:
    store = Roster(random.Random(1))
    return (
        lambda number: store.refuse(name(number), "another network", "", float(number)),
        lambda: len(store.refusals()),
        REFUSALS_MAX,
    )


def peerstore() -> tuple[Callable[[int], object], Callable[[], int], int]:
    own = ID(b"\x00\x24" + bytes(36))
    store, address = GuardedPeerStore(own, Drops()), Multiaddr("/ip4/1.2.3.4/tcp/1")

    def add(number: int) -> None:
        peer = ID(b"\x00\x24" + number.to_bytes(36, "big"))
        store.add_addrs(peer, [address] * 20, 10)
        store.set_protocols(peer, [f"/{number}/{each}" for each in range(80)])

    return add, lambda: len(store.peer_data_map), STORE_PEERS_MAX + 1


STORES = [book, admission, neighbours, buckets, standing, refusals]


@pytest.mark.slow
@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("make", STORES, ids=lambda make: str(make.__name__))
def test_strangers_reach_a_plateau(
    make: Callable[[], tuple[Callable[[int], object], Callable[[], int], int]], count: int
) -> None:
    add, size, most = make()
    process, middle = psutil.Process(), 0
    for number in range(count):
        add(number)
        if number == count // 2:
            gc.collect()
            middle = process.memory_info().rss
    assert most // 8 < size() <= most
    if count == MILLION:
        gc.collect()
        assert process.memory_info().rss - middle < SLOPE_BYTES_MAX * (count / 2 / 100_000)


@pytest.mark.slow
def test_peers_that_libp2p_remembers_reach_a_plateau() -> None:
    add, size, most = peerstore()
    for number in range(1, 3 * most):
        add(number)
    assert size() <= most
