"""The members of ConsciousnessState, one row each: unit, formula, source, and the facts that alone may move it.

Rules: core. docs/SELF.md is made from this table, and a state event is written and read by it: a number under the
member's path, a word likewise; what was not measured is left out.
Source: SELF.md, the table of fields.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Final, Literal

from node.averages import BINS
from node.consciousness import ConsciousnessState
from node.errors import BadFigure
from node.prediction import FORETOLD

Kind = Literal["int", "float", "word", "floats", "counts"]
REJECTED: Final = "learning.rejected"


@dataclass(frozen=True, slots=True, kw_only=True)
class Field:
    """One member. causes: names of facts (node.facts) that may change it; nothing else does."""

    path: str
    kind: Kind
    unit: str
    formula: str
    source: str
    causes: frozenset[str]


_LAST_STOP: Final = "How the run before ended: first (none was), order, error, kill; unread: its memory cannot be read."


def _row(path: str, kind: Kind, unit: str, formula: str, told: tuple[str, str]) -> Field:
    """told: source, and the causes' names with spaces between."""
    source, causes = told
    return Field(path=path, kind=kind, unit=unit, formula=formula, source=source, causes=frozenset(causes.split()))


_START: Final = ("node start", "Started")
_SAMPLE: Final = ("each part, asked at intervals", "Sampled Started")
_LOGITS: Final = ("the model's own distribution of tokens that it chose, before any sampling rule", "Generated Started")
_HELD_OUT: Final = (
    "forward passes over the held-out text of this package; the embedded model never read it, another may have",
    "HeldOut Started",
)
_PROBES: Final = ("fixed probes, asked again", "Probed Started")
_MERGE: Final = ("a round of training", "Merged Started")
_STORE: Final = ("node.store", "Stored")
_OUTCOMES: Final = ("predictions and their outcomes in the memory", "Happened")

_FORETOLD_UNITS: Final = {
    "latency_s": "s",
    "active_requests": "requests",
    "live_peers": "peers",
    "loss_nats": "nats/token",
}


def _identity() -> tuple[Field, ...]:
    sampled = ("the key, the model", "Sampled Started")
    return (
        _row("identity.peer_id", "word", "", "The node's peer id: its Ed25519 public key.", ("the key", "Sampled")),
        _row("identity.model", "word", "", "The name of the model that it was started with.", _START),
        _row("identity.revision", "word", "", "The revision of the weights in use.", sampled),
        _row("identity.phase", "word", "", "starting, loading, running or stopping, as last sampled.", _SAMPLE),
        _row("identity.last_stop", "word", "", _LAST_STOP, _START),
        _row(
            "identity.stop_reason", "word", "", "Why this run ended in order; absent while it runs and after a kill.",
            ("node stop", "Stopped Started"),
        ),
        _row("identity.boot_count", "int", "starts", "Starts that the memory knows of, this one among them.", _START),
        _row("identity.round", "int", "rounds", "The round of the last merge.", _MERGE),
        _row(
            "identity.uptime_s", "float", "s", "Time since this start, at the last sample or the stop.",
            ("the monotonic clock", "Sampled Started Stopped"),
        ),
    )  # fmt: skip


def _of_model() -> tuple[Field, ...]:
    return (
        _row(
            "uncertainty.entropy_nats", "float", "nats/token",
            "Running mean, about the last 1,024 judged tokens, of -sum p ln p of softmax(logits) at temperature 1.",
            _LOGITS,
        ),
        _row(
            "uncertainty.margin", "float", "probability",
            "Running mean over the same tokens of the first less the second probability.", _LOGITS,
        ),
        _row("uncertainty.tokens", "int", "tokens", "Tokens that these means have seen.", _LOGITS),
        _row("surprise.nll_nats", "float", "nats/token", "Mean -ln p(token) over a look's slices.", _HELD_OUT),
        _row("surprise.mean_nats", "float", "nats/token", "Running mean of it, about 100 looks.", _HELD_OUT),
        _row("surprise.variance", "float", "nats^2", "Running population variance of it, alike.", _HELD_OUT),
        _row(
            "surprise.deviations", "float", "standard deviations",
            "(nll_nats - mean_nats) / sqrt(variance), both from before this look; absent while that is 0.",
            _HELD_OUT,
        ),
        _row("surprise.looks", "int", "looks", "Looks at held-out text.", _HELD_OUT),
        _row(
            "calibration.error", "float", "probability",
            f"Expected calibration error: sum over {BINS} bins of (n_bin / n) |share right - mean confidence|.",
            _HELD_OUT,
        ),
        _row(
            "calibration.tokens", "float", "tokens", "n: judged tokens, fading by half in about 14,000 more of them.",
            _HELD_OUT,
        ),
        _row(
            "calibration.gaps", "floats", "tokens",
            "Of each bin: sum of its confidences less how many were right, fading alike; over 0: too sure.", _HELD_OUT,
        ),
        _row("coherence.answers", "float", "share", "Share of the answers' tokens equal to the stored.", _PROBES),
        _row("coherence.answers_drift", "float", "share/round", "(1 - answers) / rounds; absent at 0.", _PROBES),
        _row("coherence.embeddings", "float", "cosine", "Mean over the probes of the cosine with the stored.", _PROBES),
        _row("coherence.embeddings_drift", "float", "1/round", "(1 - embeddings) / rounds; absent at 0.", _PROBES),
        _row("coherence.rounds", "int", "rounds", "Rounds merged since the probes were stored.", _PROBES),
        _row("coherence.probes", "int", "times", "How often the probes were asked again.", _PROBES),
    )  # fmt: skip


def _of_predictions() -> tuple[Field, ...]:
    rows = [
        _row(
            "self_prediction_error.predicted_to_ms", "int", "Unix ms", "The end of the period last foretold.",
            ("node.prediction", "Predicted"),
        )
    ]  # fmt: skip
    for name in FORETOLD:
        unit, path = _FORETOLD_UNITS[name], f"self_prediction_error.{name}"
        rows += (
            _row(
                f"{path}.error", "float", unit, "Running mean of |measured - foretold|, about 100 periods.", _OUTCOMES
            ),
            _row(f"{path}.naive_error", "float", unit, 'The same of the forecast "as now".', _OUTCOMES),
            _row(f"{path}.skill", "float", "share", "1 - error / naive_error; absent while that is 0.", _OUTCOMES),
            _row(f"{path}.inside", "float", "share", "Outcomes inside an interval meant to hold 0.8.", _OUTCOMES),
            _row(f"{path}.outcomes", "int", "outcomes", "Foretold periods that were measured.", _OUTCOMES),
        )
    return tuple(rows)


def _of_process() -> tuple[Field, ...]:
    return (
        _row("load.queue_length", "int", "requests", "Requests waiting at the engine.", _SAMPLE),
        _row("load.active_requests", "int", "requests", "Requests that the engine works on.", _SAMPLE),
        _row("load.tokens_s", "float", "tokens/s", "Tokens made here a second, last ten seconds.", _SAMPLE),
        _row("load.loop_lag_ms", "float", "ms", "How late the event loop comes to looks due at fixed times.", _SAMPLE),
        _row("learning.phase", "word", "", "What training does, as last sampled.", _SAMPLE),
        _row("learning.loss_before_nats", "float", "nats/token", "Held-out loss before the last merge.", _MERGE),
        _row("learning.loss_after_nats", "float", "nats/token", "Held-out loss after it.", _MERGE),
        _row("learning.merges", "int", "rounds", "Merges that the memory knows of.", _MERGE),
        _row("learning.accepted", "int", "updates", "Updates that these took in.", _MERGE),
        _row(REJECTED, "counts", "updates", "Updates that these did not take, by why.", _MERGE),
        _row("body.rss_bytes", "int", "bytes", "Resident memory of the process.", _SAMPLE),
        _row("body.accelerator_bytes", "int", "bytes", "Accelerator memory that it holds.", _SAMPLE),
        _row("body.disk_free_bytes", "int", "bytes", "Free on the disk of its data directory.", _SAMPLE),
        _row("social.live_peers", "int", "peers", "Peers connected.", _SAMPLE),
        _row("social.observed_peers", "int", "peers", "Peers of which anything was measured here.", _SAMPLE),
        _row(
            "social.success_mean",
            "float",
            "share",
            "Mean over these of the share of own requests that worked.",
            _SAMPLE,
        ),
        _row("social.success_least", "float", "share", "The least of these shares.", _SAMPLE),
        _row("social.rtt_ms", "float", "ms", "Median over these of their mean round trip.", _SAMPLE),
        _row("memory.entries", "int", "events", "Events in the memory.", _STORE),
        _row("memory.last_write_ms", "int", "Unix ms", "When it last wrote.", _STORE),
        _row("memory.head_id", "int", "", "The id of its last event.", _STORE),
        _row("memory.head_hash", "word", "", "That event's hash in the chain, hex.", _STORE),
    )


FIELDS: Final = (*_identity(), *_of_model(), *_of_predictions(), *_of_process())


def member(state: ConsciousnessState, path: str) -> Any:
    """The member at a path of FIELDS."""
    found: Any = state
    for name in path.split("."):
        found = getattr(found, name)
    return found


def figures_and_words(state: ConsciousnessState) -> tuple[dict[str, float], dict[str, str]]:
    """All that was measured, as a state event has it."""
    figures: dict[str, float] = {}
    words: dict[str, str] = {}
    for row in FIELDS:
        value = member(state, row.path)
        if row.kind == "counts":
            words |= {f"{row.path}.{reason}": str(count) for reason, count in value.items()}
        elif value is None:
            continue
        elif row.kind == "word":
            words[row.path] = value
        elif row.kind == "floats":
            words[row.path] = " ".join(map(repr, value))
        else:
            figures[row.path] = float(value)
    return figures, words


def state_of(figures: Mapping[str, float], words: Mapping[str, str]) -> ConsciousnessState:
    """The state that these were written of. Raises BadFigure for what `figures_and_words` never writes."""
    members: dict[str, Any] = {}
    for row in FIELDS:
        if row.kind == "counts":
            begin = row.path + "."
            found = {name.removeprefix(begin): word for name, word in words.items() if name.startswith(begin)}
            members[row.path] = {reason: _int(row.path, word) for reason, word in found.items()}
        elif row.kind in ("int", "float") and row.path in figures:
            value = figures[row.path]
            members[row.path] = _int(row.path, f"{value:.0f}", value) if row.kind == "int" else float(value)
        elif row.kind == "word" and row.path in words:
            members[row.path] = words[row.path]
        elif row.kind == "floats" and row.path in words:
            members[row.path] = _floats(row.path, words[row.path])
    state: ConsciousnessState = _built(ConsciousnessState(), "", members)
    return state


def page() -> str:
    """docs/SELF.md."""
    rows = "".join(
        f"| `{row.path}` | {row.unit} | {row.formula.replace('|', chr(92) + '|')} | {row.source} |\n" for row in FIELDS
    )
    return _PAGE_HEAD + rows


def _built(default: Any, path: str, members: Mapping[str, Any]) -> Any:
    """The same struct with the members under this path in it."""
    made = {}
    for each in fields(default):
        inner, here = getattr(default, each.name), f"{path}{each.name}"
        made[each.name] = _built(inner, here + ".", members) if is_dataclass(inner) else members.get(here, inner)
    return type(default)(**made)


def _int(path: str, word: str, exact: float | None = None) -> int:
    if not word.isascii() or not word.isdigit() or len(word) > 16 or (exact is not None and exact != int(word)):
        raise BadFigure(f"{path}: {word[:80]!a} came ({exact}), a whole number was wanted")
    return int(word)


def _floats(path: str, word: str) -> tuple[float, ...]:
    try:
        found = tuple(map(float, word.split(" ")))
    except ValueError as exc:
        raise BadFigure(f"{path}: {word[:80]!a} came, {BINS} numbers were wanted") from exc
    if len(found) != BINS:
        raise BadFigure(f"{path}: {len(found)} numbers came, {BINS} were wanted")
    return found


_PAGE_HEAD: Final = """# The node's own state

`ConsciousnessState` (`node/consciousness.py`) is a record of what a node measured of itself: every member comes from
an event that was seen or a statistic of the model's own run, and is absent where nothing was measured. Remove a
member's cause and the member moves; nothing else moves it. It is not a claim of experience: there is no mood in it, no
single level and no Phi, and no member is drawn by chance. A start under another model begins the model's members anew,
every start those that a process measures. A node keeps it unless it runs with `--no-memory`.

This page is made from the code: `python -c "from node.consciousness_fields import page; print(page(), end='')" >
docs/SELF.md`.

| member | unit | formula | source |
| --- | --- | --- | --- |
"""
