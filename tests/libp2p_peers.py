"""Peers for tests of the real host: ours on loopback, a stranger that writes what it likes, and a bare connection."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import trio
from libp2p import new_host
from libp2p.abc import IHost
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.crypto.keys import KeyPair
from libp2p.crypto.x25519 import create_new_key_pair as create_new_noise_pair
from libp2p.custom_types import StreamHandlerFn, TProtocol
from libp2p.io.trio import TrioTCPStream
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.peer.id import ID
from libp2p.peer.peerinfo import info_from_p2p_addr
from libp2p.security.noise.transport import PROTOCOL_ID as NOISE_ID
from libp2p.security.noise.transport import Transport as NoiseTransport
from libp2p.stream_muxer.yamux.yamux import PROTOCOL_ID as YAMUX_ID
from libp2p.stream_muxer.yamux.yamux import Yamux
from libp2p.transport.upgrader import TransportUpgrader
from multiaddr import Multiaddr

from crypto.identity import Identity
from p2p.host import Libp2pTransport, open_host
from p2p.host_config import HostConfig

TOPIC = "openagi/1/test/advert"
LOOPBACK = ("/ip4/127.0.0.1/tcp/0",)


@asynccontextmanager
async def node(identity: Identity | None = None, **changes: Any) -> AsyncIterator[Libp2pTransport]:
    """One of our hosts, on loopback unless told otherwise."""
    settings: dict[str, Any] = {"listen": LOOPBACK, "topics": frozenset({TOPIC}), **changes}
    async with open_host(identity or Identity.make(), HostConfig(**settings)) as transport:
        yield transport


@dataclass
class Stranger:
    """libp2p as it comes, connected to one of our nodes."""

    host: IHost
    peer: ID

    async def stream(self, protocol: str) -> Any:
        return await self.host.new_stream(self.peer, [TProtocol(protocol)])

    async def alive(self) -> bool:
        """Whether the node still answers: a ping stream echoes 32 bytes."""
        with trio.move_on_after(5):
            stream = await self.stream("/ipfs/ping/1.0.0")
            await stream.write(bytes(range(32)))
            echo = await stream.read(32)
            await stream.reset()
            return bool(echo == bytes(range(32)))
        return False


@asynccontextmanager
async def stranger(
    target: Libp2pTransport,
    *,
    plaintext: bool = False,
    key_pair: KeyPair | None = None,
    handlers: Mapping[str, StreamHandlerFn] | None = None,
) -> AsyncIterator[Stranger]:
    """A stranger connected to `target`, who answers by `handlers`."""
    key_pair = key_pair or create_new_key_pair()
    security: Any = None
    if plaintext:
        from libp2p.security.insecure.transport import PLAINTEXT_PROTOCOL_ID, InsecureTransport

        security = {TProtocol(PLAINTEXT_PROTOCOL_ID): InsecureTransport(key_pair)}
    host = _host(key_pair, handlers or {}, security)
    async with host.run([]):
        await host.connect(info_from_p2p_addr(Multiaddr(target.addresses()[0])))
        yield Stranger(host, ID.from_base58(target.peer_id))
        await host.disconnect(ID.from_base58(target.peer_id))


@asynccontextmanager
async def over_a_circuit(
    stream: Any, peer: ID, key_pair: KeyPair, handlers: Mapping[str, StreamHandlerFn]
) -> AsyncIterator[Stranger]:
    """A stranger connected to a peer over a stream that a relay has to it; the relay has taken the circuit already."""
    host = _host(key_pair, handlers)
    async with host.run([]):
        await host.get_network().upgrade_outbound_raw_conn(RawConnection(stream, True), peer)
        yield Stranger(host, peer)
        await host.disconnect(peer)


def _host(key_pair: KeyPair, handlers: Mapping[str, StreamHandlerFn], security: Any = None) -> IHost:
    """libp2p as it comes, with Noise unless told otherwise."""
    security = security or {NOISE_ID: NoiseTransport(key_pair, noise_privkey=create_new_noise_pair().private_key)}
    host = new_host(key_pair=key_pair, sec_opt=security, muxer_preference="YAMUX")
    for protocol, handler in handlers.items():
        host.set_stream_handler(TProtocol(protocol), handler)
    return host


@asynccontextmanager
async def bare_connection(target: Libp2pTransport) -> AsyncIterator[Yamux]:
    """A connection after its handshake, with nobody behind it: it reads nothing and answers nothing."""
    key_pair = create_new_key_pair()
    upgrader = TransportUpgrader(
        {NOISE_ID: NoiseTransport(key_pair, noise_privkey=create_new_noise_pair().private_key)},
        {TProtocol(YAMUX_ID): Yamux},
    )
    peer = ID.from_base58(target.peer_id)
    async with await raw_socket(target) as stream:
        secured = await upgrader.upgrade_security(RawConnection(TrioTCPStream(stream), True), True, peer)
        muxed = await upgrader.upgrade_connection(secured, peer)
        assert isinstance(muxed, Yamux)
        yield muxed


async def raw_socket(target: Libp2pTransport) -> trio.SocketStream:
    """A TCP connection to a node, before any handshake."""
    _, _, host, _, port, *_ = target.addresses()[0].split("/")
    return await trio.open_tcp_stream(host, int(port))


async def until(condition: Any, seconds: float = 10.0) -> None:
    """Wait until `condition()` is true; fails after a generous time."""
    with trio.fail_after(seconds):
        while not condition():  # noqa: ASYNC110
            await trio.sleep(0.01)
