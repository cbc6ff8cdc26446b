"""A SelfFace over a real memory and the real cores, in the caller's thread: facts are said to it by hand."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import msgspec
import trio

from node import events
from node.consciousness import ConsciousnessState, Recorded
from node.consciousness_fields import FIELDS, figures_and_words, member
from node.errors import BadRequest, NotReady, StoreUnavailable
from node.events import Event, Kept, Note
from node.facts import Fact, Happened, Merged, Predicted, Started, Stopped, Stored
from node.memory import apply
from node.memory_events import doing, replayed, to_event
from node.prediction import Prediction
from node.self_face import RECALLED_MAX, Question
from tests.facts_world import LIFE
from tests.store_world import World

WITH_EVENTS = Started | Stopped | Predicted | Happened | Merged
KNOWN = {row.path for row in FIELDS}


class FakeSelf:
    """Begin with an empty folder, or one that another has left; `close` it."""

    def __init__(self, folder: Path) -> None:
        self.world = World(folder)
        self.store = self.world.open()
        kept = sorted(self.store.recent(None, 1_000), key=lambda each: each.id)
        self.state: ConsciousnessState = replayed(kept)
        self.before = doing(self.state)
        self.prediction: Prediction | None = None
        self.verified = 0
        self.verify_s = 0.0
        self.fails: Exception | None = None

    def close(self) -> None:
        self.store.close()

    def live(self, facts: Iterable[Fact] = LIFE) -> FakeSelf:
        """Say facts, then keep a snapshot, as the sampler does."""
        for fact in facts:
            self.say(fact)
        return self.snapshot()

    def say(self, fact: Fact) -> None:
        """Apply a fact, and remember it where it has an event."""
        self.state = apply(fact, self.state)
        if isinstance(fact, Predicted):
            self.prediction = fact.prediction
        if isinstance(fact, WITH_EVENTS):
            self.store.append([to_event(fact, self.world.now_ms)])

    def snapshot(self) -> FakeSelf:
        """What the memory says of itself, then a state event."""
        self.world.now_ms += 60_000
        told = self.store.statistics()
        memory = Recorded(
            entries=told.entries, last_write_ms=told.last_write_ms, head_id=told.head_id, head_hash=told.head_hash
        )
        self.say(Stored(memory=memory))
        self.store.append([to_event(self.state, self.world.now_ms)])
        return self

    # --- the face ---

    def told(self) -> dict[str, Any]:
        """See node.self_face."""
        fields = [
            {
                "path": row.path, "value": member(self.state, row.path), "unit": row.unit, "formula": row.formula,
                "source": row.source,
            }
            for row in FIELDS
        ]  # fmt: skip
        prediction = None if self.prediction is None else asdict(self.prediction)
        memory = {**asdict(self.store.statistics()), "queued": 0, "dropped": {}}
        cost = {"looks": {"cpu_s": 0.5, "share": 0.004}, "store": {"cpu_s": 0.25, "share": 0.002}}
        return {
            "at_ms": self.world.now_ms, "doing": doing(self.state), "before": self.before, "fields": fields,
            "prediction": prediction, "memory": memory, "cost": cost,
        }  # fmt: skip

    async def recall(self, question: Question) -> list[dict[str, Any]]:
        """See node.self_face."""
        await self._waits()
        assert 1 <= question.n <= RECALLED_MAX
        if question.by == "meaning":
            found = self.store.nearest(vector_of(question.query), question.n)
            return [{**_json(kept), "likeness": like} for like, kept in found]
        if question.query:
            kept = self.store.search(question.query, 1_000)
        elif question.subject is not None:
            kept = self.store.by_subject(question.subject, 1_000)
        else:
            kept = self.store.recent(question.kind, 1_000)
        if question.kind is not None:
            kept = [each for each in kept if each.kind == question.kind]
        if question.subject is not None:
            kept = [each for each in kept if each.body is not None and each.body.subject == question.subject]
        return [_json(each) for each in kept[: question.n]]

    async def history(self, paths: tuple[str, ...], n: int) -> dict[str, Any]:
        """See node.self_face."""
        await self._waits()
        if unknown := set(paths) - KNOWN:
            raise BadRequest(f"{sorted(unknown)[0]!r} is no member of the state; see GET /api/v1/self", param="path")
        states = [each for each in reversed(self.store.recent("state", n)) if isinstance(each.body, events.State)]
        bodies = [each.body for each in states if isinstance(each.body, events.State)]
        numbers = {row.path for row in FIELDS if row.kind in ("int", "float")}
        figures = {path: [each.figures.get(path) for each in bodies] for path in paths if path in numbers}
        words = {path: [each.words.get(path) for each in bodies] for path in paths if path not in numbers}
        return {"ts_ms": [each.ts_ms for each in states], "figures": figures, "words": words}

    async def verify(self) -> dict[str, Any]:
        """See node.self_face."""
        await self._waits()
        await trio.sleep(self.verify_s)
        self.verified += 1
        fault, told = self.store.verify(), self.store.statistics()
        return {
            "is_whole": fault is None, "events": told.entries, "head_id": told.head_id, "head_hash": told.head_hash,
            "fault": None if fault is None else {"id": fault.id, "why": fault.why},
        }  # fmt: skip

    async def note(self, text: str, subject: str) -> int:
        """See node.self_face."""
        await self._waits()
        ids = self.store.append([Event(ts_ms=self.world.now_ms, body=Note(text=text, subject=subject))])
        if not ids:
            raise NotReady(f"it was not remembered: {self.store.statistics().degraded}")
        self.store.put_vector(ids[0], vector_of(text))
        return ids[0]

    async def forget(self, subject: str) -> int:
        """See node.self_face."""
        await self._waits()
        try:
            return self.store.forget(subject)
        except StoreUnavailable as exc:
            raise NotReady(str(exc)) from exc

    async def _waits(self) -> None:
        await trio.lowlevel.checkpoint()
        if self.fails is not None:
            raise self.fails


def _json(kept: Kept) -> dict[str, Any]:
    body = None if kept.body is None else msgspec.to_builtins(kept.body)
    return {"id": kept.id, "ts_ms": kept.ts_ms, "kind": kept.kind, "hash": kept.hash.hex(), "body": body}


def vector_of(text: str) -> list[float]:
    """A stand-in for a model that embeds: words that are in two texts make their vectors alike."""
    total = [1e-3] * 16
    for word in text.lower().split():
        drawn = random.Random(word)
        total = [each + drawn.gauss(0, 1) for each in total]
    return total


def measured(self_: FakeSelf) -> tuple[dict[str, float], dict[str, str]]:
    """Figures and words of the newest snapshot in the memory itself."""
    [kept] = self_.store.recent("state", 1)
    assert isinstance(kept.body, events.State)
    assert (kept.body.figures, kept.body.words) == figures_and_words(self_.state)
    return kept.body.figures, kept.body.words
