"""The node's self-state: what moves each member, what does not, its bounds, and its way to the memory and back."""

from __future__ import annotations

import ast
import math
from collections.abc import Iterable
from dataclasses import fields, is_dataclass, replace
from functools import reduce
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings

from node import events
from node.averages import binned
from node.consciousness import OTHER, REASONS_MAX, ConsciousnessState, Learning, Load, Uncertainty, social_of
from node.consciousness_fields import FIELDS, Field, figures_and_words, member, page, state_of
from node.errors import BadFigure
from node.events import FIGURES_MAX, WORDS_MAX, Body, Event, Note, decode_body, encode_body
from node.facts import FACTS, Fact, Generated, HeldOut, Merged, Probed, Sampled, Started, Stopped, Stored
from node.memory import apply
from node.memory_events import Remembered, doing, from_event, last_stop_of, replayed, started, to_event
from tests.facts_world import CHANGES, LIFE, facts, histories
from tests.store_world import T0_MS, World

ROOT = Path(__file__).parent.parent
MODULES = (
    "averages.py", "consciousness.py", "consciousness_fields.py", "facts.py", "memory.py", "memory_events.py",
    "prediction.py",
)  # fmt: skip
every_field = pytest.mark.parametrize("row", FIELDS, ids=lambda row: row.path)


def fold(history: Iterable[Fact], state: ConsciousnessState | None = None) -> ConsciousnessState:
    return reduce(lambda state, fact: apply(fact, state), history, state or ConsciousnessState())


def over_disk(body: Body) -> Body:
    return decode_body(type(body).__name__.lower(), encode_body(body))


# --- what moves a member ---


@every_field
def test_without_its_cause_a_member_is_not_measured_and_with_it_it_moves(row: Field) -> None:
    unmeasured = member(ConsciousnessState(), row.path)
    assert unmeasured in (None, {})
    others = [fact for fact in (*LIFE, *CHANGES) if type(fact).__name__ not in row.causes]
    assert member(fold(others), row.path) == unmeasured
    lived = apply(Stopped(reason="a reason", uptime_s=1.0), fold(LIFE))
    assert row.causes
    for cause in row.causes:
        (fact,) = (fact for fact in CHANGES if type(fact).__name__ == cause)
        assert member(apply(fact, lived), row.path) != member(lived, row.path), cause


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(histories, facts)
def test_nothing_else_moves_a_member(history: list[Fact], fact: Fact) -> None:
    before = fold(history)
    after = apply(fact, before)
    for row in FIELDS:
        if type(fact).__name__ not in row.causes:
            assert member(after, row.path) == member(before, row.path), row.path


def test_the_table_has_every_member_and_every_fact_once() -> None:
    def paths(state: Any, begin: str) -> Iterable[str]:
        for each in fields(state):
            inner = getattr(state, each.name)
            yield from paths(inner, f"{begin}{each.name}.") if is_dataclass(inner) else (begin + each.name,)

    assert sorted(row.path for row in FIELDS) == sorted(paths(ConsciousnessState(), ""))
    assert {cause for row in FIELDS for cause in row.causes} == {fact.__name__ for fact in FACTS}
    for row in FIELDS:
        assert row.formula.endswith("."), row.path
        assert row.source, row.path


def test_the_page_is_made_from_the_table() -> None:
    assert (ROOT / "docs" / "SELF.md").read_text() == page(), "make it anew, as it says itself"


@pytest.mark.parametrize("name", MODULES)
def test_there_is_no_chance_and_no_clock_in_any_metric_path(name: str) -> None:
    tree = ast.parse((ROOT / "node" / name).read_text())
    names = {alias.name for item in ast.walk(tree) if isinstance(item, ast.Import) for alias in item.names}
    names |= {item.module or "" for item in ast.walk(tree) if isinstance(item, ast.ImportFrom)}
    foreign = {module for module in names if not module.startswith("node.") and module != "node"}
    # a list of what is allowed, so that no source of chance is forgotten in it
    assert foreign <= {"__future__", "collections.abc", "dataclasses", "math", "re", "statistics", "typing"}
    called = {item.func.id for item in ast.walk(tree) if isinstance(item, ast.Call) and isinstance(item.func, ast.Name)}
    assert not called & {"hash", "id", "__import__", "eval", "exec"}


# --- what the figures are ---


def test_uncertainty_is_a_mean_of_tokens_then_of_the_last_thousand() -> None:
    state = fold([Generated(tokens=1, entropy_sum_nats=4.0, margin_sum=0.0)] * 3)
    state = apply(Generated(tokens=1, entropy_sum_nats=0.0, margin_sum=1.0), state)
    assert state.uncertainty.entropy_nats == pytest.approx(3.0)
    assert state.uncertainty.margin == pytest.approx(0.25)
    state = apply(Generated(tokens=100_000, entropy_sum_nats=100_000.0, margin_sum=0.0), state)
    assert state.uncertainty.entropy_nats == pytest.approx(1.0, abs=1e-3)
    assert state.uncertainty.tokens == 100_004


def test_surprise_is_measured_against_the_looks_before() -> None:
    state = fold([HeldOut(nll_nats=2.0)])
    assert state.surprise.deviations is None
    state = fold([HeldOut(nll_nats=4.0)], state)
    assert state.surprise.deviations is None  # it varied not at all before
    assert (state.surprise.mean_nats, state.surprise.variance) == (3.0, 1.0)
    state = fold([HeldOut(nll_nats=6.0)], state)
    assert state.surprise.deviations == pytest.approx(3.0)
    assert (state.surprise.mean_nats, state.surprise.variance) == (pytest.approx(4.0), pytest.approx(8 / 3))
    assert state.calibration.error is None  # no bins were counted
    assert fold([HeldOut(nll_nats=6.0, bins=binned([]))], state).calibration == state.calibration


def test_drift_is_told_by_round_and_a_restart_alone_is_none() -> None:
    state = fold([Probed(rounds=4, answers=0.5, embeddings=0.2)])
    assert (state.coherence.answers_drift, state.coherence.embeddings_drift) == (0.125, pytest.approx(0.2))
    state = fold([Probed(rounds=0, answers=0.5)])
    assert (state.coherence.answers, state.coherence.answers_drift, state.coherence.embeddings) == (0.5, None, None)


def test_reasons_are_bounded_and_none_is_lost() -> None:
    merges = [Merged(run="r", round=n, accepted=0, rejected={f"why{n}": 2}) for n in range(40)]
    rejected = fold(merges).learning.rejected
    assert len(rejected) == REASONS_MAX + 1
    assert sum(rejected.values()) == 80
    assert rejected[OTHER] == 2 * (40 - REASONS_MAX)


def test_which_reasons_are_told_apart_does_not_hang_on_the_order_in_which_they_came() -> None:
    """An event has them in order: a replay told others apart than the node had."""
    one = Merged(run="r", round=1, accepted=0, rejected={f"why{n}": n for n in range(40, 0, -1)})
    again = from_event(over_disk(to_event(one, T0_MS).body))
    assert isinstance(again, Merged)
    assert fold([again]) == fold([one])


def test_peers_are_summed_up_of_those_that_were_measured() -> None:
    assert social_of(3, []) == social_of(3, [(None, None)])
    assert social_of(3, []).success_mean is None
    social = social_of(5, [(1.0, 10.0), (0.5, None), (None, 30.0), (None, None)])
    assert (social.observed_peers, social.success_mean, social.success_least, social.rtt_ms) == (3, 0.75, 0.5, 20.0)


# --- at the door ---


def numbers(of: Any) -> Iterable[tuple[Any, str]]:
    for each in fields(of):
        value = getattr(of, each.name)
        if is_dataclass(value):
            yield from numbers(value)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield of, each.name


@pytest.mark.parametrize("fact", LIFE + CHANGES[1:2], ids=lambda fact: type(fact).__name__)
def test_what_is_no_number_or_out_of_bounds_is_refused_when_a_fact_is_made(fact: Fact) -> None:
    for owner, name in numbers(fact):
        least = -1.5 if name in owner.COSINES else -0.5
        for bad in (math.nan, math.inf, -math.inf, 1e300, least):
            with pytest.raises(BadFigure, match=name):
                replace(owner, **{name: bad})


def test_words_and_reasons_that_no_event_takes_are_refused() -> None:
    for word in ("x" * 257, "\ud800"):
        with pytest.raises(BadFigure, match="phase"):
            Sampled(phase=word)
    for reason in ("", "A b", "x" * 41):
        with pytest.raises(BadFigure, match="wanted are"):
            Merged(run="r", round=1, accepted=0, rejected={reason: 1})
        with pytest.raises(BadFigure, match="last_stop"):
            Started(boot_count=1, version="1", model="a", last_stop=reason)
    with pytest.raises(BadFigure, match="0 or more"):
        Merged(run="r", round=1, accepted=0, rejected={"late": -1})
    with pytest.raises(BadFigure, match="told apart"):
        Learning(rejected={f"w{n}": 1 for n in range(REASONS_MAX + 2)})
    with pytest.raises(BadFigure, match="each 0 to 1"):
        Generated(tokens=1, entropy_sum_nats=1.0, margin_sum=1.5)
    with pytest.raises(BadFigure, match="each 0 to 1000"):
        Generated(tokens=2, entropy_sum_nats=2000.5, margin_sum=1.5)
    with pytest.raises(BadFigure, match="queue_length"):
        Load(queue_length=10**400)
    with pytest.raises(BadFigure, match="bins"):
        HeldOut(nll_nats=1.0, bins=())
    with pytest.raises(BadFigure, match="not finite"):
        social_of(1, [(1.0, math.nan), (1.0, 1.0), (1.0, 2.0)])


# --- to the memory and back ---


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(histories)
def test_a_replay_is_the_state_that_was(history: list[Fact]) -> None:
    """Snapshots stand after facts without an event of their own; the last facts may come after the last snapshot."""
    state, log, is_told = ConsciousnessState(), list[Event](), True
    for fact in history:
        if isinstance(fact, Remembered):
            if not is_told:
                log.append(to_event(state, T0_MS))
            log.append(to_event(fact, T0_MS))
        state, is_told = apply(fact, state), isinstance(fact, Remembered)
    if not is_told:
        log.append(to_event(state, T0_MS))
    log = [Event(ts_ms=each.ts_ms, body=over_disk(each.body)) for each in log]
    assert replayed(log) == state
    assert replayed([*log, Event(ts_ms=T0_MS, body=Note(text="nothing of the node"))]) == state
    figures, words = figures_and_words(state)
    assert len(figures) <= FIGURES_MAX
    assert len(words) <= WORDS_MAX
    assert over_disk(to_event(state, T0_MS).body) == to_event(state, T0_MS).body


def test_after_a_kill_the_node_can_say_what_it_was_doing(tmp_path: Path) -> None:
    world = World(tmp_path)
    store = world.open()
    state = fold(LIFE)
    for fact in LIFE:
        if isinstance(fact, Remembered):
            store.append([to_event(fact, T0_MS)])
    store.append([to_event(state, T0_MS)])
    store.close()  # tests/test_store_kill.py kills: what was acknowledged is there
    store = world.open()
    log = list(reversed(store.recent(None, 100)))
    before = replayed(log)
    assert before == state
    assert doing(before) == "run 3; a; running; 2 requests under way; 1 waiting; training: gathering, round 5"
    start = started(before, "2", "a")
    assert start == Started(boot_count=4, version="2", model="a", last_stop="kill")
    now = apply(start, before)
    assert (now.load, now.identity.round, now.surprise) == (Load(), 5, before.surprise)
    stopped = apply(Stopped(reason="SIGTERM", uptime_s=5.0), now)
    assert last_stop_of(stopped) == "order"
    assert "stopped in order (SIGTERM)" in doing(stopped)
    store.close()


def test_the_first_start_says_so() -> None:
    assert started(replayed([]), "1", "a").last_stop == "first"
    assert doing(replayed([])) == "nothing is recorded of this node yet"


def test_zero_is_measured_and_absence_is_not() -> None:
    zero = apply(Sampled(load=Load(queue_length=0)), ConsciousnessState())
    figures, _ = figures_and_words(zero)
    assert figures == {"load.queue_length": 0.0}
    assert state_of(figures, {}) == zero != ConsciousnessState()


def test_events_of_another_program_are_refused_and_later_members_passed_over() -> None:
    assert state_of({"load.queue_length": 2.0, "mood": 1.0}, {"later.word": "x"}).load.queue_length == 2
    for figures in ({"load.queue_length": 2.5}, {"load.queue_length": -1.0}, {"calibration.error": 2.0}):
        with pytest.raises(BadFigure):
            state_of(figures, {})
    for words in ({"calibration.gaps": "1 2"}, {"calibration.gaps": "x"}, {"learning.rejected.late": "1_0"}):
        with pytest.raises(BadFigure):
            state_of({}, words)
    with pytest.raises(BadFigure, match=r"latency_s\.naive"):
        from_event(events.Prediction(from_ms=0, to_ms=1, figures={"latency_s": 1.0}))
    with pytest.raises(BadFigure, match="latency_s"):
        from_event(events.Outcome(prediction=1, figures={"latency_s": 1.0}, errors={}))
    assert from_event(None) is None  # it was forgotten


def test_what_was_learned_of_a_model_goes_with_it_and_stays_over_a_restart() -> None:
    lived = fold(LIFE)
    again = apply(Started(boot_count=4, version="1", model="a", last_stop="kill"), lived)
    assert (again.uncertainty, again.calibration, again.coherence) == (
        lived.uncertainty, lived.calibration, lived.coherence,
    )  # fmt: skip
    assert (again.body, again.identity.uptime_s, again.identity.revision) == (Sampled().body, None, "rev1")
    other = apply(Started(boot_count=4, version="1", model="b", last_stop="kill"), lived)
    assert (other.uncertainty, other.learning, other.identity.revision) == (Uncertainty(), Learning(), None)
    assert other.self_prediction_error == lived.self_prediction_error  # which is the node's own
    assert apply(Sampled(), lived).identity.peer_id == "peer1"  # who it is stays where a sample leaves it out


def test_counts_stop_at_their_bound() -> None:
    most = (1 << 53) - 1
    state = fold([Generated(tokens=most, entropy_sum_nats=0.0, margin_sum=0.0)] * 2)
    assert state.uncertainty.tokens == most
    state = fold([Merged(run="r", round=1, accepted=most, rejected={"late": most})] * 2)
    assert (state.learning.accepted, state.learning.rejected) == (most, {"late": most})
    looks = fold([HeldOut(nll_nats=1.0), HeldOut(nll_nats=math.nextafter(1.0, 2)), HeldOut(nll_nats=1000.0)])
    assert looks.surprise.deviations is not None
    assert looks.surprise.deviations > 1e15 / 4
    assert fold([HeldOut(nll_nats=0.0), HeldOut(nll_nats=1e-150), HeldOut(nll_nats=1000.0)]).surprise.deviations == most


def test_stored_is_told_as_it_is() -> None:
    (stored,) = (fact for fact in LIFE if isinstance(fact, Stored))
    assert fold([stored]).memory == stored.memory
