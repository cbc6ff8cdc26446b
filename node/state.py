"""What the node says of itself: readiness, status, models, peers; and the capacity that it advertises.

Rules: nothing here decides or waits; every number is asked of the part that owns it, at the time of asking.
"""

from __future__ import annotations

import os
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import trio

from crypto.disk import FileStatus
from gossip.blobs import Blobs
from gossip.directory import SKEW_MS
from gossip.messages import Capacity, ModelKind, ModelOffer
from node.backend import Backend
from node.config import NodeConfig
from node.errors import CALLERS_FAULT, NO_ROOM_RETRY_S, NotReady
from node.front import FrontStatistics, Measured, ModelRow, Readiness, RouteHint, Trains
from node.inference import Inference
from node.process import Process
from node.recent import Recent, Totals
from node.remote import Network
from node.sealed import SealedCall
from node.sealed_relay import SealedRelay
from node.self_face import SelfFace
from node.state_told import disk_told, engine_told, offer_told, row_of, training_told
from node.training_wish import Begin, Join
from node.version import VERSION
from node.work import AnswerItem, Embedded, EmbedWork, GenerateWork
from p2p.address import is_relayed
from p2p.calls import Calls
from p2p.direct import Direct
from p2p.reaching import Reaching

EMBED_SLOTS = 8  # requests for vectors at a time that an encoder's advert takes for no crowd
CLOCK_PEERS_MIN = 3  # of fewer nobody can say whose clock is wrong


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """The parts of a node that its state is read from."""

    config: NodeConfig
    network: Network
    inference: Inference
    blobs: Blobs | None = None
    direct: Direct | None = None
    relay: SealedRelay | None = None
    reaching: Reaching | None = None  # None: a network where everybody reaches everybody


class NoTraining:
    """Implements node.front.Trains where there is no model to train."""

    def __init__(self, why: str) -> None:
        self._why = why

    def status(self) -> dict[str, Any]:
        """See node.front.Trains."""
        return {"state": "idle", "why": self._why, "problem": "", "paused": False, "wanted": None, "run": None}

    async def begin(self, asked: Begin) -> dict[str, Any]:
        """See node.front.Trains."""
        raise NotReady(self._why, retry_after_s=NO_ROOM_RETRY_S)

    async def join(self, asked: Join) -> dict[str, Any]:
        """See node.front.Trains."""
        raise NotReady(self._why, retry_after_s=NO_ROOM_RETRY_S)

    async def pause(self, *, is_paused: bool) -> dict[str, Any]:
        """See node.front.Trains."""
        raise NotReady(self._why, retry_after_s=NO_ROOM_RETRY_S)

    async def leave(self) -> dict[str, Any]:
        """See node.front.Trains."""
        raise NotReady(self._why, retry_after_s=NO_ROOM_RETRY_S)


class NodeState:
    """Implements node.front.Front over the parts of a running node."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._started_s = time.time()
        self.process = Process()
        self.recent = Recent()
        self._phase = "starting"
        self.on_phase: Callable[[], None] = lambda: None  # called (sync) when the phase changes
        self.http: str | None = None
        self.control: Calls | None = None  # hello, ping, peers
        self.log_left_out: Mapping[str, int] = {}
        self.trains: Trains | None = None  # once the model is there
        self.backend: Backend | None = None  # as soon as there is one, ready or not
        self.itself: SelfFace | None = None  # where the node has a memory
        self.own_files: list[Callable[[], FileStatus]] = []  # likewise: of the memory, of the first probes

    @property
    def phase(self) -> str:
        """starting | loading | running | stopping; run.py moves it on."""
        return self._phase

    @phase.setter
    def phase(self, phase: str) -> None:
        self._phase = phase
        self.on_phase()

    @property
    def inference(self) -> Inference:
        """Where requests are answered."""
        return self._parts.inference

    def answer(self, work: GenerateWork, route: RouteHint) -> AbstractAsyncContextManager[AsyncIterator[AnswerItem]]:
        """See node.front.Front."""
        return self._parts.inference.answer(work, route)

    async def embed(self, work: EmbedWork, route: RouteHint) -> Embedded:
        """See node.front.Front."""
        return await self._parts.inference.embed(work, route)

    def sealed(self, call: SealedCall, peer: str, account: str) -> AbstractAsyncContextManager[AsyncIterator[bytes]]:
        """See node.front.Front."""
        return self.relay.frames(call, peer, account)

    async def sealing_key(self, peer: str) -> bytes:
        """See node.front.Front."""
        return await self.relay.key_of(peer)

    @property
    def relay(self) -> SealedRelay:
        """Where sealed requests go through, or are opened."""
        assert self._parts.relay is not None, "every whole node has one"
        return self._parts.relay

    @property
    def training(self) -> Trains:
        """See node.front.Front."""
        if self.trains is not None:
            return self.trains
        if self._parts.config.model == "none":
            return NoTraining("this node hosts no model to train: start it with --model")
        if not self._parts.config.training:
            return NoTraining("training is switched off at this node (--no-training, app.enable.training)")
        if self._parts.config.upstream_url() is not None:
            return NoTraining(
                "a server behind this node answers (--backend), and its weights are not here to train: "
                "train on a node with a model of its own"
            )
        return NoTraining("the model is loading")

    def statistics(self) -> FrontStatistics:
        """See node.front.Front."""
        return self._parts.inference.statistics()

    def sample(self) -> None:
        """Note the counters; to be called every second."""
        inference = self._parts.inference
        errors = {name[6:]: n for name, n in inference.counts.items() if name.startswith("error:")}
        hosting = inference.hosting
        totals = Totals(
            tokens_out=inference.tallies.generation_tokens,
            tokens_made=0 if hosting is None else hosting.statistics().decoded_tokens,
            ended=inference.counts["finished"] + sum(errors.values()),
            errors=sum(n for code, n in errors.items() if code not in CALLERS_FAULT),
        )
        self.recent.sample(trio.current_time(), totals)

    def readiness(self) -> Readiness:
        """Ready when the model (if any) is loaded and the node is not stopping."""
        match self.phase:
            case "running":
                problems = (*(file.problem for file in self._files()), self.clock_problem(), self._backend_problem())
                return Readiness(ready=True, degraded=tuple(problem for problem in problems if problem))
            case "stopping":
                return Readiness(ready=False, reason="the node is stopping", retry_after_s=NO_ROOM_RETRY_S)
            case _:
                problem = self._backend_problem()
                reason = f"waiting: {problem}" if problem else f"the model {self._parts.config.model} is loading"
                loading = self._parts.inference.loading
                progress = None if loading is None else loading.told()
                return Readiness(
                    ready=False, reason=reason, loading=True, retry_after_s=NO_ROOM_RETRY_S, progress=progress
                )

    def _backend_problem(self) -> str:
        """One sentence when what answers here cannot; '' otherwise."""
        return "" if self.backend is None else str(self.backend.told()["problem"])

    def clock_problem(self) -> str:
        """One sentence when most peers say that this machine's clock is wrong; '' otherwise."""
        heard = self._parts.network.gossip.statistics().directory
        return clock_problem(heard.clock_offset_ms, heard.clock_peers)

    def _files(self) -> list[FileStatus]:
        network = self._parts.network
        files = (network.peering.file_status(), network.gossip.file_status(), *(told() for told in self.own_files))
        return [file for file in files if file is not None]

    def models(self) -> list[ModelRow]:
        """This node's own models first, then what peers serve; peers counts this node."""
        rows: dict[tuple[str, str], ModelRow] = {}
        for offer in self._own_offers():
            rows[offer.name, offer.revision] = row_of(offer, 1, local=True)
        for model in self._parts.network.gossip.directory.models(trio.current_time()):
            key = (model.name, model.revision)
            own = rows.get(key)
            rows[key] = ModelRow(
                id=model.name,
                revision=model.revision,
                kind=str(model.kind),
                peers=model.peers + (own.peers if own else 0),
                context_tokens=max(model.context_tokens, own.context_tokens if own else 0),
                local=own is not None,
                embeds=model.kind is ModelKind.ENCODER or model.embeds,
            )
        return list(rows.values())

    def default_model(self, kind: str) -> str | None:
        """This node's own model of the kind, else the one that most peers serve."""
        fits = [row for row in self.models() if row.kind == kind or (kind == "encoder" and row.embeds)]
        best = max(fits, key=lambda row: (row.local, row.peers), default=None)
        return best.id if best is not None else None

    def status(self) -> dict[str, Any]:
        """JSON for GET /api/v1/status."""
        config, network, inference = self._parts.config, self._parts.network, self._parts.inference
        statistics = inference.statistics()
        return {
            "node": {
                "peer_id": network.transport.peer_id,
                "version": VERSION,
                "network": config.network,
                "phase": self.phase,
                "http": self.http,
                "listen": list(network.transport.addresses()),
                "pid": os.getpid(),
                "uptime_s": round(time.time() - self._started_s, 1),
                **self.process.told(),
                "tasks": trio.lowlevel.current_statistics().tasks_living,
                "data_dir": str(Path(config.data_dir).absolute()),
            },
            "readiness": asdict(self.readiness()),
            "reach": None if self._parts.reaching is None else asdict(self._parts.reaching.status()),
            "peering": self._parts.network.peering.status().to_dict(),
            "gossip": asdict(network.gossip.statistics()),
            "transport": asdict(network.transport.statistics()),
            "calls": asdict(network.calls.statistics()),
            "blobs": None if self._parts.blobs is None else asdict(self._parts.blobs.statistics()),
            "direct": None if self._parts.direct is None else asdict(self._parts.direct.statistics()),
            "sealed": None if self._parts.relay is None else asdict(self._parts.relay.serving.statistics()),
            "control": None if self.control is None else asdict(self.control.statistics()),
            "log": {"left_out": dict(self.log_left_out)},
            "disk": disk_told(self._files()),
            "inference": {
                **asdict(statistics),
                "counts": dict(inference.counts),
                "busiest_peers": inference.busiest_peers,
            },
            "latency": inference.tallies.latency(),
            "throughput": inference.tallies.throughput(trio.current_time()),
            "recent": self.recent.told(),
            "model": self._model(inference.hosting),
            "backend": None if self.backend is None else self.backend.told(),
            "training": training_told(self.training.status()),
        }

    def measured(self) -> Measured:
        """See node.front.Front."""
        hosting, tallies = self._parts.inference.hosting, self._parts.inference.tallies
        if hosting is not None:
            for facts in hosting.runtime.all_facts():
                tallies.know(facts.name, facts.revision)
        return Measured(
            models=tallies.statistics(),
            engine=None if hosting is None else hosting.statistics().timings,
            loop_lag_s=self.process.lag_s.read(),
            training=self.training.status(),
        )

    def peers(self) -> list[dict[str, Any]]:
        """JSON for GET /api/v1/peers: every connected or advertised peer."""
        network, now = self._parts.network, trio.current_time()
        connected = network.transport.peers()
        offers = {offer.peer: offer for offer in network.gossip.directory.offers(now)}
        rows = []
        for peer in sorted(connected | offers.keys()):
            offer = offers.get(peer)
            capacity = offer.capacity if offer is not None else None
            rtt_ms = self._parts.network.peering.rtt_ms(peer)
            observed = network.gossip.observations.observed(peer, now)
            rows.append(
                {
                    "peer_id": peer,
                    "connected": peer in connected,
                    "address": network.transport.remote_address(peer),
                    "relayed": is_relayed(network.transport.remote_address(peer)),
                    "rtt_ms": None if rtt_ms is None else round(rtt_ms, 2),
                    "score": round(network.gossip.standing.score(peer, now), 1),
                    "observed": asdict(observed),
                    "claims": network.gossip.self_topic.claims.told(peer, observed, now),
                    "requests": asdict(self._parts.inference.flows.of(peer)),
                    "advert_age_s": None if offer is None else round(now - offer.received_s, 1),
                    "agent": None if offer is None else offer.advert.agent,
                    "models": [] if capacity is None else [offer_told(model) for model in capacity.models],
                    "slots_free": None if capacity is None else capacity.slots_free,
                    "slots_total": None if capacity is None else capacity.slots_total,
                    "queue_length": None if capacity is None else capacity.queue_length,
                    "decode_tok_s": None if capacity is None else round(capacity.decode_tok_s, 1),
                    "device": None if capacity is None else capacity.device,
                }
            )
        return rows

    def capacity(self) -> Capacity:
        """What this node advertises now."""
        hosting = self._parts.inference.hosting
        if hosting is None or self.phase != "running":
            return Capacity(accepting=self.phase == "running")
        figures = hosting.statistics()
        slots_total, slots_free, queue_length = figures.slots_total, figures.slots_free, figures.queue_length
        if not slots_total:  # an encoder: requests share its turns, and answers get slower with each
            waiting, slots_total = hosting.embeds_waiting, EMBED_SLOTS
            slots_free, queue_length = max(0, slots_total - waiting), max(0, waiting - slots_total)
        return Capacity(
            models=tuple(self._own_offers()),
            slots_total=slots_total,
            slots_free=slots_free,
            queue_length=queue_length,
            kv_tokens_free=figures.kv_tokens_free,
            decode_tok_s=figures.decode_tok_s,
            prefill_tok_s=figures.prefill_tok_s,
            device=hosting.runtime.device,
            device_free_bytes=hosting.runtime.device_free_bytes(),
            accepting=hosting.accepting,
        )

    def _own_offers(self) -> list[ModelOffer]:
        hosting = self._parts.inference.hosting
        if hosting is None:
            return []
        return [
            ModelOffer(
                name=facts.name,
                revision=facts.revision,
                kind=ModelKind(facts.kind),
                context_tokens=facts.context_tokens,
                dtype=facts.numbers,
                embeds=facts.embeds,
            )
            for facts in hosting.runtime.all_facts()
        ]

    def _model(self, hosting: Backend | None) -> dict[str, Any] | None:
        if hosting is None:
            return None
        return {
            "models": [asdict(facts) for facts in hosting.runtime.all_facts()],
            "linears": None if (linears := hosting.runtime.linears) is None else asdict(linears),
            "device": hosting.runtime.device,
            "engine": engine_told(hosting.statistics()),
            **hosting.details(),
            "running": hosting.requests_running,
        }


def clock_problem(offset_ms: int | None, peers: int) -> str:
    """What to tell the operator of a clock that most of CLOCK_PEERS_MIN or more peers disagree with; '' otherwise."""
    if offset_ms is None or peers < CLOCK_PEERS_MIN or abs(offset_ms) <= SKEW_MS:
        return ""
    side = "behind" if offset_ms > 0 else "ahead of"
    return (
        f"this machine's clock is {abs(offset_ms) // 1000} s {side} those of most of the {peers} peers heard: set it"
        " (NTP); until then they refuse what this node says, and it what they say"
    )
