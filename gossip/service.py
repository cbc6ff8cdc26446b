"""The one loop of gossip: says what this node offers, hears what others offer, acts on what is believed of them.

Rules: a shell; what to believe, when to speak and whom to ask is decided in the cores it owns (directory, standing,
observations, pace). Everything a peer sends passes its token bucket before its signature is looked at. A peer that
has just connected is asked for the adverts it knows (ADVERTS_PROTOCOL), so that a newcomer need not wait for the next
refresh of everybody; in a large network the rest is learnt by asking (gossip/finder.py). Effects are sync or go
through bounded channels; what does not fit is dropped and counted.
Source: NETWORK.md "Our rules" and "Protocols"; SECURITY.md P5, P9-P12, section 6.
"""

from __future__ import annotations

import logging
import random
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import trio

from crypto.disk import SYSTEM, FileStatus, System
from crypto.identity import Identity, PeerId
from gossip.claims import Claims, ClaimsStatistics
from gossip.claims_hearing import ClaimsHearing
from gossip.directory import Directory, DirectoryStatistics, Own
from gossip.finder import Finder
from gossip.finding import FIND_PROTOCOL
from gossip.flow import FlowStatistics
from gossip.hearing import Hearing
from gossip.messages import ADDRESSES_MAX, Advert, Capacity, advert_topic, checked_capacity, seal_advert
from gossip.observations import Observations
from gossip.pace import OwnAdvert
from gossip.routing import Candidate, Need, WhyNot, rank
from gossip.saved import RESERVED, Keeper, SavedState
from gossip.self_topic import SelfTopic
from gossip.standing import FORGIVEN, Fault, Standing, StandingStatistics, Verdict
from gossip.summaries import OwnSummary, SelfSummary
from gossip.view import Preference
from p2p.address import network_of
from p2p.errors import P2PError, StreamClosed
from p2p.transport import PeerChange, Stream, Transport

ADVERTS_PROTOCOL = "/openagi/adverts/1"  # the answer to opening a stream: adverts, one a frame, then the end
ADVERTS_HANDED_MAX = 256
NETWORK_PATTERN = "[a-z0-9][a-z0-9._-]{0,63}"  # what an envelope carries
PULL_S = 5.0
PULLERS = 4  # peers asked at once for what they know
JOINS_WAITING_MAX = 256
DISCONNECTS_WAITING_MAX = 256
GOODBYE_S = 2.0
TICK_S = 1.0
DISCONNECT_S = 5.0

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class GossipConfig:
    """What gossip is told at start.

    instance: random hex of this process. state_path: None keeps nothing over a restart; system: what writes it.
    on_duplicate is called (sync) with one sentence when another process speaks with our identity. wall_clock_ms: unix
    milliseconds.
    """

    network: str
    instance: str
    agent: str
    state_path: Path | None = None
    system: System = SYSTEM
    on_duplicate: Callable[[str], None] = lambda _message: None
    wall_clock_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000

    def __post_init__(self) -> None:
        """Raises ValueError with what came and what is wanted."""
        if re.fullmatch(NETWORK_PATTERN, self.network) is None:
            raise ValueError(f"network {self.network!r} came, wanted 1 to 64 of a-z 0-9 . _ -, beginning with a-z 0-9")
        if re.fullmatch("[0-9a-f]{8,64}", self.instance) is None:
            raise ValueError(f"instance {self.instance!r} came, wanted 8 to 64 hex digits")
        if not 1 <= len(self.agent) <= 64:
            raise ValueError(f"agent {self.agent!r} came, wanted 1 to 64 characters")


@dataclass(frozen=True, slots=True, kw_only=True)
class GossipStatistics:
    """Counts since start: adverts sent and heard by outcome, drops by reason; what is known now."""

    adverts_sent: int
    directory: DirectoryStatistics
    standing: StandingStatistics
    drops: dict[str, int]
    flow: FlowStatistics
    claims: ClaimsStatistics
    duplicate_identity: str | None  # what was last heard of a copy of this node


class GossipService:
    """A node's part in gossip. Its cores are public: whoever routes feeds `observations` and reads `directory`."""

    def __init__(self, transport: Transport, identity: Identity, config: GossipConfig, rng: random.Random) -> None:
        """Reads the saved state from disk. Call from within trio, before the transport hears gossip."""
        now, now_ms = trio.current_time(), config.wall_clock_ms()
        self._keeper = Keeper(config.state_path, config.system)
        saved = self._keeper.load()
        self._transport, self._identity, self._config, self._rng = transport, identity, config, rng
        self._own = OwnAdvert(rng, started_ms=now_ms, sequence=max(saved.sequence, now_ms))
        self.observations = Observations()
        self.standing = Standing()
        preference = Preference(rng.randbytes(16))
        self.directory = Directory(
            own=Own(peer=identity.peer_id, instance=config.instance, first_sequence=self._own.sequence),
            network=config.network,
            protected=self._is_protected,
            preference=preference,
        )
        self.standing.restore(saved.bans, now, now_ms)
        self.directory.restore({PeerId(peer): floor for peer, floor in saved.floors.items()}, now)
        self._hearing = Hearing(
            self.directory,
            self.standing,
            on_verdict=self._enforce,
            on_duplicate=config.on_duplicate,
            on_believed=self._keeper.heard,
            preference=preference,
        )
        self._finder = Finder(transport, self.directory, self._hearing, self._own, rng, config.wall_clock_ms)
        self.self_topic = SelfTopic(
            transport,
            identity,
            config.network,
            config.wall_clock_ms,
            OwnSummary(rng, self._own.sequence),
            ClaimsHearing(
                Claims(identity.peer_id, config.network, self._is_protected), self._hearing, preference, self._is_known
            ),
        )
        self._woken = trio.Event()  # the next advert may be due earlier than it was
        self._joins = trio.open_memory_channel[PeerId](JOINS_WAITING_MAX)
        self._cuts = trio.open_memory_channel[PeerId](DISCONNECTS_WAITING_MAX)

    # --- for the node ---

    def offer(self, capacity: Capacity) -> None:
        """Say from now on that this node has this capacity; told soon if it matters, else at the next refresh.

        After `withdraw` it is ignored. Raises: LocalProtocolError (out of bounds; names the field).
        """
        self._own.offer(checked_capacity(capacity), trio.current_time())
        self._woken.set()

    def offer_summary(self, summary: SelfSummary) -> None:
        """Say this of the node's own state when it is due: seldom, however often it is offered (gossip/summaries.py).

        After `withdraw` it is ignored. Raises: LocalProtocolError (out of bounds; names the field).
        """
        self.self_topic.offer(summary)

    async def withdraw(self) -> None:
        """Tell the others that this node takes no more requests, for good. At most GOODBYE_S, also when cancelled."""
        self._own.withdraw()
        self.self_topic.own.withdraw()
        with trio.move_on_after(GOODBYE_S, shield=True):
            await self._publish()

    def rank(self, need: Need) -> tuple[Candidate, ...] | WhyNot:
        """Peers to ask, best first, or why there is none."""
        now = trio.current_time()
        claims = self.self_topic.claims
        return rank(need, self.directory.offers(now), self.observations, now, self._rng, claims.hint)

    async def find(self, model: str | None) -> bool:
        """Ask peers who serves a model that no known peer serves, None: any; whether some are known then.

        Takes a few seconds at most.
        """
        return await self._finder.find(model)

    def blame(self, peer: PeerId, fault: Fault, reason: str) -> None:
        """A peer did wrong: its standing falls, and it is cut off when that says so."""
        self._hearing.blame(peer, fault, reason, trio.current_time())

    def is_in_good_standing(self, peer: PeerId) -> bool:
        """Whether the peer has served this node, or done it another good turn, and no fault of its is fresh."""
        score = self.standing.score(peer, trio.current_time())
        return score > 0.0 or (score > FORGIVEN and self.observations.is_proven(peer))

    def statistics(self) -> GossipStatistics:
        """A snapshot of the counters."""
        now = trio.current_time()
        return GossipStatistics(
            adverts_sent=self._own.times_said,
            directory=self.directory.statistics(now),
            standing=self.standing.statistics(now),
            drops=dict(self._hearing.drops),
            flow=self._hearing.flow.statistics(),
            claims=self.self_topic.statistics(),
            duplicate_identity=self._hearing.duplicate,
        )

    def file_status(self) -> FileStatus | None:
        """How the state file fares; None when there is none."""
        return self._keeper.status()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Speak and listen until cancelled; then the state is saved. Opens its own nursery."""
        self._save(self._state(RESERVED))  # before the first sequence is used
        try:
            async with trio.open_nursery() as nursery:
                self._transport.watch(self._peer_changed)
                self._transport.serve(ADVERTS_PROTOCOL, self._hand_on)
                self._transport.serve(FIND_PROTOCOL, self._finder.answer)
                await self._transport.subscribe(advert_topic(self._config.network), self._heard)
                await self.self_topic.open()
                for peer in self._transport.peers():
                    self._peer_changed(PeerChange(peer=peer, connected=True))
                for _ in range(PULLERS):
                    nursery.start_soon(self._pull_from_the_joined)
                nursery.start_soon(self._finder.sample_now_and_then)
                nursery.start_soon(self._speak)
                nursery.start_soon(self.self_topic.speak)
                nursery.start_soon(self._enforce_verdicts)
                nursery.start_soon(self._keep_house)
                task_status.started()
        finally:
            self.self_topic.close()
            self._save(self._state(0))
            self._keeper.close()

    # --- speaking ---

    async def _speak(self) -> None:
        while True:
            self._woken = trio.Event()
            with trio.move_on_at(self._own.pace.deadline()):
                await self._woken.wait()
            if trio.current_time() >= self._own.pace.deadline():
                await self._publish()

    async def _publish(self) -> None:
        now_ms, network = self._config.wall_clock_ms(), self._config.network
        capacity, sequence = self._own.say(trio.current_time(), now_ms)
        advert = Advert(
            instance=self._config.instance,
            started_ms=self._own.started_ms,
            agent=self._config.agent,
            addresses=self._transport.addresses()[:ADDRESSES_MAX],
            capacity=capacity,
        )
        raw = seal_advert(
            self._identity,
            advert,
            network=network,
            sequence=sequence,
            time_ms=now_ms,
            life_ms=self._hearing.flow.life_ms,
        )
        self._own.raw = raw
        try:
            await self._transport.publish(advert_topic(network), raw)
        except P2PError as exc:  # best effort: the next refresh says it again
            self._drop("publish_failed")
            _log.warning("an advert could not be published: %s", exc)

    # --- listening ---

    def _heard(self, publisher: PeerId, raw: bytes) -> bool:
        """Gossip came; True when it is worth forwarding. The transport has ears for a moment after the last save."""
        if self._keeper.is_closed:
            return False
        return self._hearing.heard(publisher, raw, trio.current_time(), self._config.wall_clock_ms())

    # --- peers that come and go ---

    def _peer_changed(self, change: PeerChange) -> None:
        now = trio.current_time()
        self.observations.connected(change.peer, change.connected, now)
        if not change.connected:
            if change.breach:
                self._hearing.blame(change.peer, Fault.MALFORMED, change.breach, now)
            return
        address = self._transport.remote_address(change.peer)
        self.observations.located(change.peer, network_of(address))
        verdict = self.standing.seen_at(change.peer, address, now)
        if verdict is not Verdict.FINE:
            self._hearing.enforce(change.peer, verdict, "what it did before")
            return
        self._finder.peer_came()
        self._own.pace.joined(now, len(self._transport.peers()))
        self._woken.set()
        try:
            self._joins[0].send_nowait(change.peer)
        except trio.WouldBlock:
            self._drop("joins_waiting")

    async def _pull_from_the_joined(self) -> None:
        async for peer in self._joins[1].clone():
            with trio.move_on_after(PULL_S) as scope:
                try:
                    await self._pull(peer)
                except P2PError:  # gone again, or of another kind: gossip goes on without its help
                    self._drop("pull_failed")
            if scope.cancelled_caught:
                self._drop("pull_too_slow")

    async def _pull(self, peer: PeerId) -> None:
        """Ask a peer for the adverts it knows. If cancelled, those that came are kept."""
        stream = await self._transport.open_stream(peer, ADVERTS_PROTOCOL)
        try:
            for _ in range(ADVERTS_HANDED_MAX + 1):
                raw = await stream.receive()
                self._hearing.handed(peer, raw, trio.current_time(), self._config.wall_clock_ms())
        except StreamClosed:
            return
        finally:
            await stream.reset()

    async def _hand_on(self, stream: Stream) -> None:
        """A peer asks what we know: our own advert first, then those of others, latest first."""
        now = trio.current_time()
        if not self._hearing.may_ask(stream.peer, now):
            await stream.reset()
            return
        with trio.move_on_after(PULL_S):
            known = self.directory.recent(now, ADVERTS_HANDED_MAX)
            for raw in [self._own.raw, *known] if self._own.raw else known:
                await stream.send(raw)
            await stream.close()

    def _is_protected(self, peer: PeerId) -> bool:
        return peer in self._transport.peers() or self.observations.is_proven(peer)

    def _is_known(self, peer: PeerId, now: float) -> bool:
        return peer in self._transport.peers() or self.directory.offer_of(peer, now) is not None

    # --- effects ---

    def _enforce(self, peer: PeerId, verdict: Verdict, reason: str) -> None:
        _log.warning("%s: %s after %s", peer, verdict.value, reason)
        if verdict is Verdict.BANNED:
            self._keeper.soon()
            self.self_topic.claims.forget(peer)
        if peer in self._transport.peers():
            try:
                self._cuts[0].send_nowait(peer)
            except trio.WouldBlock:
                self._drop("disconnects_waiting")

    async def _enforce_verdicts(self) -> None:
        async for peer in self._cuts[1]:
            self._drop("disconnected")
            with trio.move_on_after(DISCONNECT_S):
                await self._transport.disconnect(peer)

    async def _keep_house(self) -> None:
        while True:
            await trio.sleep(TICK_S)
            now = trio.current_time()
            self.directory.tick(now)
            self._hearing.flow.tick(now)
            self.self_topic.claims.tick(now)
            self._own.pace.stretch = self.self_topic.own.stretch = self._hearing.flow.stretch
            if self._keeper.take_turn(now):
                await trio.to_thread.run_sync(self._save, self._state(RESERVED))

    def _state(self, reserved: int) -> SavedState:
        """reserved: how many sequences may be used before the next save."""
        self._keeper.turn()
        now, now_ms = trio.current_time(), self._config.wall_clock_ms()
        floors = {str(peer): floor for peer, floor in self.directory.floors().items()}
        bans = self.standing.saved_bans(now, now_ms)
        sequence = max(self._own.sequence, self.self_topic.own.sequence) + reserved
        return SavedState(sequence=sequence, floors=floors, bans=bans)

    def _save(self, state: SavedState) -> None:
        """Blocks for the disk. A full disk costs the memory of a restart, not the node."""
        if not self._keeper.save(state):
            self._drop("save_failed")

    def _drop(self, reason: str) -> None:
        self._hearing.drops[reason] += 1
