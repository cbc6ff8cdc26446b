"""The one loop of gossip: says what this node offers, hears what others offer, acts on what is believed of them.

Rules: a shell; what to believe, when to speak and whom to ask is decided in the cores it owns (directory, standing,
observations, pace). Everything a peer sends passes its token bucket before its signature is looked at. A peer that
has just connected is asked for the adverts it knows (ADVERTS_PROTOCOL), so that a newcomer need not wait for the next
refresh of everybody. Effects are sync or go through bounded channels; what does not fit is dropped and counted.
Source: NETWORK.md "Our rules" and "Protocols"; SECURITY.md P5, P9-P12, section 6.
"""

from __future__ import annotations

import logging
import random
import re
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import trio

from crypto.disk import SYSTEM, FileStatus, System
from crypto.identity import Identity, PeerId
from gossip.directory import Directory, DirectoryStatistics, Outcome, Receipt
from gossip.messages import ADDRESSES_MAX, Advert, Capacity, advert_topic, checked_capacity, seal_advert
from gossip.observations import Observations
from gossip.pace import OwnAdvert, Quota
from gossip.routing import Candidate, Need, WhyNot, rank
from gossip.saved import RESERVED, Keeper, SavedState
from gossip.standing import Fault, Standing, StandingStatistics, Verdict
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
OVER_QUOTA_BLAMES = 10  # for one sample

_log = logging.getLogger(__name__)

# Whose fault a refused advert is, and how grave; what is not here is nobody's.
FAULTS: dict[Outcome, Fault] = {
    Outcome.MALFORMED: Fault.MALFORMED,
    Outcome.WRONG_NETWORK: Fault.MALFORMED,
    Outcome.BAD_SIGNATURE: Fault.FATAL,
    Outcome.WRONG_SENDER: Fault.FATAL,
    Outcome.EQUIVOCATION: Fault.FATAL,
    Outcome.TWO_INSTANCES: Fault.MALFORMED,
}
FRESH = frozenset({Outcome.ACCEPTED, Outcome.DUPLICATE, Outcome.STALE})


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
        self.directory = Directory(
            own_peer=identity.peer_id,
            own_instance=config.instance,
            own_first_sequence=self._own.sequence,
            network=config.network,
            protected=self._is_protected,
        )
        self.standing.restore(saved.bans, now, now_ms)
        self.directory.restore({PeerId(peer): floor for peer, floor in saved.floors.items()}, now)
        self._quota = Quota()
        self._counts: Counter[str] = Counter()
        self._duplicate: str | None = None
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

    async def withdraw(self) -> None:
        """Tell the others that this node takes no more requests, for good. At most GOODBYE_S, also when cancelled."""
        self._own.withdraw()
        with trio.move_on_after(GOODBYE_S, shield=True):
            await self._publish()

    def rank(self, need: Need) -> tuple[Candidate, ...] | WhyNot:
        """Peers to ask, best first, or why there is none."""
        now = trio.current_time()
        return rank(need, self.directory.offers(now), self.observations, now, self._rng)

    def blame(self, peer: PeerId, fault: Fault, reason: str) -> None:
        """A peer did wrong: its standing falls, and it is cut off when that says so."""
        verdict = self.standing.blame(peer, fault, trio.current_time(), reason)
        if verdict is not Verdict.FINE:
            _log.warning("%s: %s after %s", peer, verdict.value, reason)
            self._enforce(peer, verdict)

    def statistics(self) -> GossipStatistics:
        """A snapshot of the counters."""
        now = trio.current_time()
        return GossipStatistics(
            adverts_sent=self._counts["sent"],
            directory=self.directory.statistics(now),
            standing=self.standing.statistics(now),
            drops={name.removeprefix("drop:"): n for name, n in self._counts.items() if name.startswith("drop:")},
            duplicate_identity=self._duplicate,
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
                await self._transport.subscribe(advert_topic(self._config.network), self._heard)
                for peer in self._transport.peers():
                    self._peer_changed(PeerChange(peer=peer, connected=True))
                for _ in range(PULLERS):
                    nursery.start_soon(self._pull_from_the_joined)
                nursery.start_soon(self._speak)
                nursery.start_soon(self._enforce_verdicts)
                nursery.start_soon(self._keep_house)
                task_status.started()
        finally:
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
        raw = seal_advert(self._identity, advert, network=network, sequence=sequence, time_ms=now_ms)
        self._own.raw = raw
        self._counts["sent"] += 1
        try:
            await self._transport.publish(advert_topic(network), raw)
        except P2PError as exc:  # best effort: the next refresh says it again
            self._drop("publish_failed")
            _log.warning("an advert could not be published: %s", exc)

    # --- listening ---

    def _heard(self, publisher: PeerId, raw: bytes) -> bool:
        """Gossip came; True when it is worth forwarding."""
        now = trio.current_time()
        if self.standing.verdict(publisher, now) is Verdict.BANNED:
            return self._drop("banned")
        is_stranger = self.directory.offer_of(publisher, now) is None
        refusal = self._quota.refusal(publisher, is_stranger=is_stranger, now=now)
        if refusal == "over_quota" and self._quota.sampled(publisher, now):
            return self._heard_over_quota(publisher, raw, now)
        if refusal:
            return self._drop(refusal)
        return self._take(publisher, raw, now)

    def _heard_over_quota(self, publisher: PeerId, raw: bytes, now: float) -> bool:
        """Look at one of the many: only who speaks too much now is to blame, not whom others replay."""
        receipt = self._receive(raw, publisher, now)
        if receipt.outcome in FRESH:
            for _ in range(OVER_QUOTA_BLAMES):
                self.blame(publisher, Fault.OVER_QUOTA, "more adverts than its quota")
        else:
            self._judge(receipt, publisher)
        return self._drop("over_quota")

    def _take(self, publisher: PeerId, raw: bytes, now: float) -> bool:
        receipt = self._receive(raw, publisher, now)
        self._judge(receipt, publisher)
        return receipt.outcome is Outcome.ACCEPTED

    def _receive(self, raw: bytes, publisher: PeerId | None, now: float) -> Receipt:
        """Take an advert in; what is believed once is not believed again, though the process be killed now."""
        receipt = self.directory.receive(raw, publisher=publisher, now=now, now_ms=self._config.wall_clock_ms())
        believed = receipt.peer if receipt.outcome is Outcome.ACCEPTED else None
        if believed is not None and not self._keeper.heard(believed, receipt.sequence):
            self._drop("not_kept_over_a_kill")
        return receipt

    def _judge(self, receipt: Receipt, came_from: PeerId) -> None:
        if receipt.outcome is Outcome.DUPLICATE_IDENTITY:
            self._duplicate = receipt.detail
            self._config.on_duplicate(receipt.detail)
        fault = FAULTS.get(receipt.outcome)
        if fault is not None:
            self.blame(receipt.peer or came_from, fault, receipt.detail or receipt.outcome.value)

    # --- peers that come and go ---

    def _peer_changed(self, change: PeerChange) -> None:
        now = trio.current_time()
        self.observations.connected(change.peer, change.connected, now)
        if not change.connected:
            return
        verdict = self.standing.seen_at(change.peer, self._transport.remote_address(change.peer), now)
        if verdict is not Verdict.FINE:
            self._enforce(change.peer, verdict)
            return
        self._own.pace.joined(now)
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
                now = trio.current_time()
                receipt = self._receive(raw, None, now)
                if receipt.peer is not None and self.standing.verdict(receipt.peer, now) is Verdict.BANNED:
                    self.directory.forget(receipt.peer)
                self._judge(receipt, peer)
        except StreamClosed:
            return
        finally:
            await stream.reset()

    async def _hand_on(self, stream: Stream) -> None:
        """A peer asks what we know: our own advert first, then those of others, latest first."""
        now = trio.current_time()
        if not self._quota.may_ask(stream.peer, now):
            self._drop("asked_too_often")
            await stream.reset()
            return
        with trio.move_on_after(PULL_S):
            known = self.directory.recent(now, ADVERTS_HANDED_MAX)
            for raw in [self._own.raw, *known] if self._own.raw else known:
                await stream.send(raw)
            await stream.close()

    def _is_protected(self, peer: PeerId) -> bool:
        return peer in self._transport.peers() or self.observations.is_proven(peer)

    # --- effects ---

    def _enforce(self, peer: PeerId, verdict: Verdict) -> None:
        if verdict is Verdict.BANNED:
            self.directory.forget(peer)
            self._keeper.soon()
        if peer in self._transport.peers():
            try:
                self._cuts[0].send_nowait(peer)
            except trio.WouldBlock:
                self._drop("disconnects_waiting")

    async def _enforce_verdicts(self) -> None:
        async for peer in self._cuts[1]:
            self._counts["disconnected"] += 1
            with trio.move_on_after(DISCONNECT_S):
                await self._transport.disconnect(peer)

    async def _keep_house(self) -> None:
        while True:
            await trio.sleep(TICK_S)
            now = trio.current_time()
            self.directory.tick(now)
            if self._keeper.take_turn(now):
                await trio.to_thread.run_sync(self._save, self._state(RESERVED))

    def _state(self, reserved: int) -> SavedState:
        """reserved: how many sequences may be used before the next save."""
        self._keeper.turn()
        now, now_ms = trio.current_time(), self._config.wall_clock_ms()
        floors = {str(peer): floor for peer, floor in self.directory.floors().items()}
        bans = self.standing.saved_bans(now, now_ms)
        return SavedState(sequence=self._own.sequence + reserved, floors=floors, bans=bans)

    def _save(self, state: SavedState) -> None:
        """Blocks for the disk. A full disk costs the memory of a restart, not the node."""
        if not self._keeper.save(state):
            self._drop("save_failed")

    def _drop(self, reason: str) -> bool:
        self._counts[f"drop:{reason}"] += 1
        return False
