"""Bulk between directly reachable peers: a TCP connection of its own, keyed over the authenticated libp2p stream.

Rules: opener and server of a protocol agree on keys over a libp2p stream; then the opener claims a connection to the
server's port with a token that only these two can know, or says that it could not, and the frames go over that same
libp2p stream. Both get a Stream and need not know which. Only the address at which a peer is connected already is
dialled, so that nobody can send us elsewhere; a peer behind a relay has none. A channel lives no longer than the
peer's libp2p connection. A connection to the port costs its peer nothing yet, so those are few, short, and say one
token or nothing.

Source: NETWORK.md section 2 (direct TCP data channel); SECURITY.md F7.
"""

from __future__ import annotations

import hmac
import weakref
from collections import Counter, OrderedDict
from dataclasses import dataclass, field
from typing import TypeVar

import msgspec
import trio
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from crypto.canonical import Limits, decode_struct, encode_struct
from crypto.errors import BadEncoding
from crypto.identity import PeerId
from p2p.address import is_relayed
from p2p.admission import Admission, Refusal, Ticket
from p2p.direct_frames import TOKEN_BYTES, Agreement, Ask, ChannelKeys, Choice, Offer, Opener, Sealer
from p2p.direct_stream import DirectStream
from p2p.errors import Refused, RemoteProtocolError, StreamClosed, Unreachable
from p2p.host_config import HostConfig
from p2p.transport import PeerChange, Stream, StreamHandler, Transport

DIRECT_PROTOCOL = "/openagi/direct/1"
AVOIDED_MAX = 1024  # peers whose port did not answer, remembered until they leave
LISTEN_BACKLOG = 64

_LIMITS = Limits(bytes_max=512, items_max=8, array_max=0, depth_max=1)  # of a word of the agreement
_Message = TypeVar("_Message", bound=msgspec.Struct)


@dataclass(frozen=True, slots=True, kw_only=True)
class DirectConfig:
    """Bounds of the direct channels. Times are seconds."""

    port: int = 0  # to listen on; 0: the system chooses
    channels_max: int = 32  # as server; about 1 MiB of buffer each
    channels_per_peer_max: int = 4
    pending_max: int = 64  # connections that have not said their token; the oldest yields
    pending_per_ip_max: int = 4
    pending_loopback_max: int = 64
    agree_s: float = 5.0  # ask and offer, and the choice after that
    connect_s: float = 2.0  # the opener's: until its connection is claimed, or it falls back
    claim_s: float = 3.0  # the server's: from accept to the token
    avoid_s: float = 300.0  # before a port that did not answer is tried again

    def __post_init__(self) -> None:
        """Raises ValueError with what came and what is wanted."""
        for name in ("channels_max", "channels_per_peer_max", "pending_max", "pending_per_ip_max"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)} came, wanted at least 1")
        for name in ("agree_s", "connect_s", "claim_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} = {getattr(self, name)} came, wanted more than 0 seconds")


@dataclass(frozen=True, slots=True, kw_only=True)
class DirectStatistics:
    """A snapshot. port: 0 while nothing is listened on; counts: channels opened, fallbacks and drops, since start."""

    port: int
    channels: int  # open now, both ways
    counts: dict[str, int]


@dataclass(slots=True, eq=False)
class _Offer:
    """A channel that its opener may claim once."""

    peer: PeerId
    keys: ChannelKeys
    stream: DirectStream | None = None  # the claimed connection
    over: trio.Event = field(default_factory=trio.Event)  # the connection has no more use


class Direct:
    """Opens and serves streams for bulk. `run` must be running to serve direct channels; opening needs no run."""

    def __init__(self, transport: Transport, config: DirectConfig) -> None:
        self._transport = transport
        self._config = config
        self._handlers: dict[str, StreamHandler] = {}
        self._offers: list[_Offer] = []
        self._port = 0
        self._live: weakref.WeakSet[DirectStream] = weakref.WeakSet()
        self._serving: Counter[PeerId] = Counter()
        self._avoided: OrderedDict[PeerId, float] = OrderedDict()
        self._admission = Admission(
            HostConfig(
                pending_max=config.pending_max,
                pending_per_ip_max=config.pending_per_ip_max,
                pending_loopback_max=config.pending_loopback_max,
            )
        )
        self._scopes: dict[Ticket, trio.CancelScope] = {}
        self.counts: Counter[str] = Counter()  # channels opened, fallbacks and drops, by reason
        transport.watch(self._changed)
        transport.serve(DIRECT_PROTOCOL, self._answer)

    # ---- both ends ----

    def statistics(self) -> DirectStatistics:
        """A snapshot of the counters."""
        live = sum(not stream.over.is_set() for stream in self._live)
        return DirectStatistics(port=self._port, channels=live, counts=dict(self.counts))

    def serve(self, protocol: str, handler: StreamHandler) -> None:
        """As Transport.serve: `handler` gets a direct stream, or an ordinary one from a peer that cannot do better."""
        self._handlers[protocol] = handler
        self._transport.serve(protocol, handler)

    async def open_stream(self, peer: PeerId, protocol: str) -> Stream:
        """As Transport.open_stream: a direct stream when the peer can be reached, else an ordinary one.

        Takes agree_s and connect_s more than an ordinary one at worst, once in avoid_s; nothing more for a peer that is
        connected through a relay, which is not asked. Raises Unreachable, Refused.
        """
        if self._avoided.get(peer, 0.0) > trio.current_time() or is_relayed(self._transport.remote_address(peer)):
            return await self._transport.open_stream(peer, protocol)
        try:
            control = await self._transport.open_stream(peer, DIRECT_PROTOCOL)
        except Refused:
            self._avoid(peer)
            return await self._transport.open_stream(peer, protocol)
        direct: DirectStream | None = None
        done = False
        try:
            with trio.fail_after(self._config.agree_s):
                keys, port = await self._ask(control, protocol)
            direct = await self._claim(peer, keys, port) if port else None
            with trio.fail_after(self._config.agree_s):
                await control.send(encode_struct(Choice(direct=direct is not None)))
            done = True
        except trio.TooSlowError as exc:
            raise Unreachable(f"{peer} did not agree on a channel within {self._config.agree_s:g} s") from exc
        except (StreamClosed, RemoteProtocolError) as exc:
            raise Unreachable(f"{peer} did not agree on a channel: {exc}") from exc
        finally:
            if not done:
                if direct is not None:
                    direct.abort("the opening was cut short")
                await control.reset()
        if direct is None:
            self.counts["fell_back"] += 1
            self._avoid(peer)
            return control
        self.counts["opened"] += 1
        await control.close()
        return direct

    async def _ask(self, control: Stream, protocol: str) -> tuple[ChannelKeys, int]:
        """The opener's half of the agreement. Raises Refused, RemoteProtocolError, StreamClosed, Unreachable."""
        own = X25519PrivateKey.generate()
        own_key = own.public_key().public_bytes_raw()
        await control.send(encode_struct(Ask(protocol=protocol, key=own_key)))
        offer = _decode(await control.receive(), Offer)
        if not offer.served:
            raise Refused(f"{control.peer} does not serve {protocol}")
        agreement = Agreement(
            opener=self._transport.peer_id,
            server=control.peer,
            protocol=protocol,
            opener_key=own_key,
            server_key=offer.key,
        )
        return agreement.keys(own, offer.key), offer.port

    async def _claim(self, peer: PeerId, keys: ChannelKeys, port: int) -> DirectStream | None:
        """Connect and have the server prove that it took the token, within connect_s; None when it cannot be."""
        ip = _ip_of(self._transport.remote_address(peer))
        socket: trio.SocketStream | None = None
        stream: DirectStream | None = None
        proven = False
        try:
            with trio.move_on_after(self._config.connect_s):
                if ip is not None:
                    socket = await trio.open_tcp_stream(ip, port)
                    await socket.send_all(keys.token)
                    stream = DirectStream(socket, peer, Sealer(keys.opener), Opener(keys.server))
                    proven = await stream.receive() == b""
        except (OSError, trio.BrokenResourceError, StreamClosed, RemoteProtocolError, Unreachable):
            self.counts["claim_failed"] += 1
        finally:
            if not proven and socket is not None:
                socket.socket.close()
        if not proven or stream is None or peer not in self._transport.peers():
            return None
        self._live.add(stream)
        return stream

    def _avoid(self, peer: PeerId) -> None:
        if peer in self._transport.peers():
            self._avoided[peer] = trio.current_time() + self._config.avoid_s
            while len(self._avoided) > AVOIDED_MAX:
                self._avoided.popitem(last=False)

    def _changed(self, change: PeerChange) -> None:
        if not change.connected:
            self._avoided.pop(change.peer, None)
            for stream in tuple(self._live):
                if stream.peer == change.peer:
                    stream.abort(f"the connection to {change.peer} is gone")

    # ---- the server ----

    async def run(self, task_status: trio.TaskStatus[int] = trio.TASK_STATUS_IGNORED) -> None:
        """Listen on the transport's own addresses until cancelled, reporting the port; 0 when none could be bound."""
        listeners = await self._listen()
        try:
            task_status.started(self._port)
            if listeners:
                await trio.serve_listeners(self._accepted, listeners)
            else:
                self.counts["cannot_listen"] += 1
                await trio.sleep_forever()
        finally:
            self._port = 0
            for stream in tuple(self._live):
                stream.abort("the node stops")

    async def _listen(self) -> list[trio.SocketListener]:
        """One port on every address that others know us by; an address where it is taken is left out."""
        listeners: list[trio.SocketListener] = []
        self._port = self._config.port
        for ip in dict.fromkeys(map(_ip_of, self._transport.addresses())):
            if ip is not None:
                try:
                    listeners += await trio.open_tcp_listeners(self._port, host=ip, backlog=LISTEN_BACKLOG)
                except OSError:
                    continue
                self._port = int(listeners[0].socket.getsockname()[1])
        if not listeners:
            self._port = 0
        return listeners

    async def _accepted(self, socket: trio.SocketStream) -> None:
        """A connection from anyone: a token that was offered, in time, or the end. Lives until the channel is over."""
        try:
            remote = str(socket.socket.getpeername()[0])
        except OSError:
            remote = "?"  # gone already
        verdict, yielding = self._admission.open(remote, trio.current_time())
        if yielding is not None:
            self.counts["pending_yielded"] += 1
            self._scopes[yielding].cancel()
        if isinstance(verdict, Refusal):
            self.counts[verdict.reason] += 1
            socket.socket.close()
            return
        try:
            with trio.CancelScope() as scope:
                self._scopes[verdict] = scope
                offer = await self._read_token(socket)
                if offer is not None:
                    refusal, _ = self._admission.establish(verdict, known=True)  # the token proves who it is
                    if refusal is not None:
                        raise Unreachable(refusal.reason)
                    offer.stream = DirectStream(
                        socket, offer.peer, Sealer(offer.keys.server), Opener(offer.keys.opener)
                    )
                    await offer.stream.send(b"")  # proves that the token came to the one who offered it
                    await offer.over.wait()
        except Unreachable:
            self.counts["claim_failed"] += 1
        finally:
            del self._scopes[verdict]
            self._admission.close(verdict)
            socket.socket.close()

    async def _read_token(self, socket: trio.SocketStream) -> _Offer | None:
        """The offer that a connection claims, which nobody can claim again; None, counted, for anything else."""
        token = bytearray()
        with trio.move_on_after(self._config.claim_s):
            try:
                while len(token) < TOKEN_BYTES:
                    piece = await socket.receive_some(TOKEN_BYTES - len(token))
                    if not piece:
                        break
                    token += piece
            except trio.BrokenResourceError:
                pass
        found = None
        for offer in self._offers:  # all of them, so that the time tells nothing
            if hmac.compare_digest(offer.keys.token, token):
                found = offer
        if found is None:
            self.counts["token_unknown" if len(token) == TOKEN_BYTES else "token_missing"] += 1
        else:
            self._offers.remove(found)
        return found

    async def _answer(self, control: Stream) -> None:
        """The server's half: offer, wait for the choice, then run the protocol's handler on what was chosen.

        Raises what the handler raises, RemoteProtocolError, TooSlowError: the transport resets the stream then.
        """
        config, peer = self._config, control.peer
        with trio.fail_after(config.agree_s):
            ask = _decode(await control.receive(), Ask)
        own = X25519PrivateKey.generate()
        own_key = own.public_key().public_bytes_raw()
        handler = self._handlers.get(ask.protocol)
        if handler is None:
            await control.send(encode_struct(Offer(served=False, key=own_key, port=0)))
            return
        agreement = Agreement(
            opener=peer,
            server=self._transport.peer_id,
            protocol=ask.protocol,
            opener_key=ask.key,
            server_key=own_key,
        )
        offer = _Offer(peer, agreement.keys(own, ask.key))
        room = self._serving.total() < config.channels_max and self._serving[peer] < config.channels_per_peer_max
        if not room:
            self.counts["channels_full"] += 1
        self._serving[peer] += 1
        try:
            if room and self._port:
                self._offers.append(offer)
            with trio.fail_after(2 * config.agree_s + config.connect_s):
                await control.send(encode_struct(Offer(served=True, key=own_key, port=self._port if room else 0)))
                choice = _decode(await control.receive(), Choice)
            await self._run_handler(handler, control, offer, choice.direct)
        finally:
            self._withdraw(offer)

    async def _run_handler(self, handler: StreamHandler, control: Stream, offer: _Offer, direct: bool) -> None:
        """Run the handler to its end. Raises RemoteProtocolError for a choice that cannot be, and the handler's own."""
        if not direct:
            self._withdraw(offer)
            await handler(control)
            return
        stream = offer.stream
        if stream is None or offer.peer not in self._transport.peers():
            raise RemoteProtocolError(f"{offer.peer} chose a direct channel that it has not claimed")
        self._live.add(stream)
        self.counts["served"] += 1
        await control.close()
        try:
            await handler(stream)
            await stream.close()
            await stream.linger()
        finally:
            stream.abort("its handler is done")

    def _withdraw(self, offer: _Offer) -> None:
        """Nobody may claim it any more, and what was claimed is closed. Once more is the same as once."""
        if offer in self._offers:
            self._offers.remove(offer)
        if not offer.over.is_set():
            offer.over.set()
            self._serving[offer.peer] -= 1
            if not self._serving[offer.peer]:
                del self._serving[offer.peer]


def _decode(raw: bytes, kind: type[_Message]) -> _Message:
    """A message of the agreement. Raises RemoteProtocolError."""
    try:
        return decode_struct(raw, kind, _LIMITS)
    except BadEncoding as exc:
        raise RemoteProtocolError(f"not a message of {DIRECT_PROTOCOL}: {exc}") from exc


def _ip_of(address: str | None) -> str | None:
    """The IP address of the peer in a multiaddr's text; None when it has none."""
    parts = (address or "").split("/")
    return parts[2] if len(parts) > 2 and parts[1] in ("ip4", "ip6") and not is_relayed(address) else None
