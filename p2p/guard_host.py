"""libp2p's host as we make it: Noise, yamux and TCP only, on real addresses, and nothing that acts by itself.

Rules: a wanted address that cannot be bound is an error with a clear sentence. Never 0.0.0.0 to others.

Source: NETWORK.md "Our rules" 2, section 1 (address pitfalls).
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from functools import partial
from typing import Any

import psutil
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.crypto.x25519 import create_new_key_pair as create_new_noise_pair
from libp2p.custom_types import TProtocol
from libp2p.host.basic_host import BasicHost
from libp2p.host.ping import ID as PING_ID
from libp2p.host.ping import PingService
from libp2p.network.config import ConnectionConfig, RetryConfig
from libp2p.peer.id import ID
from libp2p.security.noise.transport import PROTOCOL_ID as NOISE_ID
from libp2p.security.noise.transport import Transport as NoiseTransport
from libp2p.stream_muxer.yamux.yamux import PROTOCOL_ID as YAMUX_ID
from libp2p.stream_muxer.yamux.yamux import Yamux
from multiaddr import Multiaddr

from crypto.identity import Identity
from p2p.errors import CannotListen
from p2p.guard import Drops, guarded_stream_handler
from p2p.guard_mux import GuardedUpgrader
from p2p.guard_socket import GuardedTcp
from p2p.guard_store import GuardedPeerStore
from p2p.guard_swarm import GuardedSwarm
from p2p.host_config import HostConfig
from p2p.interfaces import InterfaceAddress, is_wildcard, multiaddr_text, usable


class GuardedPing(PingService):  # type: ignore[misc]  # libp2p's types are not followed
    """Answers pings.

    Around: libp2p remembers every peer that ever pinged.
    """

    async def handle_ping(self, stream: Any) -> None:
        """Until a stream ends; of a peer without any nothing is kept."""
        try:
            await super().handle_ping(stream)
        finally:
            peer_id = stream.muxed_conn.peer_id
            if not self._inbound_streams.get(peer_id):
                self._inbound_streams.pop(peer_id, None)


def make_host(identity: Identity, config: HostConfig, tcp: GuardedTcp, drops: Drops) -> BasicHost:
    """libp2p's host with Noise, yamux and TCP only, and everything that acts by itself turned off."""
    key_pair = create_new_key_pair(identity.seed)
    peer_id = ID.from_pubkey(key_pair.public_key)
    peerstore = GuardedPeerStore(peer_id, drops)
    peerstore.add_key_pair(peer_id, key_pair)
    swarm = GuardedSwarm(
        peer_id,
        peerstore,
        GuardedUpgrader(
            {NOISE_ID: NoiseTransport(key_pair, noise_privkey=create_new_noise_pair().private_key)},
            {TProtocol(YAMUX_ID): Yamux},
            negotiate_timeout=max(1, round(config.negotiate_s)),
            drops=drops,
        ),
        transports=[tcp],
        retry_config=RetryConfig(max_retries=0),
        connection_config=ConnectionConfig(
            max_connections=config.connections_max,
            high_watermark=config.connections_max,
            low_watermark=0,
            min_connections=0,
            inbound_upgrade_timeout=config.upgrade_s,
            outbound_upgrade_timeout=config.upgrade_s,
            inbound_stream_protocol_negotiation_timeout=max(1.0, config.negotiate_s),
            outbound_stream_protocol_negotiation_timeout=max(1.0, config.negotiate_s),
        ),
        psk=None if config.psk is None else config.psk.hex(),
        config=config,
        drops=drops,
    )
    host = BasicHost(
        network=swarm,
        negotiate_timeout=max(1, round(config.negotiate_s)),
        addrs_factory=partial(_advertised, config.announce),
        disable_identify_address_discovery=True,
    )
    host.set_stream_handler(PING_ID, GuardedPing(host).handle_ping)
    inner = host._swarm_stream_handler
    swarm.set_stream_handler(guarded_stream_handler(inner, drops, config.streams_per_peer_max))
    return host


def _real_addresses() -> tuple[str, ...]:
    up = {name: state.isup for name, state in psutil.net_if_stats().items()}
    return usable(
        InterfaceAddress(name=name, address=each.address, up=up.get(name, True))
        for name, addresses in psutil.net_if_addrs().items()
        for each in addresses
    )


def automatic_addresses(port: int) -> list[str]:
    return [multiaddr_text(ip, port) for ip in _real_addresses()] or [multiaddr_text("127.0.0.1", port)]


def _advertised(announce: Sequence[str], bound: Sequence[Multiaddr]) -> list[Multiaddr]:
    """What others are told: what the operator announces, then what is bound; a wildcard becomes real addresses."""
    told = list(announce)
    for address in map(str, bound):
        if is_wildcard(address):
            port = int(address.rpartition("/")[2])
            same = (ip for ip in _real_addresses() if (":" in ip) == address.startswith("/ip6/"))
            told += [multiaddr_text(ip, port) for ip in same]
        else:
            told.append(address)
    return [Multiaddr(each) for each in dict.fromkeys(told)]


def check_listening(errors: dict[str, OSError]) -> None:
    """Raises CannotListen when any wanted address could not be bound."""
    for address, exc in errors.items():
        if exc.errno == errno.EADDRINUSE:
            raise CannotListen(
                f"cannot listen on {address}: the port is taken by another program; choose another port, or 0 for a"
                " free one"
            ) from exc
        raise CannotListen(f"cannot listen on {address}: {exc.strerror or exc}") from exc
