"""Direct channels: keys, sealed frames, the agreement over real hosts, and strangers at the port."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import trio
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from crypto.identity import PeerId
from p2p.direct import DIRECT_PROTOCOL, Direct, DirectConfig, _ip_of
from p2p.direct_frames import (
    FRAMES_MAX,
    HEAD_BYTES,
    KEEP_BYTES,
    KIND_END,
    TAG_BYTES,
    TOKEN_BYTES,
    Agreement,
    ChannelKeys,
    Opener,
    Sealer,
)
from p2p.direct_stream import DirectStream
from p2p.errors import LocalProtocolError, Refused, RemoteProtocolError, StreamClosed, Unreachable
from p2p.host import Libp2pTransport
from p2p.transport import FRAME_BYTES_MAX, Stream
from tests.libp2p_peers import node, stranger, until

slow = pytest.mark.slow
BULK = "/openagi/bulk/1"
KEY = bytes(range(32))


# ---- keys ----


def agreement(**changes: Any) -> tuple[Agreement, X25519PrivateKey, X25519PrivateKey]:
    ours = X25519PrivateKey.from_private_bytes(bytes([1]) * 32)
    theirs = X25519PrivateKey.from_private_bytes(bytes([2]) * 32)
    parts: dict[str, Any] = {
        "opener": PeerId("alice"),
        "server": PeerId("bob"),
        "protocol": BULK,
        "opener_key": ours.public_key().public_bytes_raw(),
        "server_key": theirs.public_key().public_bytes_raw(),
        **changes,
    }
    return Agreement(**parts), ours, theirs


def three(keys: ChannelKeys) -> set[bytes]:
    return {keys.opener, keys.server, keys.token}


def test_both_ends_derive_the_same_three_keys_and_no_two_are_alike() -> None:
    both, ours, theirs = agreement()
    keys = both.keys(ours, both.server_key)
    assert keys == both.keys(theirs, both.opener_key)
    assert len(three(keys)) == 3
    assert {len(key) for key in three(keys)} == {32}
    assert keys.opener.hex() not in repr(keys)
    assert repr(keys) == "ChannelKeys()"


@pytest.mark.parametrize(
    "change",
    [
        {"opener": PeerId("eve")},
        {"server": PeerId("eve")},
        {"opener": PeerId("bob"), "server": PeerId("alice")},
        {"opener": PeerId("alic"), "server": PeerId("ebob")},
        {"protocol": "/openagi/bulk/2"},
        {"opener_key": bytes(32)},
        {"server_key": bytes(32)},
    ],
)
def test_everything_that_was_agreed_goes_into_the_keys(change: dict[str, Any]) -> None:
    plain, ours, _ = agreement()
    other, _, _ = agreement(**change)
    assert not three(plain.keys(ours, plain.server_key)) & three(other.keys(ours, plain.server_key))


def test_a_key_that_agrees_with_every_other_is_refused() -> None:
    both, ours, _ = agreement()
    with pytest.raises(RemoteProtocolError):
        both.keys(ours, bytes(32))


# docs/PROTOCOLS.md: X25519 seeds 01.. and 02.., opener `alice`, server `bob`; what the opener sends first
GOLDEN_OPENER = "b599362c16023051f907d4b58aee61097315752ae626a1ec489726e960703338"
GOLDEN_TOKEN = "ae7c6f925b495f194537cb7e9e8140149b13b794882efe019a1873af06fffe64"
GOLDEN_FRAMES = [
    (b"", 0, "0000000004ecfa2a0d8671c275bf3739ef80b7e2"),
    (b"hello", 0, "000000059d6cb5bb1931617a6c7a1020df5e89e1415a5b5473"),
    (b"", KIND_END, "0100000060d8a67e661126ed3e51cb7e784b7a88"),
]


def test_golden_bytes() -> None:
    both, ours, _ = agreement()
    keys = both.keys(ours, both.server_key)
    assert (keys.opener.hex(), keys.token.hex()) == (GOLDEN_OPENER, GOLDEN_TOKEN)
    sealer = Sealer(keys.opener)
    assert [bytes(sealer.seal(content, kind)).hex() for content, kind, _ in GOLDEN_FRAMES] == [
        wire for _, _, wire in GOLDEN_FRAMES
    ]


# ---- frames ----


def wire_of(sealer: Sealer, content: bytes, kind: int = 0) -> bytes:
    return bytes(sealer.seal(content, kind))


def opened(opener: Opener, wire: bytes) -> bytes:
    head = wire[:HEAD_BYTES]
    return opener.open(head, wire[HEAD_BYTES : HEAD_BYTES + opener.body_bytes(head)])


@pytest.mark.parametrize("into", [True, False])
def test_frames_of_every_size_go_through(into: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not into:
        monkeypatch.setattr("p2p.direct_frames.KEEP_BYTES", FRAME_BYTES_MAX + 1)
    sealer, opener = Sealer(KEY), Opener(KEY)
    for size in (0, 1, KEEP_BYTES - 1, KEEP_BYTES, KEEP_BYTES + 1, FRAME_BYTES_MAX, 3):
        content = bytes([size % 251]) * size
        wire = wire_of(sealer, content)
        assert len(wire) == HEAD_BYTES + size + TAG_BYTES
        assert opened(opener, wire) == content
    with pytest.raises(LocalProtocolError):
        sealer.seal(bytes(FRAME_BYTES_MAX + 1))


def test_no_nonce_comes_twice() -> None:
    sealer = Sealer(KEY)
    sizes = [5, KEEP_BYTES, 5, KEEP_BYTES]
    wires = [wire_of(sealer, bytes(size)) for size in sizes]
    assert len({wire[HEAD_BYTES : HEAD_BYTES + 5] for wire in wires}) == 4
    with pytest.raises(LocalProtocolError):
        sealer.seal(bytes(FRAME_BYTES_MAX + 1))
    assert wire_of(sealer, bytes(5))[HEAD_BYTES : HEAD_BYTES + 5] not in {wire[4:9] for wire in wires}
    sealer._count = FRAMES_MAX
    with pytest.raises(LocalProtocolError, match="another channel"):
        sealer.seal(b"")


Break = st.sampled_from(["repeat", "drop", "swap", "flip", "reflect", "shorten", "end"])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.binary(max_size=40), min_size=2, max_size=5), Break, st.integers(0, 10_000))
@pytest.mark.slow
def test_what_is_not_as_it_was_sealed_ends_the_channel(contents: list[bytes], how: str, where: int) -> None:
    sealer, opener = Sealer(KEY), Opener(KEY)
    wires = [wire_of(sealer, content) for content in contents]
    sealed = tuple(wires)
    at = where % (len(wires) - 1)
    frame = bytearray(wires[at])
    match how:
        case "repeat":
            wires.insert(at + 1, wires[at])
        case "drop":
            del wires[at]
        case "swap":
            wires[at], wires[at + 1] = wires[at + 1], wires[at]
        case "flip":
            frame[HEAD_BYTES + where % (len(frame) - HEAD_BYTES)] ^= 1 << where % 8
            wires[at] = bytes(frame)
        case "reflect":
            wires[at] = wire_of(Sealer(bytes(32)), contents[at])
        case "shorten":  # the head says less than was sealed
            size = int.from_bytes(frame[1:HEAD_BYTES], "big") - 1
            wires[at] = bytes([0]) + max(size, 0).to_bytes(3, "big") + bytes(frame[HEAD_BYTES : len(frame) - 1])
            if size < 0:
                wires[at] = bytes([0]) + (1).to_bytes(3, "big") + bytes(frame[HEAD_BYTES:]) + b"x"
        case _:
            wires[at] = bytes([KIND_END]) + bytes(frame[1:])
    got = []
    with pytest.raises(RemoteProtocolError):  # noqa: PT012
        for wire in wires:
            got.append(opened(opener, wire))
    assert got == contents[: len(got)]
    assert not opener.ended
    for wire in sealed[at + 1 :]:  # what would open if the failure were forgotten
        with pytest.raises(RemoteProtocolError):
            opened(opener, wire)


def test_nothing_comes_after_an_end() -> None:
    sealer, opener = Sealer(KEY), Opener(KEY)
    assert opened(opener, wire_of(sealer, b"", KIND_END)) == b""
    assert opener.ended
    with pytest.raises(LocalProtocolError, match="after close"):
        sealer.seal(b"more")
    with pytest.raises(RemoteProtocolError, match="after the end"):
        opener.body_bytes(bytes(HEAD_BYTES))


@pytest.mark.parametrize("head", [(FRAME_BYTES_MAX + 1).to_bytes(4, "big"), b"\x02\x00\x00\x00", b"\xff\xff\xff\xff"])
def test_a_head_is_bounded_before_its_body_is_read(head: bytes) -> None:
    with pytest.raises(RemoteProtocolError, match="announced"):
        Opener(KEY).body_bytes(head)


# ---- over real hosts ----


@dataclass
class Pair:
    """Alice opens, Bob serves."""

    alice: Libp2pTransport
    bob: Libp2pTransport
    opener: Direct
    server: Direct

    @property
    def peer(self) -> PeerId:
        return self.bob.peer_id


@asynccontextmanager
async def pair(listening: bool = True, **changes: Any) -> AsyncIterator[Pair]:
    config = DirectConfig(**changes)
    async with node() as alice, node() as bob, trio.open_nursery() as nursery:
        server = Direct(bob, config)
        if listening:
            await nursery.start(server.run)
        await alice.dial(bob.addresses()[0])
        await until(bob.peers)
        yield Pair(alice, bob, Direct(alice, config), server)
        nursery.cancel_scope.cancel()


async def echo(stream: Stream) -> None:
    try:
        while True:
            await stream.send(await stream.receive())
    except (StreamClosed, Unreachable):
        pass


async def hold(stream: Stream) -> None:
    try:
        while True:
            await stream.receive()
    except (StreamClosed, Unreachable):
        pass


async def port_socket(both: Pair) -> trio.SocketStream:
    return await trio.open_tcp_stream("127.0.0.1", both.server._port)


async def read_to_end(socket: trio.SocketStream) -> bytes:
    got = b""
    with trio.fail_after(30):
        try:
            while piece := await socket.receive_some():
                got += piece
        except trio.BrokenResourceError:
            pass  # closed with our bytes unread: the system says reset
    return got


@slow
async def test_frames_go_over_the_direct_channel_both_ways() -> None:
    seen: list[Stream] = []

    async def serve(stream: Stream) -> None:
        seen.append(stream)
        await echo(stream)

    async with pair() as both:
        both.server.serve(BULK, serve)
        stream = await both.opener.open_stream(both.peer, BULK)
        assert isinstance(stream, DirectStream)
        await until(lambda: seen)
        assert isinstance(seen[0], DirectStream)
        assert (stream.peer, seen[0].peer) == (both.bob.peer_id, both.alice.peer_id)
        before = both.alice.statistics().bytes_out
        for content in (b"", b"x", bytes(FRAME_BYTES_MAX), b"y" * 70_000, b""):
            await stream.send(content)
            assert await stream.receive() == content
        assert both.alice.statistics().bytes_out == before
        await stream.close()
        with pytest.raises(StreamClosed):
            await stream.receive()
        with pytest.raises(LocalProtocolError):
            await stream.send(b"x")
        await until(lambda: not both.server._serving and not both.server._scopes)
        assert both.server.counts == {"served": 1}
        assert both.opener.counts == {"opened": 1}


@slow
async def test_what_was_sent_before_the_end_arrives() -> None:
    got: list[int] = []

    async def serve(stream: Stream) -> None:
        await trio.sleep(0.3)
        try:
            while True:
                got.append(len(await stream.receive()))
        except StreamClosed:
            got.append(-1)

    async with pair() as both:
        both.server.serve(BULK, serve)
        stream = await both.opener.open_stream(both.peer, BULK)
        for _ in range(3):
            await stream.send(bytes(300_000))
        await stream.close()
        await until(lambda: -1 in got)
        assert got == [300_000] * 3 + [-1]


@slow
async def test_without_a_port_the_frames_go_over_libp2p() -> None:
    async with pair(listening=False) as both:
        both.server.serve(BULK, echo)
        stream = await both.opener.open_stream(both.peer, BULK)
        assert not isinstance(stream, DirectStream)
        await stream.send(b"hello")
        assert await stream.receive() == b"hello"
        assert both.opener.counts == {"fell_back": 1}


@slow
async def test_a_port_that_does_not_answer_costs_a_bounded_wait_once() -> None:
    async with pair(connect_s=0.3, listening=False) as both, await closed_mouth() as port:
        both.server._port = port
        both.server.serve(BULK, echo)
        with trio.fail_after(30):
            for _ in range(3):
                stream = await both.opener.open_stream(both.peer, BULK)
                await stream.send(b"hello")
                assert await stream.receive() == b"hello"
        assert both.opener.counts["fell_back"] == 1
        await until(lambda: not both.server._offers)


async def closed_mouth() -> Any:
    """A port that accepts and says nothing."""
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")

    @asynccontextmanager
    async def opened_port() -> AsyncIterator[int]:
        async with listener:
            yield listener.socket.getsockname()[1]

    return opened_port()


class SeenAt:
    """A transport whose peers are connected at another address than they really are."""

    def __init__(self, below: Libp2pTransport, address: str | None) -> None:
        self.below, self.address = below, address

    def __getattr__(self, name: str) -> Any:
        return getattr(self.below, name)

    def remote_address(self, peer: PeerId) -> str | None:
        return self.address


@slow
@pytest.mark.parametrize("address", [None, "/ip4/127.0.0.2/tcp/1", "/ip4/127.0.0.1/tcp/1/p2p/12D3Koo/p2p-circuit", ""])
async def test_only_the_address_of_the_connection_is_dialled(address: str | None) -> None:
    async with pair() as both:
        both.server.serve(BULK, echo)
        transport: Any = SeenAt(both.alice, address)
        stream = await Direct(transport, DirectConfig()).open_stream(both.peer, BULK)
        assert not isinstance(stream, DirectStream)
        await stream.send(b"hello")
        assert await stream.receive() == b"hello"
        assert not both.server._scopes
        assert "token_missing" not in both.server.counts


@slow
async def test_a_peer_behind_a_relay_is_not_asked_for_a_port() -> None:
    async with pair() as both:
        both.server.serve(BULK, echo)
        relayed: Any = SeenAt(both.alice, "/ip4/127.0.0.1/tcp/1/p2p/12D3KooWRelay/p2p-circuit")
        direct = Direct(relayed, DirectConfig())
        stream = await direct.open_stream(both.peer, BULK)
        assert not isinstance(stream, DirectStream)
        await stream.send(b"hello")
        assert await stream.receive() == b"hello"
        assert not direct.counts
        assert not both.server.counts


@pytest.mark.parametrize(
    ("address", "ip"),
    [
        ("/ip4/192.0.2.1/tcp/1", "192.0.2.1"),
        ("/ip6/::1/tcp/1", "::1"),
        ("/ip4/192.0.2.1/tcp/1/p2p/12D3KooWRelay/p2p-circuit", None),
        ("/ip4/192.0.2.1/tcp/1/p2p/12D3KooWRelay/p2p-circuit/p2p/12D3KooWPeer", None),
        ("/dns4/relay.example/tcp/1", None),
        ("", None),
        (None, None),
    ],
)
def test_the_address_of_a_peer_is_not_its_relays(address: str | None, ip: str | None) -> None:
    assert _ip_of(address) == ip


@slow
async def test_a_peer_without_direct_channels_gets_an_ordinary_stream() -> None:
    async with node() as alice, node() as bob:
        bob.serve(BULK, echo)
        await alice.dial(bob.addresses()[0])
        stream = await Direct(alice, DirectConfig()).open_stream(bob.peer_id, BULK)
        await stream.send(b"hello")
        assert await stream.receive() == b"hello"


@slow
async def test_a_protocol_that_is_not_served_is_refused() -> None:
    async with pair() as both:
        with pytest.raises(Refused, match="does not serve"):
            await both.opener.open_stream(both.peer, "/no/1")
        assert not both.server._offers
        assert not both.server._serving


@slow
async def test_a_handler_that_raises_ends_its_channel_only() -> None:
    async def fail(stream: Stream) -> None:
        await stream.receive()
        raise ValueError("a bug")

    async with pair() as both:
        both.server.serve(BULK, fail)
        for _ in range(2):
            stream = await both.opener.open_stream(both.peer, BULK)
            assert isinstance(stream, DirectStream)
            await stream.send(b"x")
            with pytest.raises(Unreachable):
                await stream.receive()
        await until(lambda: both.bob.statistics().drops.get("handler_failed") == 2)
        assert not both.server._serving


@slow
async def test_a_channel_ends_with_the_peers_connection() -> None:
    async with pair() as both:
        both.server.serve(BULK, hold)
        stream = await both.opener.open_stream(both.peer, BULK)
        assert isinstance(stream, DirectStream)
        await both.bob.disconnect(both.alice.peer_id)
        with trio.fail_after(30), pytest.raises(Unreachable):
            await stream.receive()
        with pytest.raises(Unreachable):
            await stream.send(b"x")
        await until(lambda: not both.server._scopes)


@slow
async def test_a_cut_connection_is_not_an_end() -> None:
    ends: list[Exception] = []

    async def serve(stream: Stream) -> None:
        try:
            while True:
                await stream.receive()
        except (StreamClosed, Unreachable) as exc:
            ends.append(exc)

    async with pair() as both:
        both.server.serve(BULK, serve)
        stream = await both.opener.open_stream(both.peer, BULK)
        assert isinstance(stream, DirectStream)
        await stream.send(b"whole")
        await trio.sleep(0.2)
        await stream.reset()
        await until(lambda: ends)
        assert isinstance(ends[0], Unreachable)


@slow
async def test_a_send_that_was_cut_resets_the_channel() -> None:
    async def sit(stream: Stream) -> None:
        await trio.sleep_forever()

    async with pair() as both:
        both.server.serve(BULK, sit)
        stream = await both.opener.open_stream(both.peer, BULK)
        with trio.move_on_after(0.5) as scope:
            for _ in range(200):  # far more than the system's buffers hold
                await stream.send(bytes(FRAME_BYTES_MAX))
        assert scope.cancelled_caught
        with pytest.raises(Unreachable):
            await stream.send(b"x")


@slow
async def test_a_peer_has_a_share_of_channels_and_the_rest_falls_back() -> None:
    async with pair(channels_per_peer_max=2) as both:
        both.server.serve(BULK, echo)
        streams = [await both.opener.open_stream(both.peer, BULK) for _ in range(3)]
        assert [isinstance(stream, DirectStream) for stream in streams] == [True, True, False]
        assert both.server.counts["channels_full"] == 1
        for stream in streams:
            await stream.send(b"x")
            assert await stream.receive() == b"x"
            await stream.close()
        await until(lambda: not both.server._serving)


# ---- strangers at the port ----


@slow
async def test_a_token_is_taken_once() -> None:
    async with pair() as both:
        both.server.serve(BULK, hold)
        control = await both.alice.open_stream(both.peer, DIRECT_PROTOCOL)
        keys, _ = await both.opener._ask(control, BULK)
        async with await port_socket(both) as first, await port_socket(both) as second:
            await first.send_all(keys.token)
            proof = await first.receive_some(100)
            assert len(proof) == HEAD_BYTES + TAG_BYTES
            await second.send_all(keys.token)
            assert await read_to_end(second) == b""
        assert both.server.counts["token_unknown"] == 1
        await control.reset()
        await until(lambda: not both.server._serving)


@slow
async def test_an_offer_that_was_not_chosen_cannot_be_claimed_later() -> None:
    async with pair() as both:
        both.server.serve(BULK, hold)
        control = await both.alice.open_stream(both.peer, DIRECT_PROTOCOL)
        keys, _ = await both.opener._ask(control, BULK)
        await control.reset()
        await until(lambda: not both.server._serving)
        async with await port_socket(both) as socket:
            await socket.send_all(keys.token)
            assert await read_to_end(socket) == b""
        assert both.server.counts == {"token_unknown": 1}


@slow
async def test_wrong_tokens_are_told_nothing_and_hurt_nobody() -> None:
    async with pair() as both:
        both.server.serve(BULK, echo)
        for token in (bytes(TOKEN_BYTES), b"GET / HTTP/1.1\r\nHost: x\r\n\r\n........", b"x" * 100_000):
            async with await port_socket(both) as socket:
                with contextlib.suppress(trio.BrokenResourceError):  # closed before it had taken all of ours
                    await socket.send_all(token)
                assert await read_to_end(socket) == b""
        assert both.server.counts == {"token_unknown": 3}
        stream = await both.opener.open_stream(both.peer, BULK)
        assert isinstance(stream, DirectStream)


@slow
async def test_silent_strangers_are_few_and_do_not_stay() -> None:
    async with pair(claim_s=0.5, pending_loopback_max=4) as both, trio.open_nursery() as nursery:
        closed = 0

        async def sit() -> None:
            nonlocal closed
            async with await port_socket(both) as socket:
                assert await read_to_end(socket) == b""
                closed += 1

        for _ in range(10):
            nursery.start_soon(sit)
        await until(lambda: closed == 10, 30)
        assert both.server.counts["pending_per_ip"] >= 1
        assert both.server.counts.total() == 10
        assert both.server._admission.pending == 0


@slow
async def test_silent_strangers_do_not_keep_an_honest_peer_out() -> None:
    async with pair(claim_s=60.0, pending_max=3) as both, trio.open_nursery() as nursery:
        both.server.serve(BULK, echo)
        closed = 0

        async def sit() -> None:
            nonlocal closed
            async with await port_socket(both) as socket:
                await read_to_end(socket)
                closed += 1

        for _ in range(8):
            nursery.start_soon(sit)
        await until(lambda: both.server.counts["pending_yielded"] == closed == 5)
        assert isinstance(await both.opener.open_stream(both.peer, BULK), DirectStream)
        nursery.cancel_scope.cancel()


@slow
@pytest.mark.parametrize("words", [b"", b"\x00\x00\x00\x01x", b"\xff" * 8, b"\x00\x00\x00\x02\x81\xa1"])
async def test_an_agreement_that_does_not_decode_ends_its_stream_only(words: bytes) -> None:
    async with pair() as both, stranger(both.bob) as eve:
        stream = await eve.stream(DIRECT_PROTOCOL)
        await stream.write(words)
        await stream.close_write()
        await until(lambda: both.bob.statistics().drops.get("handler_failed"))
        assert await eve.alive()


@slow
async def test_a_channel_that_was_not_claimed_cannot_be_chosen() -> None:
    from crypto.canonical import encode_struct
    from p2p.direct_frames import Choice

    async with pair() as both:
        both.server.serve(BULK, hold)
        control = await both.alice.open_stream(both.peer, DIRECT_PROTOCOL)
        await both.opener._ask(control, BULK)
        await control.send(encode_struct(Choice(direct=True)))
        with trio.fail_after(30), pytest.raises(Unreachable):
            await control.receive()
        assert not both.server._serving
