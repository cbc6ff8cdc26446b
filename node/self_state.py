"""The node's self-state while it runs: facts in, events out, and what is told and recalled of them.

Rules: shell, of node/memory.py, which says what a fact changes. Before a fact with an event of its own the state is
noted as it is, unless the log gives it back already: so what a kill leaves replays to the very state of its last such
event. A sample is noted when it has news (node/self_period.py), and at least every SNAPSHOT_S. Facts that come before
the memory is read wait for it. Nothing is told but records and measurements.
Source: SELF.md, "Self-state and memory"; node/self_face.py.
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any, Final

import trio

from node import memory_events
from node.consciousness import ConsciousnessState
from node.consciousness_fields import FIELDS, member
from node.errors import BadFigure, NotReady
from node.events import Event, Kept, Peer
from node.facts import Fact, Happened, HeldOut, Merged, Predicted, Sampled, Started, Stopped, Stored
from node.memory import apply
from node.memory_events import doing, replayed, to_event
from node.prediction import Prediction, Predictor, resumed, score
from node.recorder import Recorder
from node.request_ended import OK, Ended, word
from node.request_ended import to_event as ended_event
from node.self_face import Question
from node.self_period import Period, Quota, is_news
from node.self_recall import Recall, last_events
from node.version import VERSION

SNAPSHOT_S: Final = 300.0  # the longest time without a snapshot, so that history has no holes
EARLY_MAX: Final = 1_000  # facts that come before the memory is read
PEER_EVENTS_MAX = (12, 1_200)  # an hour, of one peer and of all: a churning one must not fill the log
REQUEST_EVENTS_MAX = (10_000, 50_000)  # an hour, of one account and of all; failures a tenth of it
OF_THEIR_OWN = (Started, Stopped, Predicted, Happened, Merged)  # facts with events of their own

_log = logging.getLogger(__name__)


class SelfState:
    """Implements node.self_face.SelfFace. `begin` it once; `stop` it last."""

    def __init__(self, recorder: Recorder, recall: Recall, *, model: str) -> None:
        """model: the name that the node was started with."""
        self._recorder, self._recall, self._model = recorder, recall, word(model)
        self._state = ConsciousnessState()
        self._noted = ConsciousnessState()  # the last snapshot
        self._noted_at = trio.current_time()
        self._is_replayable = True  # the log gives back the very state
        self._early: list[Fact] | None = []  # None: the memory was read
        self._before = ""
        self._predictor = Predictor()
        self._foretold: tuple[Prediction, list[int]] | None = None  # and its id in the memory, once it has one
        self._quotas = {"peer": Quota(*PEER_EVENTS_MAX), "ok": Quota(*REQUEST_EVENTS_MAX)}
        self._quotas["failed"] = Quota(*(each // 10 for each in REQUEST_EVENTS_MAX))
        self._costs: defaultdict[str, float] = defaultdict(float)  # CPU seconds, by part
        self.period = Period()

    # --- the life of it ---

    async def begin(self) -> None:
        """Read what the run before left, and note the start. Whatever the memory is like, the state begins."""
        try:
            log = await self._recorder.ask(last_events)
            before, problem = replayed(log), "" if log else self._recorder.problem
        except (NotReady, BadFigure) as exc:
            log, before, problem = [], ConsciousnessState(), str(exc)
            _log.warning("what the run before left cannot be read, the node's self-state begins afresh: %s", exc)
        self._before = f"it cannot be read: {problem}" if problem else doing(before)
        self._state = before
        self._resume(log)
        early, self._early = self._early or [], None
        begun = memory_events.started(before, VERSION, self._model)
        self.take(memory_events.unread(begun) if problem else begun)
        for fact in early:
            self.take(fact)
        self._recorder.hurry()

    def _resume(self, log: list[Kept]) -> None:
        """Go on foretelling from the last prediction."""
        for event in log:
            if isinstance(fact := memory_events.from_event(event.body), Predicted):
                self._predictor = resumed(fact.prediction)

    def stop(self, reason: str, uptime_s: float) -> None:
        """The node ends in order: the last event."""
        if self._early is None:
            self.take(Stopped(reason=word(reason), uptime_s=uptime_s))

    # --- what happens ---

    def take(self, fact: Fact) -> None:
        """Something was measured, or happened."""
        if self._early is not None:
            if len(self._early) < EARLY_MAX:
                self._early.append(fact)
            return
        with self.counting("state"):
            self._take(fact)

    def _take(self, fact: Fact) -> None:
        if isinstance(fact, HeldOut):
            self.period.held_out(fact.nll_nats)
        is_own = isinstance(fact, OF_THEIR_OWN)
        if isinstance(fact, OF_THEIR_OWN):
            if not self._is_replayable:
                self._snapshot()
            id_of = list[int]()
            self._recorder.note(to_event(fact, self._recorder.clock_ms()), id_of.append)
            if isinstance(fact, Predicted):
                self._foretold = fact.prediction, id_of
        before, self._state = self._state, apply(fact, self._state)
        if not is_own and self._state != before:
            self._is_replayable = False
        is_overdue = trio.current_time() - self._noted_at >= SNAPSHOT_S
        if isinstance(fact, Sampled) and (is_overdue or is_news(self._noted, self._state)):
            self._snapshot()

    def _snapshot(self) -> None:
        self._recorder.note(to_event(self._state, self._recorder.clock_ms()))
        self._noted, self._noted_at, self._is_replayable = self._state, trio.current_time(), True

    def stored(self) -> None:
        """Take note of what the memory says of itself, if that is new."""
        recorded = self._recorder.recorded
        if recorded is not None and recorded != self._state.memory:
            self.take(Stored(memory=recorded))

    def foretell(self, period_ms: int, *, is_first: bool = False) -> None:
        """A period is over: say what came of its prediction, and foretell the next. is_first: none was before it."""
        measured, self.period = {} if is_first else self.period.figures(), Period()
        if self._foretold is not None:
            prediction, id_of = self._foretold
            outcome = score(prediction, measured, id_of[0] if id_of else 0)
            if outcome.figures:
                self.take(Happened(outcome=outcome))
        self._predictor = self._predictor.observed(measured)
        self._foretold = None
        prediction = self._predictor.predict(self._recorder.clock_ms(), period_ms)
        if prediction.figures:
            self.take(Predicted(prediction=prediction))

    def ended(self, request: Ended) -> None:
        """A request of a client, or of a peer, has ended."""
        with self.counting("state"):
            if request.outcome == OK:
                self.period.answered(request.took_s)
            if (event := ended_event(request, self._recorder.clock_ms())) is None:
                return
            quota = self._quotas["ok" if request.outcome == OK else "failed"]
            if quota.takes(request.account, trio.current_time()):
                self._recorder.note(event, self._recall.meant_for(event))
            else:
                self._recorder.note_lost("inference", 1)

    def peer(self, peer: str, happened: str, *, rtt_ms: float | None = None, text: str = "") -> None:
        """Something was seen of a peer: joined, left, failed, banned."""
        with self.counting("state"):
            if not self._quotas["peer"].takes(peer, trio.current_time()):
                self._recorder.note_lost("peer", 1)
                return
            body = Peer(subject=peer, peer=peer, happened=happened, rtt_ms=rtt_ms, text=word(text))
            self._recorder.note(Event(ts_ms=self._recorder.clock_ms(), body=body))

    @contextmanager
    def counting(self, part: str) -> Iterator[None]:
        """The CPU time of a block without waiting is this part's: it is told under `cost`."""
        began_s = time.thread_time()
        try:
            yield
        finally:
            self.spent(part, time.thread_time() - began_s)

    def has_spent(self, part: str, cpu_s: float) -> None:
        """A part that counts by itself has taken so much CPU time since the start."""
        self._costs[part] = cpu_s

    def spent(self, part: str, cpu_s: float) -> None:
        """A part of the self-state took so much CPU time, wherever it ran."""
        self._costs[part] += cpu_s

    # --- see node.self_face.SelfFace ---

    @property
    def state(self) -> ConsciousnessState:
        """What was measured, now."""
        return self._state

    @property
    def prediction(self) -> Prediction | None:
        """What the node expects of the period under way; None before two periods were measured."""
        return None if self._foretold is None else self._foretold[0]

    def told(self) -> dict[str, Any]:
        """See node.self_face.SelfFace."""
        statistics = self._recorder.statistics()
        process_s = time.process_time()
        costs = {**self._costs, "memory": statistics.cpu_s}
        return {
            "at_ms": self._recorder.clock_ms(),
            "doing": doing(self._state),
            "before": self._before,
            "fields": [
                {
                    "path": row.path,
                    "value": _plain(member(self._state, row.path)),
                    "unit": row.unit,
                    "formula": row.formula,
                    "source": row.source,
                }
                for row in FIELDS
            ],
            "prediction": None if self.prediction is None else asdict(self.prediction),
            "memory": {
                **asdict(statistics.store),
                "degraded": self._recorder.problem,
                "queued": statistics.queued,
                "dropped": statistics.dropped,
            },
            "cost": {
                part: {"cpu_s": round(cpu_s, 6), "share": round(cpu_s / process_s, 6) if process_s else None}
                for part, cpu_s in costs.items()
            },
        }

    async def recall(self, question: Question) -> list[dict[str, Any]]:
        """See node.self_face.SelfFace."""
        return await self._recall.recall(question)

    async def history(self, paths: tuple[str, ...], n: int) -> dict[str, Any]:
        """See node.self_face.SelfFace."""
        return await self._recall.history(paths, n)

    async def verify(self) -> dict[str, Any]:
        """See node.self_face.SelfFace."""
        return await self._recall.verify()

    async def note(self, text: str, subject: str) -> int:
        """See node.self_face.SelfFace."""
        return await self._recall.note(text, subject)

    async def forget(self, subject: str) -> int:
        """See node.self_face.SelfFace."""
        return await self._recall.forget(subject)


def _plain(value: Any) -> Any:
    """As JSON has it."""
    if isinstance(value, tuple):
        return list(value)
    return dict(value) if isinstance(value, dict) else value
