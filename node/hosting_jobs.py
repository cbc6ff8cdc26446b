"""What waits for the engine's thread: requests and loans.

Rules: no task and no clock; node/hosting.py owns them and says when.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Generator
from dataclasses import dataclass, field

import trio

from model.config import ModelFacts
from model.errors import ModelError
from model.requests import EngineStatistics
from model.requests import Progress as Place
from node.errors import NoRoom, RequestError
from node.foresight import Foreseen
from node.kept_answers import Recording
from node.requester import Requester
from node.room import Room
from node.work import AnswerItem, GenerateWork, Progress, Started

START_BYTES_PER_TURN = 128 << 10  # of prompts: a tenth of a second of a tokenizer


@dataclass(slots=True, kw_only=True, eq=False)
class Job:
    """One request in the engine: where its items go, and what has been told so far. size: bytes that its texts take;
    recording: of an answer that will be kept, from its start on."""

    work: GenerateWork
    requester: Requester
    size: int
    send: trio.MemorySendChannel[AnswerItem | RequestError]
    key: str  # unique in the engine, where a client's request id may come twice
    prompt_tokens: int = 0
    completion_tokens: int = 0
    admitted: bool = False
    wrote: bool = False  # a first piece came: from now on its pieces say how far it is
    told_at: float = -math.inf
    told: Progress | None = None
    recording: Recording | None = None
    came_at: float = 0.0
    wrote_at: float = 0.0  # its newest piece
    reason: str | None = None  # why it is finished
    is_failed: bool = False
    foreseen: Foreseen | None = None

    def start(self, peer: str, facts: ModelFacts) -> None:
        """Say, once, who answers and by which weights."""
        if not self.admitted:
            self.admitted = True
            started = Started(
                served_by=peer,
                model=facts.name,
                revision=facts.revision,
                prompt_tokens=self.prompt_tokens,
                calls=None if self.work.tools is None else facts.calls,
            )
            self.send.send_nowait(started)

    def progress(self, steps: int, place: Place) -> None:
        """Say how far it is, if that is news."""
        progress = Progress(
            engine_steps=steps, prefilled_tokens=place.prefilled_tokens, queue_position=place.queue_position
        )
        if progress != self.told:
            self.told = progress
            self.send.send_nowait(progress)


@dataclass(slots=True, kw_only=True)
class Loan:
    """An act for the engine's thread that is no request, and what came of it."""

    act: Callable[[], object]
    hold_at: float = math.inf  # from then on no request starts before it
    done: trio.Event = field(default_factory=trio.Event)
    began: bool = False
    over: trio.Event = field(default_factory=trio.Event)  # it does not run any more, however it ended
    result: object = None
    failure: ModelError | None = None
    is_left: bool = False

    def carry_out(self) -> None:
        """In the worker thread. An error that is a bug is not caught."""
        try:
            self.result = self.act()
        except ModelError as exc:
            self.failure = exc


@dataclass(slots=True, kw_only=True)
class Beside:
    """Work that goes on beside the requests, a piece a turn, and what came of it."""

    work: Generator[None, None, object]
    done: trio.Event = field(default_factory=trio.Event)
    has_ended: bool = False
    result: object = None
    failure: ModelError | None = None
    is_left: bool = False

    def carry_on(self) -> None:
        """The next piece. In the worker thread. An error that is a bug is not caught."""
        try:
            next(self.work)
        except StopIteration as end:
            self.result, self.has_ended = end.value, True
        except ModelError as exc:
            self.failure, self.has_ended = exc, True


@dataclass(slots=True)
class Waiting:
    """All that waits for the thread, but texts to embed. ends: keys of requests whose owners left."""

    starts: deque[Job] = field(default_factory=deque)
    ends: deque[str] = field(default_factory=deque)
    loans: deque[Loan] = field(default_factory=deque)
    room: Room = field(default_factory=lambda: Room("requests"))  # requests in the engine counted
    besides: deque[Beside] = field(default_factory=deque)
    keys: int = 0

    def next_key(self) -> str:
        """A name in the engine that no other request has had."""
        self.keys += 1
        return f"{self.keys}"

    @property
    def is_something(self) -> bool:
        """Whether there is a turn to take, but for requests in the engine."""
        return bool(self.ends or self.loans or self.besides)

    def next_beside(self) -> Beside | None:
        """Whose next piece comes; those whose owners left are dropped."""
        while self.besides and self.besides[0].is_left:
            self.besides.popleft().work.close()
        return self.besides[0] if self.besides else None

    def enter(self, job: Job, figures: EngineStatistics, check: Callable[[], None]) -> None:
        """One more waits, if there is room and `check` does not raise. Raises NoRoom, TooMany, and then it does not."""
        self.room.enter(job.requester, job.size, slots=max(1, figures.slots_total), queue_max=figures.queue_max)
        try:
            check()
        except NoRoom:
            self.room.leave(job.requester, job.size)
            raise
        self.starts.append(job)

    def end(self, job: Job) -> None:
        """The owner of a request has left."""
        if job in self.starts:  # the engine has not heard of it
            self.starts.remove(job)
        else:
            self.ends.append(job.key)

    def next_starts(self) -> list[Job]:
        """Who starts in the next turn; not all at once, since each has its prompt turned into tokens there."""
        starts, size = list[Job](), 0
        while self.starts and (not starts or size + self.starts[0].size <= START_BYTES_PER_TURN):
            starts.append(self.starts.popleft())
            size += starts[-1].size
        return starts
