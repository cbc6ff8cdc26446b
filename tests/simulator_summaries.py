"""What a simulated peer says of its own state, and what it makes of what others say: gossip/self_topic.py's part.

Rules: when to speak, what to keep and what to pass on are gossip's own cores; here is only the engine that is told of.
A liar says that it is idle, quick and sure, whatever it is.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from crypto.identity import PeerId
from gossip.claims import Claims
from gossip.claims_hearing import ClaimsHearing
from gossip.routing import QUEUE_PER_SLOT
from gossip.summaries import OwnSummary, SelfSummary, seal_summary
from gossip.view import Preference
from tests.simulator_net import Timer

if TYPE_CHECKING:
    from tests.simulator_node import Process

LIE = SelfSummary(
    revision="r1", uptime_s=1e9, boot_count=1, loop_lag_ms=0.0, busy=0.0, queued=0.0, first_token_s=0.0,
    entropy_nats=0.0, margin=1.0, calibration_error=0.0, latency_skill=1.0, load_skill=1.0, success_mean=1.0,
    success_least=1.0, head_id=1, head_hash=bytes(32),
)  # fmt: skip
SAMPLE_TURNS = 5  # of a second: how often a node's own state is looked at


class SummaryBytes(bytes):
    """A summary on a wire, which has one kind of gossip only: what libp2p's topic says."""


class SelfTalk:
    """One process's part in the topic of summaries."""

    def __init__(self, process: Process, preference: Preference) -> None:
        self._process = process
        rng = random.Random(f"{process.peer_id} {process.peer.lives}")  # its own: what is said moves no other chance
        self.own = OwnSummary(rng, process.own_advert.sequence)
        claims = Claims(process.peer_id, "sim", protected=process.is_protected)
        self.hearing = ClaimsHearing(claims, process.hearing, preference, self._is_known)
        self._speech: Timer | None = None
        self._turns = 0

    @property
    def claims(self) -> Claims:
        return self.hearing.claims

    def turn(self) -> None:
        """Once a second."""
        self.claims.tick(self._process.now)
        self.own.stretch = self._process.hearing.flow.stretch
        self._turns += 1
        if self._process.peer.tells and self._turns % SAMPLE_TURNS == 0:
            self.own.offer(self._summary(), self._process.now)
            self._plan()

    def heard(self, publisher: PeerId, raw: bytes) -> bool:
        return self.hearing.heard(publisher, raw, self._process.now, self._process.now_ms)

    def _summary(self) -> SelfSummary:
        process, engine = self._process, self._process.hosting
        if process.peer.actor in ("liar", "sybil", "black_hole", "staller"):
            return LIE
        head = random.Random(f"{process.peer_id} {self._turns}").randbytes(32)
        if engine is None:
            return SelfSummary(uptime_s=process.now, boot_count=process.peer.lives, head_id=self._turns, head_hash=head)
        return SelfSummary(
            revision="r1",
            uptime_s=process.now,
            boot_count=process.peer.lives,
            loop_lag_ms=1.0,
            busy=len(engine.running) / engine.slots,
            queued=min(1.0, len(engine.waiting) / engine.slots / QUEUE_PER_SLOT),
            first_token_s=engine.first_token_s,
            entropy_nats=2.5,
            margin=0.4,
            calibration_error=0.05,
            latency_skill=0.1,
            load_skill=0.1,
            success_mean=1.0,
            success_least=1.0,
            head_id=self._turns,
            head_hash=head,
        )

    def _plan(self) -> None:
        if self._speech is not None:
            self._speech.cancel()
        due = self.own.deadline()
        if due < float("inf"):
            self._speech = self._process.after(max(0.0, due - self._process.now), self._speak)

    def _speak(self) -> None:
        process = self._process
        if process.now >= self.own.deadline():
            life_ms = self.own.life_ms
            summary, sequence = self.own.say(process.now, process.now_ms)
            raw = seal_summary(
                process.peer.identity,
                summary,
                network="sim",
                sequence=sequence,
                time_ms=process.now_ms,
                life_ms=life_ms,
            )
            process.net.gossip(list(process.links.values()), process, SummaryBytes(raw), process.peer_id)
        self._plan()

    def _is_known(self, peer: PeerId, now: float) -> bool:
        return peer in self._process.links or self._process.directory.offer_of(peer, now) is not None
