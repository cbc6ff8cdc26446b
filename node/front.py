"""What the web and the command line ask of a node: answer, embed, and say how it is.

Rules: core, and no more than an interface: `node/inference.py` implements Front, `node/web/` calls it, and
`tests/fake_front.py` fakes it. Every error is a RequestError of node/errors.py. Snapshots are frozen; the methods that
return them never wait.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Protocol

from crypto.identity import PeerId
from model.histogram import Distribution
from model.timings import EngineTimings
from node.recent import Recent
from node.requester import LOCAL
from node.sealed import SealedCall
from node.self_face import SelfFace
from node.tallies import RowStatistics
from node.training_wish import Begin, Join
from node.work import AnswerItem, Embedded, EmbedWork, GenerateWork


class Route(Enum):
    """Where a request may be answered."""

    AUTO = "auto"  # the best place
    LOCAL = "local"  # this node's own engine, or an error
    REMOTE = "remote"  # a peer, even when this node could


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteHint:
    """What the client asked of the route: headers x-route and x-peer. `peer` pins one peer (no failover).

    account: which of this node's clients asks (node/requester.py). guest: the peer for whose account a sealed request
    is answered, in place of a client of this node's. is_sealed: it came sealed, from a client here or through a peer.
    """

    route: Route = Route.AUTO
    peer: str | None = None
    account: str = LOCAL
    guest: PeerId | None = None
    is_sealed: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelRow:
    """A model that at least one live peer, or this node, serves."""

    id: str
    revision: str
    kind: str  # causal | encoder
    peers: int  # how many serve it, this node counted
    context_tokens: int
    local: bool = False  # this node serves it itself
    embeds: bool = False  # /v1/embeddings accepts it


@dataclass(frozen=True, slots=True, kw_only=True)
class Readiness:
    """Whether requests are accepted now; `reason` is one sentence for people, empty when ready.

    degraded: a sentence for each thing that does not work while requests are served all the same.
    """

    ready: bool
    reason: str = ""
    loading: bool = False
    retry_after_s: float | None = None
    degraded: tuple[str, ...] = ()
    progress: Mapping[str, object] | None = None  # of the loading, as node/loading.py tells it


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontStatistics:
    """Counts since start of requests that came through this node's door, or sealed to it."""

    requests: int = 0
    errors: dict[str, int] | None = None  # error code -> count
    cancelled: int = 0
    running: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    latency_s_sum: float = 0.0  # of finished requests


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What is told to who measures, beside the status. models: requests of this node's own clients, by model; engine:
    None where no engine of ours answers; training: as GET /api/v1/training has it."""

    models: tuple[RowStatistics, ...] = ()
    engine: EngineTimings | None = None
    loop_lag_s: Distribution | None = None
    training: Mapping[str, Any] = field(default_factory=dict)


class Trains(Protocol):
    """Training at this node, as seen from its front door. Bodies are JSON objects as node/training_wish.py has them."""

    def status(self) -> dict[str, Any]:
        """JSON for GET /api/v1/training."""

    async def begin(self, asked: Begin) -> dict[str, Any]:
        """Begin a run. Raises BadRequest, NotReady."""

    async def join(self, asked: Join) -> dict[str, Any]:
        """Join a run that a peer is in. Raises BadRequest, NotReady."""

    async def pause(self, *, is_paused: bool) -> dict[str, Any]:
        """Train no more for now, or again. Raises BadRequest."""

    async def leave(self) -> dict[str, Any]:
        """Leave the run. Raises BadRequest."""


class Front(Protocol):
    """The node, as seen from its front door."""

    @property
    def training(self) -> Trains:
        """Training at this node."""

    @property
    def recent(self) -> Recent:
        """What came of the last minutes."""

    @property
    def itself(self) -> SelfFace | None:
        """The node's self-state and memory; None where there is none (--no-memory)."""

    def answer(self, work: GenerateWork, route: RouteHint) -> AbstractAsyncContextManager[AsyncIterator[AnswerItem]]:
        """Answer a request: Started once (a takeover does not repeat it), then Progress and Piece, then Finished.

        Leaving the block early cancels the work wherever it runs, within one engine step. Entering may wait for
        room or return at once; RequestError is raised on entering or from the iterator, also in mid-answer.
        """

    async def embed(self, work: EmbedWork, route: RouteHint) -> Embedded:
        """Embed texts. Raises RequestError. If cancelled, the work is given up wherever it runs."""

    def sealed(self, call: SealedCall, peer: str, account: str) -> AbstractAsyncContextManager[AsyncIterator[bytes]]:
        """The frames of a sealed request's answer, from the peer that it is for. Raises as `answer` does."""

    async def sealing_key(self, peer: str) -> bytes:
        """A peer's signed statement of the key to seal to. Raises RequestError."""

    def models(self) -> list[ModelRow]:
        """What can be asked for now: one row per (id, revision), this node's own first."""

    def default_model(self, kind: str) -> str | None:
        """The model a request that names none gets, by kind (causal | encoder); None when there is none."""

    def readiness(self) -> Readiness:
        """Whether requests are accepted now."""

    def status(self) -> dict[str, Any]:
        """JSON for GET /api/v1/status: keys node, peering, gossip, inference, model, backend, readiness, disk, latency,
        throughput (these two: see node.tallies.Tallies), recent (node.recent.Recent)."""

    def measured(self) -> Measured:
        """Histograms and counts for GET /metrics and /api/v1/metrics/model."""

    def peers(self) -> list[dict[str, Any]]:
        """JSON for GET /api/v1/peers: per peer what it advertises and what was observed."""

    def statistics(self) -> FrontStatistics:
        """A snapshot of the counters."""
