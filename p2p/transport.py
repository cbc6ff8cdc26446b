"""What we ask of a network: connections by peer id, ordered streams of frames, small gossip.

Rules: every implementation passes the suite in tests/test_transport.py. A frame is whole or absent, never cut.
Addresses are multiaddr strings. Nothing here retries; `p2p/peering.py` decides when to dial again.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Protocol

from crypto.identity import PeerId

FRAME_BYTES_MAX = 1 << 20  # control frames and token pieces; bulk goes by digest in chunks below this
GOSSIP_BYTES_MAX = 4096  # small signed facts only: gossipsub corrupts streams above 64 KiB


class Stream(Protocol):
    """An ordered, reliable, two-way stream of frames with one peer. One task sends, one receives."""

    @property
    def peer(self) -> PeerId:
        """The authenticated peer at the other end."""

    async def send(self, frame: bytes) -> None:
        """Send one frame of at most FRAME_BYTES_MAX.

        Raises: LocalProtocolError (too large), Unreachable (broken). If cancelled, the frame is sent whole or the
        stream is reset.
        """

    async def receive(self) -> bytes:
        """The next frame. Raises StreamClosed (clean end), Unreachable (broken), RemoteProtocolError (oversize)."""

    async def close(self) -> None:
        """End our direction in order; what was sent arrives."""

    async def reset(self) -> None:
        """Drop the stream at once, both ways. Never raises, never waits for the peer."""


StreamHandler = Callable[[Stream], Awaitable[None]]
# (peer that signed, payload) -> whether the payload is worth forwarding. Sync, must not raise.
GossipReceiver = Callable[[PeerId, bytes], bool]


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerChange:
    """A peer's first connection came up, or its last went down.

    breach: why the transport itself has cut it off, when its conduct was the reason.
    """

    peer: PeerId
    connected: bool
    breach: str = ""


PeerWatcher = Callable[[PeerChange], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class TransportStatistics:
    """Counts since start; every drop has a reason."""

    peers: int
    streams_open: int
    frames_in: int
    frames_out: int
    bytes_in: int
    bytes_out: int
    mesh_peers: int = 0  # with whom gossip is exchanged at once, over all topics
    drops: dict[str, int] = field(default_factory=dict)  # reason -> count


class Transport(Protocol):
    """A running network: made by an async context manager that also stops it."""

    @property
    def peer_id(self) -> PeerId:
        """Who we are."""

    def addresses(self) -> tuple[str, ...]:
        """Where others can dial us: concrete multiaddrs, each ending in /p2p/<our id>."""

    def peers(self) -> frozenset[PeerId]:
        """Peers with a live connection."""

    def remote_address(self, peer: PeerId) -> str | None:
        """The multiaddr a connected peer is seen at, without /p2p/; None when not connected."""

    def watch(self, watcher: PeerWatcher) -> None:
        """Call `watcher` (sync) at every PeerChange from now on."""

    def keep_places_for(self, is_known: Callable[[PeerId], bool]) -> None:
        """Let in the peers that `is_known` (sync, must not raise) says, when strangers hold the other places."""

    def serve(self, protocol: str, handler: StreamHandler) -> None:
        """Run `handler` for each inbound stream of `protocol`; its exceptions reset that stream and no more."""

    async def dial(self, address: str) -> PeerId:
        """Connect to a multiaddr that ends in /p2p/<id>. Raises Unreachable, Refused. A no-op when connected."""

    async def open_stream(self, peer: PeerId, protocol: str) -> Stream:
        """Open a stream to a connected peer. Raises Unreachable; Refused when the peer has no such protocol."""

    async def disconnect(self, peer: PeerId) -> None:
        """Close all connections to a peer. A no-op when there is none."""

    async def subscribe(self, topic: str, receiver: GossipReceiver) -> None:
        """Receive gossip on a topic; own messages are not delivered back."""

    async def publish(self, topic: str, payload: bytes) -> None:
        """Gossip at most GOSSIP_BYTES_MAX, best effort. Raises LocalProtocolError when larger."""

    def statistics(self) -> TransportStatistics:
        """A snapshot of the counters."""
