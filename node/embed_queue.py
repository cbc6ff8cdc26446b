"""Requests for vectors that wait, and whose texts the next turn of the engine's thread embeds: a few of many requests.

Rules: core. A turn takes texts in rotation: of the classes of requesters by CLASS_WEIGHT, of the requesters of a class
and of the requests of a requester alike, counted in bytes of text. Who comes starts level with who was served least, so
that no text waits behind all those of another request. A turn takes about TURN_S, at least one text: its bytes follow
from what turns took so far. How many may wait, and of how many bytes, node/room.py says. When texts of several requests
fail together and nobody can tell which, each request goes on in turns of its own, so that nobody's text ends another's
request.
Source: start-time fair queueing (Goyal, Vin, Cheng 1996), of classes, requesters and requests one within the other.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, NamedTuple, TypeVar

from model.config import ModelFacts
from model.errors import ModelError
from model.requests import Embeddings
from model.step import Priority
from node.errors import RequestError
from node.requester import Requester
from node.room import Room, held_bytes
from node.work import Embedded, EmbedWork

EMBED_QUEUE_MAX = 64
TURN_S = 0.1  # of a turn; others wait so long for theirs, and running answers for half of it
TURN_TEXTS_MAX = 256
TURN_BYTES_FIRST, TURN_BYTES_MAX = 512, 1 << 20
TURN_BYTES_WORTH = 384  # of less a pass of the model costs more than a quarter, so for that much ...
STRETCH = 4.0  # ... a turn may take so many times as long, on a slow or busy machine
GROWTH_MAX = 2.0  # of a turn's bytes over those of the one before
TEXT_BYTES = 16  # what any text costs beside its own bytes, in bytes of text
TOKEN_BYTES = 4  # a token id stands for about so many bytes
CLASS_WEIGHT = {Priority.OWN: 4, Priority.PEER: 2, Priority.STRANGER: 1}

K = TypeVar("K")


class Made(NamedTuple):
    """One text's vector, whether the text was cut, and its tokens."""

    vector: bytes
    truncated: bool
    tokens: int


@dataclass(slots=True, kw_only=True, eq=False)
class EmbedJob:
    """One request. made: of each text, once there is something; pending: places of those that are to be embedded.

    on_end is called once, when there is a result. facts: of the model that everything made is of.
    """

    work: EmbedWork
    requester: Requester
    on_end: Callable[[], None]
    facts: ModelFacts
    made: list[Made | None]
    pending: deque[int] = field(default_factory=deque)
    result: Embedded | RequestError | None = None
    has_begun: bool = False
    is_alone: bool = False  # a turn of its own


class Text(NamedTuple):
    """One text of a turn."""

    job: EmbedJob
    place: int


@dataclass(slots=True, kw_only=True)
class EmbedTurn:
    """What one turn embeds, and what came of it. share: of a turn's time that it may take; cost: bytes of text."""

    share: float
    texts: list[Text] = field(default_factory=list)
    cost: int = 0
    result: Embeddings | ModelError | None = None  # None: not carried out


class _Turns(Generic[K]):
    """Who is next of those that are there: who has been served least, of equals who came first."""

    def __init__(self) -> None:
        self._served: dict[K, float] = {}

    def join(self, who: K) -> None:
        if who not in self._served:
            self._served[who] = min(self._served.values(), default=0.0)

    def leave(self, who: K) -> None:
        self._served.pop(who, None)

    def serve(self, who: K, amount: float) -> None:
        self._served[who] += amount

    def order(self) -> list[K]:
        return sorted(self._served, key=self._served.__getitem__)


class EmbedQueue:
    """All requests for vectors that have not ended."""

    def __init__(self) -> None:
        self.turn_bytes = TURN_BYTES_FIRST
        self.room = Room("embedding requests")
        self._jobs: dict[EmbedJob, None] = {}  # in the order in which they came
        self._classes = _Turns[Priority]()
        self._requesters: dict[Priority, _Turns[Requester]] = {priority: _Turns() for priority in Priority}
        self._of: dict[Requester, _Turns[EmbedJob]] = {}

    def __len__(self) -> int:
        return len(self._jobs)

    def add(self, job: EmbedJob) -> None:
        """Take a request in. Raises NoRoom, TooMany, and then holds nothing of it."""
        self.room.enter(job.requester, held_bytes(job.work), slots=0, queue_max=EMBED_QUEUE_MAX)
        self._jobs[job] = None
        self._classes.join(job.requester.priority)
        self._requesters[job.requester.priority].join(job.requester)
        self._of.setdefault(job.requester, _Turns()).join(job)

    def remove(self, job: EmbedJob) -> None:
        """It ended, or its owner left; one that is not there is no error."""
        if job not in self._jobs:
            return
        del self._jobs[job]
        self.room.leave(job.requester, held_bytes(job.work))
        turns = self._of[job.requester]
        turns.leave(job)
        if turns.order():
            return
        del self._of[job.requester]
        requesters = self._requesters[job.requester.priority]
        requesters.leave(job.requester)
        if not requesters.order():
            self._classes.leave(job.requester.priority)

    def has_next(self, *, is_held: bool) -> bool:
        """Whether a turn would have texts. is_held: of requests that have begun only."""
        return any(job.pending and (job.has_begun or not is_held) for job in self._jobs)

    def take(self, *, is_held: bool, share: float = 1.0) -> EmbedTurn:
        """The next turn, of so large a share of a turn's time; without texts when nothing waits."""
        room, turn = self.turn_bytes * share, EmbedTurn(share=share)
        while len(turn.texts) < TURN_TEXTS_MAX:
            job = self._next(is_held=is_held)
            if job is None or (turn.texts and not _go_together(job, turn.texts[0].job)):
                break
            cost = cost_of(job.work.texts[job.pending[0]])
            if turn.texts and turn.cost + cost > room:
                break
            turn.cost += cost
            turn.texts.append(Text(job, job.pending.popleft()))
            job.has_begun = True
            self._serve(job, cost)
        return turn

    def give_back(self, texts: list[Text], *, are_alone: bool) -> None:
        """These were not embedded. are_alone: each request of them gets turns of its own from now on."""
        for job, place in reversed(texts):
            job.pending.appendleft(place)
            job.is_alone |= are_alone

    def took(self, turn: EmbedTurn, seconds: float) -> None:
        """A turn took so long; 0: not measured."""
        if seconds <= 0.0:
            return
        fits = turn.cost * TURN_S / seconds
        fits = int(max(fits, min(TURN_BYTES_WORTH, fits * STRETCH)))
        if seconds > TURN_S * turn.share:
            self.turn_bytes = max(1, min(self.turn_bytes, fits))
        elif 2 * turn.cost >= self.turn_bytes * turn.share:
            self.turn_bytes = min(TURN_BYTES_MAX, fits, int(self.turn_bytes * GROWTH_MAX))

    def _next(self, *, is_held: bool) -> EmbedJob | None:
        """Whose text is next."""
        for priority in self._classes.order():
            for requester in self._requesters[priority].order():
                for job in self._of[requester].order():
                    if job.pending and (job.has_begun or not is_held):
                        return job
        return None

    def _serve(self, job: EmbedJob, cost: int) -> None:
        requester = job.requester
        self._classes.serve(requester.priority, cost / CLASS_WEIGHT[requester.priority])
        self._requesters[requester.priority].serve(requester, cost)
        self._of[requester].serve(job, cost)


def _go_together(one: EmbedJob, other: EmbedJob) -> bool:
    return one is other or not (one.is_alone or other.is_alone)


def cost_of(text: str | tuple[int, ...]) -> int:
    """What a text costs, in bytes: about four a token, so that scripts whose letters are tokens cost more."""
    own = len(text.encode("utf-8", "surrogatepass")) if isinstance(text, str) else TOKEN_BYTES * len(text)
    return own + TEXT_BYTES
