"""What the operator decides about the libp2p host.

Rules: pure; imports no libp2p, so that configuration can be read before the slow import. Checked when made.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from p2p.relay import RelayLimits

PSK_BYTES = 32  # a private network's pre-shared key
PORT_MAX = 65_535


@dataclass(frozen=True, slots=True, kw_only=True)
class HostConfig:
    """Bounds and addresses of one host. Times are seconds."""

    listen: tuple[str, ...] = ()  # multiaddrs; empty: every real interface and loopback, at `port`
    port: int = 0  # of the automatic listen addresses; 0: the system chooses
    announce: tuple[str, ...] = ()  # more addresses to tell others, such as a router's forwarded port
    psk: bytes | None = None  # set: only nodes that hold the same 32 bytes can connect
    topics: frozenset[str] = frozenset()  # gossip topics that peers may subscribe to through us
    relay: RelayLimits | None = field(default_factory=RelayLimits)  # what is carried for others; None: nothing
    connections_max: int = 256  # live connections, both directions
    inbound_max: int = 192  # of these; the rest is for our own dials, which no stranger can take
    places_kept: int = 32  # of the inbound ones, for peers that we know
    pending_max: int = 64  # inbound connections before their handshake is done; the oldest yields
    pending_per_ip_max: int = 4
    pending_loopback_max: int = 64  # loopback is shared by every process of this machine
    connections_per_ip_max: int = 32  # live inbound; several nodes may share one router
    pending_per_subnet_max: int = 16  # of one public /24 or IPv6 /56
    connections_per_subnet_max: int = 64
    accepts_per_subnet_s: float = 20.0
    accepts_per_subnet_burst: int = 64
    accepts_per_ip_s: float = 5.0  # refill of new inbound connections per address
    accepts_per_ip_burst: int = 32
    streams_per_peer_max: int = 128  # inbound streams at once
    upgrade_s: float = 5.0  # a handshake, from accept to multiplexer
    negotiate_s: float = 5.0  # agreeing on a stream's protocol
    dial_s: float = 10.0  # a whole dial, handshake included
    health_interval_s: float = 10 / 3  # a connection silent for three of these, though pinged after one, is dropped

    def __post_init__(self) -> None:
        """Raises ValueError with what came and what is wanted."""
        if self.psk is not None and len(self.psk) != PSK_BYTES:
            raise ValueError(f"a pre-shared key of {len(self.psk)} bytes came, wanted {PSK_BYTES}")
        if not 0 <= self.port <= PORT_MAX:
            raise ValueError(f"port {self.port} came, wanted 0..{PORT_MAX}")
        for name in ("connections_max", "pending_max", "pending_per_ip_max", "streams_per_peer_max"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)} came, wanted at least 1")
        if not 0 <= self.places_kept < self.inbound_max <= self.connections_max:
            raise ValueError(
                f"places_kept {self.places_kept}, inbound_max {self.inbound_max}, connections_max"
                f" {self.connections_max} came, wanted 0 <= kept < inbound <= all"
            )
        for name in ("upgrade_s", "negotiate_s", "dial_s", "health_interval_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} = {getattr(self, name)} came, wanted more than 0 seconds")
