"""The facts that a node's self-state is made of: what was measured, or happened, and nothing else.

Rules: core. A closed union, each frozen and checked when it is made (node/consciousness.py); whoever measured it makes
it. Which facts may change a member of the state stands in node/consciousness_fields.py, and tests hold
`node.memory.apply` to it.
Source: SELF.md, "Self-state and memory".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from node.averages import BINS, Bin
from node.consciousness import NATS_MAX, Body, Load, Measured, Recorded, Social, check_reason, check_reasons
from node.errors import BadFigure
from node.prediction import Outcome, Prediction

REASONS_A_ROUND_MAX = 64  # as node.events.Counts


@dataclass(frozen=True, slots=True, kw_only=True)
class Started(Measured):
    """The node began. last_stop: see node.memory.last_stop_of."""

    boot_count: int
    version: str
    model: str
    last_stop: str

    def __post_init__(self) -> None:
        """Checked when made. Raises BadFigure."""
        Measured.__post_init__(self)
        check_reason("Started.last_stop", self.last_stop)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stopped(Measured):
    """The node ends in order."""

    reason: str
    uptime_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled(Measured):
    """What the parts said when they were asked, at intervals. Parts that cannot tell leave None.

    phase: of the node (node.state.NodeState.phase); training: of the training (idle, paused, a phase of the round)."""

    peer_id: str | None = None
    revision: str | None = None
    phase: str | None = None
    training: str | None = None
    uptime_s: float | None = None
    load: Load = field(default_factory=Load)
    body: Body = field(default_factory=Body)
    social: Social = field(default_factory=Social)


@dataclass(frozen=True, slots=True, kw_only=True)
class Generated(Measured):
    """This node chose so many tokens that were judged (model/openness.py): sums over them of the entropy of what the
    model gave to each, softmax of its logits at temperature 1, and of its first less its second probability."""

    tokens: int
    entropy_sum_nats: float
    margin_sum: float

    def __post_init__(self) -> None:
        """Checked when made. Raises BadFigure."""
        Measured.__post_init__(self)
        if self.tokens < 1 or self.margin_sum > self.tokens:
            raise BadFigure(f"{self.tokens} tokens with margins of {self.margin_sum} came: 1 or more, each 0 to 1")
        if self.entropy_sum_nats > NATS_MAX * self.tokens:
            raise BadFigure(f"{self.tokens} tokens of {self.entropy_sum_nats} nats came: each 0 to {NATS_MAX:g}")


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOut(Measured):
    """Text with a known continuation was read: nats a token; and bins of confidence, None: not looked at."""

    NATS = frozenset({"nll_nats"})
    nll_nats: float
    bins: tuple[Bin, ...] | None = None

    def __post_init__(self) -> None:
        """Checked when made. Raises BadFigure."""
        Measured.__post_init__(self)
        if self.bins is not None and len(self.bins) != BINS:
            raise BadFigure(f"{len(self.bins)} bins of confidence came, {BINS} were wanted (node.averages.binned)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Probed(Measured):
    """The fixed probes were asked again. rounds: since the stored answers; answers: share of equal tokens with them;
    embeddings: cosine with them. None: not probed, or there is no such thing at this model."""

    SHARES = frozenset({"answers"})
    COSINES = frozenset({"embeddings"})
    rounds: int
    answers: float | None = None
    embeddings: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Predicted(Measured):
    """The node foretold a period."""

    prediction: Prediction


@dataclass(frozen=True, slots=True, kw_only=True)
class Happened(Measured):
    """A foretold period is over."""

    outcome: Outcome


@dataclass(frozen=True, slots=True, kw_only=True)
class Merged(Measured):
    """A round changed the model. rejected: why -> how many updates; losses of held-out text, nats a token."""

    NATS = frozenset({"loss_before_nats", "loss_after_nats"})
    run: str
    round: int
    accepted: int
    rejected: Mapping[str, int] = field(default_factory=dict)
    loss_before_nats: float | None = None
    loss_after_nats: float | None = None

    def __post_init__(self) -> None:
        """Checked when made. Raises BadFigure."""
        Measured.__post_init__(self)
        check_reasons("Merged.rejected", self.rejected, REASONS_A_ROUND_MAX)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored(Measured):
    """The memory wrote."""

    memory: Recorded


Fact = Started | Stopped | Sampled | Generated | HeldOut | Probed | Predicted | Happened | Merged | Stored
FACTS: tuple[type[Fact], ...] = (
    Started, Stopped, Sampled, Generated, HeldOut, Probed, Predicted, Happened, Merged, Stored,
)  # fmt: skip
