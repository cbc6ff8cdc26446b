"""Drawn histories of a memory against a plain model of it: append, forget, retain, search, crash, reopen, clocks."""

from __future__ import annotations

import shutil
import tempfile
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from node.events import HOUR_MS, Event, Hour, Inference, Note, State
from node.retention import CONDENSED, Retention, Term
from tests.store_world import World, inference, note, state

AGE_MS = 3 * HOUR_MS
ROWS_MAX = 12
RETENTION = Retention(
    terms={
        **Retention().terms,
        **{kind: Term(age_ms=AGE_MS, rows_max=ROWS_MAX) for kind in ("state", "inference", "note")},
    }
)
WORDS = ("wolf", "kid", "well", "straw")
subjects = st.sampled_from(("", "a", "b"))


class Histories(RuleBasedStateMachine):
    """The model: (id, kind, time, subject, text; None once forgotten) of every event that is left."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.world = World(self.folder, RETENTION)
        self.store = self.world.open()
        self.rows: list[list[object]] = []
        self.ever: Counter[str] = Counter()
        self.lives = 0

    def teardown(self) -> None:
        self.store.close()
        shutil.rmtree(self.folder)

    @rule(kinds=st.lists(st.tuples(st.sampled_from("sin"), subjects, st.sampled_from(WORDS)), min_size=1, max_size=6))
    def append(self, kinds: list[tuple[str, str, str]]) -> None:
        now_ms = self.world.now_ms
        events: list[Event] = []
        for kind, subject, word in kinds:
            match kind:
                case "s":
                    events.append(state(1.0, now_ms, subject))
                case "i":
                    events.append(inference(now_ms, text=word, subject=subject))
                case _:
                    events.append(note(word, subject, now_ms))
        ids = self.store.append(events)
        assert len(ids) == len(events)
        for event_id, event in zip(ids, events, strict=True):
            text = getattr(event.body, "text", "")
            self.rows.append([event_id, event.kind, event.ts_ms, event.body.subject, text])
            self.ever[event.kind] += 1

    @rule(subject=st.sampled_from(("a", "b")))
    def forget(self, subject: str) -> None:
        mine = [row for row in self.rows if row[3] == subject]
        assert self.store.forget(subject) == len(mine)
        for row in mine:
            row[3] = row[4] = None

    @rule(hours=st.integers(-1, 4))
    def wait(self, hours: int) -> None:
        """Clocks also go back."""
        self.world.now_ms += hours * HOUR_MS

    @rule()
    def retain(self) -> None:
        now_ms = self.world.now_ms
        while self.store.retain(now_ms):
            due = []
            for kind in ("state", "inference", "note"):
                rows = [row for row in self.rows if row[1] == kind]
                over = len(rows) - ROWS_MAX
                due += [row for place, row in enumerate(rows) if place < over or int(str(row[2])) < now_ms - AGE_MS]
            self.rows = [row for row in self.rows if row not in due]

    @rule()
    def reopen(self) -> None:
        self.store.close()
        self.store = self.world.open()

    @rule()
    def crash(self) -> None:
        self.lives += 1
        crashed = self.world.crashed(self.folder / f"life{self.lives}")
        self.store.close()
        self.world = crashed
        self.store = self.world.open()

    @rule(word=st.sampled_from(WORDS), n=st.integers(1, 5))
    def search(self, word: str, n: int) -> None:
        wanted = [row[0] for row in reversed(self.rows) if row[4] == word][:n]
        assert [each.id for each in self.store.search(word, n)] == wanted

    @invariant()
    def it_is_the_model(self) -> None:
        assert self.store.verify() is None
        told = self.store.statistics()
        assert (told.set_aside, told.degraded, told.lost) == ("", "", {})
        found = []
        for kept in reversed(self.store.recent(None, 1_000)):
            match kept.body:
                case None:
                    found.append([kept.id, kept.kind, kept.ts_ms, None, None])
                case Note() | Inference() | State():
                    text = getattr(kept.body, "text", "")
                    found.append([kept.id, kept.kind, kept.ts_ms, kept.body.subject, text])
        assert found == self.rows
        left = Counter(str(row[1]) for row in self.rows)
        hours = Counter[str]()
        for kept in self.store.recent("hour", 1_000):
            assert isinstance(kept.body, Hour)
            hours[kept.body.kind] += kept.body.count
        for kind in CONDENSED:
            assert left[kind] + hours[kind] == self.ever[kind], "every measurement is there, raw or in its hour"


TestHistories = Histories.TestCase
TestHistories.settings = settings(max_examples=8, stateful_step_count=20, deadline=None)
TestHistories.pytestmark = [pytest.mark.slow]
