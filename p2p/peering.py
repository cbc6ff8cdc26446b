"""Staying connected: dials, greets, measures and remembers peers, and says for each failure what it was.

Rules: a shell; whom to dial is book.py's to say, what to do with a connected peer roster.py's. At most DIALS_MAX dials
at once, each after a short random wait, since a storm of them breaks the network for good. Every RECONCILE_S the
roster is compared with the transport, so that a lost notice costs seconds. While nobody is connected the bootstrap
peers are tried again and again. Nothing that a peer or the LAN does can end the task.
Source: SECURITY.md F10, S1; NETWORK.md rules 6 and 7.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import trio

from crypto.disk import SYSTEM, FileStatus, System
from crypto.identity import PeerId
from p2p.address import Address, Scope, seen_scope, told
from p2p.book import Book, Source
from p2p.bootstrap import BookFile, BootstrapPeer
from p2p.calls import Calls, Handler
from p2p.dialling import dial, dial_reason
from p2p.errors import Refused, RemoteProtocolError, Unreachable
from p2p.greeting import Greeting, Introduction, Ledger
from p2p.hello import PROTOCOL_VERSION, misfit
from p2p.mdns import Announcement, Sighting, run_mdns
from p2p.peering_status import BootstrapLog, PeeringStatus, RefusalRow, peer_rows, refusal_rows
from p2p.roster import OUTBOUND_MIN, PEERS_TARGET, REFUSED_WAIT_S, Disconnect, Errand, Greet, Phase, Roster
from p2p.transport import PeerChange, Transport

DIALS_MAX = 4  # at once; 256 dials at once leave py-libp2p broken (F10)
PEERS_FEW = 8  # with so many it is well connected; the rest of its target is dialled one by one, CALM_S apart at least,
CALM_S = 2.0  # so that of many nodes that start together each has its first peers before any has its last
DIAL_JITTER_S = 0.2
DIAL_TIMEOUT_S = 15.0  # the host's own limit, 10 s, comes first and says more
CONNECT_ADDRESSES_MAX = 3  # that `connect` tries before it gives up
DISCONNECT_TIMEOUT_S = 5.0
RECONCILE_S = 5.0
MDNS_POLITE_S = 1.0  # of two nodes that see each other at once the one with the larger id waits
STEADY_S = 30.0  # a connection that lasted so long was a good one
SAVE_EVERY_S = 120.0
SAVE_AGAIN_S = 10.0  # after a failure: room on the disk may be back
SAVE_TIMEOUT_S = 2.0  # at the end


@dataclass(frozen=True, slots=True, kw_only=True)
class PeeringConfig:
    """What the operator and the process decide. `instance`: random hex, new for each start of a process."""

    network: str
    agent: str
    instance: str
    bootstrap: tuple[BootstrapPeer, ...] = ()
    book_path: Path | None = None  # None: the book is not saved
    system: System = SYSTEM  # writes it
    mdns: bool = True
    peers_target: int = PEERS_TARGET
    outbound_min: int = OUTBOUND_MIN


class Peering:
    """The peers of this node. Wire it: make it, give `handlers()` to the Calls on RPC_PROTOCOL, then `run(calls)`."""

    def __init__(
        self,
        transport: Transport,
        book: Book,
        config: PeeringConfig,
        rng: random.Random,
        on_duplicate: Callable[[str], None] = lambda message: None,
    ) -> None:
        """`on_duplicate` is told, once, that another live process has our identity."""
        self._transport = transport
        self._book = book
        self._config = config
        self._rng = rng
        self._on_duplicate = on_duplicate
        self._roster = Roster(rng, target=config.peers_target, outbound_min=config.outbound_min)
        self._bootstrap = BootstrapLog(config.bootstrap)
        self._drops: Counter[str] = Counter()
        self._greeting = Greeting(
            transport,
            Introduction(network=config.network, agent=config.agent, instance=config.instance),
            Ledger(
                book=book,
                roster=self._roster,
                bootstrap=self._bootstrap,
                on_change=self._changed,
                on_duplicate=self._duplicated,
                drops=self._drops,
            ),
        )
        self._dialling: dict[PeerId, Address] = {}
        self._limiter = trio.CapacityLimiter(DIALS_MAX)
        self._wake = trio.Event()
        self._duplicate = ""
        self._mdns = "off"
        self._file = BookFile(config.book_path, config.system) if config.book_path is not None else None

    # -- for the rest of the node -------------------------------------------------------------------------------

    def handlers(self) -> Mapping[str, Handler]:
        """What peers may call on RPC_PROTOCOL."""
        return self._greeting.handlers()

    def peers(self) -> frozenset[PeerId]:
        """Connected peers of our network and protocol."""
        return self._roster.greeted

    def rtt_ms(self, peer: PeerId) -> float | None:
        """The smoothed round trip to a connected peer; None before the first measurement."""
        member = self._roster.members.get(peer)
        return None if member is None or member.rtt_s is None else member.rtt_s * 1000.0

    def refusals(self) -> tuple[RefusalRow, ...]:
        """Peers that cannot be ours or will not have us, and why; the newest last."""
        return refusal_rows(self._roster, trio.current_time())

    def learn(self, peer: PeerId, addresses: Iterable[str]) -> None:
        """Take addresses from a peer's signed advert; those that cannot be dialled are passed over.

        A private address is believed only while everybody we know is that near.
        """
        scopes = [seen_scope(self._transport.remote_address(known)) for known in self._roster.greeted]
        now = trio.current_time()
        for address in told(addresses, peer, max(scopes, default=Scope.PUBLIC)):
            self._book.add(address, Source.ADVERT, now)

    async def connect(self, peer: PeerId) -> None:
        """Be connected to a peer whose address we know. Raises Unreachable, Refused; both say why."""
        if self._book.held(peer, trio.current_time()):
            why = next((row.reason for row in self.refusals() if row.peer == peer), "it was refused")
            raise Refused(f"{peer} is not dialled: {why}")
        reasons = []
        if peer not in self._transport.peers():
            for address in self._book.addresses(peer, trio.current_time())[:CONNECT_ADDRESSES_MAX]:
                if not (reason := await self._dial(address)):
                    return
                reasons.append(reason)
            raise Unreachable("; ".join(reasons) or f"no address of {peer} is known")
        await trio.lowlevel.checkpoint()

    async def tell(self, calls: Calls) -> None:
        """Say hello again to all our peers, because our addresses have changed. What a peer does amiss is noted."""
        async with trio.open_nursery() as nursery:
            for peer in self._roster.greeted:
                nursery.start_soon(self._greeting.say, Greet(peer), calls)

    def expel(self, peer: PeerId, reason: str, wait_s: float = REFUSED_WAIT_S) -> None:
        """Disconnect a peer for its conduct; for `wait_s` it is neither dialled nor received."""
        self._greeting.expel(peer, reason, wait_s)

    def status(self) -> PeeringStatus:
        """A snapshot for people: who is connected, and why others are not."""
        now = trio.current_time()
        return PeeringStatus(
            peers=peer_rows(self._roster, self._transport, now),
            book=self._book.statistics(now),
            bootstrap=self._bootstrap.results(self._roster, self._transport, now),
            refusals=self.refusals(),
            duplicate=self._duplicate,
            mdns=self._mdns,
            dialling=len(self._dialling),
            drops=dict(self._drops),
        )

    def file_status(self) -> FileStatus | None:
        """How the address book's file fares; None when the book is not saved."""
        return self._file.status() if self._file is not None else None

    async def run(self, calls: Calls, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Keep peers until cancelled; then the book is saved, shielded, in at most SAVE_TIMEOUT_S."""
        now = trio.current_time()
        for entry in self._config.bootstrap:
            self._book.add(entry.address, Source.BOOTSTRAP, now)
        if self._file is not None:
            await trio.to_thread.run_sync(self._file.load, self._book, now)
        self._transport.watch(self._watch)
        self._transport.keep_places_for(self._book.is_known)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._keep, calls, nursery)
                nursery.start_soon(self._save_now_and_then)
                if self._config.mdns:
                    nursery.start_soon(self._discover, nursery)
                task_status.started()
        finally:
            with trio.move_on_after(SAVE_TIMEOUT_S, shield=True):
                await self._save()

    # -- the loop -----------------------------------------------------------------------------------------------

    async def _keep(self, calls: Calls, nursery: trio.Nursery) -> None:
        """Do what roster and book ask for, as soon as it is due."""
        while True:
            now = trio.current_time()
            self._reconcile(now)
            for errand in self._roster.tick(now):
                nursery.start_soon(self._run_errand, errand, calls)
            if candidates := self._candidates(now):
                self._roster.calm_until = now + CALM_S
            for address in candidates:
                self._dialling[address.peer] = address
                nursery.start_soon(self._dial_later, address)
            self._wake = trio.Event()
            with trio.move_on_at(min(now + RECONCILE_S, self._roster.deadline(), self._dial_deadline(now))):
                await self._wake.wait()
            await trio.lowlevel.checkpoint()

    def _changed(self) -> None:
        self._wake.set()

    def _reconcile(self, now: float) -> None:
        """Make the roster agree with the transport, whatever notice was lost."""
        connected = self._transport.peers()
        for peer in connected - self._roster.members.keys():
            self._roster.connected(peer, now, None)
        for peer in self._roster.members.keys() - connected:
            self._lost(peer, now)
        for member in self._roster.members.values():
            if member.dialled is not None and member.phase is Phase.GREETED:
                self._book.lasted(member.dialled, now - member.since)

    def _busy(self) -> frozenset[PeerId]:
        return frozenset(self._dialling) | frozenset(self._roster.members)

    def _room(self, now: float) -> int:
        """How many to dial now."""
        busy = len(self._dialling)
        wanted = min(self._roster.wanted() - busy, DIALS_MAX - busy)
        few = PEERS_FEW - self._roster.ours() - busy
        if few > 0:
            return min(wanted, few)
        return min(wanted, 1 - busy) if now >= self._roster.calm_until else 0

    def _candidates(self, now: float) -> list[Address]:
        room, alone = self._room(now), self._roster.alone
        if room <= 0:
            return []
        return self._book.due(now, exclude=self._busy(), groups=self._roster.groups(), alone=alone, limit=room)

    def _dial_deadline(self, now: float) -> float:
        if self._room(max(now, self._roster.calm_until)) <= 0:
            return float("inf")
        if self._room(now) <= 0:
            return self._roster.calm_until
        return self._book.deadline(now, exclude=self._busy(), alone=self._roster.alone)

    def _watch(self, change: PeerChange) -> None:
        if change.connected:
            self._roster.connected(change.peer, trio.current_time(), None)
        elif change.peer not in self._transport.peers():
            self._lost(change.peer, trio.current_time())
        self._wake.set()

    def _lost(self, peer: PeerId, now: float) -> None:
        """A connection is gone. One that was cut at once is as good as refused: it is not dialled again at once."""
        member = self._roster.lost(peer)
        if member is None or member.dialled is None:
            return
        if now - member.since >= STEADY_S:
            self._book.steady(member.dialled)
        else:
            self._drops["cut_at_once"] += 1
            self._book.failed(member.dialled, now, f"the connection was lost after {now - member.since:.1f} s")

    async def _run_errand(self, errand: Errand, calls: Calls) -> None:
        """One errand, whatever it meets; a peer's fault is noted and is no fault of ours."""
        try:
            if isinstance(errand, Disconnect):
                self._drops["disconnected"] += 1
                await self._disconnect(errand.peer, errand.reason)
            else:
                await self._greeting.say(errand, calls)
        finally:
            self._roster.done(errand.peer)
            self._wake.set()

    # -- dialling -----------------------------------------------------------------------------------------------

    async def _dial_later(self, address: Address) -> None:
        await trio.sleep(self._rng.uniform(0.0, DIAL_JITTER_S))
        if address.peer in self._transport.peers():
            self._dialling.pop(address.peer, None)  # it came to us meanwhile
        else:
            await self._dial(address)

    async def _dial(self, address: Address) -> str:
        """Dial once and note what came of it. Returns '' or why not. Cancelled, nothing is noted."""
        reason = ""
        self._dialling[address.peer] = address
        self._bootstrap.tried(address)
        try:
            async with self._limiter:
                with trio.fail_after(DIAL_TIMEOUT_S):
                    peer = await dial(self._transport, address)
            if peer != address.peer:
                reason = f"wrong peer id: {peer} answers at {address.bare}, not {address.peer}"
                await self._disconnect(peer, reason)
            elif address.scope is Scope.NAMED or self._transport.remote_address(peer) == address.bare:
                self._roster.connected(peer, trio.current_time(), address)
            else:  # it dialled us at the same moment: nothing is proved of the address
                self._roster.connected(peer, trio.current_time(), None)
        except trio.TooSlowError:
            reason = f"{address.text} timed out after {DIAL_TIMEOUT_S:g} s"
        except (Unreachable, Refused, RemoteProtocolError) as exc:
            reason = dial_reason(exc, address)
        finally:
            self._dialling.pop(address.peer, None)
            self._wake.set()
        now = trio.current_time()
        self._bootstrap.note(address, reason, now)
        if reason:
            self._drops["dial_failed"] += 1
            self._book.failed(address, now, reason)
        return reason

    async def _disconnect(self, peer: PeerId, reason: str) -> None:
        member, now = self._roster.lost(peer), trio.current_time()
        if member is not None and member.dialled is not None:
            self._book.failed(member.dialled, now, reason)
            self._bootstrap.note(member.dialled, reason, now)
        with trio.move_on_after(DISCONNECT_TIMEOUT_S):
            await self._transport.disconnect(peer)

    # -- the LAN and the disk ------------------------------------------------------------------------------------

    async def _discover(self, nursery: trio.Nursery) -> None:
        """Find and be found by mDNS; where that cannot be, only the status says so."""
        announcement = Announcement(
            peer=self._transport.peer_id,
            network=self._config.network,
            protocol=PROTOCOL_VERSION,
            instance=self._config.instance,
            addresses=self._transport.addresses(),
        )
        self._mdns = "starting"
        problem = await nursery.start(run_mdns, announcement, self.sighted)
        self._mdns = problem or "on"

    def sighted(self, sighting: Sighting) -> None:
        """A node was seen on the LAN. Sync, called in the Trio thread."""
        own, now = self._transport.peer_id, trio.current_time()
        if sighting.peer == own:
            if sighting.instance != self._config.instance:
                self._duplicated(f"it is on this LAN at {', '.join(a.bare for a in sighting.addresses)}")
            return
        if reason := misfit(self._config.network, sighting.protocol, sighting.network):
            if sighting.peer not in self._roster.members:  # anybody on the LAN can say this of a peer of ours
                self._roster.refuse(sighting.peer, reason, sighting.addresses[0].text, now)
            return
        polite_s = MDNS_POLITE_S if own > sighting.peer else 0.0
        for address in sighting.addresses:
            self._book.add(address, Source.MDNS, now + polite_s)
        self._wake.set()

    def _duplicated(self, sign: str) -> None:
        """Another live process has our identity: say so once, loudly."""
        if not self._duplicate:
            self._duplicate = (
                f"another running node has this node's identity {self._transport.peer_id}: {sign}. Peers cannot tell "
                "the two apart; was the data directory copied? Stop one, or give it a new identity with "
                "`python -m node keys identity rotate`"
            )
            self._on_duplicate(self._duplicate)

    async def _save_now_and_then(self) -> None:
        wait_s = SAVE_EVERY_S
        while True:
            await trio.sleep(wait_s)
            wait_s = SAVE_EVERY_S if await self._save() else SAVE_AGAIN_S

    async def _save(self) -> bool:
        if self._file is None:
            return True
        raw = self._book.to_json(trio.current_time(), time.time())
        return await trio.to_thread.run_sync(self._file.save, raw)
