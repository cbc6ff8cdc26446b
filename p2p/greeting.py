"""What two connected peers say to each other, both ways: hello, ping, peers.

Rules: a shell over roster.py and book.py; it decides nothing but whether words make sense. What a peer says is noted
under the id it has proved, and its addresses only as far as `address.believable` goes. A peer that breaks the protocol
is refused, never an error of ours.
Source: NETWORK.md rule 6; SECURITY.md S1, O1.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import trio

from crypto.canonical import Value
from crypto.identity import PeerId
from p2p.address import Address, Scope, is_relayed, seen_scope, told, worth_telling
from p2p.book import Book, Source
from p2p.calls import Calls, Handler, Incoming
from p2p.errors import Refused, RemoteError, RemoteProtocolError, Unreachable
from p2p.hello import (
    EXCHANGE_PEERS_MAX,
    HELLO_ADDRESSES_MAX,
    PROTOCOL_VERSION,
    Hello,
    Instances,
    KnownPeer,
    KnownPeers,
    Ping,
    objection,
    read_hello,
    read_known_peers,
    read_ping,
    to_value,
)
from p2p.peering_status import BootstrapLog
from p2p.roster import REFUSED_WAIT_S, AskPeers, Greet, Probe, Roster
from p2p.transport import Transport

CALL_TIMEOUT_S = 10.0
EXPELLED_MAX = 1024  # peers remembered as expelled
REFUSAL_GRACE_S = 1.0  # lets our refusal reach the peer before the connection goes


@dataclass(frozen=True, slots=True, kw_only=True)
class Introduction:
    """What we say of ourselves. `instance`: random hex, new for each start of a process."""

    network: str
    agent: str
    instance: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Ledger:
    """What is kept of peers; greeting and peering share it."""

    book: Book
    roster: Roster
    bootstrap: BootstrapLog
    on_change: Callable[[], None]
    on_duplicate: Callable[[str], None]  # told of each sign that another live process has our identity
    drops: Counter[str] = field(default_factory=Counter)  # refusals, failures and addresses not taken


class Greeting:
    """The words, as caller and as callee."""

    def __init__(self, transport: Transport, introduction: Introduction, ledger: Ledger) -> None:
        self._transport = transport
        self._introduction = introduction
        self._ledger = ledger
        self._instances = Instances()
        self._expelled: OrderedDict[PeerId, tuple[float, str]] = OrderedDict()  # until when, why

    def handlers(self) -> Mapping[str, Handler]:
        """What peers may call on RPC_PROTOCOL."""
        return {"hello": self._answer_hello, "ping": self._answer_ping, "peers": self._answer_peers}

    async def say(self, errand: Greet | Probe | AskPeers, calls: Calls) -> None:
        """Carry out an errand of the roster; what the peer does amiss is noted, not raised."""
        try:
            with trio.fail_after(CALL_TIMEOUT_S):
                match errand:
                    case Greet(peer=peer):
                        await self._greet(peer, calls)
                    case Probe(peer=peer):
                        await self._probe(peer, calls)
                    case AskPeers(peer=peer):
                        await self._ask_peers(peer, calls)
        except RemoteProtocolError as exc:
            self.refuse(errand.peer, f"it broke the protocol: {exc}")
        except (Unreachable, Refused, RemoteError, trio.TooSlowError) as exc:
            self._unanswered(errand, exc)

    def refuse(self, peer: PeerId, reason: str, grace_s: float = 0.0) -> None:
        """Note that a peer is none of ours; it is disconnected after `grace_s` and not dialled for REFUSED_WAIT_S."""
        now = trio.current_time()
        self._ledger.drops["refused"] += 1
        member = self._ledger.roster.members.get(peer)
        dialled = member.dialled if member is not None else None
        seen_at = dialled.text if dialled is not None else self._transport.remote_address(peer) or ""
        self._ledger.roster.refuse(peer, reason, seen_at, now, grace_s=grace_s)
        self._ledger.book.hold(peer, now, REFUSED_WAIT_S)
        if dialled is not None:
            self._ledger.bootstrap.note(dialled, reason, now)
        self._ledger.on_change()

    def expel(self, peer: PeerId, reason: str, wait_s: float) -> None:
        """Have nothing to do with a peer for `wait_s`, whoever dials."""
        now = trio.current_time()
        self._expelled[peer] = (now + wait_s, reason)
        self._expelled.move_to_end(peer)
        if len(self._expelled) > EXPELLED_MAX:
            self._expelled.popitem(last=False)
        self.refuse(peer, reason)
        self._ledger.book.hold(peer, now, wait_s)

    # -- as caller ----------------------------------------------------------------------------------------------

    async def _greet(self, peer: PeerId, calls: Calls) -> None:
        answer = read_hello(await calls.call(peer, "hello", self._hello(peer)))
        self._take_hello(peer, answer, 0.0)
        if isinstance(answer, Hello):
            self._twin_told(peer, answer.twin)

    async def _probe(self, peer: PeerId, calls: Calls) -> None:
        began = trio.current_time()
        try:
            value = await calls.call(peer, "ping", to_value(Ping(instance=self._introduction.instance)))
        except (RemoteError, Refused):  # a client that greets may serve no rpc of its own
            self._ledger.roster.pinged(peer, trio.current_time() - began)  # no answer we like, yet it lives
            return
        self._ledger.roster.pinged(peer, trio.current_time() - began)
        answer = read_ping(value)
        self._instances.heard(peer, answer.instance)
        self._twin_told(peer, answer.twin)

    async def _ask_peers(self, peer: PeerId, calls: Calls) -> None:
        answer = read_known_peers(await calls.call(peer, "peers", {}))
        now, teller = trio.current_time(), seen_scope(self._transport.remote_address(peer))
        for known in answer.peers:
            for address in self._told(known.addresses, PeerId(known.peer), teller):
                self._ledger.book.add(address, Source.EXCHANGE, now)
        member = self._ledger.roster.members.get(peer)
        if member is not None and member.hello is not None:
            self._note_addresses(peer, member.hello, now)

    def _unanswered(self, errand: Greet | Probe | AskPeers, exc: Exception) -> None:
        roster, now = self._ledger.roster, trio.current_time()
        self._ledger.drops[f"{type(errand).__name__.lower()}_unanswered"] += 1
        match errand:
            case Greet(peer=peer):
                # it has no such protocol, or no such method: a plain libp2p client, which may stay
                if isinstance(exc, Refused) or (isinstance(exc, RemoteError) and exc.code == "unknown_method"):
                    roster.foreign(peer)
                else:
                    roster.ungreeted(peer, now)
            case Probe(peer=peer):
                roster.missed(peer, now)
            case AskPeers():
                pass  # asked again later; whether the peer lives is for the pings to say

    def _hello(self, peer: PeerId, *, refused: str = "", twin: str = "") -> Value:
        own, seen_at = self._transport.peer_id, self._transport.remote_address(peer)
        return to_value(
            Hello(
                protocol=PROTOCOL_VERSION,
                network=self._introduction.network,
                agent=self._introduction.agent,
                instance=self._introduction.instance,
                addresses=worth_telling(self._transport.addresses(), own, seen_scope(seen_at), HELLO_ADDRESSES_MAX),
                seen_at=seen_at or "",
                refused=refused,
                twin=twin,
            )
        )

    # -- as callee ----------------------------------------------------------------------------------------------

    async def _answer_hello(self, call: Incoming) -> Value:
        """Say what we are; a caller that cannot be ours is told why and then disconnected."""
        await trio.lowlevel.checkpoint()
        try:
            hello = read_hello(call.body)
        except RemoteProtocolError as exc:
            self.refuse(call.peer, f"it broke the protocol: {exc}", REFUSAL_GRACE_S)
            raise RemoteError("bad_hello", str(exc), retryable=False) from exc
        reason = self._take_hello(call.peer, hello, REFUSAL_GRACE_S)
        twin = self._instances.heard(call.peer, hello.instance) if isinstance(hello, Hello) else ""
        return self._hello(call.peer, refused=reason, twin=twin)

    async def _answer_ping(self, call: Incoming) -> Value:
        await trio.lowlevel.checkpoint()
        try:
            ping = read_ping(call.body)
        except RemoteProtocolError as exc:
            raise RemoteError("bad_ping", str(exc), retryable=False) from exc
        twin = self._instances.heard(call.peer, ping.instance)
        return to_value(Ping(instance=self._introduction.instance, twin=twin))

    async def _answer_peers(self, call: Incoming) -> Value:
        await trio.lowlevel.checkpoint()
        now = trio.current_time()
        if not self._ledger.roster.serve_exchange(call.peer, now):
            raise RemoteError("not_now", "say hello first, and ask at most every 10 s", retryable=True)
        scope = seen_scope(self._transport.remote_address(call.peer))
        shared = self._ledger.book.share(now, scope, EXCHANGE_PEERS_MAX, call.peer)
        return to_value(KnownPeers(peers=[KnownPeer(peer=peer, addresses=texts) for peer, texts in shared]))

    # -- both ---------------------------------------------------------------------------------------------------

    def _take_hello(self, peer: PeerId, hello: Hello | int, grace_s: float) -> str:
        """Judge a hello, theirs first or in answer to ours. Returns our objection, or ''."""
        ledger, now = self._ledger, trio.current_time()
        until, why = self._expelled.get(peer, (now, ""))
        reason = why if now < until else objection(self._introduction.network, hello)
        if reason or isinstance(hello, int):
            self.refuse(peer, reason, grace_s)
            return reason
        ledger.book.release(peer)
        ledger.roster.greet(peer, hello, now)
        self._note_addresses(peer, hello, now)
        member = ledger.roster.members.get(peer)
        if member is not None and member.dialled is not None:
            ledger.book.succeeded(member.dialled, now)
            ledger.bootstrap.note(member.dialled, "", now)
        ledger.on_change()
        return ""

    def _note_addresses(self, peer: PeerId, hello: Hello, now: float) -> None:
        """Learn where a peer listens; one at the very host it is seen at, or behind us, may be told to others."""
        seen_at = self._transport.remote_address(peer)
        host = (seen_at or "").split("/")[1:3]
        for address in self._told(hello.addresses, peer, seen_scope(seen_at)):
            self._ledger.book.add(address, Source.INBOUND, now)
            if address.relay is not None:
                vouched = address.relay == self._transport.peer_id or address.bare == seen_at
            else:  # a relayed peer is not at its relay's host
                vouched = not is_relayed(seen_at) and address.bare.split("/")[1:3] == host
            if vouched:
                self._ledger.book.vouch(address, now)

    def _told(self, texts: Sequence[str], peer: PeerId, teller: Scope) -> list[Address]:
        """The usable ones; the others are counted."""
        usable = told(texts, peer, teller)
        if len(usable) < len(texts):
            self._ledger.drops["address_not_usable"] += len(texts) - len(usable)
        return usable

    def _twin_told(self, teller: PeerId, twin: str) -> None:
        if twin and twin != self._introduction.instance:
            self._ledger.on_duplicate(f"peer {teller} hears it too, as instance {twin[:16]}")
