"""Questions to the node's memory, as its doors ask them: recall by words and by meaning, history, notes, forgetting.

Rules: shell, of node/recorder.py; every input is checked here, and what comes back is JSON. By meaning is asked of the
model that embeds here, with vectors of notes and of opted-in texts, which one task (`run`) makes after they were
written, on the account of nobody: clients and peers go before it. A filter by kind or subject is over the newest
SEEN_MAX that fit the rest of a question.
Source: SELF.md, "Memory": recall by full-text search and by embedding.
"""

from __future__ import annotations

import logging
import struct
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Final

import msgspec
import trio

from model.step import Priority
from node.backend import Backend
from node.consciousness_fields import FIELDS
from node.errors import NO_ROOM_RETRY_S, BadRequest, NotReady, RequestError, StoreUnavailable
from node.events import KINDS, TEXT_CHARS_MAX, Event, Inference, Kept, Note, State
from node.recorder import Recorder
from node.request_ended import SUBJECT_CHARS_MAX
from node.requester import OWN, Requester
from node.self_face import QUESTION_CHARS_MAX, RECALLED_MAX, Question
from node.store import Store
from node.store_recall import RECALL_MAX
from node.work import EmbedWork

SEEN_MAX: Final = RECALL_MAX  # events that a filter looks through
HISTORY_MAX: Final = RECALL_MAX
TO_EMBED_MAX: Final = 64  # texts that wait for their vectors; beyond, the oldest goes without
OF_THE_STATE: Final = ("start", "stop", "prediction", "outcome", "merge")
NOBODY: Final = Requester("memory", Priority.STRANGER)

_log = logging.getLogger(__name__)


def last_events(store: Store) -> list[Kept]:
    """What gives back the state: the newest snapshot and the facts after it, oldest first; and before them the last
    prediction, wherever it stands."""
    snapshots = store.recent("state", 1)
    after_id = snapshots[0].id if snapshots else 0
    found = [event for kind in OF_THE_STATE for event in _after(store, kind, after_id)]
    older = [event for event in store.recent("prediction", 1) if event.id < after_id]
    return sorted([*older, *snapshots, *found], key=lambda event: event.id)


def _after(store: Store, kind: str, after_id: int) -> list[Kept]:
    """All of a kind after an event; few, so that few are read."""
    n, found = 4, list[Kept]()
    while n < SEEN_MAX:
        n *= 4
        found = store.recent(kind, n)
        if len(found) < n or found[-1].id <= after_id:
            break
    return [event for event in found if event.id > after_id]


class Recall:
    """See the module. hosting: what answers at this node now, None when nothing does (yet)."""

    def __init__(self, recorder: Recorder, hosting: Callable[[], Backend | None]) -> None:
        self._recorder, self._hosting = recorder, hosting
        self._to_embed: deque[tuple[int, str]] = deque(maxlen=TO_EMBED_MAX)
        self._wake = trio.Event()
        self.embedded = 0

    # --- in ---

    async def note(self, text: str, subject: str) -> int:
        """See node.self_face.SelfFace."""
        if not 1 <= len(text) <= TEXT_CHARS_MAX:
            raise BadRequest(f"a note of {len(text)} characters came, wanted 1 to {TEXT_CHARS_MAX}", param="text")
        _check_subject(subject)
        _check_words("text", text)
        event = Event(ts_ms=self._recorder.clock_ms(), body=Note(text=text, subject=subject))
        event_id = await self._recorder.written(event)
        self._embed_later(event_id, text)
        return event_id

    def meant_for(self, event: Event) -> Callable[[int], None] | None:
        """What is to be called with a noted event's id, so that it can be recalled by meaning; None: it has no text."""
        text = event.body.text if isinstance(event.body, Inference | Note) else None
        if text is None:
            return None
        return lambda event_id: self._embed_later(event_id, text)

    async def forget(self, subject: str) -> int:
        """See node.self_face.SelfFace."""
        if not subject:
            raise BadRequest("an empty subject came: say which account, peer or conversation", param="subject")
        _check_subject(subject)
        try:
            return await self._recorder.ask(lambda store: store.forget(subject))
        except StoreUnavailable as exc:
            raise NotReady(str(exc), retry_after_s=NO_ROOM_RETRY_S) from exc

    # --- out ---

    async def recall(self, question: Question) -> list[dict[str, Any]]:
        """See node.self_face.SelfFace."""
        if not 1 <= question.n <= RECALLED_MAX:
            raise BadRequest(f"n = {question.n}: wanted 1 to {RECALLED_MAX}", param="n")
        if len(question.query) > QUESTION_CHARS_MAX:
            raise BadRequest(
                f"a question of {len(question.query)} characters came, at most {QUESTION_CHARS_MAX} are taken",
                param="q",
            )
        if question.kind is not None and question.kind not in KINDS:
            raise BadRequest(f"kind {question.kind[:64]!r} is none; there are {', '.join(KINDS)}", param="kind")
        _check_subject(question.subject or "")
        _check_words("q", question.query)
        if question.by == "meaning":
            vector = await self._vector(question.query)
            alike = await self._recorder.ask(lambda store: store.nearest(vector, _seen(question)))
            fitting = [(like, event) for like, event in alike if _fits(event, question)]
            return [{**_told(event), "likeness": round(like, 6)} for like, event in fitting[: question.n]]
        events = await self._recorder.ask(lambda store: _by_words(store, question))
        return [_told(event) for event in events if _fits(event, question)][: question.n]

    async def history(self, paths: tuple[str, ...], n: int) -> dict[str, Any]:
        """See node.self_face.SelfFace."""
        if not 1 <= n <= HISTORY_MAX:
            raise BadRequest(f"n = {n}: wanted 1 to {HISTORY_MAX}", param="n")
        kinds = {row.path: row.kind for row in FIELDS}
        if unknown := [path for path in paths if path not in kinds]:
            raise BadRequest(
                f"{unknown[0][:80]!r} is no member of the state: GET /api/v1/self has them all", param="path"
            )
        events: list[Kept] = await self._recorder.ask(lambda store: store.recent("state", n))
        events.reverse()
        states = [event.body for event in events if isinstance(event.body, State)]
        told: dict[str, Any] = {
            "ts_ms": [event.ts_ms for event in events if isinstance(event.body, State)], "figures": {}, "words": {}
        }  # fmt: skip
        for path in paths:
            if kinds[path] in ("int", "float"):
                told["figures"][path] = [state.figures.get(path) for state in states]
            elif kinds[path] == "counts":
                told["words"][path] = [_counts(state, f"{path}.") for state in states]
            else:
                told["words"][path] = [state.words.get(path) for state in states]
        return told

    async def verify(self) -> dict[str, Any]:
        """See node.self_face.SelfFace. Other work goes between its steps."""
        walk = await self._recorder.ask(Store.verification)

        def on(_: Store) -> None:
            walk.step()
            walk.step()  # at the tail: else what is noted meanwhile would keep it from ending for ever

        while not walk.done:
            await self._recorder.ask(on)
        told = await self._recorder.ask(lambda store: store.statistics())
        fault = walk.fault
        return {
            "is_whole": fault is None,
            "events": told.entries,
            "head_id": told.head_id,
            "head_hash": told.head_hash,
            "fault": None if fault is None else {"id": fault.id, "why": fault.why},
        }

    # --- vectors ---

    async def run(self) -> None:
        """Make the vectors of what was written, one by one, for as long as the node runs."""
        while True:
            if not self._to_embed:
                self._wake = trio.Event()
                await self._wake.wait()
                continue
            event_id, text = self._to_embed.popleft()
            try:
                vector = await self._vector(text, NOBODY)
            except RequestError as exc:
                _log.debug("event %d is not recalled by meaning: %s", event_id, exc)
                continue
            if await self._put(event_id, vector):
                self.embedded += 1

    async def _put(self, event_id: int, vector: Sequence[float]) -> bool:
        try:
            return await self._recorder.ask(lambda store: store.put_vector(event_id, vector))
        except (NotReady, ValueError) as exc:  # a vector without a direction is of no use either
            _log.debug("event %d is not recalled by meaning: %s", event_id, exc)
            return False

    def _embed_later(self, event_id: int, text: str) -> None:
        if event_id:
            self._to_embed.append((event_id, text))
            self._wake.set()

    async def _vector(self, text: str, requester: Requester = OWN) -> tuple[float, ...]:
        """Raises BadRequest: no model embeds here; NotReady, and what embedding does."""
        if not text:
            raise BadRequest("an empty text came: by meaning wants some words", param="q")
        hosting = self._hosting()
        if hosting is None:
            raise NotReady("no model is loaded here that could embed the question", retry_after_s=NO_ROOM_RETRY_S)
        if hosting.facts("encoder") is None:
            raise BadRequest("no model embeds at this node: ask by words", param="by")
        work = EmbedWork(request_id="memory", texts=(text,), private=True)
        embedded = await hosting.embed(work, requester)
        return struct.unpack(f"<{embedded.dimensions}f", embedded.vectors[0])


def _by_words(store: Store, question: Question) -> list[Kept]:
    seen = _seen(question)
    if question.query:
        return store.search(question.query, seen)
    if question.subject:
        return store.by_subject(question.subject, seen)
    return store.recent(question.kind, question.n)


def _seen(question: Question) -> int:
    """How many events are looked through."""
    is_plain = question.kind is None and not (question.subject and (question.query or question.by == "meaning"))
    return question.n if is_plain else SEEN_MAX


def _fits(event: Kept, question: Question) -> bool:
    if question.kind is not None and event.kind != question.kind:
        return False
    return not question.subject or (event.body is not None and event.body.subject == question.subject)


def _told(event: Kept) -> dict[str, Any]:
    return {
        "id": event.id,
        "ts_ms": event.ts_ms,
        "kind": event.kind,
        "hash": event.hash.hex(),
        "body": None if event.body is None else _plain(msgspec.to_builtins(event.body, builtin_types=(bytes,))),
    }


def _plain(value: Any) -> Any:
    """As JSON has it: bytes in hex."""
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, dict):
        return {name: _plain(inner) for name, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list | tuple) else value


def _counts(state: State, begin: str) -> str:
    return " ".join(f"{name.removeprefix(begin)}={n}" for name, n in state.words.items() if name.startswith(begin))


def _check_subject(subject: str) -> None:
    if len(subject) > SUBJECT_CHARS_MAX:
        raise BadRequest(
            f"a subject of {len(subject)} characters came, at most {SUBJECT_CHARS_MAX} are kept", param="subject"
        )
    _check_words("subject", subject)


def _check_words(param: str, text: str) -> None:
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise BadRequest(f"{param}: it has half a surrogate pair, which no bytes stand for", param=param)
