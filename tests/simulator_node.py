"""One simulated peer: the cores of a real node, driven by timed events in place of tasks.

Rules: what decides here is the node's own code (directory, standing, hearing, observations, routing, pursuit, judge,
rpc, adverts' pace, wire forms); this file only carries bytes and time between them, and stands in for the engine. A
process dies with all it has in memory; its disk keeps what was saved last.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from crypto.identity import Identity, PeerId
from gossip.directory import Directory, Own
from gossip.hearing import Hearing
from gossip.messages import Advert, Capacity, ModelKind, ModelOffer, seal_advert
from gossip.observations import Observations
from gossip.pace import OwnAdvert
from gossip.routing import Candidate, Need, WhyNot, rank
from gossip.saved import RESERVED, SAVE_S, SavedState
from gossip.standing import Standing, Verdict
from gossip.view import Preference
from node.errors import NoRoom, RequestError
from node.loading import Loading
from node.work import (
    AnswerItem,
    Finished,
    GenerateWork,
    Started,
    from_wire,
    to_wire,
)
from p2p.address import network_of
from p2p.errors import P2PError, Refused, RemoteError, RemoteProtocolError, Unreachable
from p2p.roster import IDLE_S
from p2p.rpc import CALLS_MAX, Call, CallId, Cancel, Credit, End, Error, Item, Role, Rpc, units_of
from tests.simulator_blob import Conversation, Fetch, serve_blob
from tests.simulator_engine import REVISION, Engine, Job
from tests.simulator_finder import Finder
from tests.simulator_net import Link, Loop, Net, Timer, Waiting
from tests.simulator_request import Ask, RemoteAsk
from tests.simulator_summaries import SelfTalk, SummaryBytes

START_MS = 1_800_000_000_000
MODEL, CONTEXT = "tale", 2_000
DEGREE, MESH = 5, 6
PLACES = 64  # connections of one peer
SEEN_MAX = 8_192


@dataclass(slots=True, eq=False)
class Peer:
    """What outlives a process: the identity, the disk, the machine's clock, and what kind of peer it is."""

    identity: Identity
    serves: bool
    actor: str = "honest"  # honest | black_hole | staller | liar | flooder | equivocator | sybil
    address: str = ""  # a multiaddr, where others see it
    skew_ms: int = 0
    model: str = MODEL
    tells: bool = True  # of its own state
    disk: SavedState = field(default_factory=SavedState)
    lives: int = 0


@dataclass(slots=True, eq=False)
class Serving:
    """A peer's call that we answer; items wait here for credit."""

    call_id: CallId
    job: Job | None = None
    pending: deque[Any] = field(default_factory=deque)
    end: Any = None


class Process:
    """One life of a peer. It is the Surroundings of its requests."""

    def __init__(self, peer: Peer, net: Net, rng: random.Random, everybody: tuple[PeerId, ...]) -> None:
        self.peer, self.net, self.rng, self._everybody = peer, net, rng, everybody
        self.peer_id: PeerId = peer.identity.peer_id
        self.loop: Loop = net.loop
        self._zero_ms = START_MS + peer.skew_ms
        self.alive, self.is_silent = True, False
        self.backlog: list[Waiting] | None = None
        self.links: dict[PeerId, Link] = {}
        self.expected: dict[bytes, float] = {}
        self.asks: dict[int, Ask] = {}
        self.fetches: list[Fetch] = []
        self.paused_asks: set[int] = set()  # requests whose door was paused meanwhile
        self.violations: list[str] = []
        peer.lives += 1
        now_ms = self.now_ms
        sequence = max(peer.disk.sequence, now_ms)
        self.own_advert = OwnAdvert(rng, started_ms=now_ms, sequence=sequence)
        self.instance = rng.randbytes(16).hex()
        self.observations, self.standing = Observations(), Standing()
        self.standing.restore(peer.disk.bans, self.now, now_ms)
        preference = Preference(rng.randbytes(16))
        self.directory = Directory(
            own=Own(peer=self.peer_id, instance=self.instance, first_sequence=sequence),
            network="sim",
            protected=self.is_protected,
            preference=preference,
        )
        self.directory.restore({PeerId(each): floor for each, floor in peer.disk.floors.items()}, self.now)
        self.hearing = Hearing(
            self.directory,
            self.standing,
            on_verdict=self._cut_off,
            on_duplicate=self.violations.append,
            preference=preference,
        )
        self.self_talk = SelfTalk(self, preference)
        self.finder = Finder(self)
        self.loading = None
        self.hosting: Engine | None = Engine(self, peer.model) if peer.serves else None
        self.seen: dict[bytes, None] = {}  # oldest first
        self._callers: dict[Link, tuple[Rpc, dict[int, RemoteAsk]]] = {}
        self._callees: dict[Link, tuple[Rpc, dict[int, Serving]]] = {}
        self._speech: Timer | None = None
        self._saved_at = self.now

    # --- time ---

    @property
    def now(self) -> float:
        return self.loop.now

    @property
    def now_ms(self) -> int:
        return self._zero_ms + int(self.loop.now * 1000)

    def after(self, seconds: float, call: Callable[[], None]) -> Timer:
        return self.loop.after(seconds, call, self)

    # --- what a request sees ---

    @property
    def own(self) -> PeerId:
        return self.peer_id

    def rank(self, need: Need) -> tuple[Candidate, ...] | WhyNot:
        claims = self.self_talk.claims
        return rank(need, self.directory.offers(self.now), self.observations, self.now, self.rng, claims.hint)

    loading: Loading | None = None

    def is_protected(self, peer: PeerId) -> bool:
        return peer in self.links or self.observations.is_proven(peer)

    def served_names(self) -> set[str]:
        return {model.name for model in self.directory.models(self.now)}

    # --- life ---

    def begin(self) -> None:
        self._save()  # before the first sequence is used
        self.offer()
        self._keep_house()
        self.finder.begin()

    def pause(self) -> None:
        """Nothing happens here until `resume`."""
        self.backlog = []
        self.paused_asks |= self.asks.keys()

    def resume(self) -> None:
        """After a pause: what waited happens now, in order."""
        backlog, self.backlog = self.backlog or [], None
        for timer, call, about in backlog:
            if self.alive and not (timer is not None and timer.cancelled):
                call(*about)

    def _keep_house(self) -> None:
        self.directory.tick(self.now)
        self.hearing.flow.tick(self.now)
        self.own_advert.pace.stretch = self.hearing.flow.stretch
        self.self_talk.turn()
        if self.now >= self._saved_at + SAVE_S:
            self._save()
        for link in self._idle():
            self.net.drop(link)
        if len(self.links) < DEGREE:
            there = self.rng.choice(self._everybody)
            if there != self.peer_id and there not in self.links:
                self.net.dial(self, there, lambda _link: None)
        self.after(1.0, self._keep_house)

    def _idle(self) -> list[Link]:
        """p2p/roster.py's choice of whom to let go."""
        surplus = len(self.links) - DEGREE
        if surplus <= 0:
            return []
        idle = [
            link
            for link in self.links.values()
            if link.lent_to == self.peer_id and self.now - link.used_at >= IDLE_S and not self._is_busy(link)
        ]
        return sorted(idle, key=lambda link: link.used_at)[:surplus]

    def _is_busy(self, link: Link) -> bool:
        caller, callee = self._callers.get(link), self._callees.get(link)
        return bool(caller and caller[0].unfinished) or bool(callee and callee[1])

    def _save(self) -> None:
        """gossip/service.py's state; what is believed between two saves is lost here, as when the power goes."""
        self._saved_at = self.now
        self.peer.disk = SavedState(
            sequence=max(self.own_advert.sequence, self.self_talk.own.sequence) + RESERVED,
            floors=dict[str, int](self.directory.floors()),  # type: ignore[arg-type]  # a PeerId is a str
            bans=self.standing.saved_bans(self.now, self.now_ms),
        )

    # --- links ---

    def accepts(self, peer: PeerId) -> bool:
        return self.standing.verdict(peer, self.now) is Verdict.FINE and len(self.links) < PLACES

    def connected(self, link: Link) -> None:
        peer = link.other(self).peer_id
        self.observations.connected(peer, True, self.now)
        address = self.net.addresses.get(peer)
        self.observations.located(peer, network_of(address))
        if (verdict := self.standing.seen_at(peer, address, self.now)) is not Verdict.FINE:
            self.hearing.enforce(peer, verdict, "what it did before")
            return
        self.own_advert.pace.joined(self.now, len(self.links))
        self._plan_speech()
        self.net.send(link, self, "pull", b"")

    def lost(self, link: Link) -> None:
        self.observations.connected(link.other(self).peer_id, False, self.now)
        self.finder.lost(link)
        for fetch in list(self.fetches):
            fetch.left(link.other(self).peer_id, "the connection broke")
        self._broken(link, Unreachable("the connection broke"))

    def take(self, link: Link, kind: str, raw: bytes, about: object) -> None:
        match kind:
            case "pull":
                if self.peer.actor == "sybil":
                    for each in self.net.told_by_sybils[:256]:
                        self.net.send(link, self, "pulled", each)
                elif self.hearing.may_ask(link.other(self).peer_id, self.now):
                    known = self.directory.recent(self.now, 256)
                    for each in [self.own_advert.raw, *known] if self.own_advert.raw else known:
                        self.net.send(link, self, "pulled", each)
            case "pulled":
                self.hearing.handed(link.other(self).peer_id, raw, self.now, self.now_ms)
            case "find":
                self.finder.asked(link, raw, about)
            case "found":
                self.finder.answered(link, raw, about)
            case "blob_ask" | "blob_range":
                serve_blob(self, link, kind, raw, about)
            case "blob_answer":
                assert isinstance(about, Conversation)
                about.fetch.answered(about, raw)
            case "call":
                self._called(link, raw)
            case "answer":
                self._answered(link, raw)

    def _cut_off(self, peer: PeerId, verdict: Verdict, reason: str) -> None:
        self.net.history.note("verdict", self.peer_id[-6:], peer[-6:], verdict.value, reason[:40])
        if (link := self.links.get(peer)) is not None:
            self.net.drop(link)

    # --- gossip ---

    def offer(self) -> None:
        self.own_advert.offer(self.capacity(), self.now)
        self._plan_speech()

    def capacity(self) -> Capacity:
        if self.hosting is None:
            return Capacity(accepting=False)
        offer = ModelOffer(
            name=self.peer.model, revision=REVISION, kind=ModelKind.CAUSAL, context_tokens=CONTEXT, dtype="float32"
        )
        if self.peer.actor in ("liar", "sybil"):
            return Capacity(
                models=(offer,), slots_total=512, slots_free=512, kv_tokens_free=1 << 30, decode_tok_s=1e6,
                prefill_tok_s=1e6, device="cuda", accepting=True,
            )  # fmt: skip
        engine = self.hosting
        return Capacity(
            models=(offer,),
            slots_total=engine.slots,
            slots_free=engine.slots - len(engine.running),
            queue_length=len(engine.waiting),
            kv_tokens_free=100_000,
            decode_tok_s=1 / engine.step_s,
            prefill_tok_s=1_000.0,
            device="cpu",
            accepting=True,
        )

    def _plan_speech(self) -> None:
        if self._speech is not None:
            self._speech.cancel()
        due = self.own_advert.pace.deadline()
        if due < float("inf"):
            self._speech = self.after(max(0.0, due - self.now), self._speak)

    def _speak(self) -> None:
        if self.now >= self.own_advert.pace.deadline():
            self.publish()
        self._plan_speech()

    def publish(self) -> None:
        capacity, sequence = self.own_advert.say(self.now, self.now_ms)
        raw = self.sealed(capacity, sequence)
        self.own_advert.raw = raw
        if self.peer.actor == "sybil":
            self.net.told_by_sybils = [raw, *self.net.told_by_sybils[:255]]
        links = list(self.links.values())
        if self.peer.actor != "equivocator":
            return self.net.gossip(links, self, raw, self.peer_id)
        other = self.sealed(Capacity(models=capacity.models, accepting=True, slots_total=99), sequence)
        for number, link in enumerate(links):  # a second statement under the same sequence
            self.net.gossip((link,), self, raw if number % 2 else other, self.peer_id)

    def sealed(self, capacity: Capacity, sequence: int) -> bytes:
        advert = Advert(
            instance=self.instance,
            started_ms=self.own_advert.started_ms,
            agent="sim/1",
            addresses=(self.peer.address,),
            capacity=capacity,
        )
        return seal_advert(
            self.peer.identity,
            advert,
            network="sim",
            sequence=sequence,
            time_ms=self.now_ms,
            life_ms=self.hearing.flow.life_ms,
        )

    def heard(self, link: Link, raw: bytes, publisher: PeerId) -> None:
        """Gossip came."""
        seen = self.seen
        if raw in seen:
            return
        seen[raw] = None
        if len(seen) > SEEN_MAX:
            del seen[next(iter(seen))]
        if publisher == self.peer_id:
            return
        if isinstance(raw, SummaryBytes):
            is_wanted = self.self_talk.heard(publisher, raw)
        else:
            is_wanted = self.hearing.heard(publisher, raw, self.now, self.now_ms)
        if not is_wanted:
            return
        links = list(self.links.values())
        begin = int(self.rng.random() * len(links))
        chosen = (links[begin:] + links[:begin])[: MESH + 1]
        self.net.gossip([each for each in chosen if each is not link], self, raw, publisher)

    # --- calls ---

    def call(self, link: Link, method: str, body: Any, asks: RemoteAsk) -> CallId:
        """Raises P2PError."""
        if not link.alive:
            raise Unreachable("the connection broke")
        rpc, calls = self._callers.setdefault(link, (Rpc(Role.CALLER), {}))
        if rpc.unfinished >= CALLS_MAX:
            raise Refused("too many calls")
        call_id, frame = rpc.call(method, body)
        calls[call_id] = asks
        self.net.send(link, self, "call", frame)
        return call_id

    def leave(self, link: Link, call_id: CallId) -> None:
        """We are done with a call; the peer is told."""
        if link not in self._callers:
            return
        rpc, calls = self._callers[link]
        if calls.pop(call_id, None) is not None and (frame := rpc.cancel(call_id)) is not None:
            self.net.send(link, self, "call", frame)

    def _answered(self, link: Link, raw: bytes) -> None:
        if link not in self._callers:
            return
        rpc, calls = self._callers[link]
        try:
            frame = rpc.receive(raw)
        except RemoteProtocolError as exc:
            return self._broken(link, exc)
        asks = calls.get(frame.id) if frame is not None else None
        if frame is None or asks is None:
            return
        if isinstance(frame, Item):
            if (credit := rpc.consumed(CallId(frame.id), units_of(raw))) is not None:
                self.net.send(link, self, "call", credit)
            asks.item(frame.body)
            return
        del calls[frame.id]
        if isinstance(frame, End):
            asks.end(frame.body)
        elif isinstance(frame, Error):
            asks.fail(RemoteError(frame.code, frame.message, retryable=frame.retryable))

    def _called(self, link: Link, raw: bytes) -> None:
        rpc, served = self._callees.setdefault(link, (Rpc(Role.CALLEE), {}))
        try:
            frame = rpc.receive(raw)
        except RemoteProtocolError as exc:
            return self._broken(link, exc)
        if isinstance(frame, Call):
            self._begin(link, frame)
        elif isinstance(frame, Credit) and frame.id in served:
            self._pump(link, served[frame.id])
        elif isinstance(frame, Cancel) and frame.id in served:
            serving = served.pop(frame.id)
            if serving.job is not None and self.hosting is not None:
                self.hosting.remove(serving.job)
            self.net.send(
                link, self, "answer", rpc.error(CallId(frame.id), RemoteError("cancelled", "", retryable=False))
            )

    def _begin(self, link: Link, call: Call) -> None:
        rpc, served = self._callees[link]
        serving = served[call.id] = Serving(CallId(call.id))
        if self.peer.actor in ("black_hole", "staller", "sybil"):
            self.net.asked_of_holes[link.other(self).peer_id, self.peer_id] += 1
            if self.peer.actor == "staller":
                prompt_tokens = len(from_wire(call.body, GenerateWork).tokens or ())
                serving.pending.append(
                    to_wire(
                        Started(served_by=self.peer_id, model=MODEL, revision=REVISION, prompt_tokens=prompt_tokens)
                    )
                )
                self._pump(link, serving)
            return

        def emit(item: AnswerItem | RequestError) -> None:
            if isinstance(item, Finished):
                serving.end = to_wire(item)
            else:
                assert not isinstance(item, RequestError)
                serving.pending.append(to_wire(item))
            self._pump(link, serving)

        try:
            work = from_wire(call.body, GenerateWork)
            if self.hosting is None:
                raise NoRoom("no engine here")
            serving.job = self.hosting.add(work, emit)
        except RequestError as exc:
            del served[call.id]
            error = RemoteError(exc.code, exc.message, retryable=exc.retryable)
            self.net.send(link, self, "answer", rpc.error(serving.call_id, error))

    def _pump(self, link: Link, serving: Serving) -> None:
        if link not in self._callees:
            return
        rpc, served = self._callees[link]
        if serving.call_id not in served:
            return
        while serving.pending:
            frame = rpc.item(serving.call_id, serving.pending[0])
            if frame is None:
                return
            serving.pending.popleft()
            self.net.send(link, self, "answer", frame)
        if serving.end is not None:
            del served[serving.call_id]
            self.net.send(link, self, "answer", rpc.end(serving.call_id, serving.end))

    def _broken(self, link: Link, failure: P2PError) -> None:
        """Nothing is left of the calls on a link."""
        _, served = self._callees.pop(link, (None, {}))
        for serving in served.values():
            if serving.job is not None and self.hosting is not None:
                self.hosting.remove(serving.job)
        _, calls = self._callers.pop(link, (None, {}))
        if isinstance(failure, RemoteProtocolError):
            self.violations.append(f"a breach between honest peers: {failure}")
            self.net.drop(link, self)
        for asks in calls.values():
            asks.fail(failure)

    def leftovers(self) -> list[str]:
        """What should be gone when all is quiet."""
        found = [f"request {number} is open" for number in self.asks]
        if self.hosting is not None and (self.hosting.running or self.hosting.waiting):
            found.append(f"{len(self.hosting.running)} running, {len(self.hosting.waiting)} waiting in the engine")
        found += [f"{rpc.unfinished} calls unfinished" for rpc, _ in self._callers.values() if rpc.unfinished]
        found += [f"{len(served)} calls served" for _, served in self._callees.values() if served]
        return found
