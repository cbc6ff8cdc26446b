"""ConsciousnessState: what a node has measured of itself, and the check that every figure of it goes through.

Rules: core. Frozen structs; what has not been measured is None, never 0. A number that is not finite, or out of its
bounds, is refused when its struct is made, so it can be neither averaged nor stored. Each peer's own figures are not
here but in `peer` events, which can be forgotten by peer (node/events.py). Units and formulas of every member stand in
node/consciousness_fields.py.
Source: SELF.md, "Self-state and memory".
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from statistics import fmean, median
from typing import ClassVar, Final

from node.errors import BadFigure

FIGURE_MAX: Final = float((1 << 53) - 1)  # exact as an integer in a float: bytes, counts, milliseconds
NATS_MAX: Final = 1_000.0  # of one token; a vocabulary of 2^20 guessed at random costs 14
WORD_CHARS_MAX: Final = 256  # as node.events.Word
REASONS_MAX: Final = 16  # why updates were rejected; more are counted under OTHER
REASON_CHARS_MAX: Final = 40  # a name of node.events with `learning.rejected.` before it
OTHER: Final = "other"
_REASON: Final = re.compile(r"[a-z0-9][a-z0-9_.-]*")


def check_word(name: str, word: str) -> None:
    """Raises BadFigure unless an event takes this word."""
    if len(word) > WORD_CHARS_MAX:
        raise BadFigure(f"{name}: {len(word)} characters came, at most {WORD_CHARS_MAX} are kept")
    if any("\ud800" <= each <= "\udfff" for each in word):
        raise BadFigure(f"{name}: {word[:80]!a} came, which no bytes stand for: half a surrogate pair")


def check_reason(name: str, reason: str) -> None:
    """Raises BadFigure unless an event takes this as a name."""
    if len(reason) > REASON_CHARS_MAX or not _REASON.fullmatch(reason):
        raise BadFigure(f"{name}: {reason[:80]!a} came, wanted are 1 to {REASON_CHARS_MAX} of a-z 0-9 _ . -")


def check_reasons(name: str, counts: Mapping[str, int], kinds_max: int) -> None:
    """Raises BadFigure unless these are at most so many counts, each under a name that an event takes."""
    if len(counts) > kinds_max:
        raise BadFigure(f"{name}: {len(counts)} reasons came, at most {kinds_max} are told apart")
    for reason, count in counts.items():
        check_reason(name, reason)
        if not 0 <= count <= FIGURE_MAX:
            raise BadFigure(f"{name}: {count} of {reason} came, a count of 0 or more was wanted")


class Measured:
    """Base of structs of figures. SHARES: members of 0..1; COSINES: of -1..1; NATS: of 0..NATS_MAX; SIGNED: of any
    sign; all other numbers are 0..FIGURE_MAX."""

    __slots__ = ()
    SHARES: ClassVar[frozenset[str]] = frozenset()
    COSINES: ClassVar[frozenset[str]] = frozenset()
    NATS: ClassVar[frozenset[str]] = frozenset()
    SIGNED: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        """Checked when made. Raises BadFigure."""
        for each in fields(self):  # type: ignore[arg-type]  # every subclass is a dataclass
            value = getattr(self, each.name)
            if isinstance(value, str):
                check_word(self._name(each.name), value)
            elif isinstance(value, int | float):
                self._check(each.name, value)
            elif isinstance(value, tuple):
                for inner in value:
                    if isinstance(inner, int | float):
                        self._check(each.name, inner)

    def _check(self, name: str, value: float) -> None:
        if name in self.SHARES:
            least, most = 0.0, 1.0
        elif name in self.COSINES:
            least, most = -1.0, 1.0
        elif name in self.NATS:
            least, most = 0.0, NATS_MAX
        else:
            least, most = -FIGURE_MAX if name in self.SIGNED else 0.0, FIGURE_MAX
        if not least <= value <= most:  # neither are NaN and the infinities
            raise BadFigure(
                f"{self._name(name)}: {value} came, a number of {least:g} to {most:g} was wanted "
                "(None where nothing was measured)"
            )

    def _name(self, name: str) -> str:
        return f"{type(self).__name__}.{name}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity(Measured):
    """Who the node is, and which run of it this is. stop_reason: None while it runs, and after a kill."""

    peer_id: str | None = None
    model: str | None = None
    revision: str | None = None
    phase: str | None = None
    last_stop: str | None = None
    stop_reason: str | None = None
    boot_count: int | None = None
    round: int | None = None
    uptime_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Uncertainty(Measured):
    """How open the next token was, where this node chose it."""

    SHARES = frozenset({"margin"})
    NATS = frozenset({"entropy_nats"})
    entropy_nats: float | None = None
    margin: float | None = None
    tokens: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Surprise(Measured):
    """What held-out text costs, against what it used to."""

    NATS = frozenset({"nll_nats", "mean_nats"})
    SIGNED = frozenset({"deviations"})
    nll_nats: float | None = None
    mean_nats: float | None = None
    variance: float | None = None
    deviations: float | None = None
    looks: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration(Measured):
    """Whether the model is as often right as it is sure. gaps: of each bin of confidence; see node/averages.py."""

    SHARES = frozenset({"error"})
    SIGNED = frozenset({"gaps"})
    error: float | None = None
    tokens: float | None = None
    gaps: tuple[float, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecasts(Measured):
    """How well one figure was predicted, over past outcomes. Errors have the figure's unit."""

    SHARES = frozenset({"inside"})
    SIGNED = frozenset({"skill"})
    error: float | None = None
    naive_error: float | None = None
    skill: float | None = None
    inside: float | None = None
    outcomes: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SelfPrediction(Measured):
    """How well the node foretells itself: a Forecasts of each figure of node.prediction.FORETOLD."""

    latency_s: Forecasts = Forecasts()
    active_requests: Forecasts = Forecasts()
    live_peers: Forecasts = Forecasts()
    loss_nats: Forecasts = Forecasts()
    predicted_to_ms: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Coherence(Measured):
    """Whether the model still answers and embeds its fixed probes as it once did."""

    SHARES = frozenset({"answers", "answers_drift"})
    COSINES = frozenset({"embeddings"})
    answers: float | None = None
    answers_drift: float | None = None
    embeddings: float | None = None
    embeddings_drift: float | None = None
    rounds: int | None = None
    probes: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Load(Measured):
    """What the node has to do now."""

    queue_length: int | None = None
    active_requests: int | None = None
    tokens_s: float | None = None
    loop_lag_ms: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Learning(Measured):
    """What training does, and what its rounds did to the model. rejected: why -> how many updates."""

    NATS = frozenset({"loss_before_nats", "loss_after_nats"})
    phase: str | None = None
    loss_before_nats: float | None = None
    loss_after_nats: float | None = None
    merges: int | None = None
    accepted: int | None = None
    rejected: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Checked when made. Raises BadFigure."""
        Measured.__post_init__(self)
        check_reasons("Learning.rejected", self.rejected, REASONS_MAX + 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Body(Measured):
    """What the process takes of its machine."""

    rss_bytes: int | None = None
    accelerator_bytes: int | None = None
    disk_free_bytes: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Social(Measured):
    """The peers as observed here, in sum. Make it with `social_of`."""

    SHARES = frozenset({"success_mean", "success_least"})
    live_peers: int | None = None
    observed_peers: int | None = None
    success_mean: float | None = None
    success_least: float | None = None
    rtt_ms: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Recorded(Measured):
    """The node's memory, in numbers."""

    entries: int | None = None
    last_write_ms: int | None = None
    head_id: int | None = None
    head_hash: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ConsciousnessState:
    """A node's truthful record of its own state: figures that were measured, each with its unit and formula.

    It is what its instruments read: remove a field's cause and the field moves. It is not a claim of experience; it
    has no mood, no single level and no Phi, and nothing in it was drawn by chance. The name is that of the plan which
    this project implements. Begin with ConsciousnessState(): nothing is measured yet.
    """

    identity: Identity = Identity()
    uncertainty: Uncertainty = Uncertainty()
    surprise: Surprise = Surprise()
    calibration: Calibration = Calibration()
    self_prediction_error: SelfPrediction = SelfPrediction()
    coherence: Coherence = Coherence()
    load: Load = Load()
    learning: Learning = Learning()
    body: Body = Body()
    social: Social = Social()
    memory: Recorded = Recorded()


def social_of(live_peers: int, peers: Iterable[tuple[float | None, float | None]]) -> Social:
    """The sum of what was observed of peers: (success 0..1, round trip in ms) of each, None where never measured."""
    seen = [each for each in peers if each != (None, None)]
    successes = [success for success, _ in seen if success is not None]
    trips_ms = [trip for _, trip in seen if trip is not None]
    if not all(map(math.isfinite, (*successes, *trips_ms))):
        raise BadFigure("a success or a round trip of a peer that is not finite came (None where nothing was measured)")
    return Social(
        live_peers=live_peers,
        observed_peers=len(seen),
        success_mean=fmean(successes) if successes else None,
        success_least=min(successes, default=None),
        rtt_ms=median(trips_ms) if trips_ms else None,
    )
