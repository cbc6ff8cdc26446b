"""What the node knows of itself: how each fact changes its state.

Rules: core, pure: no clock, no chance. `apply` is total over node.facts.Fact and refuses nothing, since a fact is
checked when it is made. How state and facts go to the memory and come back: node/memory_events.py.
Source: SELF.md, "Self-state and memory"; HOUSE.md, "Self-state is node/memory.py".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Final, assert_never

from node.averages import BINS, Bin, calibration_error, gaps_of, mixed, spread, weight_of
from node.consciousness import (
    FIGURE_MAX,
    OTHER,
    REASONS_MAX,
    Body,
    Calibration,
    Coherence,
    ConsciousnessState,
    Forecasts,
    Identity,
    Learning,
    Load,
    SelfPrediction,
    Social,
    Surprise,
    Uncertainty,
)
from node.facts import (
    Fact,
    Generated,
    Happened,
    HeldOut,
    Merged,
    Predicted,
    Probed,
    Sampled,
    Started,
    Stopped,
    Stored,
)
from node.prediction import Outcome, Score, skill_of

COUNT_MAX: Final = int(FIGURE_MAX)
TOKENS_WINDOW: Final = 1_024  # of generated tokens that uncertainty is about: a few answers
LOOKS_WINDOW: Final = 100  # of looks at held-out text that surprise is measured against
CALIBRATION_WINDOW: Final = 20_000  # of judged tokens: 2,000 a bin put a gap's own noise at about 0.01
OUTCOMES_WINDOW: Final = 100  # of foretold periods that the errors are means of


def apply(fact: Fact, state: ConsciousnessState) -> ConsciousnessState:
    """The state after the fact."""
    match fact:
        case Started():
            return _started(fact, state)
        case Stopped():
            now = replace(state.identity, stop_reason=fact.reason, uptime_s=fact.uptime_s)
            return replace(state, identity=now)
        case Sampled():
            return _sampled(fact, state)
        case Generated():
            return replace(state, uncertainty=_uncertainty(fact, state.uncertainty))
        case HeldOut():
            calibration = state.calibration if fact.bins is None else _calibration(fact.bins, state.calibration)
            return replace(state, surprise=_surprise(fact.nll_nats, state.surprise), calibration=calibration)
        case Probed():
            return replace(state, coherence=_coherence(fact, state.coherence))
        case Predicted(prediction=prediction):
            told = replace(state.self_prediction_error, predicted_to_ms=prediction.to_ms)
            return replace(state, self_prediction_error=told)
        case Happened(outcome=outcome):
            return replace(state, self_prediction_error=_scored(outcome, state.self_prediction_error))
        case Merged():
            now = replace(state.identity, round=fact.round)
            return replace(state, identity=now, learning=_merged(fact, state.learning))
        case Stored(memory=memory):
            return replace(state, memory=memory)
    assert_never(fact)


# --- one field each ---


def _started(fact: Started, state: ConsciousnessState) -> ConsciousnessState:
    """What a process measures begins anew; what was learned of a model goes with the model."""
    before = state.identity
    fresh = replace(
        state,
        identity=Identity(
            peer_id=before.peer_id,
            model=fact.model,
            revision=before.revision if before.model == fact.model else None,
            last_stop=fact.last_stop,
            boot_count=fact.boot_count,
            round=before.round if before.model == fact.model else None,
        ),
        load=Load(),
        body=Body(),
        social=Social(),
        learning=replace(state.learning, phase=None),
    )
    if before.model == fact.model:
        return fresh
    return replace(
        fresh,
        uncertainty=Uncertainty(),
        surprise=Surprise(),
        calibration=Calibration(),
        coherence=Coherence(),
        learning=Learning(),
    )


def _sampled(fact: Sampled, state: ConsciousnessState) -> ConsciousnessState:
    """The last sample alone; who the node is, is not forgotten where a sample leaves it out."""
    before = state.identity
    return replace(
        state,
        identity=replace(
            before,
            peer_id=fact.peer_id or before.peer_id,
            revision=fact.revision or before.revision,
            phase=fact.phase,
            uptime_s=fact.uptime_s,
        ),
        load=fact.load,
        body=fact.body,
        social=fact.social,
        learning=replace(state.learning, phase=fact.training),
    )


def _uncertainty(fact: Generated, before: Uncertainty) -> Uncertainty:
    seen = before.tokens or 0
    weight = weight_of(fact.tokens, seen, TOKENS_WINDOW)
    entropy_nats, margin = fact.entropy_sum_nats / fact.tokens, fact.margin_sum / fact.tokens
    return Uncertainty(
        entropy_nats=_mixed(before.entropy_nats, entropy_nats, weight),
        margin=_mixed(before.margin, margin, weight),
        tokens=min(seen + fact.tokens, COUNT_MAX),
    )


def _surprise(nll_nats: float, before: Surprise) -> Surprise:
    looks = min((before.looks or 0) + 1, COUNT_MAX)
    if before.mean_nats is None or before.variance is None:
        return Surprise(nll_nats=nll_nats, mean_nats=nll_nats, variance=0.0, looks=looks)
    weight = weight_of(1, looks - 1, LOOKS_WINDOW)
    deviation_nats = before.variance**0.5
    deviations = (nll_nats - before.mean_nats) / deviation_nats if deviation_nats > 0.0 else None
    return Surprise(
        nll_nats=nll_nats,
        mean_nats=mixed(before.mean_nats, nll_nats, weight),
        variance=spread(before.mean_nats, before.variance, nll_nats, weight),
        deviations=None if deviations is None else min(FIGURE_MAX, max(-FIGURE_MAX, deviations)),
        looks=looks,
    )


def _calibration(bins: tuple[Bin, ...], before: Calibration) -> Calibration:
    tokens = sum(each.tokens for each in bins)
    if tokens == 0:
        return before
    keep = (1.0 - 1.0 / CALIBRATION_WINDOW) ** tokens
    gaps = tuple(old * keep + new for old, new in zip(before.gaps or (0.0,) * BINS, gaps_of(bins), strict=True))
    weight = (before.tokens or 0.0) * keep + tokens
    return Calibration(error=calibration_error(gaps, weight), tokens=weight, gaps=gaps)


def _coherence(fact: Probed, before: Coherence) -> Coherence:
    def drift(agreement: float | None) -> float | None:
        return None if agreement is None or fact.rounds == 0 else (1.0 - agreement) / fact.rounds

    return Coherence(
        answers=fact.answers,
        answers_drift=drift(fact.answers),
        embeddings=fact.embeddings,
        embeddings_drift=drift(fact.embeddings),
        rounds=fact.rounds,
        probes=min((before.probes or 0) + 1, COUNT_MAX),
    )


def _scored(outcome: Outcome, before: SelfPrediction) -> SelfPrediction:
    after = before
    for name, score in outcome.figures.items():
        match name:
            case "latency_s":
                after = replace(after, latency_s=_forecasts(score, before.latency_s))
            case "active_requests":
                after = replace(after, active_requests=_forecasts(score, before.active_requests))
            case "live_peers":
                after = replace(after, live_peers=_forecasts(score, before.live_peers))
            case "loss_nats":
                after = replace(after, loss_nats=_forecasts(score, before.loss_nats))
    return after


def _forecasts(score: Score, before: Forecasts) -> Forecasts:
    outcomes = min((before.outcomes or 0) + 1, COUNT_MAX)
    weight = weight_of(1, outcomes - 1, OUTCOMES_WINDOW)
    error = _mixed(before.error, abs(score.error), weight)
    naive_error = _mixed(before.naive_error, abs(score.naive_error), weight)
    inside = _mixed(before.inside, float(score.is_inside), weight)
    return Forecasts(
        error=error, naive_error=naive_error, skill=skill_of(error, naive_error), inside=inside, outcomes=outcomes
    )


def _merged(fact: Merged, before: Learning) -> Learning:
    return Learning(
        phase=before.phase,
        loss_before_nats=fact.loss_before_nats,
        loss_after_nats=fact.loss_after_nats,
        merges=min((before.merges or 0) + 1, COUNT_MAX),
        accepted=min((before.accepted or 0) + fact.accepted, COUNT_MAX),
        rejected=_counted(before.rejected, fact.rejected),
    )


def _counted(before: Mapping[str, int], more: Mapping[str, int]) -> dict[str, int]:
    """Both together; reasons beyond REASONS_MAX under OTHER. In order, since an event's are: a replay does the same."""
    counts = dict(before)
    for reason, count in sorted(more.items()):
        known = reason in counts or len(counts.keys() - {OTHER}) < REASONS_MAX
        place = reason if known else OTHER
        counts[place] = min(counts.get(place, 0) + count, COUNT_MAX)
    return counts


def _mixed(mean: float | None, value: float, weight: float) -> float:
    return value if mean is None else mixed(mean, value, weight)
