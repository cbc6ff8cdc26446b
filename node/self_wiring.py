"""Builds a node's self-state and memory, starts their tasks, and ends them in order.

Rules: shell; the parts are node/recorder.py (the memory's thread), self_state.py (facts in, events out),
self_sampler.py (asks the parts), self_looks.py (looks at the model) and self_recall.py (questions, vectors). `open` is
around everything that can still be remembered: when it is left the last event, `stop`, says why the node ended, and the
file is closed. A new instrument is started in `hosted`, and gives its facts to `itself.take`. What decides reads
`active` and what was remembered of peers.
Source: docs/ARCHITECTURE.md, "Tree of tasks", "Self-state".
"""

from __future__ import annotations

import logging
import sys
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final, Protocol

import trio

from crypto.identity import Identity, PeerId
from gossip.observations import FULL_REASONS, NEUTRAL_REASONS
from node.collector import importing
from node.config import NodeConfig
from node.errors import NotReady
from node.expectations import expected
from node.facts import Fact
from node.hosting import Hosting
from node.memory_events import ERROR
from node.prediction import Expected
from node.recorder import Recorder
from node.remembered import EVENTS_MAX, KINDS, remembered
from node.remote import Network
from node.request_ended import Ended
from node.retention import Retention
from node.self_recall import Recall
from node.self_sampler import Sampler, Sources
from node.self_state import SelfState
from node.self_summary import self_summary
from node.state import NodeState
from node.store_look import MEMORY_FILE
from p2p.transport import PeerChange

if TYPE_CHECKING:
    from node.self_looks import Looks

REASONS_MAX: Final = 4  # signals that are told
_log = logging.getLogger(__name__)


class Learner(Protocol):
    """Training, as far as the self-state reads it."""

    @property
    def doing(self) -> str:
        """In a word."""

    def merged(self, *, is_last: bool = False) -> Iterable[Fact]:
        """Rounds that changed the model since the last call. is_last: there is no later one."""


class Keeping:
    """What keeps one node's self-state and memory. Make it inside trio."""

    def __init__(self, config: NodeConfig, identity: Identity, network: Network, state: NodeState) -> None:
        self.training: Learner | None = None  # once there is one
        self.looks: Looks | None = None  # once there is a model of this process
        self._network, self._state, self._remembers = network, state, config.remember_peers
        self._folder = config.data_dir
        self._reasons: list[str] = []
        retention = Retention(bytes_max=config.memory_mb * 1_000_000)
        self._recorder = Recorder(config.data_dir / MEMORY_FILE, identity, retention=retention)
        inference = state.inference
        model = config.model if config.upstream_url() is None else config.backend
        self._recall = Recall(self._recorder, lambda: inference.hosting)
        self.itself = SelfState(self._recorder, self._recall, model=model)
        sources = Sources(
            peer_id=network.transport.peer_id,
            data_dir=config.data_dir,
            phase=lambda: state.phase,
            training=lambda: "idle" if self.training is None else self.training.doing,
            tokens_s=lambda: state.recent.told()["tokens_made_per_s"],
            facts=self._facts,
            begun=self._remember_peers,
            sampled=self._tell_peers,
            process=state.process,
            inference=inference,
            peering=network.peering,
            observations=network.gossip.observations,
        )
        self._sampler = Sampler(self.itself, sources)
        state.itself = self.itself
        state.own_files.append(self._recorder.file_status)
        state.on_phase = self._sampler.sample_now
        inference.watcher, inference.remembers_text = self, config.remember_text
        network.transport.watch(self._peer_changed)

    @asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        """The memory is written as long as the block runs, and at its end it is told why it ended."""
        async with trio.open_nursery() as nursery:
            await nursery.start(self._recorder.run)
            try:
                yield
            finally:
                reason = _reason_of(sys.exc_info()[1])
                for fact in self._merges(is_last=True):
                    self.itself.take(fact)
                self.itself.stop(reason or ", ".join(self._reasons) or "order", self._sampler.uptime_s)
                self._recorder.end()

    def start(self, nursery: trio.Nursery) -> None:
        """Start, in this nursery, what runs as long as the node."""
        nursery.start_soon(self._sampler.run)

    def hosted(self, nursery: trio.Nursery) -> None:
        """Start, in this nursery, what needs a model."""
        nursery.start_soon(self._recall.run)
        hosting = self._state.inference.hosting
        if isinstance(hosting, Hosting):
            with importing():
                from node.self_looks import Looks  # torch

            self.looks = Looks(hosting, self.itself.take, self._folder, state=lambda: self.itself.state)
            self._state.own_files.append(self.looks.file)
            nursery.start_soon(self.looks.run)

    def told_to_stop(self, signal: str) -> None:
        """A signal came."""
        if len(self._reasons) < REASONS_MAX:
            self._reasons.append(signal)

    def look(self) -> None:
        """To be called every second."""
        self._sampler.look()

    def banned(self, peer: PeerId, reason: str) -> None:
        """A peer was banned here."""
        self.itself.peer(peer, "banned", text=reason)

    # --- what decides ---

    def active(self) -> Expected | None:
        """The requests that the node expects to be active now; None: it foretells none, or not well."""
        return expected(self.itself, "active_requests", self._recorder.clock_ms())

    def crowd(self) -> float:
        """As many of them as there will be at least; 0: it is not known."""
        return 0.0 if (active := self.active()) is None else active.low

    def _facts(self) -> Iterator[Fact]:
        """What was measured since the last sample by parts that are asked."""
        yield from self._merges()
        generated = None if self.looks is None else self.looks.generated()
        if generated is not None:
            yield generated
        if self.looks is not None:
            figures = self.looks.statistics()
            self.itself.has_spent("looks", figures.look_cpu_s + figures.probe_cpu_s)

    def _tell_peers(self) -> None:
        """The state is new: what of it peers may hear."""
        hosting = self._state.inference.hosting
        engine = None if hosting is None else hosting.statistics()
        self._network.gossip.offer_summary(self_summary(self.itself.state, engine))

    async def _remember_peers(self) -> None:
        """Tell routing which peers worked for this node before it started, unless the operator wants it forgotten."""
        if not self._remembers:
            return
        try:
            log = await self._recorder.ask(
                lambda store: [each for kind in KINDS for each in store.recent(kind, EVENTS_MAX)]
            )
        except NotReady as exc:
            _log.warning("which peers worked before this start cannot be read: %s", exc)
            return
        for each in remembered(log, self._recorder.clock_ms()):
            self._network.gossip.observations.remember(
                PeerId(each.peer), worked=each.worked, failed=each.failed, age_s=each.age_s, now=trio.current_time(),
                rtt_s=each.rtt_s,
            )  # fmt: skip

    # --- what node/inference.py tells ---

    def ended(self, request: Ended) -> None:
        """A request has ended."""
        self.itself.ended(request)

    def peer_failed(self, peer: PeerId, reason: str) -> None:
        """A request to a peer failed there. One that was full, or that was not at fault, is not noted."""
        if reason not in FULL_REASONS and reason not in NEUTRAL_REASONS:
            self.itself.peer(peer, "failed", rtt_ms=self._rtt_ms(peer), text=reason)

    # --- parts ---

    def _peer_changed(self, change: PeerChange) -> None:
        happened = "joined" if change.connected else "left"
        self.itself.peer(change.peer, happened, rtt_ms=self._rtt_ms(change.peer), text=change.breach)

    def _rtt_ms(self, peer: PeerId) -> float | None:
        """As it was measured last, which may be before it left."""
        _, rtt_s = self._network.gossip.observations.measured(peer, trio.current_time())
        return None if rtt_s is None else 1000 * rtt_s

    def _merges(self, *, is_last: bool = False) -> Iterable[Fact]:
        return () if self.training is None else self.training.merged(is_last=is_last)


def _reason_of(exc: BaseException | None) -> str:
    """Why a node ended that was not told to: the names of its errors; '' when it was only cancelled."""
    leaves = [] if exc is None else _leaves(exc)
    names = sorted({type(each).__name__ for each in leaves if not isinstance(each, trio.Cancelled)})
    return ERROR + ", ".join(names) if names else ""


def _leaves(exc: BaseException) -> list[BaseException]:
    if not isinstance(exc, BaseExceptionGroup):
        return [exc]
    return [leaf for inner in exc.exceptions for leaf in _leaves(inner)]
