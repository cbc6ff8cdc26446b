"""p2p/guard_relay.py over real sockets on loopback: what a relay gives, refuses, bounds and lets go."""

from __future__ import annotations

import os
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
from libp2p.exceptions import BaseLibp2pError
from libp2p.peer.id import ID
from libp2p.relay.circuit_v2.pb.circuit_pb2 import HopMessage, Status, StopMessage
from libp2p.relay.circuit_v2.pb.circuit_pb2 import PeerId as WirePeer
from libp2p.relay.circuit_v2.pb.dcutr_pb2 import HolePunch
from libp2p.relay.circuit_v2.resources import RelayLimits as TheirLimits
from libp2p.relay.circuit_v2.resources import RelayResourceManager
from libp2p.utils.varint import encode_varint_prefixed, read_varint_prefixed_bytes_limited

from crypto.identity import Identity, PeerId
from p2p.errors import Refused, StreamClosed, Unreachable
from p2p.guard_punch import DCUTR
from p2p.guard_relay import HOP, PLACE_S_MAX, STOP
from p2p.host import Libp2pTransport
from p2p.relay import RelayLimits
from p2p.transport import Stream
from tests.fuzz_frames import damaged
from tests.libp2p_peers import node, stranger, until

pytestmark = pytest.mark.slow
RPC = "/openagi/rpc/1"


async def echo(stream: Stream) -> None:
    try:
        while True:
            await stream.send(await stream.receive())
    except (StreamClosed, Unreachable):
        pass


def bare(transport: Libp2pTransport) -> str:
    return transport.addresses()[-1].rpartition("/p2p/")[0]


async def place(client: Libp2pTransport, relay: Libp2pTransport) -> str:
    """A place of `client` at `relay`; gives its circuit address."""
    await client.dial(relay.addresses()[-1])
    await client.relay.reserve(relay.peer_id, bare(relay))
    return client.addresses()[0]


@asynccontextmanager
async def behind_a_relay(**limits: Any) -> AsyncIterator[tuple[Libp2pTransport, Libp2pTransport, Libp2pTransport, str]]:
    """A relay, a peer with a place there, another peer, and the first one's circuit address."""
    async with node(relay=RelayLimits(**limits)) as relay, node() as alice, node() as bob:
        alice.serve(RPC, echo)
        yield relay, alice, bob, await place(alice, relay)


def carried(relay: Libp2pTransport) -> Any:
    return relay.relay.desk.statistics(trio.current_time())


async def test_everything_goes_through_a_relay_and_nothing_is_left_after_it() -> None:
    async with behind_a_relay() as (relay, alice, bob, circuit):
        assert circuit == f"{bare(relay)}/p2p/{relay.peer_id}/p2p-circuit/p2p/{alice.peer_id}"
        assert await bob.dial(circuit) == alice.peer_id
        assert bob.remote_address(alice.peer_id) == circuit.rpartition("/p2p/")[0]
        seen = alice.remote_address(bob.peer_id)
        assert seen is not None
        assert seen.endswith("/p2p-circuit")
        stream = await bob.open_stream(alice.peer_id, RPC)
        for size in (0, 1, 65_536, 1 << 20):
            frame = os.urandom(size)
            await stream.send(frame)
            assert await stream.receive() == frame
        await stream.close()
        assert carried(relay).circuits == 1
        await bob.disconnect(alice.peer_id)
        await until(lambda: carried(relay).circuits == 0)
        await until(lambda: alice.peers() == {relay.peer_id})
        assert bob.peers() == {relay.peer_id}
        for each in (relay, alice, bob):
            await until(lambda each=each: each.statistics().streams_open == 0)
        assert [each.statistics().drops for each in (relay, alice, bob)] == [{}, {}, {}]


async def test_a_private_network_is_one_through_a_relay_too() -> None:
    psk = bytes(range(32))
    async with node(psk=psk) as relay, node(psk=psk) as alice, node(psk=psk) as bob:
        alice.serve(RPC, echo)
        await bob.dial(await place(alice, relay))
        stream = await bob.open_stream(alice.peer_id, RPC)
        await stream.send(b"private")
        assert await stream.receive() == b"private"


async def test_a_relay_that_dies_takes_the_circuit_and_the_address_with_it() -> None:
    async with node() as alice, node() as bob:
        async with node() as relay:
            await bob.dial(await place(alice, relay))
            assert len(alice.addresses()) == 2
        await until(lambda: not alice.peers() and not bob.peers())
        assert len(alice.addresses()) == 1


async def test_a_circuit_needs_a_place_of_the_peer_behind_it() -> None:
    async with behind_a_relay() as (relay, alice, bob, circuit):
        other = circuit.replace(alice.peer_id, Identity.make().peer_id)
        with pytest.raises(Refused, match="holds no place there"):
            await bob.dial(other)
        await relay.disconnect(alice.peer_id)
        with pytest.raises(Refused, match="holds no place there"):
            await bob.dial(circuit)


async def test_a_relay_that_is_off_says_so() -> None:
    async with node(relay=None) as relay, node() as alice:
        await alice.dial(relay.addresses()[0])
        with pytest.raises(Refused, match="does not relay"):
            await alice.relay.reserve(relay.peer_id, bare(relay))
        assert len(alice.addresses()) == 1
        assert relay.statistics().drops == {"relay_off": 1}


async def test_a_circuit_ends_with_its_bytes() -> None:
    async with behind_a_relay(circuit_bytes_max=200_000) as (relay, alice, bob, circuit):
        await bob.dial(circuit)
        stream = await bob.open_stream(alice.peer_id, RPC)

        async def use() -> None:
            for _ in range(20):
                await stream.send(bytes(20_000))
                await stream.receive()

        with pytest.raises(Unreachable):
            await use()
        await until(lambda: carried(relay).circuits == 0)
        assert relay.statistics().drops["relay_circuit_bytes"] >= 1
        assert relay.peers() == {alice.peer_id, bob.peer_id}


async def test_a_silent_circuit_ends_with_its_time() -> None:
    async with behind_a_relay(circuit_s=1.5) as (relay, alice, bob, circuit):
        await bob.dial(circuit)
        await until(lambda: alice.peer_id not in bob.peers())
        await until(lambda: carried(relay).circuits == 0)
        assert relay.statistics().drops == {"relay_circuit_time": 1}


async def test_a_peer_that_stops_reading_costs_the_relay_no_other_circuit() -> None:
    """Its circuit fills and waits; a second one through the same relay goes on."""
    async with behind_a_relay() as (relay, alice, bob, circuit), node() as carol:
        stuck = trio.Event()

        async def deaf(stream: Stream) -> None:
            stuck.set()
            await trio.sleep_forever()

        alice.serve("/openagi/deaf/1", deaf)
        await bob.dial(circuit)
        await carol.dial(circuit)
        flood = await bob.open_stream(alice.peer_id, "/openagi/deaf/1")
        good = await carol.open_stream(alice.peer_id, RPC)
        async with trio.open_nursery() as nursery:

            async def pour() -> None:
                while True:
                    await flood.send(bytes(100_000))

            nursery.start_soon(pour)
            await stuck.wait()
            await trio.sleep(0.3)
            for _ in range(5):
                await good.send(b"still here")
                assert await good.receive() == b"still here"
            nursery.cancel_scope.cancel()
        assert relay.peers() == {alice.peer_id, bob.peer_id, carol.peer_id}


async def test_cancelled_sends_spoil_their_own_streams_only() -> None:
    async with behind_a_relay() as (relay, alice, bob, circuit):
        await bob.dial(circuit)
        good = await bob.open_stream(alice.peer_id, RPC)
        for number in range(10):
            stream = await bob.open_stream(alice.peer_id, RPC)
            with trio.move_on_after(0.002 * number):
                await stream.send(bytes(1 << 20))
            await stream.reset()
            await good.send(b"whole")
            assert await good.receive() == b"whole"
        assert carried(relay).circuits_total == 1


# ---- peers that break the rules ----


async def said(stream: Any, message: Any, kind: Any = HopMessage) -> Any:
    await stream.write(encode_varint_prefixed(message.SerializeToString()))
    with trio.fail_after(10):
        answer = kind()
        answer.ParseFromString(await read_varint_prefixed_bytes_limited(stream, 4096))
        return answer


async def test_a_place_is_for_the_one_that_asks_whatever_it_names() -> None:
    victim = Identity.make().peer_id
    async with node() as relay, stranger(relay) as eve:
        for name in (victim, Identity.make().peer_id):
            message = HopMessage(type=HopMessage.RESERVE, peer=WirePeer(id=ID.from_base58(name).to_bytes()))
            answer = await said(await eve.stream(HOP), message)
            assert answer.status == Status.OK
        assert carried(relay).reservations == 1
        assert not relay.relay.desk.holds(victim, trio.current_time())


def test_libp2ps_own_relay_gives_places_to_whom_the_message_names() -> None:
    """Red when upstream no longer does: then look again at whether its relay can be used."""
    manager = RelayResourceManager(TheirLimits(duration=60, data=1024, max_circuit_conns=2, max_reservations=2))
    named = [ID(os.urandom(34)) for _ in range(2)]
    for peer in named:
        assert manager.can_accept_reservation(peer)
        manager.reserve(peer)
    assert not manager.can_accept_reservation(ID(os.urandom(34))), "one connection has taken all places"


@pytest.mark.parametrize(
    "raw",
    [
        b"\xff\xff\xff\xff\x0f",  # a length of gigabytes
        b"\x81\x80\x04",
        encode_varint_prefixed(b"\xff" * 64),
        encode_varint_prefixed(b""),
        encode_varint_prefixed(HopMessage(type=HopMessage.CONNECT).SerializeToString()),
        encode_varint_prefixed(HopMessage(type=HopMessage.CONNECT, peer=WirePeer(id=b"\x01")).SerializeToString()),
        encode_varint_prefixed(HopMessage(type=HopMessage.STATUS, status=Status.OK).SerializeToString()),
    ],
)
@pytest.mark.parametrize("protocol", [HOP, STOP])
async def test_senseless_words_end_their_stream_only(protocol: str, raw: bytes) -> None:
    async with node() as relay, stranger(relay) as eve:
        stream = await eve.stream(protocol)
        await stream.write(raw)
        reasons = {"relay_malformed", "relay_hop_failed", "relay_stop_failed"}
        await until(lambda: reasons & relay.statistics().drops.keys())
        assert await eve.alive()
        await until(lambda: relay.statistics().streams_open == 0)


async def test_a_message_longer_than_any_of_ours_is_not_read() -> None:
    async with node() as relay, stranger(relay) as eve:
        stream = await eve.stream(HOP)
        long = HopMessage(type=HopMessage.RESERVE, senderRecord=bytes(5000)).SerializeToString()
        await stream.write(encode_varint_prefixed(long))
        await until(lambda: relay.statistics().drops.get("relay_hop_failed") == 1)
        assert carried(relay).reservations == 0


async def test_mutated_words_end_nobody() -> None:
    """The other protocols of a node are fuzzed in tests/test_fuzz_host.py."""
    rng = random.Random(11)
    async with node() as relay, node() as alice, node() as bob, stranger(relay) as eve:
        relay.relay.observed = ("11.0.1.1",)
        alice.serve(RPC, echo)
        circuit = await place(alice, relay)
        own, target = eve.host.get_id().to_bytes(), ID.from_base58(alice.peer_id).to_bytes()
        words = [
            (HOP, HopMessage(type=HopMessage.RESERVE)),
            (HOP, HopMessage(type=HopMessage.CONNECT, peer=WirePeer(id=target))),
            (HOP, HopMessage(type=HopMessage.CONNECT, peer=WirePeer(id=own, addrs=[b"x"]), senderRecord=b"y")),
            (STOP, StopMessage(type=StopMessage.CONNECT, peer=WirePeer(id=own))),
            (STOP, StopMessage(type=StopMessage.STATUS, status=Status.OK)),
            (DCUTR, HolePunch(type=HolePunch.CONNECT, ObsAddrs=[b"\x04\x08\x08\x08\x08\x06\x10\x00"])),
        ]
        taken = 0
        for _ in range(150):
            protocol, message = rng.choice(words)
            try:
                stream = await eve.stream(protocol)
                await stream.write(damaged(rng, encode_varint_prefixed(message.SerializeToString())))
                await (stream.reset() if rng.random() < 0.3 else stream.close_write())
                taken += 1
            except BaseLibp2pError:
                await trio.sleep(0.2)  # our share of streams is in use
        assert taken > 75
        await bob.dial(circuit)
        good = await bob.open_stream(alice.peer_id, RPC)
        await good.send(b"still here")
        assert await good.receive() == b"still here"


async def test_a_circuit_is_taken_from_a_relay_of_ours_only() -> None:
    async with node() as alice, stranger(alice) as eve:
        message = StopMessage(type=StopMessage.CONNECT, peer=WirePeer(id=eve.host.get_id().to_bytes()))
        answer = await said(await eve.stream(STOP), message, StopMessage)
        assert answer.status == Status.PERMISSION_DENIED
        assert alice.statistics().drops == {"relay_unasked": 1}


async def test_circuits_whose_handshake_never_comes_are_few_and_end() -> None:
    """A relay of ours turns against us: it connects us to nobody, again and again."""

    async def give(net: Any) -> None:
        await read_varint_prefixed_bytes_limited(net, 4096)
        answer = HopMessage(type=HopMessage.STATUS, status=Status.OK)
        answer.reservation.expire = 1 << 40
        await net.write(encode_varint_prefixed(answer.SerializeToString()))

    async with node(upgrade_s=2.0) as alice, stranger(alice, handlers={HOP: give}) as eve:
        relay = PeerId(eve.host.get_id().to_base58())
        lasts_s = await alice.relay.reserve(relay, "/ip4/127.0.0.1/tcp/1")
        assert lasts_s == PLACE_S_MAX
        message = StopMessage(
            type=StopMessage.CONNECT, peer=WirePeer(id=ID.from_base58(Identity.make().peer_id).to_bytes())
        )
        answers: list[int] = []

        async def connect() -> None:
            answers.append((await said(await eve.stream(STOP), message, StopMessage)).status)

        async with trio.open_nursery() as nursery:
            for _ in range(12):
                nursery.start_soon(connect)
        assert answers.count(Status.OK) == 8
        assert answers.count(Status.RESOURCE_LIMIT_EXCEEDED) == 4
        await until(lambda: alice.statistics().drops.get("relay_stop_failed") == 8)
        assert (await said(await eve.stream(STOP), message, StopMessage)).status == Status.OK
        assert await eve.alive()


async def test_nobody_reserves_or_connects_through_two_relays() -> None:
    async with behind_a_relay() as (_, alice, bob, circuit):
        await bob.dial(circuit)
        with pytest.raises(Refused, match="behind a relay"):
            await bob.relay.reserve(alice.peer_id, circuit)


# ---- dial-backs ----


async def breaks_the_handshake(stream: trio.SocketStream) -> None:
    """A listener that agrees on Noise, and whose second message nobody encrypted."""

    async def line() -> bytes:
        size, told = (await stream.receive_some(1))[0], b""
        while len(told) < size:
            told += await stream.receive_some(size - len(told))
        return told

    async with stream:
        await stream.send_all(b"\x13/multistream/1.0.0\n")
        assert await line() == b"/multistream/1.0.0\n"
        assert await line() == b"/noise\n"
        await stream.send_all(b"\x07/noise\n")
        await stream.receive_some(1000)
        await stream.send_all((96).to_bytes(2, "big") + bytes(range(96)))
        await stream.receive_some(1000)


async def test_a_dial_back_to_words_that_nobody_encrypted_reaches_nobody() -> None:
    async with node() as alice, trio.open_nursery() as nursery:
        [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, breaks_the_handshake, [listener])
        port = listener.socket.getsockname()[1]
        with pytest.raises(Unreachable):
            await alice.relay.probe(f"/ip4/127.0.0.1/tcp/{port}/p2p/{Identity.make().peer_id}")
        nursery.cancel_scope.cancel()


async def test_a_dial_back_proves_the_peer_and_leaves_nothing() -> None:
    async with node() as alice, node() as bob:
        await bob.relay.probe(alice.addresses()[0])
        assert bob.peers() == alice.peers() == frozenset()
        with pytest.raises(Unreachable):
            await bob.relay.probe(alice.addresses()[0].replace(alice.peer_id, Identity.make().peer_id))
        with pytest.raises(Unreachable):
            await bob.relay.probe(f"/ip4/127.0.0.1/tcp/1/p2p/{alice.peer_id}")
        await alice.dial(bob.addresses()[0])
        assert alice.relay.dialled_at(bob.peer_id) == bare(bob)
        assert bob.relay.dialled_at(alice.peer_id) is None
        await bob.relay.probe(alice.addresses()[0])
        assert bob.peers() == {alice.peer_id}, "the connection there was is untouched"
