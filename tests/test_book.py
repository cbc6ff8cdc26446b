"""The address book: what it takes, whom it says to dial and when, and that it comes back whole from the disk."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crypto.identity import Identity, PeerId, peer_id_of
from p2p.address import Address, Scope, believable, is_relayed, parse_address, seen_group, seen_scope, tellable, told
from p2p.book import (
    ADDRESSES_MAX,
    ADDRESSES_PER_GROUP_MAX,
    ALONE_WAIT_MAX_S,
    ANCHOR_AFTER_S,
    ANCHORS_MAX,
    FAILURES_MAX,
    FIRST_WAIT_S,
    JITTER,
    PEERS_MAX,
    PEERS_PER_GROUP_MAX,
    WAIT_MAX_S,
    Book,
    Source,
)
from p2p.book_saved import BOOK_BYTES_MAX
from p2p.errors import BadAddress, BadFile

IDS = [Identity.make().peer_id for _ in range(40)]
OWN = IDS.pop()


def at(peer: PeerId, host: str = "10.0.0.1", port: int = 4001) -> Address:
    return parse_address(f"/ip4/{host}/tcp/{port}/p2p/{peer}")


def new_book(**bounds: int) -> Book:
    return Book(OWN, random.Random(1), **bounds)


# --- addresses


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("", "not a multiaddr"),
        ("10.0.0.1:4001", "not a multiaddr"),
        ("/ip4/10.0.0.1/tcp/4001", "does not say which peer"),
        (f"/ip4/10.0.0.1/udp/4001/p2p/{IDS[0]}", "not plain TCP"),
        (f"/ip4/10.0.0.1/tcp/4001/ws/p2p/{IDS[0]}", "not plain TCP"),
        (f"/ip4/10.0.0.1/tcp/0/p2p/{IDS[0]}", "not a TCP port"),
        (f"/ip4/10.0.0.1/tcp/65536/p2p/{IDS[0]}", "not a TCP port"),
        (f"/ip4/10.0.0.1/tcp/-1/p2p/{IDS[0]}", "not a TCP port"),
        (f"/ip4/10.0.0.1/tcp/٣/p2p/{IDS[0]}", "not a TCP port"),
        (f"/ip4/10.0.0/tcp/1/p2p/{IDS[0]}", "not an IPv4 address"),
        (f"/ip6/10.0.0.1/tcp/1/p2p/{IDS[0]}", "not an IPv6 address"),
        (f"/ip4/0.0.0.0/tcp/1/p2p/{IDS[0]}", "every interface"),
        (f"/ip6/::/tcp/1/p2p/{IDS[0]}", "every interface"),
        (f"/ip4/224.0.0.251/tcp/1/p2p/{IDS[0]}", "not one machine's"),
        (f"/ip6/::ffff:0.0.0.0/tcp/1/p2p/{IDS[0]}", "every interface"),
        (f"/dns/-bad-/tcp/1/p2p/{IDS[0]}", "not a host name"),
        (f"/unix/tmp/tcp/1/p2p/{IDS[0]}", "cannot be dialled"),
        ("/ip4/10.0.0.1/tcp/1/p2p/Qmrubbish", "not a peer id"),
        (f"/ip4/10.0.0.1/tcp/1/p2p/{IDS[0]}/p2p-circuit", "behind one relay"),
        (f"/p2p/{IDS[0]}/p2p-circuit/p2p/{IDS[1]}", "behind one relay"),
        (f"/ip4/10.0.0.1/tcp/1/p2p/{IDS[0]}/p2p-circuit/p2p/{IDS[0]}", "one peer as relay"),
        (f"/ip4/10.0.0.1/tcp/1/p2p/rubbish/p2p-circuit/p2p/{IDS[0]}", "not a peer id"),
        (f"/dns/{'a' * 300}/tcp/1/p2p/{IDS[0]}", "at most"),
    ],
    ids=lambda text: text.replace(IDS[0], "PEER").replace(IDS[1], "OTHER"),  # drawn anew in each process
)
def test_a_bad_address_is_refused_with_the_reason(text: str, wanted: str) -> None:
    with pytest.raises(BadAddress, match=wanted):
        parse_address(text)


@pytest.mark.slow
@settings(deadline=None)
@given(st.text(alphabet="/ip4dns6tcp.:0123456789-aZé٣\0", max_size=300))
def test_any_text_is_an_address_or_bad(text: str) -> None:
    for candidate in (text, f"/ip4/{text}/tcp/1/p2p/{IDS[0]}", f"/ip4/1.1.1.1/tcp/{text}/p2p/{IDS[0]}"):
        try:
            parse_address(candidate)
        except BadAddress:
            pass


def test_a_relayed_address_is_its_relays_place_and_another_peer() -> None:
    text = f"/ip4/8.8.8.8/tcp/1/p2p/{IDS[0]}/p2p-circuit/p2p/{IDS[1]}"
    address = parse_address(text)
    assert (address.peer, address.relay) == (IDS[1], IDS[0])
    assert (address.host, address.scope, address.group) == ("8.8.8.8", Scope.PUBLIC, "8.8.8.0/24")
    assert address.bare == f"/ip4/8.8.8.8/tcp/1/p2p/{IDS[0]}/p2p-circuit"
    assert is_relayed(address.bare)
    assert not is_relayed("/ip4/8.8.8.8/tcp/1")
    assert not is_relayed(None)


def test_a_peer_behind_a_relay_may_be_anywhere() -> None:
    at_home = f"/ip4/192.168.1.1/tcp/1/p2p/{IDS[0]}/p2p-circuit"
    assert seen_scope(at_home) is Scope.PUBLIC
    assert seen_group(at_home.replace("192.168.1.1", "8.8.8.8")) is None, "it does not answer for its relay"
    assert seen_group("/ip4/8.8.8.8/tcp/1") == "8.8.8.0/24"
    assert seen_group("/ip6/2a00:1450:4001:82a::200e/tcp/1") == "2a00:1450:4001:800::/56"
    assert seen_group("/ip4/192.168.1.1/tcp/1") is seen_group(None) is None


def test_scopes_and_groups() -> None:
    assert at(IDS[0], "127.0.0.1").scope is Scope.LOOPBACK
    assert at(IDS[0], "192.168.1.2").scope is Scope.PRIVATE
    assert at(IDS[0], "8.8.8.8").scope is Scope.PUBLIC
    assert at(IDS[0], "8.8.8.8").group == "8.8.8.0/24"
    assert at(IDS[0], "192.168.1.2").group is None
    assert parse_address(f"/ip6/2600::1/tcp/1/p2p/{IDS[0]}").group == "2600::/56"
    assert parse_address(f"/ip6/::ffff:127.0.0.1/tcp/1/p2p/{IDS[0]}").scope is Scope.LOOPBACK
    assert parse_address(f"/dns4/node.example/tcp/1/p2p/{IDS[0]}").scope is Scope.NAMED
    assert at(IDS[0]).bare == "/ip4/10.0.0.1/tcp/4001"


def test_nobody_makes_us_dial_nearer_than_himself() -> None:
    loopback, lan, public = (at(IDS[0], host) for host in ("127.0.0.1", "192.168.1.2", "8.8.8.8"))
    name = parse_address(f"/dns/node.example/tcp/1/p2p/{IDS[0]}")
    assert [believable(public, scope) for scope in (Scope.LOOPBACK, Scope.PRIVATE, Scope.PUBLIC)] == [True] * 3
    assert [believable(lan, scope) for scope in (Scope.LOOPBACK, Scope.PRIVATE, Scope.PUBLIC)] == [True, True, False]
    assert [believable(loopback, s) for s in (Scope.LOOPBACK, Scope.PRIVATE, Scope.PUBLIC)] == [True, False, False]
    assert not believable(name, Scope.LOOPBACK)
    assert not tellable(loopback, Scope.PRIVATE)
    assert seen_scope("/ip4/8.8.8.8/tcp/5") is Scope.PUBLIC
    assert seen_scope("/ip4/127.0.0.1/tcp/5") is Scope.LOOPBACK
    assert seen_scope(None) is seen_scope("/ip4/nonsense/tcp/1") is Scope.PUBLIC
    mixed = [loopback.text, "rubbish", lan.text, at(IDS[1], "8.8.8.8").text, public.text]
    assert told(mixed, IDS[0], Scope.PUBLIC) == [public]


# --- dialling order


def test_a_new_address_is_due_at_once_and_the_trusted_come_first() -> None:
    book = new_book()
    book.add(at(IDS[0]), Source.EXCHANGE, 0.0)
    book.add(at(IDS[1]), Source.MDNS, 0.0)
    book.add(at(IDS[2]), Source.BOOTSTRAP, 0.0)
    assert [address.peer for address in book.due(0.0)] == [IDS[2], IDS[1], IDS[0]]
    assert [address.peer for address in book.due(0.0, exclude=frozenset({IDS[2]}), limit=1)] == [IDS[1]]


def test_a_proven_peer_comes_before_an_unproven_bootstrap() -> None:
    book = new_book()
    book.add(at(IDS[0]), Source.EXCHANGE, 0.0)
    book.add(at(IDS[1]), Source.BOOTSTRAP, 0.0)
    book.succeeded(at(IDS[0]), 1.0)
    assert book.due(2.0)[0].peer == IDS[0]


def test_own_address_is_not_taken() -> None:
    book = new_book()
    assert not book.add(at(OWN), Source.BOOTSTRAP, 0.0)
    assert book.due(0.0) == []


def test_names_are_taken_from_the_operator_only() -> None:
    book = new_book()
    name = parse_address(f"/dns/node.example/tcp/1/p2p/{IDS[0]}")
    assert not book.add(name, Source.ADVERT, 0.0)
    assert book.add(name, Source.BOOTSTRAP, 0.0)


def test_one_address_of_a_peer_at_a_time_and_the_next_after_a_failure() -> None:
    book = new_book()
    first, second = at(IDS[0], "10.0.0.1"), at(IDS[0], "10.0.0.2")
    book.add(first, Source.MDNS, 0.0)
    book.add(second, Source.EXCHANGE, 0.0)
    assert book.due(0.0) == [first]
    book.failed(first, 0.0, "connection refused")
    assert book.due(0.0) == [second]
    book.failed(second, 0.0, "timed out")
    assert book.due(0.0) == []
    assert book.reasons(IDS[0]) == {first.text: "connection refused", second.text: "timed out"}


def test_waits_double_up_to_a_cap_that_is_low_while_alone() -> None:
    book, address, now = new_book(), at(IDS[0]), 0.0
    book.add(address, Source.BOOTSTRAP, now)
    for failures in range(1, 40):
        book.failed(address, now, "refused")
        base = FIRST_WAIT_S * 2 ** (failures - 1)
        for alone, cap in ((False, WAIT_MAX_S), (True, ALONE_WAIT_MAX_S)):
            wait = min(base, cap)
            assert not book.due(now + wait * (1 - JITTER) - 1e-3, alone=alone)
            assert book.due(now + wait * (1 + JITTER), alone=alone) == [address]
        now += 1000.0


def test_only_a_connection_that_lasted_ends_the_waiting() -> None:
    book, address = new_book(), at(IDS[0])
    book.add(address, Source.BOOTSTRAP, 0.0)
    for _ in range(5):
        book.failed(address, 0.0, "refused")
    book.succeeded(address, 1.0)
    assert book.due(1.0) == []  # a peer that cuts us off at once is not dialled in a circle
    assert book.reasons(IDS[0]) == {}
    book.steady(address)
    assert book.due(1.0) == [address]


def test_the_deadline_is_when_something_more_is_due() -> None:
    book = new_book()
    assert book.deadline(0.0) == float("inf")
    book.add(at(IDS[0]), Source.MDNS, 5.0)
    book.add(at(IDS[1]), Source.MDNS, 0.0)
    assert book.due(0.0) == [at(IDS[1])]
    assert book.deadline(0.0) == 5.0
    assert book.deadline(0.0, exclude=frozenset({IDS[0]})) == float("inf")
    book.hold(IDS[0], 0.0, 100.0)
    assert book.deadline(0.0) == 100.0
    book.failed(at(IDS[1]), 0.0, "refused")
    assert FIRST_WAIT_S * (1 - JITTER) <= book.deadline(0.0) <= FIRST_WAIT_S * (1 + JITTER)


def test_a_peer_can_be_held_before_it_is_known() -> None:
    book = new_book()
    book.hold(IDS[0], 0.0, 100.0)
    book.add(at(IDS[0]), Source.ADVERT, 1.0)
    assert book.due(99.0) == []
    assert book.due(100.0) == [at(IDS[0])]


def test_a_held_peer_is_not_dialled_until_released() -> None:
    book, address = new_book(), at(IDS[0])
    book.add(address, Source.BOOTSTRAP, 0.0)
    book.hold(IDS[0], 0.0, 1800.0)
    assert book.due(1799.0, alone=True) == []
    assert book.due(1800.0) == [address]
    book.hold(IDS[0], 1800.0, 1800.0)
    book.release(IDS[0])
    assert book.due(1801.0) == [address]


def test_two_of_one_public_group_are_enough_but_the_operator_may_name_more() -> None:
    book = new_book()
    for index in range(8):
        book.add(at(IDS[index], f"8.8.8.{index + 1}"), Source.EXCHANGE, 0.0)
    assert len(book.due(0.0)) == PEERS_PER_GROUP_MAX
    assert len(book.due(0.0, groups={"8.8.8.0/24": 1})) == PEERS_PER_GROUP_MAX - 1
    assert book.due(0.0, groups={"8.8.8.0/24": 2}) == []
    book.add(at(IDS[9], "8.8.8.99"), Source.BOOTSTRAP, 0.0)
    assert [address.peer for address in book.due(0.0, groups={"8.8.8.0/24": 2})] == [IDS[9]]
    for index in range(10, 20):
        book.add(at(IDS[index], f"10.0.0.{index}"), Source.MDNS, 0.0)
    assert len(book.due(0.0, groups={"8.8.8.0/24": 2})) == 11  # a LAN is one group and no threat


# --- bounds


def test_strangers_cannot_push_out_bootstrap_proven_or_anchor() -> None:
    book = new_book(peers_max=10)
    keep = IDS[:6]  # more proven ones than anchors
    book.add(at(keep[0]), Source.BOOTSTRAP, 0.0)
    for peer in keep[1:]:
        book.add(at(peer), Source.EXCHANGE, 0.0)
        book.succeeded(at(peer), 0.0)
    for index in range(6, 39):
        book.add(at(IDS[index]), Source.EXCHANGE, float(index))
    assert len(book) <= 10
    assert all(peer in book for peer in keep)
    assert book.statistics(40.0).dropped["made room"] >= 28


def test_a_book_full_of_proven_peers_takes_no_stranger() -> None:
    book = new_book(peers_max=2)
    for peer in IDS[:2]:
        book.add(at(peer), Source.EXCHANGE, 0.0)
        book.succeeded(at(peer), 0.0)
    assert not book.add(at(IDS[2]), Source.EXCHANGE, 1.0)
    assert book.statistics(1.0).dropped == {"book full": 1}


def test_a_peer_has_a_bounded_number_of_addresses() -> None:
    book = new_book()
    for port in range(1, 60):
        book.add(at(IDS[0], port=port), Source.EXCHANGE, 0.0)
    assert book.statistics(0.0).addresses == ADDRESSES_MAX
    book.failed(at(IDS[0], port=1), 0.0, "refused")
    assert book.add(at(IDS[0], port=99), Source.EXCHANGE, 1.0)
    assert at(IDS[0], port=1) not in book.addresses(IDS[0], 1.0)


def test_an_address_that_never_worked_is_forgotten_unless_the_operator_named_it() -> None:
    book = new_book()
    book.add(at(IDS[0]), Source.EXCHANGE, 0.0)
    book.add(at(IDS[1]), Source.BOOTSTRAP, 0.0)
    for peer in IDS[:2]:
        for _ in range(FAILURES_MAX):
            book.failed(at(peer), 0.0, "refused")
    assert IDS[0] not in book
    assert IDS[1] in book


def test_anchors_lasted_are_few_sticky_and_of_different_groups() -> None:
    book = new_book()
    hosts = ["8.8.8.1", "8.8.8.2", "9.9.9.1", "11.1.1.1", "12.1.1.1"]
    addresses = [at(peer, host) for peer, host in zip(IDS, hosts, strict=False)]
    for address in addresses:
        book.add(address, Source.EXCHANGE, 0.0)
        book.succeeded(address, 0.0)
        book.lasted(address, ANCHOR_AFTER_S - 1)
    assert book.anchors == (), "a connection must have lasted"
    for address in addresses:
        book.lasted(address, ANCHOR_AFTER_S)
    assert book.anchors == (IDS[0], IDS[2], IDS[3])
    for _ in range(FAILURES_MAX):
        for address in addresses[:4]:
            book.failed(address, 1.0, "no network")
    assert book.anchors == (IDS[0], IDS[2], IDS[3]), "while we are cut off nobody else takes their place"
    book.lasted(addresses[4], ANCHOR_AFTER_S)
    assert book.anchors == (IDS[4],)


def test_anchors_are_dialled_first() -> None:
    book, anchor = new_book(), at(IDS[20], "8.8.8.8")
    for peer in IDS[:20]:
        book.add(at(peer), Source.BOOTSTRAP, 0.0)
        book.succeeded(at(peer), 0.0)
    book.add(anchor, Source.EXCHANGE, 0.0)
    book.lasted(anchor, ANCHOR_AFTER_S)
    other = new_book()
    other.read_json(book.to_json(1.0, 1e9), 1.0, 1e9)
    assert other.due(1.0, limit=1, groups={"8.8.8.0/24": PEERS_PER_GROUP_MAX}) == [anchor]


def test_a_network_that_we_do_not_know_comes_first() -> None:
    book = new_book()
    for index in range(8):
        proven = at(IDS[index], f"8.8.8.{index + 1}")
        book.add(proven, Source.EXCHANGE, 0.0)
        book.succeeded(proven, 0.0)
    book.add(at(IDS[9], "9.9.9.9"), Source.EXCHANGE, 0.0)
    chosen = [address.peer for address in book.due(0.0, limit=2, groups={"8.8.8.0/24": 1})]
    assert chosen[0] == IDS[9]
    assert len(chosen) == 2


def test_one_public_network_cannot_fill_the_book() -> None:
    book = new_book()
    for index in range(ADDRESSES_PER_GROUP_MAX + 50):
        book.add(at(IDS[index % 39], f"8.8.8.{index + 1}", port=1 + index), Source.EXCHANGE, 0.0)
    assert book.statistics(0.0).addresses == ADDRESSES_PER_GROUP_MAX
    assert book.statistics(0.0).dropped == {"addresses of one network": 50}
    assert book.add(at(IDS[0], "8.8.8.1"), Source.BOOTSTRAP, 0.0), "the operator may"
    assert book.add(at(IDS[0], "9.9.9.1"), Source.EXCHANGE, 0.0)
    for _ in range(FAILURES_MAX):
        book.failed(at(IDS[1], "8.8.8.2", port=2), 0.0, "refused")
        book.failed(at(IDS[2], "8.8.8.3", port=3), 0.0, "refused")
    assert book.add(at(IDS[1], "8.8.8.222"), Source.EXCHANGE, 0.0), "what goes makes room"


def test_who_is_known_was_reached_by_us_or_named() -> None:
    book = new_book()
    for index, source in enumerate((Source.BOOTSTRAP, Source.EXCHANGE, Source.INBOUND)):
        book.add(at(IDS[index]), source, 0.0)
    book.vouch(at(IDS[2]), 0.0)
    assert [book.is_known(peer) for peer in IDS[:4]] == [True, False, False, False]
    book.succeeded(at(IDS[1]), 1.0)
    assert book.is_known(IDS[1])


# --- sharing


def test_only_what_worked_of_late_is_shared_and_only_where_it_is_of_use() -> None:
    book = new_book()
    lan, public, untried = at(IDS[0], "192.168.1.2"), at(IDS[1], "8.8.8.8"), at(IDS[2], "9.9.9.9")
    for address in (lan, public, untried):
        book.add(address, Source.EXCHANGE, 0.0)
    book.succeeded(lan, 0.0)
    book.vouch(public, 0.0)
    assert dict(book.share(1.0, Scope.PUBLIC, 8, OWN)) == {IDS[1]: [public.text]}
    assert dict(book.share(1.0, Scope.PRIVATE, 8, IDS[1])) == {IDS[0]: [lan.text]}
    assert len(dict(book.share(1.0, Scope.PRIVATE, 1, OWN))) == 1
    assert dict(book.share(1e6, Scope.LOOPBACK, 8, OWN)) == {}


# --- disk


def test_the_book_comes_back_from_the_disk() -> None:
    book = new_book()
    for peer, source in zip(IDS, Source, strict=False):
        book.add(at(peer, "8.8.8.8" if source is Source.ADVERT else "10.0.0.1"), source, 5.0)
    book.succeeded(at(IDS[0]), 6.0)
    book.lasted(at(IDS[0]), ANCHOR_AFTER_S)
    book.failed(at(IDS[1]), 7.0, "connection refused")
    other = new_book()
    other.read_json(book.to_json(10.0, 1_000_010.0), 100.0, 1_000_020.0)
    assert len(other) == len(book)
    assert other.anchors == book.anchors == (IDS[0],)
    assert other.due(100.0)[0].peer == IDS[0]
    assert len(other.due(100.0)) == len(book)  # a restart tries everything again
    assert dict(other.share(100.0, Scope.PRIVATE, 9, OWN)) == {IDS[0]: [at(IDS[0]).text]}


def test_an_operators_entry_comes_back_as_an_ordinary_one() -> None:
    book = new_book()
    book.add(at(IDS[0]), Source.BOOTSTRAP, 0.0)
    other = new_book()
    other.read_json(book.to_json(0.0, 0.0), 0.0, 0.0)
    for _ in range(FAILURES_MAX):
        other.failed(at(IDS[0]), 0.0, "refused")
    assert IDS[0] not in other


def test_a_clock_set_back_blocks_nothing() -> None:
    book = new_book()
    book.add(at(IDS[0]), Source.MDNS, 0.0)
    book.failed(at(IDS[0]), 0.0, "refused")
    book.succeeded(at(IDS[0]), 0.0)
    other = new_book()
    other.read_json(book.to_json(0.0, 2e9), 50.0, 1e9)
    assert other.due(50.0) == [at(IDS[0])]


@pytest.mark.parametrize(
    "raw",
    [b"", b"[]", b"{}", b'{"version":2,"anchors":[],"addresses":[]}', b"\xff\xfe", b'{"version":1,"anchors":[1]}'],
)
def test_a_spoiled_book_is_a_bad_file_and_adds_nothing(raw: bytes) -> None:
    book = new_book()
    with pytest.raises(BadFile):
        book.read_json(raw, 0.0, 0.0)
    assert len(book) == 0


@pytest.mark.slow
@settings(deadline=None)
@given(st.data())
def test_a_damaged_book_is_read_whole_or_refused(data: st.DataObject) -> None:
    book = new_book()
    for peer in IDS[:3]:
        book.add(at(peer), Source.MDNS, 0.0)
    raw = bytearray(book.to_json(0.0, 0.0))
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    other = new_book()
    try:
        other.read_json(bytes(raw), 0.0, 0.0)
    except BadFile:
        assert len(other) == 0


# --- histories

_OPERATION = st.tuples(
    st.sampled_from(["add", "dial ok", "dial bad", "hold", "release", "save"]),
    st.integers(0, 11),  # whom
    st.integers(1, 20),  # at which port
    st.sampled_from(Source),
    st.floats(0.0, 400.0),  # wait
)


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(st.lists(_OPERATION, max_size=120), st.integers(0, 2**32), st.booleans())
def test_histories_keep_the_bounds(history: list[tuple[str, int, int, Source, float]], seed: int, alone: bool) -> None:
    book, now, peers_max = Book(OWN, random.Random(seed), peers_max=6), 0.0, 6
    named: set[PeerId] = set()
    held: dict[PeerId, float] = {}
    failed: dict[str, float] = {}
    for action, whom, port, source, wait in history:
        now += wait
        address = at(IDS[whom], f"8.8.{whom % 3}.{whom + 1}", port)
        match action:
            case "add":
                if book.add(address, source, now) and source is Source.BOOTSTRAP:
                    named.add(IDS[whom])
            case "dial ok":
                for candidate in book.due(now, alone=alone, limit=1):
                    book.succeeded(candidate, now)
                    book.steady(candidate)
                    book.lasted(candidate, 2 * ANCHOR_AFTER_S * (whom % 2))
                    failed.pop(candidate.text, None)
            case "dial bad":
                for candidate in book.due(now, alone=alone, limit=1):
                    book.failed(candidate, now, "refused")
                    failed[candidate.text] = now
            case "hold":
                book.hold(IDS[whom], now, 100.0)
                held[IDS[whom]] = now + 100.0
            case "release":
                book.release(IDS[whom])
                held.pop(IDS[whom], None)
            case "save":
                other = Book(OWN, random.Random(0), peers_max=6)
                other.read_json(book.to_json(now, 1e9), now, 1e9)
                assert len(other) == len(book)
                assert set(other.anchors) == set(book.anchors)
        due = book.due(now, exclude=frozenset(IDS[:1]), alone=alone)
        peers = [candidate.peer for candidate in due]
        assert len(set(peers)) == len(peers)
        assert IDS[0] not in peers
        assert len(book) <= peers_max
        assert all(peer in book for peer in named)
        assert len(book.anchors) <= ANCHORS_MAX
        assert all(anchor in book for anchor in book.anchors)
        for candidate in due:
            assert now >= held.get(candidate.peer, now)
            assert now - failed.get(candidate.text, -1e9) >= FIRST_WAIT_S * (1 - JITTER) - 1e-9
        failed = {text: when for text, when in failed.items() if parse_address(text).peer in book}


@pytest.mark.slow
def test_a_full_book_fits_its_bound_on_disk() -> None:
    book = new_book()
    for index in range(PEERS_MAX):
        peer = peer_id_of(index.to_bytes(32, "big"))
        for port in (65534, 65535):
            book.add(at(peer, f"203.200.{index // 60 + 100}.200", port), Source.EXCHANGE, 0.123456789)
    raw = book.to_json(123.456789, 1.7e9)
    assert len(raw) < BOOK_BYTES_MAX * 2 // ADDRESSES_MAX
    assert len(book) == PEERS_MAX
