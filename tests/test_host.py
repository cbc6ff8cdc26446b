"""p2p/host.py over real sockets on loopback: what the transport's suite does not ask."""

from __future__ import annotations

import os
import traceback

import pytest
import trio

from crypto.identity import Identity, PeerId
from p2p.errors import CannotListen, LocalProtocolError, Refused, RemoteProtocolError, StreamClosed, Unreachable
from p2p.host_config import HostConfig
from p2p.transport import FRAME_BYTES_MAX, GOSSIP_BYTES_MAX, PeerChange, Stream
from tests.libp2p_peers import TOPIC, node, stranger, until

pytestmark = pytest.mark.slow
RPC = "/openagi/rpc/1"


async def echo(stream: Stream) -> None:
    try:
        while True:
            await stream.send(await stream.receive())
    except (StreamClosed, Unreachable):
        pass


async def hang(stream: Stream) -> None:
    await trio.sleep_forever()


async def test_frames_of_every_size_come_back_whole() -> None:
    async with node() as alice, node() as bob:
        bob.serve(RPC, echo)
        stream = await alice.open_stream(await alice.dial(bob.addresses()[0]), RPC)
        for size in (0, 1, 65_502, 65_503, 65_504, 65_520, 131_072, FRAME_BYTES_MAX):
            frame = os.urandom(size)
            await stream.send(frame)
            assert await stream.receive() == frame
        with pytest.raises(LocalProtocolError):
            await stream.send(bytes(FRAME_BYTES_MAX + 1))
        await stream.send(b"still whole")
        assert await stream.receive() == b"still whole"
        await stream.close()
        with pytest.raises(StreamClosed):
            await stream.receive()
        with pytest.raises(LocalProtocolError):
            await stream.send(b"after the end")
        statistics = alice.statistics()
        assert (statistics.streams_open, statistics.frames_in, statistics.frames_out) == (0, 9, 9)
        await until(lambda: bob.statistics().streams_open == 0)
        assert alice.statistics().drops == bob.statistics().drops == {}


async def test_many_frames_in_one_read_keep_their_order() -> None:
    async with node() as alice, node() as bob:
        got: list[bytes] = []

        async def collect(stream: Stream) -> None:
            while True:
                got.append(await stream.receive())

        bob.serve(RPC, collect)
        stream = await alice.open_stream(await alice.dial(bob.addresses()[0]), RPC)
        frames = [number.to_bytes(2, "big") * 7 for number in range(500)]
        for frame in frames:
            await stream.send(frame)
        await until(lambda: len(got) == 500)
        assert got == frames


async def test_watchers_hear_of_the_first_connection_and_of_the_last() -> None:
    async with node() as alice, node() as bob:
        changes: list[PeerChange] = []
        alice.watch(changes.append)
        await bob.dial(alice.addresses()[0])
        await alice.dial(bob.addresses()[0])  # a no-op: connected
        await until(lambda: changes)
        assert alice.peers() == {bob.peer_id}
        assert (alice.remote_address(bob.peer_id) or "").startswith("/ip4/127.0.0.1/tcp/")
        assert bob.remote_address(alice.peer_id) == alice.addresses()[0].partition("/p2p/")[0]
        await alice.disconnect(bob.peer_id)
        assert alice.peers() == frozenset()
        assert alice.remote_address(bob.peer_id) is None
        assert changes == [PeerChange(peer=bob.peer_id, connected=up) for up in (True, False)]
        await until(lambda: not bob.peers())
        await alice.disconnect(bob.peer_id)  # a no-op


async def test_dials_to_one_peer_at_the_same_time_share_a_connection() -> None:
    async with node() as alice, node() as bob:
        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(alice.dial, bob.addresses()[0])
        assert len(alice._swarm.get_connections()) == 1


@pytest.mark.parametrize(
    "address",
    [
        "",
        "/ip4/127.0.0.1/tcp/1",
        "nonsense/p2p/12D3KooWA5HqCHcGVCvhuCLp1UuYNQnUwUmcz8XyChS9zzTd7uwU",
        "/ip4/127.0.0.1/udp/1/quic-v1/p2p/12D3KooWA5HqCHcGVCvhuCLp1UuYNQnUwUmcz8XyChS9zzTd7uwU",
        "/ip4/127.0.0.1/tcp/1/p2p/12D3KooWA5HqCHcGVCvhuCLp1UuYNQnUwUmcz8XyChS9zzTd7uwU",
        "/ip4/127.0.0.1/tcp/1/p2p/QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N",
        "/ip4/127.0.0.1/tcp/1/ws/p2p/12D3KooWA5HqCHcGVCvhuCLp1UuYNQnUwUmcz8XyChS9zzTd7uwU",
    ],
)
async def test_an_address_that_leads_nowhere_is_unreachable(address: str) -> None:
    async with node() as alice:
        with pytest.raises(Unreachable) as caught:
            await alice.dial(address)
        assert len(str(caught.value)) > 20


async def test_another_peer_at_the_address_is_unreachable() -> None:
    async with node() as alice, node() as bob:
        other = Identity.make().peer_id
        with pytest.raises(Unreachable, match="another peer answers"):
            await alice.dial(bob.addresses()[0].replace(bob.peer_id, other))
        assert alice.peers() == frozenset()
        assert await alice.dial(bob.addresses()[0]) == bob.peer_id


async def test_oneself_is_refused() -> None:
    async with node() as alice:
        with pytest.raises(Refused, match="itself"):
            await alice.dial(alice.addresses()[0])


async def test_streams_are_refused_and_unreachable_for_their_reasons() -> None:
    async with node() as alice, node() as bob:
        with pytest.raises(Unreachable, match="not connected"):
            await alice.open_stream(bob.peer_id, RPC)
        await alice.dial(bob.addresses()[0])
        with pytest.raises(Refused, match="does not serve"):
            await alice.open_stream(bob.peer_id, RPC)
        bob.serve(RPC, echo)
        await alice.open_stream(bob.peer_id, RPC)


async def test_a_lost_connection_is_not_a_clean_end() -> None:
    async with node() as alice, node() as bob:
        bob.serve(RPC, echo)
        stream = await alice.open_stream(await alice.dial(bob.addresses()[0]), RPC)
        await stream.send(b"x")
        await stream.receive()
        for conn in bob._swarm.get_connections():
            conn.muxed_conn.secured_conn.conn.read_writer.read_write_closer.stream.abort()
        with pytest.raises(Unreachable):
            await stream.receive()
        with pytest.raises(Unreachable):
            await stream.send(b"x")
        await until(lambda: not alice.peers() and not bob.peers())


async def test_a_reset_stream_is_not_a_clean_end() -> None:
    async with node() as alice, node() as bob:

        async def reset(stream: Stream) -> None:
            await stream.receive()
            await stream.reset()

        bob.serve(RPC, reset)
        stream = await alice.open_stream(await alice.dial(bob.addresses()[0]), RPC)
        await stream.send(b"x")
        with pytest.raises(Unreachable):
            await stream.receive()
        assert alice.peers() == {bob.peer_id}
        (conn,) = alice._swarm.get_connections()
        assert set(conn.muxed_conn.stream_events) <= set(conn.muxed_conn.streams)  # libp2p's reader leaves one behind


async def test_a_cut_or_oversize_frame_is_told_apart() -> None:
    async with node() as bob:
        ends: list[type[Exception]] = []

        async def note(stream: Stream) -> None:
            try:
                await stream.receive()
            except (StreamClosed, Unreachable, RemoteProtocolError) as exc:
                ends.append(type(exc))

        bob.serve(RPC, note)
        async with stranger(bob) as eve:
            for raw in (b"", b"\x00\x00\x00\x09half", (FRAME_BYTES_MAX + 1).to_bytes(4, "big")):
                wanted = len(ends) + 1
                stream = await eve.stream(RPC)
                if raw:
                    await stream.write(raw)
                await stream.close_write()
                await until(lambda wanted=wanted: len(ends) == wanted)
        assert ends == [StreamClosed, Unreachable, RemoteProtocolError]


async def test_a_handler_that_returns_ends_the_stream_and_leaves_nothing() -> None:
    async with node() as alice, node() as bob:

        async def once(stream: Stream) -> None:
            await stream.send(await stream.receive())

        bob.serve(RPC, once)
        peer = await alice.dial(bob.addresses()[0])
        for _ in range(20):
            stream = await alice.open_stream(peer, RPC)
            await stream.send(b"x")
            assert await stream.receive() == b"x"
            with pytest.raises(StreamClosed), trio.fail_after(10):
                await stream.receive()
            await stream.close()
        (conn,) = bob._swarm.get_connections()
        await until(lambda: len(conn.streams) == len(conn.muxed_conn.streams) == 2)  # gossip's, one each way


async def test_gossip_reaches_the_others_and_not_oneself() -> None:
    async with node() as alice, node() as bob, node() as carol:
        got: dict[str, list[tuple[PeerId, bytes]]] = {"alice": [], "bob": [], "carol": []}
        for name, each in (("alice", alice), ("bob", bob), ("carol", carol)):
            await each.subscribe(TOPIC, lambda peer, payload, name=name: not got[name].append((peer, payload)))
        await bob.dial(alice.addresses()[0])
        await carol.dial(bob.addresses()[0])
        await trio.sleep(2.5)  # two beats
        await alice.publish(TOPIC, b"hello")
        await until(lambda: got["bob"] and got["carol"])
        await trio.sleep(1)
        assert got == {"alice": [], "bob": [(alice.peer_id, b"hello")], "carol": [(alice.peer_id, b"hello")]}


async def test_gossip_is_small_and_of_known_topics() -> None:
    async with node() as alice:
        with pytest.raises(LocalProtocolError):
            await alice.publish(TOPIC, bytes(GOSSIP_BYTES_MAX + 1))
        with pytest.raises(LocalProtocolError, match=r"HostConfig\.topics"):
            await alice.subscribe("openagi/1/other/advert", lambda peer, payload: True)


async def test_a_receiver_decides_what_is_forwarded() -> None:
    async with node() as alice, node() as bob, node() as carol:
        heard: list[bytes] = []
        await alice.subscribe(TOPIC, lambda peer, payload: True)
        await bob.subscribe(TOPIC, lambda peer, payload: payload != b"bad")
        await carol.subscribe(TOPIC, lambda peer, payload: not heard.append(payload))
        await bob.dial(alice.addresses()[0])
        await carol.dial(bob.addresses()[0])
        await trio.sleep(2.5)
        await alice.publish(TOPIC, b"bad")
        await alice.publish(TOPIC, b"good")
        await until(lambda: heard)
        assert heard == [b"good"]
        used = bob._pubsub.subscribed_topics_send[TOPIC].statistics().current_buffer_used
        assert used == 0  # libp2p's queue of 32, which nobody reads


async def test_a_private_network_lets_in_who_holds_its_key() -> None:
    key, other = os.urandom(32), os.urandom(32)
    async with node(psk=key) as alice, node(psk=key) as bob, node(psk=other, upgrade_s=2.0, dial_s=3.0) as eve:
        bob.serve(RPC, echo)
        stream = await alice.open_stream(await alice.dial(bob.addresses()[0]), RPC)
        await stream.send(b"secret")
        assert await stream.receive() == b"secret"
        assert bob.remote_address(alice.peer_id)
        with pytest.raises(Unreachable):
            await eve.dial(bob.addresses()[0])


async def test_plaintext_is_not_spoken() -> None:
    async with node() as alice:
        with pytest.raises(ExceptionGroup) as caught:
            async with stranger(alice, plaintext=True):
                pass
        assert "unable to connect" in "".join(traceback.format_exception(caught.value))
        assert alice.peers() == frozenset()


async def test_a_wildcard_is_listened_on_and_never_told() -> None:
    async with node(listen=("/ip4/0.0.0.0/tcp/0",), announce=("/ip4/203.0.113.7/tcp/4001",)) as alice, node() as bob:
        told = alice.addresses()
        assert told[0] == f"/ip4/203.0.113.7/tcp/4001/p2p/{alice.peer_id}"
        assert len(told) >= 2
        assert not any("0.0.0.0" in each for each in told)
        await bob.dial(told[-1])


async def test_by_default_real_interfaces_and_loopback_are_listened_on() -> None:
    async with node(listen=()) as alice, node() as bob:
        (loopback,) = (each for each in alice.addresses() if each.startswith("/ip4/127.0.0.1/tcp/"))
        await bob.dial(loopback)


async def test_a_taken_port_is_said() -> None:
    async with node() as alice:
        port = alice.addresses()[0].split("/")[4]
        with pytest.raises(CannotListen, match=f"tcp/{port}: the port is taken"):
            async with node(listen=(f"/ip4/127.0.0.1/tcp/{port}",)):
                pass
    async with node(listen=(f"/ip4/127.0.0.1/tcp/{port}",)):
        pass  # free again, at once


async def test_a_foreign_address_is_said() -> None:
    with pytest.raises(CannotListen, match=r"192\.0\.2\.1"):
        async with node(listen=("/ip4/192.0.2.1/tcp/0",)):
            pass


async def test_the_blocks_own_exception_comes_out_as_it_is() -> None:
    with pytest.raises(KeyError, match="mine"):  # noqa: PT012
        async with node() as alice, node() as bob:
            await alice.dial(bob.addresses()[0])
            raise KeyError("mine")


async def test_leaving_the_block_is_prompt_in_the_middle_of_everything() -> None:
    with trio.fail_after(15):
        async with node() as alice, node() as bob:
            bob.serve(RPC, hang)
            stream = await alice.open_stream(await alice.dial(bob.addresses()[0]), RPC)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(stream.receive)
                for _ in range(3):
                    nursery.start_soon((await alice.open_stream(bob.peer_id, RPC)).send, bytes(FRAME_BYTES_MAX))
                await trio.sleep(0.1)
                nursery.cancel_scope.cancel()


@pytest.mark.parametrize("changes", [{"psk": b"short"}, {"port": 70_000}, {"pending_max": 0}, {"dial_s": 0.0}])
def test_a_wrong_configuration_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="came, wanted"):
        HostConfig(**changes)  # type: ignore[arg-type]
