"""mDNS: what is announced and believed, and nodes that find each other by real multicast on loopback."""

from __future__ import annotations

import random
import re
import sys
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from crypto.identity import Identity
from p2p.address import parse_address
from p2p.book import Book
from p2p.bootstrap import bootstrap_peer
from p2p.calls import Calls
from p2p.hello import RPC_PROTOCOL
from p2p.mdns import ADDRESSES_MAX, Announcement, Sighting, announced, interfaces, read_txt, run_mdns, to_txt
from p2p.peering import Peering, PeeringConfig
from p2p.transport import Transport

HANG_S = 30.0  # found in 0.1 s on an idle machine


def announcement(host: str = "127.0.0.1", *, instance: str = "a" * 32, network: str = "main") -> Announcement:
    peer = Identity.make().peer_id
    return Announcement(
        peer=peer, network=network, protocol=1, instance=instance, addresses=(f"/ip4/{host}/tcp/4001/p2p/{peer}",)
    )


def test_what_is_announced_is_read_back() -> None:
    said = announcement("192.168.1.7")
    sighting = read_txt(dict(to_txt(said)))
    assert sighting == Sighting(
        peer=said.peer,
        network="main",
        protocol=1,
        instance="a" * 32,
        addresses=(parse_address(said.addresses[0]),),
    )


def test_the_lan_hears_lan_addresses_and_loopback_only_where_there_is_nothing_else() -> None:
    peer = Identity.make().peer_id
    texts = tuple(f"/ip4/{host}/tcp/4001/p2p/{peer}" for host in ("127.0.0.1", "192.168.1.7", "8.8.8.8"))
    assert [address.host for address in announced(texts)] == ["192.168.1.7", "8.8.8.8"]
    assert [address.host for address in announced(texts[:1])] == ["127.0.0.1"]
    assert announced(("rubbish",)) == []
    assert len(announced(tuple(f"/ip4/10.0.0.{i}/tcp/1/p2p/{peer}" for i in range(1, 99)))) == ADDRESSES_MAX
    assert interfaces((*texts, texts[0], f"/ip6/::1/tcp/1/p2p/{peer}")) == ["127.0.0.1", "192.168.1.7", "8.8.8.8"]


def test_an_announcement_fits_one_packet() -> None:
    peer = Identity.make().peer_id
    host = "/ip6/2600:1111:2222:3333:4444:5555:6666:7777/tcp/65535/p2p/"
    said = Announcement(
        peer=peer, network="n" * 32, protocol=1, instance="a" * 32, addresses=(f"{host}{peer}",) * ADDRESSES_MAX
    )
    txt = to_txt(said)
    assert all(len(key) + 1 + len(value) <= 255 for key, value in txt.items())
    assert sum(len(key) + len(value) + 2 for key, value in txt.items()) < 1000


@pytest.mark.parametrize(
    "change",
    [
        {"v": "x"},
        {"v": "-1"},
        {"v": "9" * 99},
        {"v": None},
        {"peer": "Qm"},
        {"peer": None},
        {"inst": ""},
        {"inst": "a" * 99},
        {"a0": "/ip4/0.0.0.0/tcp/1"},
        {"a0": "/dns/evil.example/tcp/1"},
        {"a0": "x" * 250},
        {"a0": None},
    ],
)
def test_nonsense_on_the_lan_is_passed_over(change: dict[str, str | None]) -> None:
    assert read_txt({**to_txt(announcement()), **change}) is None


@pytest.mark.slow
@settings(deadline=None)
@given(
    st.dictionaries(st.sampled_from(["v", "net", "peer", "inst", "a0", "a1", "zz"]), st.none() | st.text(max_size=300))
)
def test_any_txt_record_is_read_or_passed_over(txt: dict[str, str | None]) -> None:
    read_txt(txt)
    read_txt({**to_txt(announcement()), **txt})


async def test_a_node_with_no_ipv4_says_so() -> None:
    peer = Identity.make().peer_id
    said = Announcement(peer=peer, network="main", protocol=1, instance="a" * 32, addresses=())
    async with trio.open_nursery() as nursery:
        assert "no IPv4 interface" in await nursery.start(run_mdns, said, lambda sighting: None)


def other_threads() -> set[threading.Thread]:
    """Those that are not Trio's or libp2p's own: zeroconf's browser has a name, its event loop has none."""
    known = re.compile("Trio thread|.*_background_cleanup")
    return {thread for thread in threading.enumerate() if not known.match(thread.name)}


@pytest.mark.slow
async def test_an_interface_that_is_not_there_is_a_sentence_and_leaves_nothing() -> None:
    before = other_threads()
    async with trio.open_nursery() as nursery:
        problem = await nursery.start(run_mdns, announcement("192.0.2.77"), lambda sighting: None)
    assert problem.startswith("no multicast on 192.0.2.77: ")
    assert other_threads() <= before


@pytest.mark.slow
async def test_two_announcers_see_each_other_and_stop_without_a_trace() -> None:
    before = other_threads()
    one, two = announcement(instance="1" * 32), announcement(instance="2" * 32, network="other")
    seen: dict[str, Sighting] = {}
    both = trio.Event()
    in_trio = threading.current_thread()

    def sighted(sighting: Sighting) -> None:
        assert threading.current_thread() is in_trio
        seen[sighting.instance] = sighting
        if {one.instance, two.instance} <= seen.keys():
            both.set()

    with trio.fail_after(HANG_S):
        async with trio.open_nursery() as nursery:
            for said in (one, two):
                if problem := await nursery.start(run_mdns, said, sighted):
                    pytest.skip(problem)
            await both.wait()
            nursery.cancel_scope.cancel()
    assert (seen[one.instance].peer, seen[two.instance].peer) == (one.peer, two.peer)
    assert (seen[one.instance].network, seen[two.instance].network) == ("main", "other")
    assert other_threads() <= before


@pytest.mark.slow
@pytest.mark.parametrize("after_s", [0.0, 0.05, 0.3])
async def test_it_can_be_stopped_while_it_starts(after_s: float) -> None:
    before = other_threads()
    with trio.fail_after(HANG_S):
        with trio.move_on_after(after_s):
            await run_mdns(announcement(), lambda sighting: None)
        while not other_threads() <= before:  # noqa: ASYNC110  # threads have no event to wait for
            await trio.sleep(0.05)


def test_nothing_of_zeroconf_is_imported_before_it_is_wanted() -> None:
    import subprocess

    code = "import sys, p2p.peering; sys.exit('zeroconf' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent.parent)


# --- over libp2p


@asynccontextmanager
async def real_node(
    *bootstrap: str, mdns: bool = False, network: str = "main", identity: Identity | None = None, dial_s: float = 10.0
) -> AsyncIterator[tuple[Transport, Peering]]:
    from p2p.host import open_host
    from p2p.host_config import HostConfig

    identity, rng = identity or Identity.make(), random.Random(1)
    async with open_host(identity, HostConfig(listen=("/ip4/127.0.0.1/tcp/0",), dial_s=dial_s)) as transport:
        config = PeeringConfig(
            network=network,
            agent="test",
            instance=random.randbytes(16).hex(),
            bootstrap=tuple(bootstrap_peer(text) for text in bootstrap),
            mdns=mdns,
        )
        peering = Peering(transport, Book(identity.peer_id, rng), config, rng)
        calls = Calls(transport, RPC_PROTOCOL, peering.handlers())
        async with trio.open_nursery() as nursery:
            await nursery.start(calls.run)
            await nursery.start(peering.run, calls)
            yield transport, peering
            nursery.cancel_scope.cancel()


async def eventually(condition: object) -> None:
    assert callable(condition)
    with trio.fail_after(HANG_S):
        while not condition():  # noqa: ASYNC110  # the condition is of several nodes
            await trio.sleep(0.02)


@pytest.mark.slow
async def test_two_libp2p_nodes_find_each_other_by_mdns_alone() -> None:
    before = other_threads()
    async with real_node(mdns=True) as (a, peering_a), real_node(mdns=True) as (b, peering_b):
        await eventually(lambda: peering_a.status().mdns not in ("off", "starting"))
        if peering_a.status().mdns != "on":
            pytest.skip(peering_a.status().mdns)
        await eventually(lambda: b.peer_id in peering_a.peers() and a.peer_id in peering_b.peers())
        await eventually(lambda: peering_a.rtt_ms(b.peer_id) is not None)
    assert other_threads() <= before


@pytest.mark.slow
async def test_bootstrap_failures_over_libp2p_are_sentences() -> None:
    async with real_node() as (there, _), real_node(network="x") as (other, _):
        stranger = Identity.make().peer_id
        host = there.addresses()[0].rsplit("/", 1)[0]
        silent = await trio.open_tcp_listeners(0, host="127.0.0.1")
        port = silent[0].socket.getsockname()[1]
        entries = (
            f"/ip4/127.0.0.1/tcp/1/p2p/{stranger}",
            f"{host}/{Identity.make().peer_id}",
            f"/ip4/127.0.0.1/tcp/{port}/p2p/{Identity.make().peer_id}",
            other.addresses()[0],
            there.addresses()[0],
        )
        async with silent[0], real_node(*entries, dial_s=1.0) as (_, peering):
            await eventually(lambda: all(row.state in ("failed", "connected") for row in peering.status().bootstrap))
            await eventually(lambda: peering.status().bootstrap[4].state == "connected")
            reasons = [row.reason for row in peering.status().bootstrap]
    assert reasons[0].startswith("connection refused: nothing listens at /ip4/127.0.0.1/tcp/1;")
    assert "another peer answers there" in reasons[1]
    assert "did not answer within 1 s" in reasons[2]
    assert reasons[3] == "other network 'x' while ours is 'main'"
    assert reasons[4] == ""
