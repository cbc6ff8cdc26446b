"""The node's state, and the facts that have events of their own, as events of its memory; and back.

Rules: core, pure. A state event is a snapshot of every member that was measured; facts that came after it and have
events of their own are applied to it, so that a log whose last other fact was followed by a snapshot gives back the
very state that the node had. Members that a later version wrote are passed over.
Source: SELF.md, "Memory"; node/events.py.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Final, assert_never

from node import events
from node.consciousness import ConsciousnessState
from node.consciousness_fields import figures_and_words, state_of
from node.errors import BadFigure
from node.facts import Happened, Merged, Predicted, Started, Stopped
from node.memory import apply
from node.prediction import Expected, Outcome, Prediction, Score

ERROR: Final = "error: "  # begins why a run stopped that an error ended
Remembered = ConsciousnessState | Started | Stopped | Predicted | Happened | Merged


def to_event(what: Remembered, ts_ms: int) -> events.Event:
    """Its event. Raises nothing: bounds were checked when it was made, and are those of node.events."""
    match what:
        case ConsciousnessState():
            figures, words = figures_and_words(what)
            body: events.Body = events.State(figures=figures, words=words)
        case Started():
            body = events.Start(boot=what.boot_count, version=what.version, model=what.model, last_stop=what.last_stop)
        case Stopped():
            body = events.Stop(reason=what.reason, uptime_s=float(what.uptime_s))
        case Predicted(prediction=told):
            body = events.Prediction(from_ms=told.from_ms, to_ms=told.to_ms, figures=_foretold(told))
        case Happened(outcome=outcome):
            body = _outcome(outcome)
        case Merged():
            body = events.Merge(
                run=what.run,
                round=what.round,
                loss_before=what.loss_before_nats,
                loss_after=what.loss_after_nats,
                accepted=what.accepted,
                rejected=dict(what.rejected),
            )
        case _:
            assert_never(what)
    return events.Event(ts_ms=ts_ms, body=body)


def from_event(body: events.Body | None) -> Remembered | None:
    """What an event's body stands for; None for kinds that the state is not made of, and for what was forgotten.

    Raises BadFigure for figures that no state or prediction has: they were written by another program."""
    match body:
        case events.State(figures=figures, words=words):
            return state_of(figures, words)
        case events.Start():
            return Started(boot_count=body.boot, version=body.version, model=body.model, last_stop=body.last_stop)
        case events.Stop():
            return Stopped(reason=body.reason, uptime_s=body.uptime_s)
        case events.Prediction():
            return Predicted(prediction=_prediction(body))
        case events.Outcome():
            return Happened(outcome=_of_outcome(body))
        case events.Merge():
            return Merged(
                run=body.run,
                round=body.round,
                accepted=body.accepted,
                rejected=body.rejected,
                loss_before_nats=body.loss_before,
                loss_after_nats=body.loss_after,
            )
    return None


def replayed(log: Iterable[events.Event | events.Kept]) -> ConsciousnessState:
    """The state that these events leave, oldest first: what the node was doing when it stopped (see `doing`).

    From the newest snapshot on is enough. Raises BadFigure as `from_event`."""
    state = ConsciousnessState()
    for event in log:
        match from_event(event.body):
            case None:
                continue
            case ConsciousnessState() as state:
                continue
            case fact:
                state = apply(fact, state)
    return state


def last_stop_of(before: ConsciousnessState) -> str:
    """How the run ended that left this state: "first" (there was none), "order", "error", or "kill"."""
    if before.identity.boot_count is None:
        return "first"
    reason = before.identity.stop_reason
    return "kill" if reason is None else "error" if reason.startswith(ERROR) else "order"


def started(before: ConsciousnessState, version: str, model: str) -> Started:
    """The fact of a start after the run that left this state."""
    boots = (before.identity.boot_count or 0) + 1
    return Started(boot_count=boots, version=version, model=model, last_stop=last_stop_of(before))


def unread(begun: Started) -> Started:
    """The same start, where what the run before left cannot be read."""
    return replace(begun, last_stop="unread")


def doing(state: ConsciousnessState) -> str:
    """One sentence of what the node does, or did when this state was written, from measured members only."""
    now, load = state.identity, state.load
    if now.boot_count is None:
        return "nothing is recorded of this node yet"
    parts = [f"run {now.boot_count}", f"{now.model or 'no model'}", now.phase or "phase not measured"]
    if now.stop_reason is not None:
        parts.append(f"stopped in order ({now.stop_reason})")
    if load.active_requests is not None:
        parts.append(f"{load.active_requests} requests under way")
    if load.queue_length is not None:
        parts.append(f"{load.queue_length} waiting")
    if state.learning.phase is not None:
        parts.append(f"training: {state.learning.phase}" + ("" if now.round is None else f", round {now.round}"))
    return "; ".join(parts)


# --- predictions and outcomes: NAME is the figure, NAME.low and so on what belongs to it ---


def _foretold(prediction: Prediction) -> dict[str, float]:
    figures: dict[str, float] = {}
    for name, each in prediction.figures.items():
        figures[name] = float(each.value)
        figures |= {
            f"{name}.naive": float(each.naive),
            f"{name}.low": float(each.low),
            f"{name}.high": float(each.high),
        }
    return figures


def _prediction(body: events.Prediction) -> Prediction:
    told = body.figures
    return Prediction(
        from_ms=body.from_ms,
        to_ms=body.to_ms,
        figures={
            name: Expected(
                value=value,
                naive=_there(told, f"{name}.naive"),
                low=_there(told, f"{name}.low"),
                high=_there(told, f"{name}.high"),
            )
            for name, value in told.items()
            if "." not in name
        },
    )


def _outcome(outcome: Outcome) -> events.Outcome:
    figures: dict[str, float] = {}
    errors: dict[str, float] = {}
    for name, each in outcome.figures.items():
        figures |= {name: float(each.measured), f"{name}.inside": float(each.is_inside)}
        errors |= {name: float(each.error), f"{name}.naive": float(each.naive_error)}
    return events.Outcome(prediction=outcome.prediction, figures=figures, errors=errors)


def _of_outcome(body: events.Outcome) -> Outcome:
    told, errors = body.figures, body.errors
    return Outcome(
        prediction=body.prediction,
        figures={
            name: Score(
                measured=measured,
                error=_there(errors, name),
                naive_error=_there(errors, f"{name}.naive"),
                is_inside=bool(_there(told, f"{name}.inside")),
            )
            for name, measured in told.items()
            if "." not in name
        },
    )


def _there(figures: events.Figures, name: str) -> float:
    if (value := figures.get(name)) is None:
        raise BadFigure(f"an event without its figure {name} came: another program wrote it")
    return value
